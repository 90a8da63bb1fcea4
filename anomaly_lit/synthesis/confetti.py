"""Confetti: rectangles of changed colour (FCDD: Liznerski et al., ICLR 2021, arXiv:2007.01760)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.base import Synthesis, check_pairs, pixel_grid
from anomaly_lit.types import UserError, check_range


class Confetti(Synthesis):
    """Make a few rotated rectangles brighter or darker, each by adding a colour of its own.

    FCDD chooses the number of rectangles by the share of the image that they cover; here it is
    drawn uniformly from a range.

    Args:
        pieces: Smallest and largest number of rectangles in an image.
        side: Smallest and largest side, in pixels of an image whose shorter side is 224.
        angle: Largest rotation, in degrees.
        smoothing: Side of the window that smooths the change of colour, in pixels, odd; 1 gives
            hard borders.
        probability: See `Synthesis`.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.

    Raises:
        UserError: A range does not rise, or the window is even.
    """

    def __init__(
        self,
        pieces: Sequence[int] = (1, 4),
        side: Sequence[float] = (8, 54),
        angle: float = 45.0,
        smoothing: int = 5,
        probability: float = 0.5,
        foreground: bool = False,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        check_pairs("[1, inf)", pieces=pieces)
        check_pairs("(0, inf)", side=side)
        check_range("dataset.synthesis", "(-inf, inf)", angle=angle)
        if smoothing < 1 or smoothing % 2 == 0:
            raise UserError(f"dataset.synthesis: smoothing={smoothing} must be odd")
        self.pieces = pieces
        self.side = side
        self.angle = angle
        self.smoothing = smoothing

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Add the colours of all rectangles of an image, and clip the result to [0, 1]."""
        inside = self.rectangles(image, generator)  # (B, n, H, W)
        batch, number = inside.shape[:2]
        shape = (batch, number, 3)
        colour = torch.rand(shape, generator=generator, device=image.device)
        bright = torch.rand(batch, number, 1, generator=generator, device=image.device) < 0.5
        change = torch.einsum(
            "bnhw,bnc->bchw", inside.float(), torch.where(bright, colour, -colour)
        )
        window = self.smoothing
        change = F.avg_pool2d(change, window, 1, window // 2, count_include_pad=False)
        changed = (image + change).clamp(0, 1)
        differs = (changed != image).any(dim=1, keepdim=True)  # white cannot become brighter
        return changed, inside.any(dim=1, keepdim=True) & differs

    def rectangles(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Draw masks (B, n, H, W) bool, n being the largest number; unused ones are empty."""
        batch, (height, width), most = len(image), image.shape[-2:], self.pieces[1]

        def draw(low: float, high: float) -> Tensor:
            share = torch.rand(batch, most, 1, 1, generator=generator, device=image.device)
            return low + (high - low) * share

        rows, columns = pixel_grid(height, width, image.device)
        down, right = rows - draw(0, height), columns - draw(0, width)
        turn = draw(-1, 1) * math.radians(self.angle)
        unit = min(height, width) / 224
        along = turn.cos() * down - turn.sin() * right
        across = turn.sin() * down + turn.cos() * right
        inside = (along.abs() <= draw(*self.side) * unit / 2) & (
            across.abs() <= draw(*self.side) * unit / 2
        )
        count = torch.randint(
            self.pieces[0], most + 1, (batch, 1, 1, 1), generator=generator, device=image.device
        )
        return inside & (torch.arange(most, device=image.device).view(1, -1, 1, 1) < count)
