"""The networks of INP-Former: extractor, decoder block and residual head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.attention import Attention

EPS = 1e-8  # of layer normalisation
WIDTHS = (256, 64)  # of the residual head


def mlp(dim: int, dropout: float = 0.0) -> nn.Sequential:
    """Return two linear layers with 4 `dim` channels between them."""
    drop = (nn.Dropout(dropout),) if dropout else ()
    return nn.Sequential(*drop, nn.Linear(dim, 4 * dim), nn.GELU(), *drop, nn.Linear(4 * dim, dim))


class Extractor(nn.Module):
    """Gathers an image's tokens into its prototypes.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        prototypes: Number of prototypes.
    """

    def __init__(self, dim: int, heads: int, prototypes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(prototypes, dim))
        self.norm1 = nn.LayerNorm(dim, eps=EPS)  # of queries and tokens alike
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, dim) to (B, prototypes, dim)."""
        query = self.query.expand(len(tokens), -1, -1)
        normed = self.norm1(tokens)
        found = query + self.attention(self.norm1(query), normed, normed)
        return found + self.mlp(self.norm2(found))


class DecoderBlock(nn.Module):
    """Rebuilds tokens from prototypes alone: no residual passes the attention.

    Weights are cosines of token and prototype, times a learned number for each head, where
    positive; they do not add up to one.

    Args:
        dim: Width of a token.
        heads: Attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)  # of tokens and prototypes alike
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(heads))
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = mlp(dim)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """Map (B, N, dim) and (B, M, dim) to (B, N, dim)."""
        normed = self.norm1(prototypes)
        q, k, v = (
            part.unflatten(-1, (len(self.scale), -1)).transpose(1, 2)  # (B, heads, N or M, d)
            for part in (self.query(self.norm1(tokens)), self.key(normed), self.value(normed))
        )
        likeness = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        weights = F.relu(self.scale[:, None, None] * likeness)
        tokens = self.output((weights @ v).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class ResidualHead(nn.Sequential):
    """Maps residuals, (B, C, h, w), to logits of a defect, (B, 1, 4 h, 4 w).

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        wide, narrow = WIDTHS
        super().__init__(
            nn.ConvTranspose2d(dim, wide, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(narrow, 1, 3, padding=1),
        )
