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
