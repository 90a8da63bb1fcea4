"""CutPaste: parts of the image in other places (Li et al., CVPR 2021, arXiv:2104.04015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from anomaly_lit.synthesis.augment import colour_jitter
from anomaly_lit.synthesis.base import Synthesis, check_pairs, pixel_grid, uniform
from anomaly_lit.types import UserError, check_choice, check_range


class CutPaste(Synthesis):
    """Cut a rectangle, change its colours, and paste it elsewhere in the same image.

    A patch is upright; a scar is thin and rotated.

    Args:
        kind: `patch`, `scar`, or `both` (either with a chance of one half).
        area: Smallest and largest area of a patch, as a share of the image.
        aspect: Smallest and largest ratio of a patch's width to its height.
        aspect_scale: `log` draws the ratio's logarithm uniformly (CutPaste); `halves` draws the
            ratio uniformly below 1 or above 1, either with a chance of one half (OneNIP).
        scar_width: Smallest and largest width of a scar, in pixels.
        scar_length: Smallest and largest length of a scar, in pixels.
        scale_scars: Whether lengths of scars are in pixels of an image whose shorter side is 256,
            and scale with the image; otherwise they are in the image's own pixels (OneNIP).
        scar_angle: Largest rotation of a scar, in degrees.
        jitter: Largest relative change of brightness, contrast and saturation.
        hue: Largest change of hue, as a share of the colour circle.
        probability: See `Synthesis`.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.

    Raises:
        UserError: A range does not rise or leaves its bounds.
    """

    def __init__(
        self,
        kind: Literal["patch", "scar", "both"] = "both",
        area: Sequence[float] = (0.02, 0.15),
        aspect: Sequence[float] = (0.3, 3.3),
        aspect_scale: Literal["log", "halves"] = "log",
        scar_width: Sequence[float] = (2, 16),
        scar_length: Sequence[float] = (10, 25),
        scar_angle: float = 45.0,
        jitter: float = 0.1,
        hue: float = 0.1,
        probability: float = 1.0,
        foreground: bool = False,
        allow_empty: bool = False,
        scale_scars: bool = True,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        check_pairs("(0, 1)", area=area)
        check_pairs("(0, inf)", aspect=aspect, scar_width=scar_width, scar_length=scar_length)
        if not aspect[0] <= 1 <= aspect[1]:
            raise UserError(f"dataset.synthesis: aspect={list(aspect)} must rise across 1")
        check_range("dataset.synthesis", "(-inf, inf)", scar_angle=scar_angle)
        check_range("dataset.synthesis", "[0, inf)", jitter=jitter, hue=hue)
        check_choice("dataset.synthesis", ("patch", "scar", "both"), kind=kind)
        check_choice("dataset.synthesis", ("log", "halves"), aspect_scale=aspect_scale)
        self.kind = kind
        self.area = area
        self.aspect = aspect
        self.aspect_scale = aspect_scale
        self.scar_width = scar_width
        self.scar_length = scar_length
        self.scale_scars = scale_scars
        self.scar_angle = scar_angle
        self.jitter = jitter
        self.hue = hue

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Cut, change and paste one rectangle per image."""
        height, width, angle = self._shape(image, generator)
        sides = image.shape[-2:]
        rows, columns = pixel_grid(sides[0], sides[1], image.device)
        cut, paste = (
            [
                _within(uniform(image, generator), length, side)
                for length, side in zip((height, width), sides, strict=True)
            ]
            for _ in range(2)
        )
        down, right = rows - paste[0], columns - paste[1]  # broadcast to (B, 1, H, W)
        along = angle.cos() * down - angle.sin() * right  # in the rectangle's own axes
        across = angle.sin() * down + angle.cos() * right
        corruption = (along.abs() <= height / 2) & (across.abs() <= width / 2)
        row = (along + cut[0]).round().clamp(0, sides[0] - 1)
        column = (across + cut[1]).round().clamp(0, sides[1] - 1)
        place = (row * sides[1] + column).long().flatten(2).expand(-1, 3, -1)
        moved = image.flatten(2).gather(2, place).view_as(image)
        return colour_jitter(moved, self.jitter, self.hue, generator), corruption

    def _shape(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw height, width and angle of each image's rectangle, each (B, 1, 1, 1)."""
        sides = image.shape[-2:]
        area = uniform(image, generator, *self.area) * sides[0] * sides[1]
        aspect = self._aspect(image, generator)
        patch = (area / aspect).sqrt(), (area * aspect).sqrt(), torch.zeros_like(area)
        unit = min(sides) / 256 if self.scale_scars else 1.0
        scar = (
            uniform(image, generator, *self.scar_length) * unit,
            uniform(image, generator, *self.scar_width) * unit,
            uniform(image, generator, -1, 1) * math.radians(self.scar_angle),
        )
        chance = {"patch": 0.0, "scar": 1.0, "both": 0.5}[self.kind]
        scarred = uniform(image, generator) < chance
        height, width, angle = (
            torch.where(scarred, thin, upright) for thin, upright in zip(scar, patch, strict=True)
        )
        return height.clamp(1, sides[0]), width.clamp(1, sides[1]), angle

    def _aspect(self, image: Tensor, generator: torch.Generator) -> Tensor:
        low, high = self.aspect
        if self.aspect_scale == "log":
            return uniform(image, generator, math.log(low), math.log(high)).exp()
        wide = uniform(image, generator) < 0.5
        above, below = uniform(image, generator, 1, high), uniform(image, generator, low, 1)
        return torch.where(wide, above, below)


def _within(share: Tensor, length: Tensor, side: int) -> Tensor:
    """Return the centre of a segment within an axis: at its start for share 0, at its end for 1."""
    return length / 2 - 0.5 + share * (side - length)
