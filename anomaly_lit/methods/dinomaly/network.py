"""Bottleneck and decoder of Dinomaly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NARROW = 256  # channels between the two layers that Dinomaly2 makes of the bottleneck's first
EPS = 1e-8  # of layer normalisation


def wide_bottleneck(dim: int, dropout: float) -> nn.Sequential:
    """Return Dinomaly's bottleneck: dropout before, between and after two linear layers."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(dim, 4 * dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(4 * dim, dim),
        nn.Dropout(dropout),
    )


def narrow_bottleneck(dim: int, dropout: float) -> nn.Sequential:
    """Return Dinomaly2's bottleneck: the first of three linear layers leaves 256 channels."""
    return nn.Sequential(
        nn.Linear(dim, NARROW),
        nn.Dropout(dropout),
        nn.Linear(NARROW, 4 * dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(4 * dim, dim),
        nn.Dropout(dropout),
    )


class DecoderBlock(nn.Module):
    """A pre-norm transformer block with a given attention.

    Args:
        dim: Width of a token.
        attention: Maps queries, keys and values (B, N, dim) to (B, N, dim).
    """

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, dim) to (B, N, dim)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed)
        return tokens + self.mlp(self.norm2(tokens))


class LinearAttention(nn.Module):
    """Attention whose weights are products of features, ELU + 1, of queries and keys.

    Sums over keys come first, so that the cost grows with the number of tokens, not its square.

    Args:
        dim: Width of a token, a multiple of `heads`.
        heads: Number of heads.
        eps: Added to the denominator.
    """

    def __init__(self, dim: int, heads: int, eps: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.eps = eps
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map (B, N, dim), (B, M, dim), (B, M, dim) to (B, N, dim)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2).float()  # (B, heads, N, d)
            for part in (self.query(query), self.key(key), self.value(value))
        )
        with torch.autocast(query.device.type, enabled=False):  # with 16 bits it may underflow
            q, k = F.elu(q) + 1, F.elu(k) + 1
            above = q @ (k.transpose(-1, -2) @ v)
            below = q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2)  # (B, heads, N, 1)
            mixed = above / (below + self.eps)
        return self.output(mixed.transpose(1, 2).flatten(2))
