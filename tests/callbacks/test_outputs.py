from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from anomaly_lit.calibration import colour_range
from anomaly_lit.callbacks import Evaluation, Outputs
from anomaly_lit.types import Prediction, UserError


def test_colours_of_a_category_are_the_same_for_ordinary_maps() -> None:
    limits = {"map_median": 1.0, "map_high": 2.0}
    low, high = colour_range(limits, np.zeros((4, 4)))
    assert (low, high) == (1.5, 4.0)
    assert colour_range({}, np.array([[2.0, 7.0]])) == (2.0, 7.0)


def test_outputs_need_an_evaluation(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="Evaluation"):
        Outputs(str(tmp_path)).on_test_end(trainer, None)  # type: ignore[arg-type]


class ScoresOnly:
    """A method that does not localise."""

    device = torch.device("cpu")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        return batch

    def score_batch(self, batch: Any) -> Prediction:
        return Prediction(None, torch.ones(1))


class FinishedRun:
    """A trainer after the test of six images."""

    is_global_zero = True

    def __init__(self, evaluation: Evaluation) -> None:
        self.callbacks = [evaluation]
        self.test_dataloaders = SimpleNamespace(dataset=SimpleNamespace(batch=self.batch))

    def batch(self, indices: list[int]) -> dict[str, Any]:
        image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(indices[0]))
        gt_mask = torch.zeros(1, 1, 24, 32, dtype=torch.bool)
        gt_mask[..., 5:9, 5:9] = indices[0] % 2 == 1
        return {"image": image, "gt_mask": gt_mask}


def test_a_method_that_does_not_localise_gets_panels_of_image_and_verdict(tmp_path: Path) -> None:
    evaluation = Evaluation()
    evaluation.rows = [
        {
            "path": f"{i}.png",
            "category": "bolt",
            "defect_type": "scratch" if i % 2 else "good",
            "label": bool(i % 2),
            "score": float(i),
            "threshold": 2.5,
            "verdict": "defect" if i > 2.5 else "good",
        }
        for i in range(6)
    ]
    evaluation.calibration = {"categories": {"bolt": {"threshold": 2.5}}, "all": {}}
    outputs: Any = Outputs(str(tmp_path))
    outputs.on_test_end(FinishedRun(evaluation), ScoresOnly())
    files = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert files[:2] == ["000_missed_bolt_scratch_1.png", "001_false_alarm_bolt_good_4.png"]
    assert len(files) == len(outputs.findings) == 6
    assert all(finding.outline is None for finding in outputs.findings)
    with Image.open(tmp_path / "images" / files[0]) as shown:
        assert shown.width < 2 * 192  # one tile
    assert (tmp_path / "overview.png").is_file()
