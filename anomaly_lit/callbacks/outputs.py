"""The files of a finished test: predictions, pictures and curves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from anomaly_lit.calibration import colour_range, outline_of
from anomaly_lit.callbacks.evaluation import Evaluation
from anomaly_lit.drawing.curves import save_curves
from anomaly_lit.drawing.loss_curves import save_loss_curves
from anomaly_lit.drawing.panels import contact_sheet, panel, training_panel
from anomaly_lit.drawing.png import save_image
from anomaly_lit.files import replace_file
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


class TrainingPictures(pl.Callback):
    """Writes ``training.png``: the first batch as training sees it, with synthesis and prompts.

    Args:
        directory: Where to write.
        max_images: Most images shown; 0 writes none.
    """

    def __init__(self, directory: str, max_images: int = 8) -> None:
        self.path = Path(directory) / "training.png"
        self.max_images = max_images

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes the picture, unless this run or the one it resumes did; on the first rank only."""
        if not self.max_images or not trainer.is_global_zero or self.path.exists():
            return
        optional = {
            key: batch[key] for key in ("corrupted", "corruption", "prompt") if key in batch
        }
        panels = [
            training_panel(
                _picture(batch["image"][row]),
                f"{batch['category'][row]}  {Path(batch['path'][row]).name}",
                **{key: _picture(value[row]) for key, value in optional.items()},
            )
            for row in range(min(self.max_images, len(batch["image"])))
        ]
        save_image(contact_sheet(panels, 2), self.path)
        self.max_images = 0


def _picture(tensor: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to (H, W, 3) uint8; (1, H, W) bool to (H, W)."""
    array = tensor.detach().float().cpu().numpy()
    if tensor.dtype == torch.bool:
        return array[0] > 0.5
    return (array.transpose(1, 2, 0) * 255).round().astype(np.uint8)


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


class LossCurves(pl.Callback):
    """Keeps every logged loss and draws ``loss.png`` when training ends.

    Lightning goes on to give the last value of a term that is no longer logged, such as one of an
    earlier stage: a value to the bit the same as the one before it is taken for that.

    Args:
        directory: Where to write.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.history: dict[str, list[tuple[int, float]]] = {}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Notes the terms at the steps at which they are logged."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the held-out loss."""
        if not trainer.sanity_checking:
            self._note(trainer, "val/")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws."""
        if trainer.is_global_zero and self.history:
            save_loss_curves(self.directory / "loss.png", self.history)

    def _note(self, trainer: pl.Trainer, prefix: str) -> None:
        for key, value in trainer.callback_metrics.items():
            if key.startswith(prefix):
                line = self.history.setdefault(key, [])
                if not line or line[-1][1] != float(value):  # else it is the last one still
                    line.append((trainer.global_step, float(value)))

    def state_dict(self) -> dict[str, Any]:
        """The history, so that a resumed run draws all of it."""
        return {"history": {key: [list(p) for p in line] for key, line in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history back."""
        self.history = {
            key: [(int(step), float(value)) for step, value in line]
            for key, line in state_dict["history"].items()
        }


def choose_images(rows: list[dict[str, Any]], limit: int) -> list[int]:
    """Indices of the images worth a look, worst mistakes first.

    Up to a third of the places goes to missed defects, a third to false alarms; right verdicts,
    a defect and a normal image of each category in turn, take what is left.
    """
    margin = [row["score"] - (row["threshold"] or 0.0) for row in rows]

    def kind(label: bool, verdict: str) -> list[int]:
        found = [
            i for i, row in enumerate(rows) if (row["label"], row["verdict"]) == (label, verdict)
        ]
        return sorted(found, key=lambda i: margin[i], reverse=not label)

    missed, alarms = kind(True, "good"), kind(False, "defect")
    mistakes = missed[: max(1, limit // 3)] + alarms[: max(1, limit // 3)]
    right: dict[tuple[str, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if index not in missed and index not in alarms:
            right.setdefault((row["category"], not row["label"]), []).append(index)
    rest = []
    lists = [indices for _, indices in sorted(right.items(), key=lambda item: item[0][1])]
    for depth in range(max((len(indices) for indices in lists), default=0)):
        rest += [indices[depth] for indices in lists if depth < len(indices)]
    return (mistakes[:limit] + rest)[:limit]


def caption_of(row: dict[str, Any]) -> str:
    """One line on an image: what it is, its score, and the verdict."""
    threshold = "no threshold" if row["threshold"] is None else f"threshold {row['threshold']:.4g}"
    return (
        f"{row['category']} / {row['defect_type']}: score {row['score']:.4g}, {threshold}: "
        f"{row['verdict']}"
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with a line per row; labels as 0 and 1."""
    with replace_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["path"])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: int(v) if isinstance(v, bool) else v for k, v in row.items()})
