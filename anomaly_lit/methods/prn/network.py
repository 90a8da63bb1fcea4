"""PRN's network after the residuals: fusion of stages, attention between patches, decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.aggregate import resize
from anomaly_lit.nn.unet import conv3


class ResidualSegmenter(nn.Module):
    """Finds anomalies in the features of an image and their residuals to the prototypes.

    Args:
        channels: Channels of the stages, finest first; each stage is half as high and wide as the
            one before.
        deepest: Channels of the stage after these, which starts the decoder.
        divisions: Into how many patches attention cuts each side of a map; one number per size.
        blocks: Blocks of attention of each stage.
    """

    def __init__(
        self, channels: Sequence[int], deepest: int, divisions: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        joined = [2 * count for count in channels]
        self.fuse_features = Fusion(channels)
        self.fuse_residuals = Fusion(channels)
        self.attention = nn.ModuleList(
            nn.Sequential(*(MultiSizeAttention(count, divisions) for _ in range(blocks)))
            for count in joined
        )
        self.fuse_attended = Fusion(joined)
        self.decoder = Decoder(channels, deepest)

    def forward(
        self,
        features: Sequence[Tensor],
        residuals: Sequence[Tensor],
        deepest: Tensor,
        size: Sequence[int],
    ) -> Tensor:
        """Map features and residuals, (B, C_i, h_i, w_i) each, to logits (B, 1, *size)."""
        pairs = zip(self.fuse_features(features), self.fuse_residuals(residuals), strict=True)
        joined = [torch.cat(pair, dim=1) for pair in pairs]  # (B, 2 C_i, h_i, w_i)
        attended = [part(x) for part, x in zip(self.attention, joined, strict=True)]
        return self.decoder(self.fuse_attended(attended), deepest, size)


class Fusion(nn.Module):
    """Lets stages exchange what they hold, as in HRNet: each adds the others, resized, to itself.

    Args:
        channels: Channels of the stages, finest first; each has half the size of the one before.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        stages = range(len(channels))
        self.paths = nn.ModuleList(
            nn.ModuleList(path(channels, source, target) for source in stages) for target in stages
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C_i, h_i, w_i) to the same shapes."""
        fused = []
        for own, paths in zip(maps, self.paths, strict=True):
            assert isinstance(paths, nn.ModuleList)
            others = [move(x) for move, x in zip(paths, maps, strict=True) if x is not own]
            fused.append(sum(others, start=own))
        return fused


def path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """Return what brings the map of one stage to the shape of another.

    To a coarser stage: a strided convolution, with as many groups as both numbers of channels
    allow. To a finer one: bilinear upsampling, then a 1 x 1 convolution.
    """
    given, wanted = channels[source], channels[target]
    if source == target:
        return nn.Identity()
    if source < target:
        stride = 2 ** (target - source)
        groups = math.gcd(given, wanted)
        return nn.Conv2d(given, wanted, stride + 1, stride, stride // 2, groups=groups)
    larger = nn.Upsample(scale_factor=2 ** (source - target), mode="bilinear", align_corners=True)
    return nn.Sequential(larger, nn.Conv2d(given, wanted, 1))


class MultiSizeAttention(nn.Module):
    """Attention between the patches of a map, for several sizes of patches side by side.

    Args:
        channels: Channels of the map.
        divisions: Into how many patches each side of the map is cut; one number per size.
    """

    def __init__(self, channels: int, divisions: Sequence[int]) -> None:
        super().__init__()
        self.sizes = nn.ModuleList(PatchAttention(channels, division) for division in divisions)
        every = len(divisions) * channels
        self.merge = nn.Sequential(
            nn.Conv2d(every, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Conv2d(every, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        attended = torch.cat([attend(x) for attend in self.sizes], dim=1)
        return self.merge(attended) + self.shortcut(attended)


class PatchAttention(nn.Module):
    """Attention with one head, whose tokens are the patches of a map.

    Queries, keys and values are the map times a weight for each channel, which starts as that of a
    1 x 1 convolution grouped by channels. With one patch the result is the value.

    Args:
        channels: Channels of the map.
        division: Into how many patches each side of the map is cut.
    """

    def __init__(self, channels: int, division: int) -> None:
        super().__init__()
        self.division = division
        self.query, self.key, self.value = (
            nn.Parameter(torch.empty(channels, 1, 1).uniform_(-1, 1)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        query, key, value = (
            cut(weight * x, self.division) for weight in (self.query, self.key, self.value)
        )
        with torch.autocast(x.device.type, enabled=False):  # logits are sums of up to 10^5 terms
            mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return join(mixed.to(value.dtype), x.shape)


def cut(x: Tensor, division: int) -> Tensor:
    """Cut a map (B, C, h, w) into patches, row by row: (B, division^2, C * h * w / division^2)."""
    batch, channels, height, width = x.shape
    tall, wide = height // division, width // division
    patches = x.reshape(batch, channels, division, tall, division, wide)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, division**2, channels * tall * wide)


def join(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """Put patches together again; undoes `cut`.

    Args:
        patches: (B, n^2, C * h * w / n^2).
        shape: Of the map, (B, C, h, w).
    """
    batch, channels, height, width = shape
    division = math.isqrt(patches.shape[1])
    tall, wide = height // division, width // division
    tiles = patches.reshape(batch, division, division, channels, tall, wide)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


class Decoder(nn.Module):
    """Goes back up from the deepest map, and joins the attended map of each stage.

    Args:
        channels: Channels of the stages before they were joined with residuals, finest first.
        deepest: Channels of the map that it starts from.
    """

    def __init__(self, channels: Sequence[int], deepest: int) -> None:
        super().__init__()
        coarse_first = [deepest, *reversed(channels)]
        self.grow = nn.ModuleList(convs(coarse, fine) for coarse, fine in pairwise(coarse_first))
        self.up = nn.ModuleList(convs(3 * fine, fine, fine) for fine in coarse_first[1:])
        self.last = convs(channels[0], channels[0])
        self.head = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, maps: Sequence[Tensor], deepest: Tensor, size: Sequence[int]) -> Tensor:
        """Map stages (B, 2 C_i, h_i, w_i), finest first, and the deepest map to (B, 1, *size)."""
        x = deepest
        for grow, up, skip in zip(self.grow, self.up, reversed(maps), strict=True):
            x = up(torch.cat([grow(resize(x, skip.shape[-2:])), skip], dim=1))
        return self.head(self.last(resize(x, size)))


def convs(*channels: int) -> nn.Sequential:
    """Return 3 x 3 convolutions, each with batch normalisation and ReLU."""
    return conv3(*channels, norm=nn.BatchNorm2d)
