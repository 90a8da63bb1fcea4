"""Masks: what a network may not see. True where a position is hidden.

Every mask is a callable `mask(batch, height, width, generator)` that returns `(n, B, h, w)` bool: n
sets of hidden positions per image, with n = 1 unless stated otherwise. `for_scoring` returns the
sets to use at test time, for methods that hide positions there too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_lit.types import UserError


class Mask:
    """Base of all masks."""

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (n, B, h, w) bool, true where hidden."""
        raise NotImplementedError

    def for_scoring(self, height: int, width: int, generator: torch.Generator) -> list[Tensor]:
        """Return masks (n, 1, h, w) to score any image; its score is the mean over this list."""
        return [self(1, height, width, generator)]


class NoMask(Mask):
    """No position is hidden."""

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (1, B, h, w) bool, all false."""
        return torch.zeros(1, batch, height, width, dtype=torch.bool, device=generator.device)


class RandomMask(Mask):
    """A random number of random positions (AMI-Net, training).

    For each image a share r is drawn uniformly from [low, high); floor(r * h * w) positions, drawn
    without replacement, are hidden.

    Args:
        low: Smallest share, in [0, 1].
        high: Largest share, in [low, 1].

    Raises:
        UserError: The shares are not in order, or not in [0, 1].
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not 0 <= low <= high <= 1:
            raise UserError(f"mask shares low={low}, high={high}; needed: 0 <= low <= high <= 1")
        self.low = low
        self.high = high

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (1, B, h, w) bool."""
        share = torch.rand(batch, 1, generator=generator, device=generator.device)
        share = self.low + (self.high - self.low) * share
        return _hide(share, height, width, generator)


class FixedRatioMask(Mask):
    """Random positions, the same share in every image.

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
        """Return (1, B, h, w) bool."""
        share = torch.full((batch, 1), self.ratio, device=generator.device)
        return _hide(share, height, width, generator)


class BlockMask(Mask):
    """Random square blocks in training, nothing in scoring (the self-supervised task of SIVT).

    Blocks lie on a grid; those at the lower and right border are smaller if their side does not
    divide that of the map.

    Args:
        ratio: Share of the blocks that is hidden, in [0, 1]; rounded down to whole blocks.
        side: Side of a block, in positions.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, ratio: float = 0.4, side: int = 2) -> None:
        if not 0 <= ratio <= 1 or side < 1:
            raise UserError(
                f"mask: ratio={ratio} must lie in [0, 1], and side={side} be at least 1"
            )
        self.ratio = ratio
        self.side = side

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (1, B, h, w) bool."""
        share = torch.full((batch, 1), self.ratio, device=generator.device)
        blocks = _hide(share, -(-height // self.side), -(-width // self.side), generator)
        return _enlarged(blocks, self.side)[..., :height, :width]

    def for_scoring(self, height: int, width: int, generator: torch.Generator) -> list[Tensor]:
        """Return one set (1, 1, h, w) that hides nothing."""
        return [NoMask()(1, height, width, generator)]


class CrossedMasks(Mask):
    """Sets of square cells that together hide every position exactly once (MFRNet).

    For each image the cells of a grid are dealt at random to `sets` sets of nearly equal size; with
    two sets, each is the complement of the other. Cells at the lower and right border are smaller
    if their side does not divide that of the map.

    Args:
        sizes: Sides of a cell, in positions; each call draws one of those that give at least as
            many cells as there are sets.
        sets: Number of sets, at least 2.
        score_sizes: Sides used in scoring, one after the other; None uses all of `sizes`.

    Raises:
        UserError: A number is out of range, or, when called, no side gives enough cells.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (2, 4, 8),
        sets: int = 3,
        score_sizes: Sequence[int] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.sets = sets
        self.score_sizes = self.sizes if score_sizes is None else list(score_sizes)
        if sets < 2 or not self.sizes or not self.score_sizes:
            raise UserError(
                f"method.mask: sizes={self.sizes} and score_sizes={score_sizes} need one side, and "
                f"sets={sets} must be at least 2"
            )
        if min(self.sizes + self.score_sizes) < 1:
            raise UserError(f"method.mask: sizes={self.sizes} must be sides of at least 1")

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (sets, B, h, w) bool; any two are disjoint and together they cover the map."""
        drawn = [
            self._partition(size, batch, height, width, generator)
            for size in self._fitting(self.sizes, height, width)
        ]
        pick = torch.randint(len(drawn), (1,), generator=generator, device=generator.device)
        return torch.stack(drawn).index_select(0, pick)[0]  # does not wait for the device

    def for_scoring(self, height: int, width: int, generator: torch.Generator) -> list[Tensor]:
        """Return a partition (sets, 1, h, w) for each of `score_sizes` that gives enough cells."""
        sizes = self._fitting(self.score_sizes, height, width)
        return [self._partition(size, 1, height, width, generator) for size in sizes]

    def _fitting(self, sizes: Sequence[int], height: int, width: int) -> list[int]:
        enough = [s for s in sizes if -(-height // s) * -(-width // s) >= self.sets]
        if not enough:
            raise UserError(
                f"mask: a map of {height} x {width} has fewer than sets={self.sets} cells of side "
                f"{min(sizes)}: lower method.mask.sizes"
            )
        return enough

    def _partition(
        self, size: int, batch: int, height: int, width: int, generator: torch.Generator
    ) -> Tensor:
        rows, columns = -(-height // size), -(-width // size)
        noise = torch.rand(batch, rows * columns, generator=generator, device=generator.device)
        rank = noise.argsort(dim=1).argsort(dim=1).view(batch, rows, columns)
        cells = _enlarged(rank, size)
        number = torch.arange(self.sets, device=generator.device).view(-1, 1, 1, 1)
        return cells[None, :, :height, :width] % self.sets == number


def _hide(share: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Hide floor(share * positions) positions of each image; share is (B, 1)."""
    positions = height * width
    noise = torch.rand(len(share), positions, generator=generator, device=generator.device)
    rank = noise.argsort(dim=1).argsort(dim=1)
    # 1e-6 keeps floor(0.29 * 100) at 29 in float32
    hidden = rank < (share * positions + 1e-6).floor()
    return hidden.view(1, -1, height, width)


def _enlarged(cells: Tensor, side: int) -> Tensor:
    """Repeat each cell of (..., rows, columns) over a square of positions."""
    return cells.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)
