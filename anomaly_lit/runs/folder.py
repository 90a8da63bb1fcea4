"""A run's folder: how far the run is, whether its results still hold, what is kept of old ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anomaly_lit import __version__
from anomaly_lit.config.build import differences, instantiate, moved
from anomaly_lit.config.later import with_later_keys
from anomaly_lit.files import without_secrets
from anomaly_lit.runs.code import code_digest
from anomaly_lit.runs.ranks import is_first_process
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.runs.storage import Start

# what a run writes into its folder, except the logs that the current command writes to
WRITTEN = frozenset(
    {
        "checkpoints", "config.yaml", "curves.png", "images", "logs", "loss.png", "metrics.json",
        "mlflow.db", "mlruns", "overview.png", "predictions.csv", "profile.png", "profile.txt",
        "pruned.json", "run_ids.json", "teacher.safetensors", "training.png", "wandb",
    }
)  # fmt: skip


def state_of(directory: Path, config: dict[str, Any]) -> str:
    """Return `new`, `unfinished` or `finished`; what another run left is never touched.

    Raises:
        UserError: The folder holds a run of another configuration, or one without its config.
    """
    check_holds_no_data(directory, config)
    noted, folder = directory / "config.yaml", directory / "checkpoints"
    begun = any((folder / name).is_file() for name in ("last.ckpt", "last.earlier.ckpt"))
    if not noted.is_file():
        if begun or (directory / "metrics.json").exists():
            raise UserError(
                f"output_dir={directory} holds results but no config.yaml that says of what; "
                "choose another output_dir"
            )
        return "new"
    before = moved(read_configuration(directory), str(directory))
    step = before.pop("step", None)  # it affects speed only, so a run may resume with another
    told = without_secrets({k: v for k, v in config.items() if k != "step"})
    changes = differences(before, told) and differences(with_later_keys(before, told), told)
    finished = (directory / "metrics.json").is_file()
    if changes and (finished or begun):
        lines = "\n".join(f"  {line}" for line in changes)
        writer = read_metrics(directory).get("versions/anomaly-lit") if finished else None
        if writer not in (None, __version__):
            raise UserError(
                f"output_dir={directory} holds a run of anomaly_lit {writer}, and this is "
                f"{__version__}, whose configurations differ:\n{lines}\n"
                f"choose another output_dir, or use anomaly_lit {writer} for that run"
            )
        raise UserError(
            f"output_dir={directory} holds a run with another configuration:\n{lines}\n"
            "choose another output_dir, or repeat the old command to resume"
        )
    if finished:
        return "finished"
    if not begun:
        return "new"
    for line in differences(step or config["step"], config["step"], "step"):
        print(f"{line}: the weights will agree with those of the old command up to rounding")
    return "unfinished"


def is_current(
    folder: Path, config: dict[str, Any], when_changed: Literal["rerun", "keep"] = "rerun"
) -> bool:
    """Return whether a finished run's results may stay; warn if images or code have changed.

    Args:
        folder: Of the run.
        config: Its composed configuration.
        when_changed: `keep` accepts results of older code, but never those of other images.
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
    """Return whether the images differ from those of these results; false if they are gone."""
    data = {**config["dataset"], "cache": None, "feature_cache": None}
    datamodule = instantiate(data)
    try:
        digest = datamodule.present_digest()
    except UserError:
        return False
    return metrics.get("data_digest", digest) != digest


def code_changed(metrics: dict[str, Any], config: dict[str, Any]) -> bool:
    """Return whether the code behind a run's numbers differs from that of these results."""
    digest = code_digest(config)
    return metrics.get("code_digest", digest) != digest


def put_aside(folder: Path) -> None:
    """Move what a run has written to `.earlier/N` in its folder, where reports do not look.

    Other files there stay.
    """
    if not is_first_process():
        return
    kept = folder / ".earlier"
    place = kept / str(sum(1 for _ in kept.iterdir()) + 1 if kept.is_dir() else 1)
    place.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.name in WRITTEN:
            path.rename(place / path.name)


def check_holds_no_data(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a run's folder that has no name, or that contains the data set.

    Raises:
        UserError: The name is empty, or results would be written among the images.
    """
    if not str(config["output_dir"]).strip():
        raise UserError("output_dir is empty: name the folder of the run with output_dir=DIR")
    root = (config.get("dataset") or {}).get("root")
    if root is None or not Path(root).expanduser().is_dir():
        return
    data, own = Path(root).expanduser().resolve(), directory.resolve()
    if data == own or own in data.parents:
        raise UserError(
            f"output_dir={directory} holds the images of dataset.root={root}: choose another "
            "output_dir, beside them or elsewhere"
        )


def check_same_data(datamodule: AnomalyDataModule, start: Start) -> None:
    """Refuse to go on with other images than those a run began with.

    Raises:
        UserError: Files were added, removed or changed since.
    """
    assert start.content is not None
    if start.content["anomaly_lit"].get("data_digest") != datamodule.digest:
        raise UserError(
            f"the images in dataset.root={datamodule.root} are not those with which {start.path} "
            "was trained: files were added, removed or changed. Restore them, or choose another "
            "output_dir to start anew"
        )


def read_configuration(directory: Path) -> dict[str, Any]:
    """Return the configuration that a run noted in its folder.

    Raises:
        UserError: The file is empty or damaged.
    """
    import yaml

    file = directory / "config.yaml"
    config = _mapping_in(file, yaml.safe_load)
    if config is None or not isinstance(config.get("output_dir"), str):
        raise UserError(
            f"{file} is empty or damaged, so nothing tells what run this is: choose another "
            "output_dir, or put back a copy of the file"
        )
    return config


def _mapping_in(file: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """Return the keys and values in a file; None if it is damaged or holds something else."""
    import yaml

    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def read_metrics(directory: Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        UserError: The file is empty or damaged.
    """
    file = directory / "metrics.json"
    metrics = _mapping_in(file, json.loads)
    if metrics is None:
        raise UserError(
            f"{file} is empty or damaged: delete it, and the same command writes it again"
        )
    return metrics
