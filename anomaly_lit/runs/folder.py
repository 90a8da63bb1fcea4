"""A run's folder: how far the run is, whether its results still hold, what is kept of old ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anomaly_lit.config.build import differences, instantiate, moved
from anomaly_lit.runs.code import code_digest
from anomaly_lit.runs.ranks import is_first_process
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    from anomaly_lit.data.datamodule import AnomalyDataModule

LOGS = ("job.log", "job.json", "train.log")  # which the present command writes to


def state_of(directory: Path, config: dict[str, Any]) -> str:
    """``new``, ``unfinished`` or ``finished``; what another run left is never touched.

    Raises:
        UserError: The folder holds a run of another configuration, or one without its config.
    """
    import yaml

    noted, checkpoint = directory / "config.yaml", directory / "checkpoints" / "last.ckpt"
    if not noted.is_file():
        if checkpoint.exists() or (directory / "metrics.json").exists():
            raise UserError(
                f"output_dir={directory} holds results but no config.yaml that says of what; "
                "choose another output_dir"
            )
        return "new"
    before = moved(yaml.safe_load(noted.read_text("utf-8")), str(directory))
    step = before.pop("step", None)  # how fast a step is: a run may go on with another
    changes = differences(before, {k: v for k, v in config.items() if k != "step"})
    finished = (directory / "metrics.json").is_file()
    if changes and (finished or checkpoint.is_file()):
        lines = "\n".join(f"  {line}" for line in changes)
        raise UserError(
            f"output_dir={directory} holds a run with another configuration:\n{lines}\n"
            "choose another output_dir, or repeat the old command to resume"
        )
    if finished:
        return "finished"
    if not checkpoint.is_file():
        return "new"
    for line in differences(step or config["step"], config["step"], "step"):
        print(f"{line}: the weights will agree with those of the old command up to rounding")
    return "unfinished"


def is_current(
    folder: Path, config: dict[str, Any], when_changed: Literal["rerun", "keep"] = "rerun"
) -> bool:
    """Whether a finished run's results may stand; warns where images or code changed since.

    Args:
        folder: Of the run.
        config: Its composed configuration.
        when_changed: ``keep`` lets results of older code stand, though never those of other images.
    """
    metrics = read_metrics(folder)
    images, code = images_changed(metrics, config), code_changed(metrics, config)
    if not images and not code:
        return True
    what = "the images have changed" if images else "the code has changed"
    keeps = when_changed == "keep" and not images
    then = (
        "its results are kept (when_changed=keep)"
        if keeps
        else "it is trained again, and the old results are kept in .earlier"
    )
    if is_first_process():
        print(f"warning: {what} since the run in {folder} finished: {then}", file=sys.stderr)
    return keeps


def images_changed(metrics: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the images are others than those of these results; images that are gone are not."""
    data = {**config["dataset"], "cache": None, "feature_cache": None}
    datamodule = instantiate(data)
    try:
        digest = datamodule.present_digest()
    except UserError:
        return False
    return metrics.get("data_digest", digest) != digest


def code_changed(metrics: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the code that makes such a run's numbers is other than that of these results."""
    digest = code_digest(config)
    return metrics.get("code_digest", digest) != digest


def put_aside(folder: Path) -> None:
    """Moves what a run has left to ``.earlier/N`` in its folder, where reports do not look."""
    if not is_first_process():
        return
    kept = folder / ".earlier"
    place = kept / str(sum(1 for _ in kept.iterdir()) + 1 if kept.is_dir() else 1)
    place.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path != kept and path.name not in LOGS:
            path.rename(place / path.name)


def check_same_data(datamodule: AnomalyDataModule, checkpoint: Path) -> None:
    """Refuses to go on with other images than those a run began with.

    Raises:
        UserError: Files were added, removed or changed since.
    """
    from anomaly_lit.inference.checkpoint import read_checkpoint

    if read_checkpoint(checkpoint)["anomaly_lit"].get("data_digest") != datamodule.digest:
        raise UserError(
            f"the images in dataset.root={datamodule.root} are not those with which {checkpoint} "
            "was trained: files were added, removed or changed. Restore them, or choose another "
            "output_dir to start anew"
        )


def read_metrics(directory: Path) -> dict[str, Any]:
    """The results of a finished run."""
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
