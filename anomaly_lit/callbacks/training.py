"""Figures that training leaves behind: its first batch, and its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from anomaly_lit.drawing.loss_curves import save_loss_curves
from anomaly_lit.drawing.panels import contact_sheet, training_panel
from anomaly_lit.drawing.png import save_image
from anomaly_lit.types import check_range

FIFTHS = 5  # parts of a loss curve that are compared


class TrainingPictures(pl.Callback):
    """Write `training.png`: the first batch as training sees it, with synthesis and prompts.

    Args:
        directory: Where to write.
        max_images: Most images to show; 0 writes none.
    """

    def __init__(self, directory: str, max_images: int = 8) -> None:
        check_range("callbacks.training_pictures", "[0, inf)", max_images=max_images)
        self.path = Path(directory) / "training.png"
        self.max_images = max_images

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the file on the first rank, unless this run wrote it before it was resumed."""
        if not self.max_images or not trainer.is_global_zero or self.path.exists():
            return
        optional = {
            key: batch[key] for key in ("corrupted", "corruption", "prompt") if key in batch
        }
        panels = [
            training_panel(
                _array(batch["image"][row]),
                f"{batch['category'][row]}  {Path(batch['path'][row]).name}",
                **{key: _array(value[row]) for key, value in optional.items()},
            )
            for row in range(min(self.max_images, len(batch["image"])))
        ]
        save_image(contact_sheet(panels, 2), self.path)
        self.max_images = 0


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Turn (3, H, W) in [0, 1] into (H, W, 3) uint8, and (1, H, W) bool into (H, W)."""
    array = tensor.detach().float().cpu().numpy()
    if tensor.dtype == torch.bool:
        return array[0] > 0.5
    return (array.transpose(1, 2, 0) * 255).round().astype(np.uint8)


class LossCurves(pl.Callback):
    """Keep every logged loss and draw `loss.png` when training ends.

    Lightning keeps reporting the last value of a term that is no longer logged, such as one of an
    earlier stage. A value that equals the one before it bit for bit is therefore left out.

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
        """Note the terms at the steps at which they are logged."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the held-out loss."""
        if not trainer.sanity_checking:
            self._note(trainer, "val/")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the figure, on the first rank only."""
        if trainer.is_global_zero and self.history:
            save_loss_curves(self.directory / "loss.png", self.history)

    @property
    def falling(self) -> float | None:
        """How much the training loss still fell at the end; see `still_falling`."""
        terms = [line for key, line in self.history.items() if key.startswith("train/")]
        last = max((line[-1][0] for line in terms), default=0)
        stage = max((line[0][0] for line in terms if line[-1][0] == last), default=0)
        loss = [value for step, value in self.history.get("train/loss", []) if step >= stage]
        return still_falling(np.array(loss))

    def _note(self, trainer: pl.Trainer, prefix: str) -> None:
        for key, value in trainer.callback_metrics.items():
            if key.startswith(prefix):
                line = self.history.setdefault(key, [])
                if not line or line[-1][1] != float(value):  # else it was not logged anew
                    line.append((trainer.global_step, float(value)))

    def state_dict(self) -> dict[str, Any]:
        """Return the history, so that a resumed run draws all of it."""
        return {"history": {key: [list(p) for p in line] for key, line in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = {
            key: [(int(step), float(value)) for step, value in line]
            for key, line in state_dict["history"].items()
        }


def still_falling(loss: np.ndarray) -> float | None:
    """Return the part of the loss's whole fall that happened in its last fifth.

    Compares the means of the last two fifths. A fall within three standard errors of their
    difference is noise and counts as 0.

    Args:
        loss: (n,) losses in the order of training, of one stage.

    Returns:
        A fraction, or None if there are fewer than `4 * FIFTHS` values, which tell nothing.
    """
    if len(loss) < 4 * FIFTHS:
        return None
    fifths = np.array_split(loss, FIFTHS)
    before, last = fifths[-2:]
    fall = before.mean() - last.mean()
    error = np.sqrt(before.var(ddof=1) / len(before) + last.var(ddof=1) / len(last))
    whole = fifths[0].mean() - last.mean()
    return float(min(fall / whole, 1.0)) if fall > 3 * error and whole > 0 else 0.0
