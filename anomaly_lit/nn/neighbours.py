"""Parts of transformers that must not look at a position's own neighbourhood (UniAD, OneNIP).

Tokens are (B, N, dim) with N = rows * columns, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from anomaly_lit.nn.attention import Attention
from anomaly_lit.nn.transformer import relu_mlp
from anomaly_lit.types import UserError


def neighbour_mask(rows: int, columns: int, window: int) -> Tensor:
    """Return which keys each query may attend to: all outside a window centred on the query.

    Args:
        rows: Height of the grid.
        columns: Width of the grid.
        window: Side of the window, in positions; it is cut at the borders, and 0 means no window.
            An even side reaches as far as the next odd one.

    Returns:
        (N, N) bool, true where query i may attend to key j.

    Raises:
        UserError: A position would have nothing to attend to.
    """
    reach = window // 2 if window else -1
    if rows <= 2 * reach + 1 and columns <= 2 * reach + 1:
        raise UserError(
            f"a window of {window} covers the whole map of {rows} x {columns} positions: lower "
            "method.window, or raise image_size"
        )
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    near_rows = (row.flatten()[:, None] - row.flatten()).abs() <= reach
    near_columns = (column.flatten()[:, None] - column.flatten()).abs() <= reach
    return ~(near_rows & near_columns)


class LearnedPositions(nn.Module):
    """Position codes: a learned column half and a learned row half, at first uniform in [0, 1).

    Args:
        rows: Height of the grid.
        columns: Width of the grid.
        dim: Width of a token, even.
    """

    def __init__(self, rows: int, columns: int, dim: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.rand(rows, dim // 2))
        self.column = nn.Parameter(torch.rand(columns, dim // 2))

    def forward(self) -> Tensor:
        """Return the codes, (N, dim): first the column's half, then the row's."""
        rows, columns = len(self.row), len(self.column)
        column = self.column.expand(rows, -1, -1)
        row = self.row[:, None].expand(-1, columns, -1)
        return torch.cat([column, row], dim=-1).flatten(0, 1)


class NeighbourEncoderLayer(nn.Module):
    """Post-norm transformer layer; positions are added to queries and keys, never to values.

    Args:
        dim: Width of a token.
        heads: Number of heads.
        feedforward: Width of the hidden layer.
        dropout: Share dropped of attention weights, the hidden layer and both residuals.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.mlp = relu_mlp(dim, feedforward, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Map (B, N, dim), (N, dim) and (N, N) bool or None to (B, N, dim)."""
        placed = tokens + positions
        tokens = self.norm1(tokens + self.dropout(self.attention(placed, placed, tokens, allowed)))
        return self.norm2(tokens + self.dropout(self.mlp(tokens)))


class NeighbourEncoder(nn.Module):
    """A sequence of layers without a final norm.

    Args:
        dim: Width of a token.
        heads: Number of heads.
        feedforward: Width of the hidden layers.
        depth: Number of layers.
        dropout: See `NeighbourEncoderLayer`.
    """

    def __init__(
        self, dim: int, heads: int, feedforward: int, depth: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            NeighbourEncoderLayer(dim, heads, feedforward, dropout) for _ in range(depth)
        )

    def forward(self, tokens: Tensor, positions: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Map (B, N, dim), (N, dim) and (N, N) bool or None to (B, N, dim)."""
        for layer in self.layers:
            tokens = layer(tokens, positions, allowed)
        return tokens


def silence(head: nn.Linear) -> None:
    """Make a new head output zero; `answer_with_mean` then makes it output the mean feature.

    At a learning rate far above the papers' 1e-4, a post-norm transformer with a randomly
    initialised head forgets its input: for about twenty steps all images call for the same smaller
    output, AdamW moves all weights in that direction at full speed, and the tokens of all images
    become the same. With a silent head, the inner weights get gradients only once the head has
    learned how to use its tokens.
    """
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


@torch.no_grad()
def answer_with_mean(head: nn.Linear, maps: Iterable[Tensor]) -> None:
    """Set the bias of a silenced head to the mean feature.

    Args:
        head: A head with C output channels.
        maps: The (B, C, h, w) feature maps of normal images.
    """
    means = [(len(part), part.float().mean(dim=(0, 2, 3))) for part in maps]
    total = sum(count for count, _ in means)
    head.bias.copy_(torch.stack([mean * (count / total) for count, mean in means]).sum(dim=0))
