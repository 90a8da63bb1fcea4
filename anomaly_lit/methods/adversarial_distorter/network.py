"""Networks of the adversarial distorter, and the perturbations between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.autoencoder import halving

# ------------------------------------------------------------------------------ perturbations


def add(z: Tensor, answer: Tensor, strength: float) -> Tensor:
    """Add a vector whose norm is `strength` times that of each encoding."""
    direction = answer.tanh().flatten(1).float()
    direction = direction / (direction.norm(dim=1, keepdim=True) + 1e-8)
    length = strength * z.detach().flatten(1).float().norm(dim=1, keepdim=True)
    return z + (length * direction).view(z.shape)


def multiply(z: Tensor, answer: Tensor, strength: float) -> Tensor:
    """Take away a share of each value, below `strength`."""
    return z * (1 - strength * answer.float().sigmoid())


def mask(z: Tensor, answer: Tensor, strength: float) -> Tensor:
    """Set the positions with the highest mean answers to zero, a share `strength` of all."""
    high = answer.float().mean(dim=1, keepdim=True)  # (B, 1, h, w)
    count = round(strength * high[0].numel())
    count = min(count, high[0].numel() - 1)
    limit = high.flatten(1).topk(count + 1).values[:, -1].view(-1, 1, 1, 1)
    soft = (high - limit).sigmoid()
    gate = (high > limit).float() + soft - soft.detach()
    return z * (1 - gate)


PERTURB = {"additive": add, "multiplicative": multiply, "mask": mask}


class Reversed(torch.autograd.Function):
    """Passes values on as they are and their gradient with the opposite sign."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the values."""
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the negative gradient."""
        return -gradient


# ----------------------------------------------------------------------------------- networks


def down(channels: Sequence[int]) -> nn.Sequential:
    """Return stages that halve the map: 4 x 4 convolution, batch normalisation, leaky ReLU.

    The last is a convolution alone.
    """
    layers: list[nn.Module] = []
    for given, made in zip([3, *channels[:-2]], channels[:-1], strict=True):
        layers += halving(given, made)
    given = channels[-2] if len(channels) > 1 else 3
    return nn.Sequential(*layers, nn.Conv2d(given, channels[-1], 4, 2, 1))


class NormalisedMap(nn.Module):
    """Layer normalisation over a whole map (C, h, w), without weights."""

    def forward(self, z: Tensor) -> Tensor:
        """Give each map of (B, C, h, w) zero mean and unit variance."""
        return F.layer_norm(z, z.shape[1:])


class Decoder(nn.Module):
    """Stages that double the map: nearest neighbours, 3 x 3 convolution, batch normalisation.

    Args:
        channels: Channels of the encoder's stages, coarsest first.
        signed: Whether images lie in [-1, 1] instead of [0, 1].
    """

    def __init__(self, channels: Sequence[int], signed: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(given, made, 3, 1, 1, bias=False),
                nn.BatchNorm2d(made),
                nn.LeakyReLU(0.2),
            )
            for given, made in zip(channels, [*channels[1:], channels[-1]], strict=True)
        )
        self.last = nn.Conv2d(channels[-1], 3, 3, 1, 1)
        self.signed = signed

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, 3, H, W)."""
        for stage in self.stages:
            z = stage(z)
        return self.last(z).tanh() if self.signed else self.last(z).sigmoid()
