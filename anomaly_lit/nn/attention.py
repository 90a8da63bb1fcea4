"""Multi-head attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values may come from different tokens.

    Args:
        dim: Width of a token; a multiple of `heads`.
        heads: Number of heads.
        dropout: Share of attention weights dropped in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """Map (B, N, dim), (B, M, dim), (B, M, dim) and (N, M) bool or None to (B, N, dim)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)
            for part in (self.query(query), self.key(key), self.value(value))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def init_as_one(module: nn.Module) -> None:
    """Scale Xavier weights as if queries, keys and values were one projection; for `Module.apply`.

    Networks that keep the three in one matrix with 3 dim rows (ViT) start with a bound that is
    smaller by a factor of the square root of two.
    """
    if isinstance(module, Attention):
        for part in (module.query, module.key, module.value):
            part.weight.mul_(math.sqrt(0.5))


@torch.no_grad()
def start_equal(layers: nn.ModuleList) -> None:
    """Give all layers the first one's projections to queries, keys and values, and its own query.

    UniAD and OneNIP build one layer, copy it, and then draw the weights of linear layers anew. The
    joint projection of their attention is no linear layer, so it starts equal in all layers.
    """
    first = dict(layers[0].named_parameters())
    for layer in layers[1:]:
        for name, value in layer.named_parameters():
            if {"query", "key", "value"} & set(name.split(".")):
                value.copy_(first[name])
