"""A method of one's own, in a folder of one's own: no file of the package is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OWN = Path(__file__).resolve().parents[2] / "examples" / "own_method"


@pytest.fixture
def trained(
    run_here: Callable[..., Any],
    mvtec_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.syspath_prepend(OWN)
    outcome = run_here(
        "train", "--config-dir", str(OWN / "conf"), "method=dfr", "method.backbone.weights=random",
        "method.grid=8", "loss=l1", "dataset=mvtec_ad", f"dataset.root={mvtec_folder}",
        "image_size=64", "trainer=cpu", "trainer.max_steps=4", "trainer.val_check_interval=4",
        "logger=none", f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return tmp_path / "run"


def test_it_trains_tests_and_predicts_through_the_commands(
    trained: Path, run_here: Callable[..., Any], mvtec_folder: Path, tmp_path: Path
) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["method"] == "dfr.DFR"
    checkpoint = f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    tested = run_here("test", checkpoint, "trust=true", f"output_dir={tmp_path / 'test'}")
    assert tested.code == 0, tested.err
    again = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert again["test/image_auroc"] == metrics["test/image_auroc"]
    images = f"input={mvtec_folder / 'bolt' / 'test' / 'scratch'}"
    predicted = run_here(
        "predict", checkpoint, "trust=true", images, f"output_dir={tmp_path / 'predictions'}"
    )
    assert predicted.code == 0, predicted.err
    assert (tmp_path / "predictions" / "predictions.csv").is_file()


def test_a_checkpoint_that_names_other_code_asks_for_trust(
    trained: Path, run_here: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    outcome = run_here("test", checkpoint, f"output_dir={tmp_path / 'test'}")
    assert outcome.code != 0
    assert "dfr.DFR" in outcome.err
    assert "trust=true" in outcome.err
