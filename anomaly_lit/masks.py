"""Masks: what a network may not see. True where a position is hidden.

Every mask is a callable ``mask(batch, height, width, generator)`` that returns ``(n, B, h, w)``
bool: n sets of hidden positions per image. Training-time masks here have n = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_lit.types import UserError


class NoMask:
    """Hides nothing."""

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """(1, B, h, w) bool, all false."""
        return torch.zeros(1, batch, height, width, dtype=torch.bool, device=generator.device)


class RandomMask:
    """Random positions in a random quantity (AMI-Net, training).

    Per image the share r is uniform in [low, high); floor(r * h * w) positions are hidden, drawn
    without replacement.

    Args:
        low: Least share, in [0, 1].
        high: Greatest share, in [low, 1].

    Raises:
        UserError: The shares are out of order or range.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not 0 <= low <= high <= 1:
            raise UserError(f"mask shares low={low}, high={high}; needed: 0 <= low <= high <= 1")
        self.low = low
        self.high = high

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """(1, B, h, w) bool."""
        share = torch.rand(batch, 1, generator=generator, device=generator.device)
        share = self.low + (self.high - self.low) * share
        return _hide(share, height, width, generator)


class FixedRatioMask:
    """Random positions, the same share of every image.

    Args:
        ratio: Share of hidden positions, in [0, 1]; rounded down to whole positions.

    Raises:
        UserError: The ratio is out of range.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        if not 0 <= ratio <= 1:
            raise UserError(f"mask ratio {ratio} is not in [0, 1]")
        self.ratio = ratio

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """(1, B, h, w) bool."""
        share = torch.full((batch, 1), self.ratio, device=generator.device)
        return _hide(share, height, width, generator)


def _hide(share: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Hides floor(share * positions) positions of each image; share is (B, 1)."""
    positions = height * width
    noise = torch.rand(len(share), positions, generator=generator, device=generator.device)
    rank = noise.argsort(dim=1).argsort(dim=1)
    # 1e-6 keeps floor(0.29 * 100) at 29 in float32
    hidden = rank < (share * positions + 1e-6).floor()
    return hidden.view(1, -1, height, width)
