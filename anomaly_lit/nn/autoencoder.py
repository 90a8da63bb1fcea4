"""A convolutional auto-encoder for images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Stages that each halve the map: 4 x 4 convolution, batch normalisation, leaky ReLU.

    Args:
        channels: Channels of the stages, finest first.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(*halving(given, made))
            for given, made in zip([3, *channels[:-1]], channels, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to the maps of all stages, finest first."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps


def halving(given: int, made: int) -> list[nn.Module]:
    """Return the layers of a stage that halves a map of `given` channels."""
    return [nn.Conv2d(given, made, 4, 2, 1, bias=False), nn.BatchNorm2d(made), nn.LeakyReLU(0.2)]


class Decoder(nn.Module):
    """The mirrored encoder; maps passed on from the encoder are joined at the stage of their size.

    Args:
        channels: Channels of the encoder's stages, coarsest first.
        given: How many of the encoder's maps are passed on, from the coarsest; 1 is a plain
            auto-encoder.
    """

    def __init__(self, channels: Sequence[int], given: int = 1) -> None:
        super().__init__()
        made = [*channels[1:], 3]
        read = [count * (2 if 0 < n < given else 1) for n, count in enumerate(channels)]
        self.stages = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, 2, 1)
            for before, after in zip(read, made, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in made[:-1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map the encoder's maps, coarsest first, to (B, 3, H, W) in [0, 1]."""
        x = maps[0]
        for number, (stage, norm) in enumerate(zip(self.stages[:-1], self.norms, strict=True), 1):
            x = F.leaky_relu(norm(stage(x)), 0.2)
            if number < len(maps):
                x = torch.cat([x, maps[number]], dim=1)
        return self.stages[-1](x).sigmoid()
