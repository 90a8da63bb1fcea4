"""Perlin noise for a batch of images at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def perlin_noise(cells: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return gradient noise, times the square root of 2.

    Between lattice points the contributions of the gradients are faded by
    6 t^5 - 15 t^4 + 10 t^3. The sum over lattice points separates into rows and columns, so the
    noise is computed as two products of small matrices.

    Args:
        cells: (2, B) float, lattice cells along the height and the width of each image.
        height: H.
        width: W.
        generator: Draws the gradients.

    Returns:
        (B, H, W) float32, mostly within [-1, 1].
    """
    # reading the maximum would wait for the GPU
    points = 2**8 + 1 if cells.is_cuda else int(cells.max()) + 1
    angle = torch.rand(cells.shape[1], points, points, generator=generator, device=cells.device) * (
        2 * math.pi
    )
    row_weight, row_offset = _faded(cells[0], height, points)
    column_weight, column_offset = _faded(cells[1], width, points)
    along_rows = (row_weight * row_offset) @ angle.sin() @ column_weight.mT
    along_columns = row_weight @ angle.cos() @ (column_weight * column_offset).mT
    return math.sqrt(2) * (along_rows + along_columns)


def _faded(cells: Tensor, length: int, points: int) -> tuple[Tensor, Tensor]:
    """Return the weight of each lattice point at each pixel of an axis, and their distance.

    Both are (B, L, points).
    """
    place = torch.arange(length, device=cells.device) / length * cells[:, None]
    offset = place[..., None] - torch.arange(points, device=cells.device)
    t = offset.abs().clamp(max=1)
    return 1 - t**3 * (t * (6 * t - 15) + 10), offset


def fractal_noise(
    batch: int, height: int, width: int, generator: torch.Generator, octaves: int = 4
) -> Tensor:
    """Return (B, 1, H, W) in [0, 1]: a sum of Perlin noise, weaker at higher frequencies."""
    device = generator.device
    start = torch.randint(1, 4, (2, batch), generator=generator, device=device)
    total = torch.zeros(batch, height, width, device=device)
    for octave in range(octaves):
        total += perlin_noise(2.0 ** (start + octave), height, width, generator) / 2**octave
    flat = total.flatten(1)
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    scaled = (total - low.view(-1, 1, 1)) / (high - low).clamp(min=1e-6).view(-1, 1, 1)
    return scaled.clamp(0, 1)[:, None]
