"""Textures under a mask of Perlin noise (DRAEM: Zavrtanik et al., ICCV 2021, arXiv:2108.07610)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_lit.synthesis.augment import augment, rotate
from anomaly_lit.synthesis.base import Synthesis, check_pairs, uniform
from anomaly_lit.synthesis.noise import perlin_noise
from anomaly_lit.synthesis.textures import TextureFolder, procedural_textures
from anomaly_lit.types import check_range


class PerlinMask:
    """Draw regions where Perlin noise is high.

    Args:
        exponents: Smallest and largest u: an axis has 2^u lattice cells, and u is drawn for each
            axis.
        rotation: Largest rotation of the noise, in degrees.
        area: Smallest and largest share of the image; None takes all noise above `threshold`.
        threshold: Threshold on the noise, which is in about [-1, 1].
        attempts: Number of draws; the first that is not empty is taken.

    Raises:
        UserError: A range does not rise or leaves its bounds.
    """

    def __init__(
        self,
        exponents: Sequence[int] = (0, 5),
        rotation: float = 90.0,
        area: Sequence[float] | None = None,
        threshold: float = 0.5,
        attempts: int = 2,
    ) -> None:
        check_pairs("[0, 8]", exponents=exponents)
        check_pairs("(0, 1)", area=area)
        check_range("dataset.synthesis", "(-inf, inf)", rotation=rotation, threshold=threshold)
        check_range("dataset.synthesis", "[1, inf)", attempts=attempts)
        self.exponents = exponents
        self.rotation = rotation
        self.area = area
        self.threshold = threshold
        self.attempts = 1 if area is not None else attempts

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return (B, 1, H, W) bool for images (B, 3, H, W)."""
        batch, _, height, width = image.shape
        noise = self.noise(image, generator)
        if self.area is not None:
            share = uniform(image, generator, *self.area).view(batch, 1)
            ordered = noise.flatten(1).sort(dim=1, descending=True).values
            last = (share * height * width).long().clamp(max=height * width - 1)
            return (noise > ordered.gather(1, last).view(-1, 1, 1))[:, None]
        return first_filled((noise > self.threshold).view(self.attempts, batch, height, width))

    def noise(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Draw rotated noise in about [-1, 1], (attempts * B, H, W)."""
        count, (height, width) = len(image) * self.attempts, image.shape[-2:]
        low, high = self.exponents
        exponents = torch.randint(
            low, high + 1, (2, count), generator=generator, device=image.device
        )
        noise = perlin_noise(2.0**exponents, height, width, generator)
        if self.rotation:
            angle = torch.rand(count, generator=generator, device=image.device)
            noise = rotate(noise[:, None], self.rotation * (2 * angle - 1))[:, 0]
        return noise


def first_filled(drawn: Tensor) -> Tensor:
    """Map several draws (n, B, H, W) bool to the first of each image that is not empty."""
    filled = drawn.flatten(2).any(dim=2)  # (n, B)
    first = filled.float().argmax(dim=0)  # 0 where all are empty
    rows = torch.arange(drawn.shape[1], device=drawn.device)
    return drawn[first, rows][:, None]


class Perlin(Synthesis):
    """Lay a texture over the image where Perlin noise is high.

    The texture is augmented first. A share `beta` of the image remains visible under it.

    Args:
        texture_dir: Folder of texture images, with its sub-folders; None draws textures from
            fractal noise, stripes, spots and colour ramps.
        max_textures: Largest number of images read from the folder, None for all; each takes 3
            bytes per pixel.
        beta: Smallest and largest share of the image that remains under the texture.
        augmentations: Number of augmentations of a texture, 0 to 10; DRAEM applies 3.
        exponents: See `PerlinMask`.
        rotation: See `PerlinMask`.
        area: See `PerlinMask`.
        threshold: See `PerlinMask`.
        attempts: See `PerlinMask`.
        probability: See `Synthesis`; DRAEM uses 0.5.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.
        shuffle: See `augment`; OneNIP shuffles.
        mirror: See `augment`; OneNIP mirrors.

    Raises:
        UserError: A range does not rise or leaves its bounds, or the folder has no image.
    """

    def __init__(
        self,
        texture_dir: str | None = None,
        max_textures: int | None = 500,
        beta: Sequence[float] = (0.0, 0.8),
        augmentations: int = 3,
        exponents: Sequence[int] = (0, 5),
        rotation: float = 90.0,
        area: Sequence[float] | None = None,
        threshold: float = 0.5,
        probability: float = 0.5,
        foreground: bool = False,
        allow_empty: bool = False,
        attempts: int = 2,
        shuffle: bool = False,
        mirror: bool = False,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        check_pairs("[0, 1)", beta=beta)
        check_range("dataset.synthesis", "[0, 10]", augmentations=augmentations)
        self.mask = PerlinMask(exponents, rotation, area, threshold, attempts)
        self.folder = None if texture_dir is None else TextureFolder(texture_dir, max_textures)
        self.beta = beta
        self.augmentations = augmentations
        self.shuffle = shuffle
        self.mirror = mirror

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Draw a texture or colour, and a mask, per image."""
        batch, _, height, width = image.shape
        draw = procedural_textures if self.folder is None else self.folder
        texture = draw(batch, height, width, generator)
        texture = augment(texture, self.augmentations, generator, self.shuffle, self.mirror)
        beta = uniform(image, generator, *self.beta)
        return beta * image + (1 - beta) * texture, self.mask(image, generator)


class Smudge(Synthesis):
    """Lay a single colour over the image where Perlin noise is high (DSR).

    Args:
        beta: Smallest and largest share of the image that remains under the colour.
        exponents: See `PerlinMask`.
        rotation: See `PerlinMask`.
        area: See `PerlinMask`.
        threshold: See `PerlinMask`.
        attempts: See `PerlinMask`.
        probability: See `Synthesis`.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.

    Raises:
        UserError: A range does not rise or leaves its bounds.
    """

    def __init__(
        self,
        beta: Sequence[float] = (0.0, 0.8),
        exponents: Sequence[int] = (0, 5),
        rotation: float = 90.0,
        area: Sequence[float] | None = None,
        threshold: float = 0.5,
        probability: float = 0.5,
        foreground: bool = False,
        allow_empty: bool = False,
        attempts: int = 2,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        check_pairs("[0, 1)", beta=beta)
        self.mask = PerlinMask(exponents, rotation, area, threshold, attempts)
        self.beta = beta

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Draw a texture or colour, and a mask, per image."""
        colour = torch.rand(len(image), 3, 1, 1, generator=generator, device=image.device)
        beta = uniform(image, generator, *self.beta)
        return beta * image + (1 - beta) * colour, self.mask(image, generator)
