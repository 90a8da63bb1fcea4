"""The ten augmentations of DRAEM's textures, of which each image gets a few."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kornia import enhance
from kornia.geometry.transform import rotate
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.base import uniform

__all__ = ["augment", "colour_jitter", "rotate"]


def augment(image: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Changes each image by some of ten augmentations, drawn without replacement.

    They come in one order for all images.

    Args:
        image: (B, 3, H, W) float32 in [0, 1].
        number: Augmentations of each image, 0 to 10.
        generator: Decides which, and how strongly.
    """
    if number == 0:
        return image
    changes = (
        _gamma,
        _brightness,
        _sharpness,
        _hue_and_saturation,
        _solarize,
        _posterize,
        _invert,
        _autocontrast,
        _equalize,
        _turn,
    )
    noise = torch.rand(len(changes), len(image), generator=generator, device=image.device)
    chosen = noise.argsort(dim=0).argsort(dim=0) < number  # (10, B)
    for change, mine in zip(changes, chosen, strict=True):
        image = apply_where(mine, image, lambda part: change(part, generator).clamp(0, 1))  # noqa: B023
    return image


def apply_where(chosen: Tensor, image: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Changes the chosen images of a batch.

    On a CPU only these are computed. On a GPU all are, since to know which are chosen would make
    the CPU wait.

    Args:
        chosen: (B,) bool.
        image: (B, C, H, W).
        change: Of any number of images.
    """
    if not chosen.is_cpu:
        return torch.where(chosen.view(-1, 1, 1, 1), change(image), image)
    rows = chosen.nonzero()[:, 0]
    return image.index_copy(0, rows, change(image[rows])) if len(rows) else image


def colour_jitter(image: Tensor, strength: float, hue: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation times 1 +- strength, hue turned by +- ``hue`` circles."""
    factors = [_per_image(uniform(image, generator, 1 - strength, 1 + strength)) for _ in range(3)]
    image = (image * factors[0].view(-1, 1, 1, 1)).clamp(0, 1)
    grey = _grey(image)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    image = (mean + factors[1].view(-1, 1, 1, 1) * (image - mean)).clamp(0, 1)
    turn = uniform(image, generator, -2 * math.pi * hue, 2 * math.pi * hue)
    return _turn_colours(image, turn, factors[2].view(-1, 1, 1, 1)).clamp(0, 1)


def _gamma(image: Tensor, generator: torch.Generator) -> Tensor:
    gamma = 0.5 + 1.5 * torch.rand(len(image), 3, 1, 1, generator=generator, device=image.device)
    return image.clamp(min=1e-6) ** gamma


def _brightness(image: Tensor, generator: torch.Generator) -> Tensor:
    return image * uniform(image, generator, 0.8, 1.2) + uniform(image, generator, -30, 30) / 255


def _sharpness(image: Tensor, generator: torch.Generator) -> Tensor:
    """Away from, or towards, a slight blur; kornia's convolution takes eight times as long."""
    blurred = (9 * F.avg_pool2d(image, 3, 1, 1, count_include_pad=False) + 4 * image) / 13
    return blurred + uniform(image, generator, 0, 3) * (image - blurred)


def _hue_and_saturation(image: Tensor, generator: torch.Generator) -> Tensor:
    turn = uniform(image, generator, -50 / 180 * math.pi, 50 / 180 * math.pi)
    return _turn_colours(image, turn, uniform(image, generator, 0.5, 1.5))


def _solarize(image: Tensor, generator: torch.Generator) -> Tensor:
    """Applied to half of those that drew it."""
    threshold = uniform(image, generator, 32, 128) / 255
    applied = uniform(image, generator) < 0.5
    return torch.where(applied & (image >= threshold), 1 - image, image)


def _posterize(image: Tensor, generator: torch.Generator) -> Tensor:
    levels = 2.0 ** torch.randint(
        2, 7, (len(image), 1, 1, 1), generator=generator, device=image.device
    )
    return (image * levels).floor() / levels


def _invert(image: Tensor, generator: torch.Generator) -> Tensor:
    return enhance.invert(image)


def _autocontrast(image: Tensor, generator: torch.Generator) -> Tensor:
    return enhance.normalize_min_max(image)


def _equalize(image: Tensor, generator: torch.Generator) -> Tensor:
    """Each channel by its ranks: the value becomes the share of pixels that are not brighter."""
    flat = (image.flatten(2) * 255).long()
    count = torch.zeros(*flat.shape[:2], 256, device=image.device)
    count.scatter_add_(2, flat, torch.ones_like(image.flatten(2)))
    share = count.cumsum(dim=2) / flat.shape[2]
    return share.gather(2, flat).view_as(image)


def _turn(image: Tensor, generator: torch.Generator) -> Tensor:
    angle = _per_image(uniform(image, generator, -45, 45))
    return rotate(image, angle, padding_mode="reflection")


def _per_image(values: Tensor) -> Tensor:
    """(B, 1, 1, 1) to (B,), as kornia takes parameters."""
    return values.flatten()


def _grey(image: Tensor) -> Tensor:
    weight = torch.tensor([0.299, 0.587, 0.114], device=image.device).view(1, 3, 1, 1)
    return (image * weight).sum(dim=1, keepdim=True)


def _turn_colours(image: Tensor, angle: Tensor, saturation: Tensor) -> Tensor:
    """Turns colours about the grey axis and stretches them from it: one 3 x 3 matrix an image.

    kornia goes through HSV for it, which takes ten times as long; textures do not care.
    """
    axis = torch.full((3, 3), 1 / 3, device=image.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=image.device) / math.sqrt(3)
    cosine, sine = angle.view(-1, 1, 1).cos(), angle.view(-1, 1, 1).sin()
    chroma = cosine * (torch.eye(3, device=image.device) - axis) + sine * cross
    matrix = axis + saturation.view(-1, 1, 1) * chroma
    return (matrix @ image.flatten(2)).view_as(image)
