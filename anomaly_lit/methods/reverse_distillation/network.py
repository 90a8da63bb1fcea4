"""Bottleneck and decoder of Reverse Distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["basic", "bottleneck"]
EXPANSION = {"basic": 1, "bottleneck": 4}


class Bottleneck(nn.Module):
    """Fuses the teacher's three maps, and squeezes them to one embedding at half their grid.

    Args:
        channels: Channels of the teacher's maps, finest first.
        kind: Kind of the residual blocks.
        depth: Number of residual blocks.
        base_width: Inner channels of a `bottleneck` block per 64 of its planes.
        width: Factor of all inner channels.
    """

    def __init__(
        self, channels: Sequence[int], kind: Kind, depth: int, base_width: int, width: float
    ) -> None:
        super().__init__()
        fine, middle, coarse = channels
        inner = scaled(middle, width)
        self.from_fine = nn.Sequential(*halving(fine, inner), *halving(inner, coarse))
        self.from_middle = nn.Sequential(*halving(middle, coarse))
        out = 2 * coarse
        first = Block(3 * coarse, out, kind, base_width, width, "halve")
        rest = [Block(out, out, kind, base_width, width) for _ in range(depth - 1)]
        self.squeeze = nn.Sequential(first, *rest)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map three maps, the coarsest (B, c3, h, w), to (B, 2 c3, h / 2, w / 2)."""
        fine, middle, coarse = maps
        return self.squeeze(torch.cat([self.from_fine(fine), self.from_middle(middle), coarse], 1))


class Decoder(nn.Module):
    """Grows the embedding back to the teacher's three maps: a ResNet upside down.

    Args:
        channels: Channels of the teacher's maps, finest first.
        kind: Kind of the residual blocks.
        depths: Number of residual blocks of each stage, the coarsest first.
        base_width: See `Bottleneck`.
        width: See there.
        signed: Return each map as it is before the last ReLU of its stage; the next stage reads it
            after that ReLU all the same.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kind: Kind,
        depths: Sequence[int],
        base_width: int,
        width: float,
        signed: bool,
    ) -> None:
        super().__init__()
        self.signed = signed
        outs = list(reversed(channels))
        ins = [2 * outs[0], *outs[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                Block(before, after, kind, base_width, width, "double"),
                *(Block(after, after, kind, base_width, width) for _ in range(depth - 1)),
            )
            for before, after, depth in zip(ins, outs, depths, strict=True)
        )
        for stage in self.stages:
            stage[-1].activate = False  # type: ignore[index]

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """Return the rebuilt maps, finest first."""
        maps: list[Tensor] = []
        for stage in self.stages:
            rebuilt = stage(embedding)
            embedding = F.relu(rebuilt)
            maps.insert(0, rebuilt if self.signed else embedding)
        return maps


class Block(nn.Module):
    """A residual block of ResNet, which may halve or double the grid.

    To halve it, the 3 x 3 convolution has stride 2; to double it, a transposed 2 x 2 convolution
    with stride 2 takes its place, in the block and beside it.

    Args:
        channels: Channels of the input.
        out: Channels of the output.
        kind: `basic`: two 3 x 3 convolutions; `bottleneck`: one, between two of 1 x 1.
        base_width: Inner channels of a `bottleneck` block per 64 of its planes.
        width: Factor of the inner channels.
        resize: What becomes of the grid.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kind: Kind,
        base_width: int,
        width: float,
        resize: Literal["keep", "halve", "double"] = "keep",
    ) -> None:
        super().__init__()
        planes = out // EXPANSION[kind]
        self.activate = True
        if kind == "basic":
            inner = scaled(planes, width)
            layers = [
                *(spatial(channels, inner, resize), nn.BatchNorm2d(inner), nn.ReLU()),
                *(spatial(inner, out), nn.BatchNorm2d(out)),
            ]
        else:
            inner = scaled(planes * base_width // 64, width)
            layers = [
                *(pointwise(channels, inner), nn.BatchNorm2d(inner), nn.ReLU()),
                *(spatial(inner, inner, resize), nn.BatchNorm2d(inner), nn.ReLU()),
                *(pointwise(inner, out), nn.BatchNorm2d(out)),
            ]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if resize == "halve":
            self.shortcut.extend([pointwise(channels, out, stride=2), nn.BatchNorm2d(out)])
        elif resize == "double":
            self.shortcut.extend([spatial(channels, out, resize), nn.BatchNorm2d(out)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to (B, out, ...)."""
        y = self.layers(x) + self.shortcut(x)
        return F.relu(y) if self.activate else y


def spatial(channels: int, out: int, resize: str = "keep") -> nn.Module:
    """Return the convolution of a block that sees neighbours or changes the grid."""
    if resize == "double":
        return nn.ConvTranspose2d(channels, out, 2, stride=2, bias=False)
    return nn.Conv2d(channels, out, 3, 2 if resize == "halve" else 1, padding=1, bias=False)


def pointwise(channels: int, out: int, stride: int = 1) -> nn.Module:
    """Return a 1 x 1 convolution without bias."""
    return nn.Conv2d(channels, out, 1, stride, bias=False)


def halving(channels: int, out: int) -> list[nn.Module]:
    """Return a convolution that halves the grid, with its normalisation and activation."""
    return [spatial(channels, out, "halve"), nn.BatchNorm2d(out), nn.ReLU()]


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times a factor, at least 1."""
    return max(1, round(channels * width))


def init_convolutions(module: nn.Module) -> None:
    """Set ResNet's weights, except of transposed convolutions; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
