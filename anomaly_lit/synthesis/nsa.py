"""NSA: natural synthetic anomalies, blended in (Schlüter et al., ECCV 2022, arXiv:2109.15222)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.base import Synthesis, check_pairs, pixel_grid, uniform
from anomaly_lit.types import check_range


class NSA(Synthesis):
    """Blend resized parts of another normal image into the image, without a seam.

    The other image comes from the same batch and, where categories are known, from the same
    category; an image without such a partner is its own source.

    Differs from the paper: the blend adds a smooth field to the pasted part that cancels the step
    at its border. We interpolate this field from coarse to fine, where the paper solves Poisson's
    equation. Parts are not chosen by how much of the object they contain (`foreground` restricts
    them to the object). The mask is binary, not graded by the amount of change.

    Args:
        half_size: Smallest and largest half side of a part, relative to the image's side.
        parts: Largest number of parts per image; each after the first is added with a chance of
            one half.
        scale: Smallest and largest factor by which a part is resized.
        least_change: A pixel counts as corrupted if the change, averaged over channels and the
            5 x 5 pixels around it, exceeds this value in [0, 1].
        probability: See `Synthesis`.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.

    Raises:
        UserError: A range does not rise or leaves its bounds.
    """

    def __init__(
        self,
        half_size: Sequence[float] = (0.03, 0.4),
        parts: int = 3,
        scale: Sequence[float] = (0.7, 1.3),
        least_change: float = 1 / 255,
        probability: float = 1.0,
        foreground: bool = False,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        check_pairs("(0, 0.5)", half_size=half_size)
        check_pairs("(0, inf)", scale=scale)
        check_range("dataset.synthesis", "[1, inf)", parts=parts)
        check_range("dataset.synthesis", "[0, 1]", least_change=least_change)
        self.half_size = half_size
        self.parts = parts
        self.scale = scale
        self.least_change = least_change

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Blend one or more parts into each image."""
        other = image[partners(len(image), category, generator)]
        blended, region = image, torch.zeros_like(image[:, :1], dtype=torch.bool)
        for part in range(self.parts):
            moved, inside = self._part(other, generator)
            if part:
                inside = inside & (uniform(image, generator) < 0.5)
            step = fill_smoothly((blended - moved) * ~inside, ~inside)
            blended = torch.where(inside, moved + step, blended)
            region = region | inside
        change = (blended.clamp(0, 1) - image).abs().mean(dim=1, keepdim=True)
        around = F.avg_pool2d(change, 5, stride=1, padding=2, count_include_pad=False)
        return blended, region & (around > self.least_change)

    def _part(self, other: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the other image, moved and resized, and the rectangle to take from it."""
        sides = other.shape[-2:]
        half = []
        for side in sides:
            gamma = (
                -(uniform(other, generator) + 1e-9).log() - (uniform(other, generator) + 1e-9).log()
            )  # a Gamma distribution of shape 2
            share = (self.half_size[0] + 0.05 * gamma).clamp(*self.half_size)
            half.append((share * side).clamp(min=1))
        grid = pixel_grid(sides[0], sides[1], other.device)
        offset = [
            axis - uniform(other, generator, 0, side)
            for axis, side in zip(grid, sides, strict=True)
        ]
        inside = (offset[0].abs() <= half[0]) & (offset[1].abs() <= half[1])
        normal = torch.randn(len(other), 1, 1, 1, generator=generator, device=other.device)
        scale = (1 + 0.5 * normal).clamp(*self.scale)
        places = []
        for away, reach, side in zip(offset, half, sides, strict=True):
            reach = (reach / scale).clamp(max=(side - 1) / 2)
            centre = reach + uniform(other, generator) * (side - 1 - 2 * reach)
            places.append((away / scale + centre) / max(side - 1, 1) * 2 - 1)
        rows, columns = torch.broadcast_tensors(*places)
        flow = torch.stack([columns[:, 0], rows[:, 0]], dim=-1)
        moved = F.grid_sample(other, flow, padding_mode="reflection", align_corners=True)
        return moved, inside


def partners(count: int, category: Sequence[str] | None, generator: torch.Generator) -> Tensor:
    """Return (B,) rows: another image of the same category, or the image itself if none."""
    own = torch.arange(count, device=generator.device)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(category or []))}
    group = torch.zeros_like(own)
    if category is not None:
        group = torch.tensor([numbers[name] for name in category], device=generator.device)
    alike = (group[:, None] == group) & (own[:, None] != own)
    noise = torch.rand(count, count, generator=generator, device=generator.device)
    chosen = (noise + alike).argmax(dim=1)  # at least 1 if alike, below 1 if not
    return torch.where(alike.any(dim=1), chosen, own)


def fill_smoothly(values: Tensor, known: Tensor) -> Tensor:
    """Fill unknown values from known ones around them, from coarse to fine.

    The maps are halved, averaging known positions only, until a single position is left. Then, from
    coarse to fine, each map takes its unknown values from the coarser one.

    Args:
        values: (B, C, H, W), 0 where unknown.
        known: (B, 1, H, W) bool.

    Returns:
        (B, C, H, W), equal to `values` where known.
    """
    weight = known.float()
    levels = [(values, weight)]
    while max(values.shape[-2:]) > 1:
        values, weight = (
            F.avg_pool2d(part, 2, ceil_mode=True, count_include_pad=False)
            for part in (values, weight)
        )
        total = weight.clamp(min=1e-6)
        share = (4 * weight).clamp(max=1)  # one known position in four is as good as four
        values, weight = values / total * share, share
        levels.append((values, weight))
    filled = values / weight.clamp(min=1e-6)
    for values, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, values.shape[-2:], mode="bilinear")
        filled = values + (1 - weight) * coarse
    return filled
