"""Anomalies of many shapes and contents (after CMA-AE: Luo et al., 2023, arXiv:2208.03879)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.augment import augment
from anomaly_lit.synthesis.base import Synthesis, check_pairs, pixel_grid, uniform
from anomaly_lit.synthesis.nsa import partners
from anomaly_lit.synthesis.perlin import PerlinMask
from anomaly_lit.synthesis.textures import TextureFolder, procedural_textures
from anomaly_lit.types import UserError, check_range

SHAPES = ("perlin", "blob", "stroke", "strip")
CONTENTS = ("texture", "other", "shuffled", "grey")
STROKE_STEPS = 96
TILES = 8  # per side of the shuffled image


class GeneralAnomalies(Synthesis):
    """Fill a region of one of four shapes with one of four contents.

    Shapes: Perlin noise above a threshold, a blob, a stroke along a random walk, a rotated strip.
    Contents: a texture; another normal image of the batch, of the same category, shifted; the image
    itself in shuffled tiles; a single grey with grain. The content is augmented, then laid over the
    image, fading out at the border of the region. The paper states its aims, but not these numbers:
    they follow the later public code of the same laboratory, and are ours where it has none.

    Args:
        texture_dir: Folder of texture or natural images; None draws textures.
        max_textures: Largest number of images read from the folder; each takes 3 bytes per pixel.
        shapes: Weights of the four shapes, by name.
        contents: Weights of the four contents, by name.
        beta: Smallest and largest share of the image that remains under the content.
        augmentations: Number of augmentations of the content, 0 to 10.
        feather: Side of the window that fades the border, in pixels, odd; 1 gives a hard border.
            Faded pixels count as corrupted.
        probability: See `Synthesis`.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.

    Raises:
        UserError: A range does not rise or leaves its bounds, or a shape or content is unknown.
    """

    def __init__(
        self,
        texture_dir: str | None = None,
        max_textures: int = 500,
        shapes: dict[str, float] | None = None,
        contents: dict[str, float] | None = None,
        beta: Sequence[float] = (0.0, 0.6),
        augmentations: int = 3,
        feather: int = 3,
        probability: float = 0.8,
        foreground: bool = False,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        check_pairs("[0, 1)", beta=beta)
        check_range("dataset.synthesis", "[0, 10]", augmentations=augmentations)
        if feather < 1 or feather % 2 == 0:
            raise UserError(f"dataset.synthesis: feather={feather} must be odd and above 0")
        self.shapes = _shares("shapes", shapes, SHAPES)
        self.contents = _shares("contents", contents, CONTENTS)
        self.folder = None if texture_dir is None else TextureFolder(texture_dir, max_textures)
        self.perlin = PerlinMask()
        self.beta = beta
        self.augmentations = augmentations
        self.feather = feather

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Lay one content over one region per image."""
        region = self._region(image, generator)
        content = augment(self._content(image, generator, category), self.augmentations, generator)
        beta = uniform(image, generator, *self.beta)
        window = self.feather
        alpha = F.avg_pool2d(region.float(), window, 1, window // 2, count_include_pad=False)
        laid_over = beta * image + (1 - beta) * content
        return image + alpha * (laid_over - image), alpha > 0

    def _region(self, image: Tensor, generator: torch.Generator) -> Tensor:
        makers = (self.perlin, blob, stroke, strip)
        drawn = torch.stack([maker(image, generator) for maker in makers])
        return _one_each(drawn, self.shapes, generator)

    def _content(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> Tensor:
        batch, _, height, width = image.shape
        draw = procedural_textures if self.folder is None else self.folder
        grain = 0.1 * torch.randn(image.shape, generator=generator, device=image.device)
        drawn = torch.stack(
            [
                draw(batch, height, width, generator),
                shifted(image[partners(batch, category, generator)], generator),
                shuffled_tiles(image, generator),
                uniform(image, generator) + grain,
            ]
        )
        return _one_each(drawn, self.contents, generator).clamp(0, 1)


def blob(image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (B, 1, H, W) bool: a disc with a wavy outline, anywhere in the image."""
    rows, columns, side = _centred_grid(image, generator)
    angle, distance = torch.atan2(rows, columns), (rows.square() + columns.square()).sqrt()
    radius = torch.ones_like(angle)
    for waves in range(2, 6):
        phase = uniform(image, generator, 0, 2 * math.pi)
        radius = radius + uniform(image, generator, 0, 0.6 / waves) * (waves * angle + phase).cos()
    return distance <= radius * side * uniform(image, generator, 0.03, 0.15)


def strip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (B, 1, H, W) bool: a thin rotated rectangle, anywhere in the image."""
    rows, columns, side = _centred_grid(image, generator)
    angle = uniform(image, generator, 0, math.pi)
    along = angle.cos() * columns + angle.sin() * rows
    across = angle.cos() * rows - angle.sin() * columns
    half_length = uniform(image, generator, 0.05, 0.3) * side
    half_width = uniform(image, generator, 0.004, 0.03) * side
    return (along.abs() <= half_length) & (across.abs() <= half_width.clamp(min=0.5))


def stroke(image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (B, 1, H, W) bool: the path of a random walk, 1, 3 or 5 pixels wide."""
    batch, _, height, width = image.shape
    start = torch.rand(2, batch, 1, generator=generator, device=image.device)
    turns = 0.35 * torch.randn(batch, STROKE_STEPS, generator=generator, device=image.device)
    heading = uniform(image, generator, 0, 2 * math.pi).view(batch, 1) + turns.cumsum(dim=1)
    pace = min(height, width) / 256
    rows = start[0] * height + pace * heading.sin().cumsum(dim=1)
    columns = start[1] * width + pace * heading.cos().cumsum(dim=1)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    place = rows.long().clamp(0, height - 1) * width + columns.long().clamp(0, width - 1)
    line = torch.zeros(batch, height * width, device=image.device)
    line = line.scatter_reduce(1, place, inside.float(), "amax").view(batch, 1, height, width)
    thick = [line, *(F.max_pool2d(line, 2 * reach + 1, 1, reach) for reach in (1, 2))]
    return _one_each(torch.stack(thick), [1 / 3] * 3, generator) > 0


def shifted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by a random distance; what leaves on one side enters on the other."""
    batch, channels, height, width = image.shape
    rows = torch.arange(height, device=image.device) + (uniform(image, generator) * height).long()
    columns = torch.arange(width, device=image.device)[:, None]
    columns = columns + (uniform(image, generator) * width).long()
    place = (rows % height).view(batch, height, 1) * width + (columns % width).view(batch, 1, width)
    place = place.view(batch, 1, -1).expand(-1, channels, -1)
    return image.flatten(2).gather(2, place).view_as(image)


def shuffled_tiles(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle the 8 x 8 tiles of each image; its edge is repeated up to a multiple of 8."""
    batch, channels, height, width = image.shape
    tall, wide = -(-height // TILES), -(-width // TILES)
    padded = F.pad(image, (0, wide * TILES - width, 0, tall * TILES - height), mode="replicate")
    tiles = padded.view(batch, channels, TILES, tall, TILES, wide).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(batch, TILES * TILES, channels, tall, wide)
    noise = torch.rand(batch, TILES * TILES, generator=generator, device=image.device)
    order = noise.argsort(dim=1).view(batch, -1, 1, 1, 1).expand_as(tiles)
    tiles = tiles.gather(1, order).view(batch, TILES, TILES, channels, tall, wide)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(padded.shape)[..., :height, :width]


def _centred_grid(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Return rows and columns relative to a random centre, and the shorter side.

    Rows and columns broadcast to (B, 1, H, W).
    """
    height, width = image.shape[-2:]
    rows, columns = pixel_grid(height, width, image.device)
    rows = rows - uniform(image, generator, 0, height)
    columns = columns - uniform(image, generator, 0, width)
    return rows, columns, min(height, width)


def _one_each(drawn: Tensor, shares: Sequence[float], generator: torch.Generator) -> Tensor:
    """Reduce (K, B, ...) to (B, ...): draw one of K per image, by shares that sum to 1."""
    bounds = torch.tensor(shares[:-1], device=drawn.device).cumsum(dim=0)
    draw = torch.rand(drawn.shape[1], generator=generator, device=drawn.device)
    number = torch.bucketize(draw, bounds, right=True)
    return drawn[number, torch.arange(drawn.shape[1], device=drawn.device)]


def _shares(key: str, weights: dict[str, float] | None, names: Sequence[str]) -> list[float]:
    given = weights or dict.fromkeys(names, 1.0)
    values = [given.get(name, 0.0) for name in names]
    if set(given) - set(names) or min(values) < 0 or sum(values) <= 0:
        raise UserError(
            f"dataset.synthesis.{key}={given}: give weights of {', '.join(names)}, at least 0, one "
            "above 0"
        )
    return [value / sum(values) for value in values]
