"""Parts of vision transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anomaly_lit.nn.attention import Attention


class TransformerBlock(nn.Module):
    """Pre-norm transformer block with GELU and no dropout (ViT).

    Args:
        dim: Width of a token.
        heads: Number of heads.
        mlp_ratio: Width of the hidden layer divided by `dim`.
        eps: Added to the variance in both layer norms.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-5) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, dim) to (B, N, dim)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed)
        return tokens + self.mlp(self.norm2(tokens))


def relu_mlp(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    """Return two linear layers with ReLU and dropout between them."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
    )


def add_jitter(tokens: Tensor, relative_norm: float) -> Tensor:
    """Add Gaussian noise whose norm is about `relative_norm` times the token's norm (UniAD).

    Args:
        tokens: (B, N, dim).
        relative_norm: At least 0; 0 returns the tokens unchanged.
    """
    if relative_norm == 0:
        return tokens
    scale = tokens.norm(dim=-1, keepdim=True) * relative_norm / math.sqrt(tokens.shape[-1])
    return tokens + torch.randn_like(tokens) * scale


def init_linear(module: nn.Module) -> None:
    """Set Xavier-uniform weights and zero biases; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Return a fixed 2-D sine-cosine code, half of the channels for each axis (temperature 10000).

    Args:
        dim: Channels, a multiple of 4.
        height: Rows of tokens.
        width: Columns of tokens.

    Returns:
        (height * width, dim) float, row by row; the first half codes the column.
    """
    assert dim % 4 == 0
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten().double()[:, None] * frequency for axis in (columns, rows)]
    return torch.cat([code for a in angles for code in (a.sin(), a.cos())], dim=1).float()
