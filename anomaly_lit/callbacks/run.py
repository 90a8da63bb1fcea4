"""What keeps a run repeatable and resumable: seeds, checkpoints, a stop at the first NaN."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from anomaly_lit.callbacks.stopping import StopSignals, signal_name, stop_asked
from anomaly_lit.data.sampler import mixed_seed
from anomaly_lit.inference.checkpoint import FORMAT_VERSION
from anomaly_lit.methods.base import Method
from anomaly_lit.types import Batch, Sample, Stopped, UserError, check_range

TOGETHER = 10  # steps between two exchanges of several ranks: each exchange waits for their devices


class StepSeeds(pl.Callback):
    """Seed torch anew at every step from (seed, stage, step, rank).

    Masks, jitter, dropout and synthesis then do not depend on earlier steps, and an interrupted run
    continues exactly as if nothing had happened.

    Args:
        seed: Any integer.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch by the number of batches so far, over all epochs."""
        step = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        torch.manual_seed(mixed_seed(self.seed, 0, step, trainer.global_rank))

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed torch by the batch, so that every validation draws the same masks."""
        torch.manual_seed(mixed_seed(self.seed, 1, batch_idx, trainer.global_rank))

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed torch by the batch."""
        torch.manual_seed(mixed_seed(self.seed, 2, batch_idx, trainer.global_rank))


class ResumeCheckpoint(Checkpoint):
    """Write the whole state of training to `checkpoints/last.ckpt` from time to time.

    The file is replaced atomically, so it is never half written; a run that dies loses only what
    came after the last write. If a validation follows the step, the file is written after the
    validation, so that its result is kept. Place this callback after those whose state a validation
    changes.

    Args:
        directory: Where `last.ckpt` lies.
        every_minutes: Least time between two writes.
        every_steps: Optimiser steps between two writes; None uses `every_minutes` instead.
        signals: Once one of these arrives, the file is written and training ends.

    Raises:
        UserError: `every_steps` is below one, or `every_minutes` below zero.
    """

    def __init__(
        self,
        directory: str,
        every_minutes: float = 2.0,
        every_steps: int | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        self.path = Path(directory) / "last.ckpt"
        check_range("checkpoint", "[0, inf)", every_minutes=every_minutes)
        self.every_seconds = 60 * every_minutes
        if every_steps is not None and every_steps < 1:
            raise UserError(f"checkpoint.every_steps={every_steps} must be at least 1, or null")
        self.every_steps = every_steps
        self.written = time.monotonic()
        self.step = 0
        self.due = False
        self.signals = signals
        self.asked = 0  # the signal that ends training, once all ranks know about it

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.written = time.monotonic()
        self.step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the file if it is time; the clock of rank 0 decides for all ranks."""
        if trainer.global_step == self.step:
            return  # gradients are being accumulated, and no checkpoint holds them
        self.step = trainer.global_step
        if self.every_steps is not None:
            due = trainer.global_step % self.every_steps == 0
        else:
            due = time.monotonic() - self.written >= self.every_seconds
        received = self.signals.received if self.signals else 0
        if trainer.world_size > 1 and trainer.global_step % TOGETHER:
            due, received = due and self.every_steps is not None, 0
        else:
            due, received = stop_asked(trainer, due, received)
        self.asked = received
        self.due = due or self.asked != 0
        if self.due and not _validation_follows(trainer):
            if self.asked:
                _log_step(trainer)
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file that was due before the validation."""
        if self.due:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        self.due = False
        self.written = time.monotonic()
        trainer.save_checkpoint(self.path)
        if self.asked:
            raise Stopped(f"stopped by {signal_name(self.asked)} at step {self.step}, and saved")


def _log_step(trainer: pl.Trainer) -> None:
    """Log the losses of the last step now.

    Lightning would do so after this hook, but the hook ends the run.
    """
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether Lightning validates after this batch; Lightning decides by the same call."""
    loop = trainer.fit_loop
    return sum(trainer.num_val_batches) > 0 and loop.epoch_loop._should_check_val_fx(
        loop._data_fetcher  # type: ignore[arg-type]
    )


class WholeCheckpoint(pl.Callback):
    """Put into every checkpoint what `anomaly_lit.load` needs: the format and the configuration.

    Args:
        config: The composed configuration as plain data.
        data_digest: The data module's digest, by which a resumed run recognises its images.
    """

    def __init__(self, config: dict[str, Any], data_digest: str = "") -> None:
        self.config = config
        self.data_digest = data_digest

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add plain data only, so that the file loads with `weights_only=True`."""
        entry = checkpoint.setdefault("anomaly_lit", {})
        entry["format_version"] = FORMAT_VERSION
        entry["config"] = self.config
        entry["data_digest"] = self.data_digest


class StopAtNaN(pl.Callback):
    """End training with a clear error when a loss is no longer finite.

    Args:
        every_steps: Optimiser steps between two checks; each check waits for the device. There is
            also a check before each validation and at the end.
    """

    def __init__(self, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self.loss: Tensor | None = None
        self.paths: list[str] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss, and check it if it is time."""
        self.loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.paths = batch["path"]
        if trainer.global_step % self.every_steps == 0:
            self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the loss before a validation scores the weights."""
        self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the loss a last time."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if isinstance(self.loss, Tensor) and not torch.isfinite(self.loss).all():
            raise UserError(
                f"the loss is {float(self.loss)} at step {trainer.global_step}: lower "
                "method.optimizer.lr, or set trainer.precision=32-true, or clip gradients with "
                f"trainer.gradient_clip_val=1. Last images: {', '.join(self.paths[:3])}"
            )


class RanksAgree(pl.Callback):
    """Stop a run whose processes were given different configurations or data.

    Args:
        config: The composed configuration as plain data.
        data_digest: Digest of the data module's files.
    """

    def __init__(self, config: dict[str, Any], data_digest: str) -> None:
        self.marks = {
            "configurations": zlib.crc32(json.dumps(config, sort_keys=True).encode()),
            "images": zlib.crc32(data_digest.encode()),
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare all ranks with the first."""
        if trainer.world_size == 1:
            return
        own = torch.tensor(list(self.marks.values()), device=pl_module.device)
        marks = pl_module.all_gather(own)  # (ranks, 2)
        assert isinstance(marks, Tensor)
        alike = (marks == marks[:1]).tolist()
        for number, name in enumerate(self.marks):
            other = [str(rank) for rank, same in enumerate(alike) if not same[number]]
            if other:
                raise UserError(
                    f"rank {', '.join(other)} of {trainer.world_size} has different {name} from "
                    "rank 0: start all with the same arguments (output_dir= too) and data"
                )


class FillFeatureCache(pl.Callback):
    """Compute the features of frozen backbones once, before training, in its precision."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the data module's feature cache, if it has one."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        cache = getattr(datamodule, "feature_cache", None)
        if cache is None:
            return
        assert isinstance(pl_module, Method)
        backbones = pl_module.training_backbones()
        samples = datamodule.feature_samples()

        def batches_of(samples: list[Sample]) -> Iterator[Batch]:
            for batch in datamodule.batches_of(samples):
                yield pl_module.transfer_batch_to_device(batch, pl_module.device, 0)

        with trainer.precision_plugin.forward_context():
            cache.fill(backbones, samples, batches_of, datamodule.resize)
