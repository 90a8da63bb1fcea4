"""Prompts, decoder and refiner of OneNIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.attention import Attention
from anomaly_lit.nn.bank import Bank
from anomaly_lit.types import UserError


class StoredPrompts(Bank):
    """The frozen features of a few normal images of each category, (C, h, w) each.

    Those of one category are adjacent in `items`.

    Attributes:
        categories: Names of the categories, in order.
        count: Number of prompts per category.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.categories: list[str] = []
        self.count = 0

    def keep(self, features: Tensor, categories: Sequence[str], count: int) -> None:
        """Keep `count` of the (n, C, h, w) maps per category, with repeats if there are fewer."""
        self.categories = list(dict.fromkeys(categories))
        self.count = count
        rows: list[int] = []
        for name in self.categories:
            own = [row for row, category in enumerate(categories) if category == name]
            rows += [own[number % len(own)] for number in range(count)]
        self.fill(features[rows])

    def rows(self, categories: Sequence[str], index: int | Sequence[int]) -> list[int]:
        """Return the rows of prompt number `index` of each named category.

        Raises:
            UserError: A category has no prompt.
        """
        unknown = sorted(set(categories) - set(self.categories))
        if unknown:
            raise UserError(
                f"no prompt for {', '.join(unknown)}: the checkpoint holds those of "
                f"{', '.join(self.categories) or 'no category'}. Set method.prompt=nearest"
            )
        numbers = [index] * len(categories) if isinstance(index, int) else index
        places = [self.categories.index(name) * self.count for name in categories]
        return [place + number for place, number in zip(places, numbers, strict=True)]

    def most_similar(self, features: Tensor) -> Tensor:
        """Return the (B,) rows of the prompts whose mean feature has the largest cosine.

        Raises:
            UserError: There is no prompt.
        """
        if not self.categories:
            raise UserError("OneNIP has no prompts yet: train it first, or load a checkpoint")
        means = [F.normalize(maps.mean(dim=(2, 3)), dim=1) for maps in (features, self.items)]
        return (means[0] @ means[1].mT).argmax(dim=1)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the categories as plain data."""
        return {"categories": self.categories, "count": self.count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.categories, self.count = list(state["categories"]), state["count"]


class BidirectionalDecoder(nn.Module):
    """Prompt and image attend to each other in every layer; the prompt's side is the output.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        feedforward: Width of the hidden layers.
        depth: Number of layers.
        dropout: Share of attention weights and residuals that is dropped.
    """

    def __init__(
        self, dim: int, heads: int, feedforward: int, depth: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BidirectionalLayer(dim, heads, feedforward, dropout) for _ in range(depth)
        )
        self.last = Attention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor, prompt: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """Map tokens (B, N, dim) of images and prompts, (N, dim) and (N, N) bool to (B, N, dim)."""
        for layer in self.layers:
            image, prompt = layer(image, prompt, positions, allowed)
        mixed = self.last(prompt + positions, image + positions, image)  # without a mask
        return self.norm(prompt + self.dropout(mixed))


class BidirectionalLayer(nn.Module):
    """The prompt attends to the image, then the image to the prompt; both ignore neighbours.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        feedforward: Width of the hidden layer.
        dropout: Share of attention weights and residuals that is dropped.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.to_image = Attention(dim, heads, dropout)
        self.to_prompt = Attention(dim, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(dim, feedforward), nn.ReLU(), nn.Linear(feedforward, dim)
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, image: Tensor, prompt: Tensor, positions: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next layer's tokens (B, N, dim) of images and of prompts."""
        mixed = self.to_image(prompt + positions, image + positions, image, allowed)
        prompt = self.norm1(prompt + self.dropout(mixed))
        prompt = self.norm2(prompt + self.dropout(self.mlp(prompt)))
        mixed = self.to_prompt(image + positions, prompt + positions, prompt, allowed)
        return self.norm3(image + self.dropout(mixed)), prompt


class Refiner(nn.Sequential):
    """Maps the error of each channel, (B, C, h, w), to logits of a defect, (B, 1, 4 h, 4 w).

    Args:
        channels: C.
        dim: Channels of the hidden layers.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(
            *_enlarging_block(channels, dim), *_enlarging_block(dim, dim), nn.Conv2d(dim, 1, 1)
        )


def _enlarging_block(channels: int, dim: int) -> tuple[nn.Module, ...]:
    """Return layers that double height and width."""
    return (
        nn.Conv2d(channels, dim, 3, padding=1, bias=False),
        nn.BatchNorm2d(dim),
        nn.ReLU(),
        nn.ConvTranspose2d(dim, dim, 2, stride=2),
    )
