"""A run's folder holds what the run wrote, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from anomaly_lit.runs.folder import is_current, put_aside, state_of
from anomaly_lit.types import UserError


def config_of(folder: Path | str, root: Path | None = None) -> dict[str, Any]:
    return {"output_dir": str(folder), "dataset": {"root": root and str(root)}, "step": {}}


def test_only_what_a_run_wrote_is_put_aside(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.json", "notes.txt", "job.log"):
        (tmp_path / name).write_text(name)
    for name in (".git", "checkpoints", "papers"):
        (tmp_path / name).mkdir()
    put_aside(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {".earlier", ".git", "job.log", "notes.txt", "papers"}
    moved = {path.name for path in (tmp_path / ".earlier" / "1").iterdir()}
    assert moved == {"checkpoints", "config.yaml", "metrics.json"}


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_a_folder_that_holds_the_images_is_refused(tmp_path: Path, place: str) -> None:
    root = tmp_path / "a" / "data"
    root.mkdir(parents=True)
    with pytest.raises(UserError, match="holds the images"):
        state_of(root / place, config_of(root / place, root))
    assert state_of(root / "run", config_of(root / "run", root)) == "new"
    assert state_of(tmp_path / "gone", config_of(tmp_path / "gone", tmp_path / "none")) == "new"


LOSS = {"_target_": "torch.nn.HuberLoss", "reduction": "mean"}
TRAINER = {"_target_": "pytorch_lightning.Trainer", "devices": 1}


@pytest.fixture
def begun(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a run of an earlier version, which has begun."""
    config = {
        **config_of(tmp_path), "seed": 0, "checkpoint": {"every_minutes": 2.0},
        "method": {"loss": LOSS, "losses": [LOSS]}, "trainer": TRAINER,
        "callbacks": {"outputs": {"_target_": "anomaly_lit.callbacks.Outputs"}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    return config


@pytest.mark.parametrize(
    "later",
    [
        {"trainer": {**TRAINER, "num_nodes": 1}},
        {"method": {"loss": {**LOSS, "delta": 1.0}, "losses": [LOSS]}},
        {"method": {"loss": LOSS, "losses": [{**LOSS, "delta": 1.0}]}},
        {"checkpoint": {"every_minutes": 2.0, "every_steps": None}},
        {"threshold": {"fpr": 0.01}},
        {"selection": "last"},
    ],
)
def test_a_run_goes_on_though_a_later_version_has_more_keys(
    tmp_path: Path, begun: dict[str, Any], later: dict[str, Any]
) -> None:
    assert state_of(tmp_path, begun | later) == "unfinished"
    with pytest.raises(UserError) as raised:
        state_of(tmp_path, begun | later | {"seed": 1})
    assert str(raised.value).count(" there, ") == 1  # a key that means nothing is not told
    (tmp_path / "metrics.json").write_text("{}")
    assert state_of(tmp_path, begun | later) == "finished"


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({"trainer": {**TRAINER, "num_nodes": 2}}, "trainer.num_nodes: absent there, 2 now"),
        ({"trainer": {**TRAINER, "num_nodes": True}}, "trainer.num_nodes: absent there, true now"),
        ({"trainer": {**TRAINER, "no_such": None}}, "trainer.no_such: absent there, null now"),
        ({"method": {"loss": {**LOSS, "delta": 2.0}, "losses": [LOSS]}}, "method.loss.delta"),
        ({"method": {"loss": LOSS, "losses": [LOSS, LOSS]}}, "method.losses"),
        ({"method": {"loss": LOSS}}, "method.losses: .* there, absent now"),
        (
            {"method": {"loss": {**LOSS, "_target_": "torch.nn.SmoothL1Loss", "beta": 1.0},
                        "losses": [LOSS]}},
            "method.loss.beta: absent there, 1.0 now",
        ),
        ({"checkpoint": {"every_minutes": 2.0, "every_steps": 5}}, "checkpoint.every_steps"),
        ({"threshold": {"fpr": 0.05}}, "threshold: absent there, .* now"),
        ({"threshold": {"fpr": 0.01, "own": None}}, "threshold.own: absent there, null now"),
        ({"selection": "best"}, "selection"),
        ({"synthesis": None}, "synthesis: absent there, null now"),
        ({"callbacks": {}}, "callbacks.outputs: .* there, absent now"),
    ],
)  # fmt: skip
def test_a_key_that_a_run_never_had_makes_another_run_if_it_means_something(
    tmp_path: Path, begun: dict[str, Any], later: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        state_of(tmp_path, begun | later)


def test_a_part_that_a_run_was_without_makes_another_run(
    tmp_path: Path, begun: dict[str, Any]
) -> None:
    """As `~callbacks.outputs` takes it out, although it is there by default."""
    without = begun | {"callbacks": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(without))
    with pytest.raises(UserError, match=r"callbacks.outputs: absent there"):
        state_of(tmp_path, begun)


def test_a_folder_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir is empty"):
        state_of(tmp_path, config_of(""))


@pytest.mark.parametrize("content", [b"", b"[1", b"- 1", b"seed: 0", b"output_dir: 3", b"\xff\xfe"])
def test_a_damaged_configuration_is_named(
    tmp_path: Path, begun: dict[str, Any], content: bytes
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is empty or damaged.*another output_dir"):
        state_of(tmp_path, begun)


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"[1]", b"\xff\xfe"])
def test_damaged_results_are_named_and_can_be_written_again(
    tmp_path: Path, begun: dict[str, Any], content: bytes
) -> None:
    (tmp_path / "metrics.json").write_bytes(content)
    assert state_of(tmp_path, begun) == "finished"
    with pytest.raises(UserError, match=r"metrics\.json is empty or damaged: delete it"):
        is_current(tmp_path, begun)
    (tmp_path / "metrics.json").unlink()
    assert state_of(tmp_path, begun) == "unfinished"
