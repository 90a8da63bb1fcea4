"""A memory of normal patterns (MNAD), and the losses of its queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recall(NamedTuple):
    """What a memory says of a map (B, C, h, w); N = B * h * w."""

    out: Tensor  # (B, C, h, w), what was read
    query: Tensor  # (N, C) float32, unit vectors
    weights: Tensor  # (N, M), of the items; rows sum to 1
    distance: Tensor  # (B, h, w), squared, of each query to its nearest item


class Memory(nn.Module):
    """Reads unit vectors from a few items, which follow the queries of training, not a gradient.

    Args:
        items: Number M of items, at least 2.
        channels: C of the map.
    """

    items: Tensor

    def __init__(self, items: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("items", F.normalize(torch.rand(items, channels), dim=1))

    def forward(self, features: Tensor) -> Recall:
        """Read for every position of (B, C, h, w), in float32."""
        count, channels, height, width = features.shape
        with torch.autocast(features.device.type, enabled=False):
            query = F.normalize(
                features.to(self.items.dtype).permute(0, 2, 3, 1).reshape(-1, channels), dim=1
            )
            similarity = query @ self.items.T  # (N, M)
            weights = similarity.softmax(dim=1)
            read = (weights @ self.items).view(count, height, width, channels).permute(0, 3, 1, 2)
            nearest = (query - self.items[similarity.argmax(dim=1)]).square().sum(dim=1)
        return Recall(read, query, weights, nearest.view(count, height, width))

    @torch.no_grad()
    def updated(self, query: Tensor) -> Tensor:
        """Return the items after they moved towards the queries nearest to them.

        Args:
            query: (N, C) unit vectors.
        """
        similarity = query @ self.items.T
        share = similarity.softmax(dim=0)  # over the queries
        share = share / share.amax(dim=0)
        own = similarity.argmax(dim=1)[:, None] == torch.arange(
            len(self.items), device=query.device
        )
        return F.normalize(self.items + (share * own).T @ query, dim=1)


def separation(recall: Recall, items: Tensor, margin: float = 1.0) -> Tensor:
    """Return the mean triplet loss of queries, their nearest and second nearest item (MNAD)."""
    order = (recall.query.detach() @ items.T).topk(2, dim=1).indices
    first, second = ((recall.query - items[order[:, n]]).norm(dim=1) for n in (0, 1))
    return (first - second + margin).relu().mean()


def dispersion(recall: Recall) -> Tensor:
    """Return how alike the patterns are that an image's queries form around the items, a mean.

    A pattern is the mean of the queries, weighted by an item's weights, of unit length. The result
    is the mean square of the positive cosines of two patterns of one image.
    """
    count = len(recall.distance)
    weights = recall.weights.view(count, -1, recall.weights.shape[1])  # (B, h * w, M)
    queries = recall.query.view(count, -1, recall.query.shape[1])
    patterns = F.normalize(weights.mT @ queries, dim=2)  # (B, M, C)
    alike = (patterns @ patterns.mT).relu().square()
    own = alike.diagonal(dim1=1, dim2=2).sum()
    items = patterns.shape[1]
    return (alike.sum() - own) / (count * items * (items - 1))


def entropy(recall: Recall) -> Tensor:
    """Return the mean entropy of the weights, in nats."""
    return -(recall.weights * (recall.weights + 1e-12).log()).sum(dim=1).mean()
