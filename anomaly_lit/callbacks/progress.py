"""Progress of a training or a test: a bar in a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar


def progress_bar() -> ProgressBar:
    """Return a live bar for a terminal, or plain lines for output that goes to a file."""
    return LiveProgress(leave=False) if sys.stdout.isatty() else PlainProgress()


def shown(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the numbers to show, the training loss first. This waits for the device."""
    loss = {k: float(v) for k, v in trainer.callback_metrics.items() if k == "train/loss"}
    return {**loss, **trainer.progress_bar_metrics}


class LiveProgress(RichProgressBar):
    """A bar that moves with every step and fetches the loss twice a second."""

    every_seconds = 0.5
    asked = -math.inf
    answer: dict[str, Any] = {}  # noqa: RUF012

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the last numbers; fetch new ones after half a second."""
        if time.monotonic() - self.asked >= self.every_seconds:
            self.asked = time.monotonic()
            self.answer = shown(trainer)
        return self.answer


class PlainProgress(ProgressBar):
    """Print step, loss, images per second and the time left every few seconds.

    Args:
        every_seconds: Shortest time between two lines.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.enabled = True

    def disable(self) -> None:
        """Print nothing; Lightning calls this on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Print again."""
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
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
        """Print a line if `every_seconds` have passed since the last one."""
        self.images += len(batch["image"]) * trainer.world_size
        now = time.monotonic()
        if not self.enabled or now - self.printed < self.every_seconds:
            return
        self.printed = now
        done = max(1, trainer.global_step - self.first_step)  # 0 while gradients accumulate
        total = trainer.estimated_stepping_batches
        left = (now - self.start) / done * (total - trainer.global_step)
        losses = ", ".join(f"{key} {float(value):.4g}" for key, value in shown(trainer).items())
        print(
            f"step {trainer.global_step}/{total}: {losses}, "
            f"{self.images / (now - self.start):.1f} images/s, {duration(left)} left",
            flush=True,
        )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = self.printed = time.monotonic()
        self.images = 0

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if `every_seconds` have passed since the last one."""
        self.images += len(batch["image"]) * trainer.world_size
        now = time.monotonic()
        if not self.enabled or now - self.printed < self.every_seconds:
            return
        self.printed = now
        total = trainer.num_test_batches[dataloader_idx]
        left = (now - self.start) / (batch_idx + 1) * (total - batch_idx - 1)
        print(
            f"tested {self.images} images, {(now - self.start) / self.images:.3g} s per image, "
            f"{duration(left)} left",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Return a time in words: 45 s, 3 min 20 s, 2 h 05 min; infinity is "an unknown time"."""
    if math.isinf(seconds):
        return "an unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
