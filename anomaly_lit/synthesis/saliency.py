"""Textures on what is salient in the image (SGSF: Xing et al., 2022, arXiv:2209.12440)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.base import foreground_of, uniform
from anomaly_lit.synthesis.perlin import Perlin, PerlinMask, first_filled
from anomaly_lit.types import check_choice, check_range

SIDE = 64  # of the grey image in which the spectral residual looks for what is salient

FLOOR = 1e-4  # of the largest amplitude; below it lies rounding, whose phase is random


class SaliencyPerlin(Perlin):
    """Lay a texture over the image where Perlin noise, weighted by saliency, is high.

    The authors name this the saliency augmentation module. Their saliency is that of a trained
    network (CPD); here it is computed from the image. They weigh the random grid from which the
    noise is made, here the noise is weighed.

    Args:
        saliency: `foreground`: 1 where the image differs in colour from its border, for objects.
            `spectral`: what is rare in the image's spectrum. `none`: the whole image, for textures.
        threshold: The noise must exceed threshold + slope * (mean saliency), without saliency the
            threshold alone; the authors take 0.4.
        slope: See `threshold`; the authors take 0.2.
        area: Smallest and largest share of the salient region to cover, drawn on a log scale,
            instead of the threshold.
        attempts: Number of draws; the first that is not empty is taken.
        texture_dir: See `Perlin`.
        max_textures: See `Perlin`.
        beta: See `Perlin`; the authors' opacity of the texture lies in [0.1, 1].
        augmentations: See `Perlin`.
        exponents: See `Perlin`.
        rotation: See `Perlin`.
        probability: See `Synthesis`; the authors corrupt three of four images.
        foreground: See `Synthesis`.
        allow_empty: See `Synthesis`.

    Raises:
        UserError: A range does not rise or leaves its bounds, or the saliency is unknown.
    """

    def __init__(
        self,
        saliency: Literal["foreground", "spectral", "none"] = "foreground",
        threshold: float = 0.4,
        slope: float = 0.2,
        area: Sequence[float] | None = None,
        attempts: int = 2,
        texture_dir: str | None = None,
        max_textures: int = 500,
        beta: Sequence[float] = (0.0, 0.9),
        augmentations: int = 3,
        exponents: Sequence[int] = (0, 5),
        rotation: float = 90.0,
        probability: float = 0.75,
        foreground: bool = False,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(
            texture_dir,
            max_textures,
            beta,
            augmentations,
            probability=probability,
            foreground=foreground,
            allow_empty=allow_empty,
        )
        self.mask = SaliencyMask(saliency, slope, exponents, rotation, area, threshold, attempts)


class SaliencyMask(PerlinMask):
    """Draw regions where Perlin noise times saliency is high.

    Args:
        saliency: See `SaliencyPerlin`.
        slope: See there.
        exponents: See `PerlinMask`.
        rotation: See `PerlinMask`.
        area: See `SaliencyPerlin`.
        threshold: See there.
        attempts: See there.

    Raises:
        UserError: As for `PerlinMask`, or the saliency is unknown.
    """

    def __init__(
        self,
        saliency: str,
        slope: float,
        exponents: Sequence[int],
        rotation: float,
        area: Sequence[float] | None,
        threshold: float,
        attempts: int,
    ) -> None:
        super().__init__(exponents, rotation, area, threshold, attempts)
        check_range("dataset.synthesis", "(-inf, inf)", slope=slope)
        check_range("dataset.synthesis", "[1, inf)", attempts=attempts)
        maps = {"foreground": foreground_of, "spectral": spectral_residual, "none": None}
        check_choice("dataset.synthesis", maps, saliency=saliency)
        self.saliency = maps[saliency]
        self.slope = slope

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return (B, 1, H, W) bool for images (B, 3, H, W)."""
        noise = self.noise(image, generator).unflatten(0, (self.attempts, len(image)))
        salient = torch.ones_like(image[:, 0])  # (B, H, W) in [0, 1]
        if self.saliency is not None:
            salient = self.saliency(image)[:, 0].float()
        mean = salient.mean(dim=(1, 2), keepdim=True)
        if self.area is not None:
            low, high = self.area
            share = low * (high / low) ** uniform(image, generator)
            return highest(salient * (noise[0] + 1) / 2, salient >= mean, share.view(-1, 1))
        rise = 0.0 if self.saliency is None else self.slope * mean
        return first_filled(salient * noise > self.threshold + rise)


def highest(values: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """Return the highest values inside a region.

    Args:
        values: (B, H, W), at least -1.
        region: (B, H, W) bool, not empty.
        share: (B, 1), of the region's pixels.

    Returns:
        (B, 1, H, W) bool, at least one pixel of each image.
    """
    inside = torch.where(region, values, -2.0).flatten(1)
    count = (share * region.flatten(1).sum(dim=1, keepdim=True)).round().long().clamp(min=1)
    ordered = inside.sort(dim=1, descending=True).values
    return (inside >= ordered.gather(1, count - 1)).view_as(region)[:, None]


def spectral_residual(image: Tensor) -> Tensor:
    """Return what is rare in the spectrum of each image (Hou and Zhang, CVPR 2007).

    Args:
        image: (B, 3, H, W) float32 in [0, 1].

    Returns:
        (B, 1, H, W) in [0, 1], from 0 to 1 in each image; 1 everywhere in a plain one.
    """
    grey = F.interpolate(
        image.mean(dim=1, keepdim=True), (SIDE, SIDE), mode="bilinear", antialias=True
    )
    spectrum = torch.fft.fft2(grey)
    amplitude = spectrum.abs()
    floor = FLOOR * amplitude.amax(dim=(2, 3), keepdim=True)
    strength = (amplitude + floor).log()
    around = F.avg_pool2d(F.pad(strength, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    rare = (strength - around).exp() * amplitude / (amplitude + floor)
    residual = torch.fft.ifft2(torch.polar(rare, spectrum.angle()))
    salient = gaussian_blur2d(residual.abs().square(), (19, 19), (3.0, 3.0))
    salient = F.interpolate(salient, image.shape[-2:], mode="bilinear")
    low = salient.amin(dim=(2, 3), keepdim=True)
    spread = salient.amax(dim=(2, 3), keepdim=True) - low
    scaled = (salient - low) / spread.clamp(min=1e-12)
    plain = image.flatten(2).amax(dim=2) - image.flatten(2).amin(dim=2) < 1e-6
    return torch.where(plain.all(dim=1).view(-1, 1, 1, 1), torch.ones_like(scaled), scaled)
