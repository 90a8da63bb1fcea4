from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from anomaly_lit.calibration import colour_range
from anomaly_lit.callbacks import Outputs
from anomaly_lit.callbacks.outputs import LossCurves, caption_of, choose_images, write_rows
from anomaly_lit.types import UserError


def row(label: bool, score: float, threshold: float | None = 1.0, **more: Any) -> dict[str, Any]:
    verdict = "unknown" if threshold is None else "defect" if score > threshold else "good"
    return {
        "path": f"{score}.png",
        "category": "bolt",
        "defect_type": "scratch" if label else "good",
        "label": label,
        "score": score,
        "threshold": threshold,
        "verdict": verdict,
    } | more


def scores(rows: list[dict[str, Any]], limit: int) -> list[float]:
    return [rows[index]["score"] for index in choose_images(rows, limit)]


MISSED = [row(True, 0.9), row(True, 0.1), row(True, 0.5)]
ALARMS = [row(False, 1.1), row(False, 9.0), row(False, 3.0)]
RIGHT = [row(True, 2.0), row(False, 0.2), row(True, 5.0), row(False, 0.3)]


def test_worst_mistakes_come_first() -> None:
    found = scores([*RIGHT, *ALARMS, *MISSED], 9)
    assert found[:6] == [0.1, 0.5, 0.9, 9.0, 3.0, 1.1]
    assert set(found[6:]) <= {row["score"] for row in RIGHT}


def test_mistakes_of_one_kind_leave_room_for_the_other() -> None:
    missed = [row(True, 0.01 * number) for number in range(40)]
    found = scores([*missed, *ALARMS, *RIGHT], 9)
    assert found[:3] == [0.0, 0.01, 0.02]
    assert found[3:6] == [9.0, 3.0, 1.1]
    assert len(found) == 9


def test_right_verdicts_alternate_between_defects_and_normal_images_of_all_categories() -> None:
    rows = RIGHT + [{**r, "category": "cloth"} for r in RIGHT]
    chosen = [rows[index] for index in choose_images(rows, 4)]
    assert {(r["category"], r["label"]) for r in chosen} == {
        ("bolt", True), ("bolt", False), ("cloth", True), ("cloth", False)
    }  # fmt: skip


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 100])
def test_no_more_than_the_limit_and_none_twice(limit: int) -> None:
    rows = [*RIGHT, *ALARMS, *MISSED]
    chosen = choose_images(rows, limit)
    assert len(chosen) == len(set(chosen)) == min(limit, len(rows))


def test_without_thresholds_images_are_chosen_all_the_same() -> None:
    rows = [row(True, 3.0, None), row(False, 1.0, None)]
    assert sorted(choose_images(rows, 5)) == [0, 1]


def test_colours_of_a_category_are_the_same_for_ordinary_maps() -> None:
    limits = {"map_median": 1.0, "map_high": 2.0}
    low, high = colour_range(limits, np.zeros((4, 4)))
    assert (low, high) == (1.5, 4.0)
    assert colour_range({}, np.array([[2.0, 7.0]])) == (2.0, 7.0)


def test_caption_says_what_it_is_and_what_was_found() -> None:
    text = caption_of(row(True, 2.0))
    for word in ("bolt", "scratch", "2", "threshold 1", "defect"):
        assert word in text
    assert "no threshold" in caption_of(row(True, 2.0, None))


def test_rows_are_written_with_labels_as_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [row(True, 2.0), row(False, 0.5, None, path="a,\nb.png")])
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [r["label"] for r in found] == ["1", "0"]
    assert found[1]["path"] == "a,\nb.png"
    assert found[1]["threshold"] == ""


def test_no_rows_still_give_a_header(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [])
    assert (tmp_path / "rows.csv").read_text().startswith("path")


def test_outputs_need_an_evaluation(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="Evaluation"):
        Outputs(str(tmp_path)).on_test_end(trainer, None)  # type: ignore[arg-type]


class TwoStages(pl.LightningModule):
    """Logs one term in its first steps and another later, as methods in stages do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("train/first" if batch_idx < 3 else "train/second", batch.sum() + batch_idx)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_loss_curves_end_with_the_stage_that_logs_them(tmp_path: Path) -> None:
    curves = LossCurves(str(tmp_path))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, log_every_n_steps=1, logger=False, callbacks=[curves],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(TwoStages(), torch.utils.data.DataLoader(torch.ones(6, 1)))
    steps = {key: [step for step, _ in line] for key, line in curves.history.items()}
    assert steps == {"train/first": [1, 2, 3], "train/second": [4, 5, 6]}
    assert (tmp_path / "loss.png").is_file()
