"""A run's folder holds what the run wrote, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from anomaly_lit.runs.folder import put_aside, state_of
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


def test_a_run_from_before_a_setting_was_noted_goes_on(tmp_path: Path) -> None:
    config = {**config_of(tmp_path), "trainer": {"devices": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    one, two = ({**config, "trainer": {"devices": 1, "num_nodes": n}} for n in (1, 2))
    assert state_of(tmp_path, one) == "unfinished"
    with pytest.raises(UserError, match=r"trainer.num_nodes: 1 there, 2 now"):
        state_of(tmp_path, two)


def test_a_folder_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir is empty"):
        state_of(tmp_path, config_of(""))
