"""Convolutional networks in pixel space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Encoder-decoder with skip connections and instance normalisation.

    Args:
        channels: Channels of the input.
        widths: Channels of the stages, finest first.
        classes: Channels of the output.
    """

    def __init__(self, channels: int, widths: Sequence[int], classes: int = 2) -> None:
        super().__init__()
        before = [channels, *widths[:-1]]
        self.down = nn.ModuleList(
            conv3(given, made, made) for given, made in zip(before, widths, strict=True)
        )
        fine_last = list(reversed(widths))
        self.shrink = nn.ModuleList(conv3(coarse, fine) for coarse, fine in pairwise(fine_last))
        self.up = nn.ModuleList(conv3(2 * fine, fine, fine) for fine in fine_last[1:])
        self.out = nn.Conv2d(widths[0], classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, classes, H, W); each stage but the first halves H and W."""
        stages: list[Tensor] = []
        for number, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if number else x)
            stages.append(x)
        for shrink, up, shortcut in zip(self.shrink, self.up, stages[-2::-1], strict=True):
            x = up(torch.cat([shrink(doubled(x)), shortcut], dim=1))
        return self.out(x)


def conv3(*channels: int, norm: Callable[[int], nn.Module] = nn.InstanceNorm2d) -> nn.Sequential:
    """Return 3 x 3 convolutions, each with a normalisation and ReLU."""
    layers: list[nn.Module] = []
    for given, made in pairwise(channels):
        layers += [nn.Conv2d(given, made, 3, padding=1), norm(made), nn.ReLU()]
    return nn.Sequential(*layers)


def doubled(x: Tensor) -> Tensor:
    """Map (B, C, h, w) to (B, C, 2 h, 2 w), bilinear with aligned corners."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
