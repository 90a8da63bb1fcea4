"""Partition memories and the decoder of PMB."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.types import UserError


class PartitionMemory(nn.Module):
    """Rebuilds a map from learned slots, of which each part of the map has its own.

    Args:
        channels: Channels C of the map, and length of a slot.
        parts: Parts P per side of the map.
        slots: Slots n of a part.
        block: Side k of the block that a query stands for, in positions.
        temperature: Divides cosines before the softmax.
    """

    def __init__(
        self, channels: int, parts: int, slots: int, block: int, temperature: float
    ) -> None:
        super().__init__()
        self.parts = parts
        self.block = block
        self.temperature = temperature
        self.query = nn.Conv2d(channels, channels, 3 * block, stride=block, padding=block)
        self.restore = nn.ConvTranspose2d(channels, channels, block, stride=block)
        bound = channels**-0.5
        drawn = torch.empty(parts * parts, slots, channels).uniform_(-bound, bound)
        self.slots = nn.Parameter(drawn)

    def forward(self, map_: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rebuilt map, (B, C, h, w), and the attention, (B, P^2, Q, n).

        Raises:
            UserError: The map cannot be divided into blocks and parts.
        """
        height, width = map_.shape[-2:]
        unit = self.block * self.parts
        if height % unit or width % unit:
            raise UserError(
                f"a map of {height} x {width} cannot be divided into {self.parts} x {self.parts} "
                f"parts of blocks of {self.block} x {self.block}: change image_size, "
                "method.partition or method.block"
            )
        queries = self.query(map_)  # (B, C, h / k, w / k)
        windows = cut(queries, self.parts).float()  # (B, P^2, Q, C)
        slots = self.slots.float()
        with torch.autocast(map_.device.type, enabled=False):
            cosine = F.normalize(windows, dim=-1) @ F.normalize(slots, dim=-1).mT
            attention = address(cosine / self.temperature)
            read = attention @ slots
        return self.restore(
            joined(read, self.parts, queries.shape[-2:]).to(queries.dtype)
        ), attention


def cut(map_: Tensor, parts: int) -> Tensor:
    """Cut a (B, C, h, w) map into P x P equal windows, (B, P^2, h * w / P^2, C)."""
    batch, channels, height, width = map_.shape
    split = map_.view(batch, channels, parts, height // parts, parts, width // parts)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, parts * parts, -1, channels)


def joined(windows: Tensor, parts: int, size: Sequence[int]) -> Tensor:
    """Put windows back into a (B, C, *size) map; undoes `cut`."""
    batch, _, _, channels = windows.shape
    height, width = size[0] // parts, size[1] // parts
    split = windows.view(batch, parts, parts, height, width, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, size[0], size[1])


def address(logits: Tensor) -> Tensor:
    """Return weights over the slots: a softmax, then hard shrinkage at 1 / n (MemAE).

    Where the shrinkage leaves nothing, since all slots are alike, the softmax stays.
    """
    weight = logits.softmax(dim=-1)
    above = weight - 1 / logits.shape[-1]
    shrunk = above.relu() * weight / (above.abs() + 1e-12)
    left = shrunk.sum(dim=-1, keepdim=True)
    return torch.where(left > 0, shrunk / left.clamp(min=1e-12), weight)


def entropy(attention: Tensor) -> Tensor:
    """Return the mean entropy of reading, in nats."""
    return -(attention * (attention + 1e-12).log()).sum(dim=-1).mean()


class Decoder(nn.Module):
    """The mirrored encoder: doubles the map, joins a lateral, convolves.

    Args:
        channels: Channels of the encoder's stages, finest first.
        joins: For each stage, whether its lateral arrives.
    """

    def __init__(self, channels: Sequence[int], joins: Sequence[bool]) -> None:
        super().__init__()
        coarse_first = list(reversed(channels))
        self.up = nn.ModuleList(conv(given, made) for given, made in pairwise(coarse_first))
        self.mix = nn.ModuleList(
            nn.Sequential(conv(made * (1 + join), made), conv(made, made))
            for made, join in zip(coarse_first[1:], list(reversed(joins))[1:], strict=True)
        )
        last = channels[0]
        self.last = nn.Sequential(conv(last, last), conv(last, last), conv(last, last))
        self.out = nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, laterals: Sequence[Tensor | None]) -> Tensor:
        """Map laterals, finest first, to (B, 3, H, W) in [0, 1]; the last is the bottleneck."""
        *others, x = laterals
        assert x is not None
        for up, mix, lateral in zip(self.up, self.mix, reversed(others), strict=True):
            x = up(doubled(x))
            x = mix(x if lateral is None else torch.cat([x, lateral], dim=1))
        return (self.out(self.last(doubled(x))).tanh() + 1) / 2


def doubled(x: Tensor) -> Tensor:
    """Map (B, C, h, w) to (B, C, 2 h, 2 w), bilinearly."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def conv(given: int, made: int) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()
    )
