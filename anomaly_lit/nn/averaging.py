"""A moving average of weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """Exponential moving average of a network's weights and statistics, for scoring.

    The decay is lower in the first steps, (1 + n) / (10 + n), so that a short run does not end
    near its first weights. Unlike with the base class, an update never waits for the GPU.

    Args:
        model: What is averaged; this starts as a copy of it.
        decay: Decay after many steps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards the present weights; whole numbers, such as counters, are copied."""
        decay = ((1 + self.n_averaged) / (10 + self.n_averaged)).clamp(max=self.decay)
        averaged = chain(self.module.parameters(), self.module.buffers())
        current = chain(model.parameters(), model.buffers())
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new.detach(), (1 - decay).to(old.dtype))
            else:
                old.copy_(new)
        self.n_averaged += 1
