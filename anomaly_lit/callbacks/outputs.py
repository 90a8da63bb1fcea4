"""The files of a finished test: predictions, pictures and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from anomaly_lit.calibration import colour_range, outline_of
from anomaly_lit.callbacks.evaluation import Evaluation
from anomaly_lit.drawing.curves import save_curves
from anomaly_lit.drawing.panels import contact_sheet, panel
from anomaly_lit.drawing.png import save_image
from anomaly_lit.reporting.predictions import caption_of, choose_images, write_rows
from anomaly_lit.types import UserError

OVERVIEW = 12  # panels on the overview
KINDS = {
    (True, "good"): "missed",
    (False, "defect"): "false_alarm",
    (True, "defect"): "found",
    (False, "good"): "passed",
}


class Finding(NamedTuple):
    """A tested image that is worth a look."""

    row: dict[str, Any]  # as in predictions.csv
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray | None  # (H, W) bool; None where nobody drew the defect
    outline: np.ndarray | None  # (H, W) bool, where the method saw one; None where it saw none
    file: Path  # the panel


class Outputs(pl.Callback):
    """Writes ``predictions.csv``, ``images/``, ``overview.png`` and ``curves.png`` after a test.

    The worst mistakes come first: defects far below their threshold, then normal images far
    above it, then right verdicts of each category.

    Args:
        directory: Where to write.
        max_images: Most panels written; 0 writes none.

    Attributes:
        findings: What the panels of the last test show, in their order.
    """

    def __init__(self, directory: str, max_images: int = 24) -> None:
        self.directory = Path(directory)
        self.max_images = max_images
        self.findings: list[Finding] = []

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes everything; on the first rank only."""
        evaluation = next((c for c in trainer.callbacks if isinstance(c, Evaluation)), None)  # type: ignore[attr-defined]
        if evaluation is None:
            raise UserError("Outputs needs an Evaluation among the callbacks of the Trainer")
        if not trainer.is_global_zero:
            return
        write_rows(self.directory / "predictions.csv", evaluation.rows)
        save_curves(self.directory / "curves.png", evaluation.curves, "Test images")
        self.findings = []
        chosen = choose_images(evaluation.rows, self.max_images)
        if chosen:
            self._draw(chosen, evaluation, trainer, pl_module)

    def _draw(
        self,
        chosen: list[int],
        evaluation: Evaluation,
        trainer: pl.Trainer,
        pl_module: Any,
    ) -> None:
        """Predicts the chosen images again: cheaper than keeping the maps of all."""
        panels = []
        loader: Any = trainer.test_dataloaders
        loader = loader[0] if isinstance(loader, list) else loader
        for number, index in enumerate(chosen):
            row = evaluation.rows[index]
            batch = loader.dataset.batch([index])
            moved = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            with torch.inference_mode():
                anomaly_map = pl_module.score_batch(moved).anomaly_map[0, 0].cpu().numpy()
            limits = evaluation.limits_of(row["category"])
            low, high = colour_range(limits, anomaly_map)
            image = (batch["image"][0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            has_truth = not row["label"] or bool(batch["gt_mask"].any())
            truth = batch["gt_mask"][0, 0].cpu().numpy() if has_truth else None
            kind = KINDS.get((row["label"], row["verdict"]), "unjudged")
            name = f"{number:03d}_{kind}_{row['category']}_{row['defect_type']}"
            outline = outline_of(row["verdict"], anomaly_map, limits)
            picture = panel(image, anomaly_map, truth, low, high, caption_of(row), outline)
            panels.append(picture)
            file = self.directory / "images" / f"{name}_{Path(row['path']).stem}.png"
            save_image(picture, file)
            self.findings.append(Finding(row, image, truth, outline, file))
        sheet = contact_sheet(panels[:OVERVIEW], columns=2)
        save_image(sheet, self.directory / "overview.png")
