"""The restoration network of MFRNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RestorationNetwork(nn.Module):
    """A pyramid of hybrid blocks; its skip connections carry masked input only.

    Args:
        channels: Channels of the map.
        dims: Channels of each level.
        depths: Blocks of each level.
        head_dim: Channels of an attention head.
        pools: Sides of the pooled maps that attention looks at.
        grid: Height and width of the map.
    """

    def __init__(
        self,
        channels: int,
        dims: Sequence[int],
        depths: Sequence[int],
        head_dim: int,
        pools: Sequence[int],
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels + 1, dims[0], 1), _conv(dims[0], dims[0]), _conv(dims[0], dims[0])
        )
        self.levels = nn.ModuleList()
        self.shrink = nn.ModuleList()
        for level, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side = min(grid) // 2**level
            wanted = [*pools, 16] if level == 0 else pools
            sizes = [size for size in wanted if size < side]  # larger ones would pool nothing
            blocks = [HybridBlock(dim, dim // head_dim, sizes or [1]) for _ in range(depth)]
            self.levels.append(nn.Sequential(*blocks))
            if level:
                self.shrink.append(nn.Conv2d(dims[level - 1], dim, 2, stride=2))
        self.join = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fine + coarse, fine, 1), _conv(fine, fine))
            for fine, coarse in pairwise(dims)
        )
        self.head = nn.Conv2d(dims[0], channels, 1)

    def forward(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """Restore (B, C, h, w), its hidden positions filled, given (B, 1, h, w), 1 where hidden."""
        x = self.levels[0](self.stem(torch.cat([visible, hidden], dim=1)))
        skips = []
        for shrink, level in zip(self.shrink, list(self.levels)[1:], strict=True):
            skips.append(x)
            x = level(shrink(x))
        for skip, join in zip(reversed(skips), reversed(list(self.join)), strict=True):
            grown = F.interpolate(x, skip.shape[-2:], mode="bilinear")
            x = join(torch.cat([skip, grown], dim=1))
        return self.head(x)


class HybridBlock(nn.Module):
    """Local position code, multi-pooling attention and convolutional feed-forward network.

    Args:
        dim: Channels.
        heads: Attention heads.
        pools: Sides of the pooled maps that attention looks at.
    """

    def __init__(self, dim: int, heads: int, pools: Sequence[int]) -> None:
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = MultiPoolingAttention(dim, heads, pools)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, 4 * dim, 1),
            nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim),
            nn.GELU(),
            nn.Conv2d(4 * dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        x = x + self.position(x)
        x = x + self.attention(_normed(self.norm1, x))
        return x + self.mlp(_normed(self.norm2, x))


class MultiPoolingAttention(nn.Module):
    """Every position looks at the map pooled to a few sizes.

    Args:
        dim: Channels.
        heads: Attention heads; they divide the channels.
        pools: Sides of the pooled maps.
    """

    def __init__(self, dim: int, heads: int, pools: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.pools = tuple(pools)
        self.refine = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in self.pools
        )
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        pooled = [
            refine(F.adaptive_avg_pool2d(x, size)).flatten(2)
            for size, refine in zip(self.pools, self.refine, strict=True)
        ]
        context = self.norm(torch.cat(pooled, dim=2).transpose(1, 2))  # (B, sum of sizes^2, C)
        query = self._split(self.query(x.flatten(2).transpose(1, 2)))
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        return mixed.transpose(1, 2).unflatten(2, x.shape[-2:])

    def _split(self, tokens: Tensor) -> Tensor:
        """Map (B, N, C) to (B, heads, N, C / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply layer norm over the channels of (B, C, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()
    )


def init_fan_out(module: nn.Module) -> None:
    """Draw weights as hybrid networks of this kind do, and set biases to zero.

    Weights of convolutions come from a normal distribution with the variance 2 / fan-out, where the
    fan-out counts one group only; those of linear layers from N(0, 0.02^2), cut at two deviations.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
