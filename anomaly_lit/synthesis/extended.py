"""Real defects, changed and pasted on normal images (PRN: Zhang et al., CVPR 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.augment import (
    apply_where,
    brightness,
    hue_and_saturation,
    sharpness,
)
from anomaly_lit.synthesis.base import pixel_grid, uniform


def extend(
    defect: Tensor, mask: Tensor, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Change images of defects, and their masks alike, each by some of ten changes.

    Six bend the image: quarter turns, mirroring, transposing, a lens, a shift with zoom and turn,
    and waves. Four change its colours: noise, a blur, brightness with sharpness, hue with
    saturation.

    Args:
        defect: (B, 3, H, W) float32 in [0, 1].
        mask: (B, 1, H, W) bool.
        number: Changes of each image, drawn without replacement, 0 to 10.
        generator: Draws the changes and their strengths.

    Returns:
        The changed images and masks, of the same shapes.
    """
    noise = torch.rand(
        len(BENDS) + len(COLOURS), len(defect), generator=generator, device=defect.device
    )
    chosen = noise.argsort(dim=0).argsort(dim=0) < number  # (10, B)
    upright = torch.eye(2, 3, device=defect.device).expand(len(defect), 2, 3)
    places = F.affine_grid(upright, list(defect.shape), align_corners=False)  # (B, H, W, 2)
    for bend, mine in zip(BENDS, chosen, strict=False):
        places = torch.where(mine.view(-1, 1, 1, 1), bend(places, generator), places)
    image = F.grid_sample(defect, places, padding_mode="border", align_corners=False)
    bent = F.grid_sample(mask.float(), places, mode="nearest", align_corners=False) > 0.5
    for change, mine in zip(COLOURS, chosen[len(BENDS) :], strict=True):
        image = apply_where(mine, image, lambda part: change(part, generator).clamp(0, 1))  # noqa: B023
    return image, bent


def paste(
    image: Tensor, defect: Tensor, mask: Tensor, ground: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lay defects over normal images.

    A defect of which more than two thirds lie on the ground stays in its place. Any other moves as
    a whole: the middle of its mask falls on a pixel of the ground, drawn among those where all of
    it fits into the image. If there is none, it stays.

    Args:
        image: (B, 3, H, W), normal images.
        defect: (B, 3, H, W).
        mask: (B, 1, H, W) bool, what to take from the defects.
        ground: (B, 1, H, W) bool, where defects may lie.
        generator: Draws the places.

    Returns:
        The images with defects, and the mask of what was pasted.
    """
    on_ground, whole = (part.flatten(1).sum(dim=1) for part in (mask & ground, mask))
    (top, bottom), (left, right) = extent(mask.any(dim=3)), extent(mask.any(dim=2))
    middle = (top + bottom) // 2, (left + right) // 2  # (B, 1, 1, 1) each, as all four
    rows, columns = pixel_grid(mask.shape[2], mask.shape[3], mask.device)
    fits = (rows >= middle[0] - top) & (rows < len(rows) - bottom + middle[0])
    fits = fits & (columns >= middle[1] - left)
    fits = fits & (columns < columns.shape[1] - right + middle[1]) & ground
    draw = torch.rand(mask.shape, generator=generator, device=mask.device)
    place = (draw * fits).flatten(1).argmax(dim=1)
    moves = (3 * on_ground <= 2 * whole) & fits.flatten(1).any(dim=1)
    down = place // mask.shape[3] - middle[0].flatten()
    across = place % mask.shape[3] - middle[1].flatten()
    moved = rolled(torch.cat([defect, mask.to(defect.dtype)], dim=1), moves * down, moves * across)
    pasted = moved[:, 3:] > 0.5
    return torch.where(pasted, moved[:, :3], image), pasted


def extent(filled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last true place of (B, 1, n) bool, (B, 1, 1, 1) int64 each.

    Where none is true, these are 0 and n - 1.
    """
    marks = filled.flatten(1).float()
    first, behind = marks.argmax(dim=1), marks.flip(1).argmax(dim=1)
    last = marks.shape[1] - 1 - behind
    return first.view(-1, 1, 1, 1), last.view(-1, 1, 1, 1)


def rolled(image: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Move each image (B, C, H, W) by its own (B,) pixels; what leaves enters at the other side."""
    batch, channels, height, width = image.shape
    rows = (torch.arange(height, device=image.device) - down[:, None]) % height  # (B, H)
    columns = (torch.arange(width, device=image.device) - across[:, None]) % width  # (B, W)
    place = (rows[:, :, None] * width + columns[:, None]).view(batch, 1, -1)
    return image.flatten(2).gather(2, place.expand(-1, channels, -1)).view_as(image)


# ---------------------------------------------------------- bends: where each pixel comes from


def quarter_turn(places: Tensor, generator: torch.Generator) -> Tensor:
    """Turn places (B, H, W, 2) in [-1, 1] by 90, 180 or 270 degrees."""
    quarters = (3 * uniform(places, generator)).floor() + 1
    return turned(places, quarters * (math.pi / 2))


def mirror(places: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror along x, y or both."""
    kind = uniform(places, generator)
    signs = torch.cat([kind < 2 / 3, kind >= 1 / 3], dim=-1)  # (B, 1, 1, 2), x and y
    return torch.where(signs, -places, places)


def transpose(places: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange x and y."""
    return places.flip(-1)


def lens(places: Tensor, generator: torch.Generator) -> Tensor:
    """Bend straight lines outwards or inwards."""
    squares = places.square().sum(dim=-1, keepdim=True) / 4
    return places * (1 + uniform(places, generator, -1, 1) * (squares + squares.square()))


def shift_zoom_turn(places: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to a sixteenth of a side, zoom by up to a fifth, turn by up to 45 degrees."""
    sides = places.new_tensor([places.shape[2], places.shape[1]])
    angle = uniform(places, generator, -math.pi / 4, math.pi / 4)
    shift = torch.cat([uniform(places, generator, -0.125, 0.125) for _ in range(2)], dim=-1)
    return turned(places * sides, angle) / sides / uniform(places, generator, 0.8, 1.2) + shift


def waves(places: Tensor, generator: torch.Generator) -> Tensor:
    """Shift rows and columns along waves of up to a twentieth of a side."""
    height, count = uniform(places, generator, 0, 0.1), uniform(places, generator, 1, 4)
    phase = torch.cat([uniform(places, generator, 0, 2 * math.pi) for _ in range(2)], dim=-1)
    return places + height * torch.sin(math.pi * count * places.flip(-1) + phase)


def turned(places: Tensor, angle: Tensor) -> Tensor:
    """Turn (B, H, W, 2) about the middle by (B, 1, 1, 1) radians."""
    x, y = places.split(1, dim=-1)
    return torch.cat([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], dim=-1)


# ------------------------------------------------------------------------------------- colours


def noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise with a standard deviation of up to a tenth."""
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return image + uniform(image, generator, 0, 0.1) * noise


def blurred(image: Tensor, generator: torch.Generator) -> Tensor:
    """Replace each pixel by the mean of the 5 x 5 pixels around it."""
    return F.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)


def brighter_or_sharper(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change the brightness, then the sharpness."""
    return sharpness(brightness(image, generator).clamp(0, 1), generator)


BENDS = (quarter_turn, mirror, transpose, lens, shift_zoom_turn, waves)
COLOURS = (noisy, blurred, brighter_or_sharper, hue_and_saturation)
