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


def evaluated(category: str = "bolt", path: str = "{}.png") -> Evaluation:
    """The evaluation of six images."""
    evaluation = Evaluation()
    evaluation.rows = [
        {
            "path": path.format(i),
            "category": category,
            "defect_type": "scratch" if i % 2 else "good",
            "label": bool(i % 2),
            "score": float(i),
            "threshold": 2.5,
            "verdict": "defect" if i > 2.5 else "good",
        }
        for i in range(6)
    ]
    evaluation.calibration = {"categories": {category: {"threshold": 2.5}}, "all": {}}
    return evaluation


def test_a_method_that_does_not_localise_gets_panels_of_image_and_verdict(tmp_path: Path) -> None:
    evaluation = evaluated()
    outputs: Any = Outputs(str(tmp_path))
    outputs.on_test_end(FinishedRun(evaluation), ScoresOnly())
    files = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert files[:2] == ["000_missed_bolt_scratch_1.png", "001_false_alarm_bolt_good_4.png"]
    assert len(files) == len(outputs.findings) == 6
    assert all(finding.outline is None for finding in outputs.findings)
    with Image.open(tmp_path / "images" / files[0]) as shown:
        assert shown.width < 2 * 192  # one tile
    assert (tmp_path / "overview.png").is_file()


def test_panels_have_names_that_every_file_system_takes(tmp_path: Path) -> None:
    long = "in/" + "ä" * 120 + "{}.png"
    outputs: Any = Outputs(str(tmp_path))
    for category, path in (("a/b:c", long), ("bolt", "in/caf\udce9{}.png")):
        outputs.on_test_end(FinishedRun(evaluated(category, path)), ScoresOnly())
        assert len({finding.file for finding in outputs.findings}) == 6
        for finding in outputs.findings:
            assert finding.file.parent == tmp_path / "images"
            assert finding.file.is_file()
            assert len(finding.file.name.encode()) <= 255
            assert not set(finding.file.name) & set('/\\:*?"<>|')
    assert outputs.findings[0].file.name == "000_missed_bolt_scratch_caf_xe91.png"


def test_panels_that_cannot_be_written_cost_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").write_text("a file where the folder should be")
    outputs: Any = Outputs(str(tmp_path))
    outputs.on_test_end(FinishedRun(evaluated()), ScoresOnly())
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "images/000_missed_bolt_scratch_1.png" in said
    assert "5 more were not written" in said
    assert outputs.findings == []
    assert (tmp_path / "predictions.csv").is_file()
    assert (tmp_path / "overview.png").is_file()
