"""The students of multi-scale imitation, and the image pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.aggregate import shrink
from anomaly_lit.nn.backbone import Backbone


class SeparateStudents(nn.Module):
    """A student for each level, from the teacher's map of the level before to the level's own.

    Levels count from 0. No student sees what another one made, so that errors do not add up and any
    of them can be left out.

    Args:
        teacher: Its first stage is the input of level 0, each further stage is imitated.
        depth: Residual blocks of a student.
        bottleneck: Channels between input and blocks where input and output have one resolution;
            None leaves this layer out.
    """

    def __init__(self, teacher: Backbone, depth: int, bottleneck: int | None) -> None:
        super().__init__()
        strides = [teacher.strides[1], *teacher.strides[1:]]  # the first map is pooled
        self.levels = nn.ModuleList(
            imitator(given, made, coarse // fine, depth, bottleneck)
            for (given, made), (fine, coarse) in zip(
                pairwise(teacher.channels), pairwise(strides), strict=True
            )
        )

    def forward(
        self, image: Tensor, inputs: Sequence[Tensor], chosen: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return imitations of the chosen levels.

        Args:
            image: Not used.
            inputs: The teacher's map before each level, (B, C, h, w).
            chosen: Numbers of the levels.
        """
        return {level: self.levels[level](inputs[level]) for level in chosen}


def imitator(
    given: int, made: int, stride: int, depth: int, bottleneck: int | None
) -> nn.Sequential:
    """Return a network from a teacher's map to the next.

    Where both have the same resolution it could copy its input, anomalies included; a bottleneck of
    few channels prevents this.
    """
    entry: list[nn.Module] = []
    if stride == 1 and bottleneck is not None:
        entry = [nn.Conv2d(given, bottleneck, 1)]
        given = bottleneck
    return nn.Sequential(
        *entry,
        nn.Conv2d(given, made, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(made),
        nn.ReLU(),
        *(BasicBlock(made, made) for _ in range(depth)),
        nn.Conv2d(made, made, 1),
    )


class ChainedStudent(nn.Module):
    """The teacher's network with random weights, from the image (STPM), for comparison.

    Args:
        teacher: Gives the architecture, the levels and the normalisation of the input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, teacher: Backbone) -> None:
        super().__init__()
        self.network: Any = timm.create_model(
            teacher.name.split(".")[0],
            features_only=True,
            out_indices=teacher.out_indices[1:],
            **teacher.options,
        )
        for module in self.network.modules():  # timm starts some of them at 0, torchvision none
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        self.register_buffer("mean", teacher.mean.clone(), persistent=False)
        self.register_buffer("std", teacher.std.clone(), persistent=False)

    def forward(
        self, image: Tensor, inputs: Sequence[Tensor], chosen: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return imitations of the chosen levels, as `SeparateStudents` does; reads the image."""
        maps = self.network((image - self.mean) / self.std)
        return {level: maps[level] for level in chosen}


def inputs_of(features: Sequence[Tensor], ratio: int) -> list[Tensor]:
    """Return the map before each level.

    Args:
        features: All of the teacher's maps, finest first.
        ratio: How many times the first is finer than the second. It is pooled to the same
            resolution, as a ResNet does with the output of its first convolution.
    """
    first = features[0]
    if ratio > 1:
        first = F.max_pool2d(first, ratio + 1, ratio, padding=ratio // 2)
    return [first, *features[1:-1]]


def at_scale(image: Tensor, factor: float, unit: int) -> Tensor:
    """Return (B, 3, H, W) images resized by a factor, with antialiasing.

    Sides are rounded to multiples of `unit`, the teacher's largest stride; otherwise the maps of
    different levels would not align.
    """
    height, width = (max(1, round(side * factor / unit)) * unit for side in image.shape[-2:])
    return image if image.shape[-2:] == (height, width) else shrink(image, (height, width))


def distance(target: Tensor, imitation: Tensor) -> Tensor:
    """Return half the squared distance of unit vectors at each position: (B, 1, h, w) in [0, 2]."""
    target, imitation = F.normalize(target.float(), dim=1), F.normalize(imitation.float(), dim=1)
    return 0.5 * (target - imitation).square().sum(dim=1, keepdim=True)


def at_size(map_: Tensor, size: torch.Size) -> Tensor:
    """Return a (B, 1, h, w) map at the image's size, bilinear, corners not aligned."""
    return F.interpolate(map_, size, mode="bilinear")
