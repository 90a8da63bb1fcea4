"""The files of a finished test: predictions, panels and curves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from anomaly_lit.calibration import colour_range, outline_of
from anomaly_lit.callbacks.evaluation import Evaluation
from anomaly_lit.drawing.curves import save_curves
from anomaly_lit.drawing.panels import contact_sheet, panel
from anomaly_lit.drawing.png import save_image
from anomaly_lit.files import short_name, tell
from anomaly_lit.reporting.predictions import caption_of, choose_images, printable_row, write_rows
from anomaly_lit.types import Batch, UserError, check_range

OVERVIEW = 12  # panels on the overview
NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f]')  # on one file system or another
KINDS = {
    (True, "good"): "missed",
    (False, "defect"): "false_alarm",
    (True, "defect"): "found",
    (False, "good"): "passed",
}


class Finding(NamedTuple):
    """A tested image that is worth looking at."""

    row: dict[str, Any]  # as in predictions.csv
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray | None  # (H, W) bool; None if nobody drew the defect
    outline: np.ndarray | None  # (H, W) bool, the defect that was found; None if there was none
    file: Path  # the panel


class Outputs(pl.Callback):
    """Write `predictions.csv`, `images/`, `overview.png` and `curves.png` after a test.

    The worst mistakes come first: defects far below their threshold, then normal images far above
    it, then correct verdicts of each category. The panels of a method that does not localise show
    the image and its verdict only. Pictures that cannot be written cost no results: one warning
    names the first.

    Args:
        directory: Where to write.
        max_images: Most panels to write; 0 writes none.

    Attributes:
        findings: What the panels of the last test show, in the order of the panels.
    """

    def __init__(self, directory: str, max_images: int = 24) -> None:
        check_range("callbacks.outputs", "[0, inf)", max_images=max_images)
        self.directory = Path(directory)
        self.max_images = max_images
        self.findings: list[Finding] = []
        self._failures: list[str] = []

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write everything, on the first rank only."""
        evaluation = next((c for c in trainer.callbacks if isinstance(c, Evaluation)), None)  # type: ignore[attr-defined]
        if evaluation is None:
            raise UserError("Outputs needs an Evaluation among the callbacks of the Trainer")
        if not trainer.is_global_zero:
            return
        write_rows(self.directory / "predictions.csv", evaluation.rows)
        self.findings, self._failures = [], []
        self._written(save_curves, self.directory / "curves.png", evaluation.curves, "Test images")
        loader: Any = trainer.test_dataloaders
        loader = loader[0] if isinstance(loader, list) else loader
        panels = []
        for number, index in enumerate(choose_images(evaluation.rows, self.max_images)):
            batch = loader.dataset.batch([index])
            anomaly_map = _score_again(batch, pl_module)
            row = evaluation.rows[index]
            panels.append(self._draw(number, row, batch, anomaly_map, evaluation))
        if panels:
            sheet = contact_sheet(panels[:OVERVIEW], columns=2)
            self._written(save_image, sheet, self.directory / "overview.png")
        if self._failures:
            first, *others = self._failures
            more = f" ({len(others)} more were not written)" if others else ""
            tell(f"{first}{more}", warning=True)

    def _draw(
        self,
        number: int,
        row: dict[str, Any],
        batch: Batch,
        anomaly_map: np.ndarray | None,
        evaluation: Evaluation,
    ) -> Image.Image:
        """Write the panel of one image and keep what it shows."""
        limits = evaluation.limits_of(row["category"])
        low, high, outline = 0.0, 1.0, None
        if anomaly_map is not None:
            low, high = colour_range(limits, anomaly_map)
            outline = outline_of(row["verdict"], anomaly_map, limits)
        image = (batch["image"][0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        has_truth = not row["label"] or bool(batch["gt_mask"].any())
        truth = batch["gt_mask"][0, 0].cpu().numpy() if has_truth else None
        row = printable_row(row)
        shown = panel(image, anomaly_map, truth, low, high, caption_of(row), outline)
        kind = KINDS.get((row["label"], row["verdict"]), "unjudged")
        name = short_name(f"{row['category']}_{row['defect_type']}_{Path(row['path']).stem}")
        file = self.directory / "images" / f"{number:03d}_{kind}_{NOT_IN_NAMES.sub('_', name)}.png"
        if self._written(save_image, shown, file):
            self.findings.append(Finding(row, image, truth, outline, file))
        return shown

    def _written(self, save: Callable[..., None], *arguments: Any) -> bool:
        """Write a picture; return whether that went well."""
        try:
            save(*arguments)
        except UserError as error:
            self._failures.append(str(error))
            return False
        return True


def _score_again(batch: Batch, pl_module: Any) -> np.ndarray | None:
    """Return the anomaly map of one image, (H, W), or None from a method that does not localise.

    Scoring the few chosen images again is cheaper than keeping the maps of all images.
    """
    moved = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
    with torch.inference_mode():
        maps = pl_module.score_batch(moved).anomaly_map
    return None if maps is None else maps[0, 0].cpu().numpy()
