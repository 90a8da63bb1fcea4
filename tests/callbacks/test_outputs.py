from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl

from anomaly_lit.calibration import colour_range
from anomaly_lit.callbacks import Outputs
from anomaly_lit.types import UserError


def test_colours_of_a_category_are_the_same_for_ordinary_maps() -> None:
    limits = {"map_median": 1.0, "map_high": 2.0}
    low, high = colour_range(limits, np.zeros((4, 4)))
    assert (low, high) == (1.5, 4.0)
    assert colour_range({}, np.array([[2.0, 7.0]])) == (2.0, 7.0)


def test_outputs_need_an_evaluation(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="Evaluation"):
        Outputs(str(tmp_path)).on_test_end(trainer, None)  # type: ignore[arg-type]
