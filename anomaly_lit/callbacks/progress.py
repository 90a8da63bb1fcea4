"""Progress for people: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar


def progress_bar() -> ProgressBar:
    """A live bar where somebody watches, plain lines where the output goes to a file."""
    return RichProgressBar(leave=False) if sys.stdout.isatty() else PlainProgress()


class PlainProgress(ProgressBar):
    """Prints step, loss, images per second and the time left every few seconds.

    Args:
        every_seconds: Least time between two lines.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.enabled = True

    def disable(self) -> None:
        """Keeps quiet, as Lightning asks of all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Speaks again."""
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.start = self.printed = time.monotonic()
        self.first_step = trainer.global_step
        self.images = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prints a line where it is time."""
        self.images += len(batch["image"]) * trainer.world_size
        now = time.monotonic()
        if not self.enabled or now - self.printed < self.every_seconds:
            return
        self.printed = now
        done = max(1, trainer.global_step - self.first_step)  # 0 while gradients accumulate
        total = trainer.estimated_stepping_batches
        left = (now - self.start) / done * (total - trainer.global_step)
        shown = {key: f"{float(value):.4g}" for key, value in trainer.progress_bar_metrics.items()}
        losses = ", ".join(f"{key} {value}" for key, value in shown.items())
        print(
            f"step {trainer.global_step}/{total}: {losses}, "
            f"{self.images / (now - self.start):.1f} images/s, {duration(left)} left",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Such as 45 s, 3 min 20 s, 2 h 05 min; without an end, an unknown time."""
    if math.isinf(seconds):
        return "an unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
