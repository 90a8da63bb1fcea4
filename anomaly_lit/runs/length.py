"""How long a run trains where its configuration leaves that to the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from anomaly_lit.data.datamodule import AnomalyDataModule

PASSES = 40  # over the training images
LEAST_STEPS, MOST_STEPS = 500, 5000


def steps_follow_data(settings: Mapping[str, Any]) -> bool:
    """Return whether the trainer's settings name neither a number of steps nor another end."""
    ends = (settings.get(name) for name in ("max_epochs", "max_time"))
    return settings.get("max_steps", -1) is None and all(end in (None, -1) for end in ends)


def given_length(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return `max_steps: -1` where the settings leave it open: Lightning takes no null."""
    return {"max_steps": -1} if settings.get("max_steps", -1) is None else {}


def steps_for(trainer: pl.Trainer, datamodule: AnomalyDataModule) -> int:
    """Return the number of steps of 40 passes over the training images, from 500 to 5000.

    The lower bound gives a network enough steps to learn anything at all. The upper bound keeps
    large data sets, for which fewer passes are enough, from taking days.
    """
    seen = datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    steps = math.ceil(PASSES * len(datamodule.train_samples) / seen)
    return min(max(steps, LEAST_STEPS), MOST_STEPS)
