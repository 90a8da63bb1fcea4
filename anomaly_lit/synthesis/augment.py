"""The ten augmentations of DRAEM's textures; each image gets some of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kornia import enhance
from kornia.geometry.transform import rotate
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis.base import uniform

__all__ = ["augment", "change_one_colour", "colour_jitter", "rotate", "turn_grey"]


def augment(
    image: Tensor,
    number: int,
    generator: torch.Generator,
    shuffle: bool = False,
    mirror: bool = False,
) -> Tensor:
    """Apply some of ten augmentations to each image, drawn without replacement.

    Args:
        image: (B, 3, H, W) float32 in [0, 1].
        number: Number of augmentations per image, 0 to 10.
        generator: Draws the augmentations and their strengths.
        shuffle: Apply an image's augmentations in a random order; otherwise the order is the same
            for all images, which is faster.
        mirror: Make the tenth augmentation a mirroring with a chance of one half, instead of a
            rotation by up to 45 degrees.
    """
    if number == 0:
        return image
    changes = (
        _gamma,
        brightness,
        sharpness,
        hue_and_saturation,
        _solarize,
        _posterize,
        _invert,
        _autocontrast,
        _equalize,
        _mirror if mirror else _turn,
    )
    noise = torch.rand(len(changes), len(image), generator=generator, device=image.device)
    rank = noise.argsort(dim=0).argsort(dim=0)  # (10, B), each change's place in an image's order
    rounds = [rank == place for place in range(number)] if shuffle else [rank < number]
    for chosen in rounds:
        for change, mine in zip(changes, chosen, strict=True):
            image = apply_where(mine, image, lambda part: change(part, generator).clamp(0, 1))  # noqa: B023
    return image


def apply_where(chosen: Tensor, image: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a change to the chosen images of a batch.

    On a CPU the change is computed for the chosen images only. On a GPU it is computed for all,
    since selecting images there would make the CPU wait for it.

    Args:
        chosen: (B,) bool.
        image: (B, C, H, W).
        change: Function of any number of images.
    """
    if not chosen.is_cpu:
        return torch.where(chosen.view(-1, 1, 1, 1), change(image), image)
    rows = chosen.nonzero()[:, 0]
    return image.index_copy(0, rows, change(image[rows])) if len(rows) else image


def colour_jitter(image: Tensor, strength: float, hue: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation by up to `strength`, and the hue by up to `hue`.

    `strength` is relative; `hue` is a share of the colour circle.
    """
    factors = [_per_image(uniform(image, generator, 1 - strength, 1 + strength)) for _ in range(3)]
    image = (image * factors[0].view(-1, 1, 1, 1)).clamp(0, 1)
    grey = _grey(image)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    image = (mean + factors[1].view(-1, 1, 1, 1) * (image - mean)).clamp(0, 1)
    turn = uniform(image, generator, -2 * math.pi * hue, 2 * math.pi * hue)
    return _turn_colours(image, turn, factors[2].view(-1, 1, 1, 1)).clamp(0, 1)


def change_one_colour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast or saturation: one of them for each image, by up to `strength`.

    Each moves the image away from, or towards, another one: a black image, one of its mean grey, or
    its grey version.

    Args:
        image: (B, 3, H, W) float32 in [0, 1].
        strength: Largest relative change.
        generator: Draws the kind and the size of the change.
    """
    which = torch.randint(3, (len(image), 1, 1, 1), generator=generator, device=image.device)
    factor = uniform(image, generator, 1 - strength, 1 + strength)
    grey = _grey(image)
    other = torch.where(which == 1, grey.mean(dim=(2, 3), keepdim=True), grey) * (which > 0)
    return (other + factor * (image - other)).clamp(0, 1)


def turn_grey(image: Tensor) -> Tensor:
    """Give all three channels of (B, 3, H, W) images their brightness."""
    return _grey(image).expand_as(image)


def _gamma(image: Tensor, generator: torch.Generator) -> Tensor:
    gamma = 0.5 + 1.5 * torch.rand(len(image), 3, 1, 1, generator=generator, device=image.device)
    return image.clamp(min=1e-6) ** gamma


def brightness(image: Tensor, generator: torch.Generator) -> Tensor:
    """Scale all values by up to a fifth and add up to 30 of 255; not clipped."""
    return image * uniform(image, generator, 0.8, 1.2) + uniform(image, generator, -30, 30) / 255


def sharpness(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move away from, or towards, a slight blur; kornia's convolution takes eight times as long."""
    blurred = (9 * F.avg_pool2d(image, 3, 1, 1, count_include_pad=False) + 4 * image) / 13
    return blurred + uniform(image, generator, 0, 3) * (image - blurred)


def hue_and_saturation(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the hue by up to 50 degrees and scale the saturation by up to a half; not clipped."""
    turn = uniform(image, generator, -50 / 180 * math.pi, 50 / 180 * math.pi)
    return _turn_colours(image, turn, uniform(image, generator, 0.5, 1.5))


def _solarize(image: Tensor, generator: torch.Generator) -> Tensor:
    """Solarize each image with a chance of one half."""
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
    """Replace each value by the share of the channel's pixels that are not brighter."""
    flat = (image.flatten(2) * 255).long()
    count = torch.zeros(*flat.shape[:2], 256, device=image.device)
    count.scatter_add_(2, flat, torch.ones_like(image.flatten(2)))
    share = count.cumsum(dim=2) / flat.shape[2]
    return share.gather(2, flat).view_as(image)


def _turn(image: Tensor, generator: torch.Generator) -> Tensor:
    angle = _per_image(uniform(image, generator, -45, 45))
    return rotate(image, angle, padding_mode="reflection")


def _mirror(image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(uniform(image, generator) < 0.5, image.flip(-1), image)


def _per_image(values: Tensor) -> Tensor:
    """Reshape (B, 1, 1, 1) to (B,), the shape of kornia's parameters."""
    return values.flatten()


def _grey(image: Tensor) -> Tensor:
    weight = torch.tensor([0.299, 0.587, 0.114], device=image.device).view(1, 3, 1, 1)
    return (image * weight).sum(dim=1, keepdim=True)


def _turn_colours(image: Tensor, angle: Tensor, saturation: Tensor) -> Tensor:
    """Rotate colours about the grey axis and scale their distance from it, by a matrix per image.

    kornia converts to HSV and back, which takes ten times as long; for textures the difference
    does not matter.
    """
    axis = torch.full((3, 3), 1 / 3, device=image.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=image.device) / math.sqrt(3)
    cosine, sine = angle.view(-1, 1, 1).cos(), angle.view(-1, 1, 1).sin()
    chroma = cosine * (torch.eye(3, device=image.device) - axis) + sine * cross
    matrix = axis + saturation.view(-1, 1, 1) * chroma
    return (matrix @ image.flatten(2)).view_as(image)
