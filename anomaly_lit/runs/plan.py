"""What a run will need, printed before it starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from anomaly_lit.data.companions import FEATURES
from anomaly_lit.data.sampler import fitting_batch
from anomaly_lit.files import tell
from anomaly_lit.types import Batch, UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.methods.base import Method

BACKWARD_SHARE = 2.0  # a backward pass costs about twice as much as its forward pass


def plan_of(trainer: pl.Trainer, method: Method, datamodule: AnomalyDataModule) -> Iterator[str]:
    """Yield lines on parameters, memory, steps and, on a CPU, time, as measured on a batch."""
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in method.parameters()) - trainable
    state = 4 * (4 * trainable + frozen) / 2**20  # weights, gradients, two moments of AdamW
    yield (
        f"{type(method).__name__}: {trainable / 1e6:.2f} M trainable and {frozen / 1e6:.2f} M "
        f"frozen parameters; about {state:.0f} MB for weights, gradients and AdamW's moments, "
        "plus activations"
    )
    steps = steps_of(trainer, len(datamodule.train_dataloader()))
    if steps is None:
        return
    device = trainer.strategy.root_device.type
    count = len(datamodule.train_samples)
    size = fitting_batch(datamodule.batch_size, count, trainer.world_size)
    passes = steps * trainer.accumulate_grad_batches * size * trainer.world_size / max(count, 1)
    text = (
        f"{steps} steps of {size} image{'s'[: size > 1]} ({passes:.3g} passes over the training "
        f"images), {trainer.precision}, on {device}"
    )
    per_step = seconds_per_step(trainer, method, datamodule) if device == "cpu" else None
    if per_step is not None:
        text += f": roughly {steps * per_step / 60:.1f} minutes of training"
    yield text


def print_plan(trainer: pl.Trainer, method: Method, datamodule: AnomalyDataModule) -> None:
    """Print what is about to happen: data, parameters, memory, time."""
    tell(datamodule.summary())
    for line in plan_of(trainer, method, datamodule):
        tell(line)


def steps_of(trainer: pl.Trainer, steps_per_epoch: int) -> int | None:
    """Return the number of steps until the end; None if nothing limits it."""
    limits = []
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * steps_per_epoch // trainer.accumulate_grad_batches)
    return min(limits) if limits else None


def seconds_per_step(
    trainer: pl.Trainer, method: Method, datamodule: AnomalyDataModule
) -> float | None:
    """Compute a batch's loss twice in evaluation mode, and estimate a step from the second.

    None if the loss cannot be computed yet, such as that of a method that first fills a memory
    bank.
    """
    batch = next(iter(datamodule.train_dataloader()))
    if datamodule.synthesis is not None:
        batch = datamodule.corrupt(batch)
    training = method.training
    state = torch.get_rng_state()
    method.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        share_frozen = 0.5  # about half of the forward pass
        if datamodule.feature_cache is not None:
            batch, share_frozen = with_features(batch, method), 0.0
        durations = [_seconds(method, batch) for _ in range(2)]
    method.train(training)
    torch.set_rng_state(state)
    if durations[1] is None:
        return None
    step = durations[1] * (1 + BACKWARD_SHARE * (1 - share_frozen))
    return step * trainer.accumulate_grad_batches


def _seconds(method: Method, batch: Batch) -> float | None:
    """Time the loss of a batch; None if it raises a `UserError`, which is left to training."""
    start = time.perf_counter()
    try:
        method.losses(batch)
    except UserError:
        return None
    return time.perf_counter() - start


def with_features(batch: Batch, method: Method) -> Batch:
    """Return the batch with the features of images and companions that the cache will hold."""
    backbones, values = method.training_backbones(), cast(dict[str, Any], {**batch})
    for images, key in FEATURES.items():
        if images in values:
            values[key] = {name: module(values[images]) for name, module in backbones.items()}
    return cast("Batch", values)
