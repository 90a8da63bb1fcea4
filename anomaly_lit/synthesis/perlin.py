"""Textures under a mask of Perlin noise (DRAEM: Zavrtanik et al., ICCV 2021, arXiv:2108.07610)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_lit.synthesis.augment import augment, rotate
from anomaly_lit.synthesis.base import Synthesis, uniform
from anomaly_lit.synthesis.noise import perlin_noise
from anomaly_lit.synthesis.textures import TextureFolder, procedural_textures
from anomaly_lit.types import UserError


class PerlinMask:
    """Draws regions where Perlin noise is high.

    Args:
        exponents: Least and greatest u of 2^u lattice cells along an axis, drawn for each axis.
        rotation: Greatest turn of the noise, in degrees.
        area: Least and greatest share of the image; None takes all noise above ``threshold``.
        threshold: On noise in about [-1, 1].
        attempts: Draws of which the first that is not empty is taken.

    Raises:
        UserError: A range is not one.
    """

    def __init__(
        self,
        exponents: Sequence[int] = (0, 5),
        rotation: float = 90.0,
        area: Sequence[float] | None = None,
        threshold: float = 0.5,
        attempts: int = 2,
    ) -> None:
        if not 0 <= exponents[0] <= exponents[1] <= 8:
            raise UserError(f"dataset.synthesis: exponents={list(exponents)} must rise, in 0 to 8")
        if area is not None and not 0 < area[0] <= area[1] < 1:
            raise UserError(f"dataset.synthesis: area={list(area)} must rise, between 0 and 1")
        self.exponents = exponents
        self.rotation = rotation
        self.area = area
        self.threshold = threshold
        self.attempts = 1 if area is not None else attempts

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 1, H, W) bool for images (B, 3, H, W)."""
        batch, _, height, width = image.shape
        count = batch * self.attempts
        low, high = self.exponents
        exponents = torch.randint(
            low, high + 1, (2, count), generator=generator, device=image.device
        )
        noise = perlin_noise(2.0**exponents, height, width, generator)
        if self.rotation:
            angle = torch.rand(count, generator=generator, device=image.device)
            noise = rotate(noise[:, None], self.rotation * (2 * angle - 1))[:, 0]
        if self.area is not None:
            share = uniform(image, generator, *self.area).view(batch, 1)
            ordered = noise.flatten(1).sort(dim=1, descending=True).values
            last = (share * height * width).long().clamp(max=height * width - 1)
            return (noise > ordered.gather(1, last).view(-1, 1, 1))[:, None]
        high_noise = (noise > self.threshold).view(self.attempts, batch, height, width)
        filled = high_noise.flatten(2).any(dim=2)  # (attempts, B)
        first = filled.float().argmax(dim=0)  # 0 where all are empty
        rows = torch.arange(batch, device=image.device)
        return high_noise[first, rows][:, None]


class Perlin(Synthesis):
    """A texture shines through the image where Perlin noise is high.

    The texture is changed by three of ten augmentations first. ``beta`` of the image remains.

    Args:
        texture_dir: Folder of texture images, searched through; None draws textures from fractal
            noise, stripes, spots and colour ramps.
        max_textures: Most images read from it; each takes 3 bytes a pixel.
        beta: Least and greatest share of the image that remains under the texture.
        augmentations: Number of augmentations of a texture, 0 to 10.
        exponents: See ``PerlinMask``.
        rotation: See there.
        area: See there.
        threshold: See there.
        probability: See ``Synthesis``; DRAEM takes 0.5.
        foreground: See there.
        allow_empty: See there.

    Raises:
        UserError: A range is not one, or the folder holds no image.
    """

    def __init__(
        self,
        texture_dir: str | None = None,
        max_textures: int = 500,
        beta: Sequence[float] = (0.0, 0.8),
        augmentations: int = 3,
        exponents: Sequence[int] = (0, 5),
        rotation: float = 90.0,
        area: Sequence[float] | None = None,
        threshold: float = 0.5,
        probability: float = 0.5,
        foreground: bool = False,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        if not 0 <= beta[0] <= beta[1] < 1:
            raise UserError(f"dataset.synthesis: beta={list(beta)} must rise, from 0 to below 1")
        self.mask = PerlinMask(exponents, rotation, area, threshold)
        self.folder = None if texture_dir is None else TextureFolder(texture_dir, max_textures)
        self.beta = beta
        self.augmentations = augmentations

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        batch, _, height, width = image.shape
        draw = procedural_textures if self.folder is None else self.folder
        texture = draw(batch, height, width, generator)
        texture = augment(texture, self.augmentations, generator)
        beta = uniform(image, generator, *self.beta)
        return beta * image + (1 - beta) * texture, self.mask(image, generator)


class Smudge(Synthesis):
    """One colour shines through the image where Perlin noise is high (DSR).

    Args:
        beta: Least and greatest share of the image that remains under the colour.
        exponents: See ``PerlinMask``.
        rotation: See there.
        area: See there.
        threshold: See there.
        probability: See ``Synthesis``.
        foreground: See there.
        allow_empty: See there.
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
    ) -> None:
        super().__init__(probability, foreground, allow_empty)
        self.mask = PerlinMask(exponents, rotation, area, threshold)
        self.beta = beta

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        colour = torch.rand(len(image), 3, 1, 1, generator=generator, device=image.device)
        beta = uniform(image, generator, *self.beta)
        return beta * image + (1 - beta) * colour, self.mask(image, generator)
