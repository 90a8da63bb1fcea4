"""UniAD: a unified model for anomaly detection (You et al., NeurIPS 2022, arXiv:2206.03687).

One transformer rebuilds the feature maps of all categories. Three things keep it from learning to
copy its input, defects included: noise on the features (jitter), attention that must not look at a
position's own neighbourhood, and a decoder in which each layer starts from a learned query of its
own. The distance between rebuilt and original features is the anomaly map.

Follows the authors' published code. Differs from it:

- AUROC is never mirrored when it falls below one half.
- The map need not be square, and `window=0` removes the neighbour mask, for ablations.

With EfficientNet-B4 at 224 x 224 there are 7.717 million trainable parameters. The queries belong
to positions, so a checkpoint is tied to its image size.

Paper: You et al.: A Unified Model for Multi-class Anomaly Detection. NeurIPS 2022,
arXiv:2206.03687.
Status: works; measured small (experiments/uniad), not yet at the paper's size.
Note: the authors' code is Apache-2.0; written anew from its description.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from anomaly_lit.losses import loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import aggregate, grid_of, pooled_maximum, resize
from anomaly_lit.nn.attention import Attention, init_as_one, start_equal
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.neighbours import (
    LearnedPositions,
    NeighbourEncoder,
    answer_with_mean,
    neighbour_mask,
    silence,
)
from anomaly_lit.nn.transformer import add_jitter, init_linear, relu_mlp
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range


class UniAD(Method):
    """Unified anomaly detection.

    Args:
        backbone: Frozen feature extractor; the paper takes four stages of EfficientNet-B4.
        loss: Reconstruction loss on (B, C, h, w) maps.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients. Without it the large first gradients make
            AdamW's second moments so high that hundreds of steps learn almost nothing.
        image_size: Height and width of the images, or one number for both.
        stride: Pixels per position of the feature map; it divides the image size.
        dim: Width of a token, even and a multiple of `heads`.
        heads: Attention heads.
        feedforward: Width of the hidden layers.
        encoder_depth: Layers of the encoder.
        decoder_depth: Layers of the decoder.
        head: How the last layer starts: `random` as published, or `mean`, which outputs the mean
            training feature. At a learning rate far above the published one, only `mean` keeps the
            tokens from forgetting the image (see `nn.neighbours.silence`).
        dropout: Share of attention weights, hidden layers and residuals that is dropped.
        window: Side of the neighbourhood that attention ignores, in positions; 0 for none.
        jitter: Standard deviation of the noise on a channel, in units of the token's norm divided
            by its number of channels (the paper's alpha).
        score: `max` (of the map after `pool`), `std` or `mean` of the map.
        pool: Side of the averaging window before `max`, in pixels.

    Raises:
        UserError: `stride` does not divide the image size, `heads` or 2 does not divide `dim`, the
            window covers the whole map, or a value is out of range.
    """

    oracle_criterion = "pixel_auroc"

    def __init__(
        self,
        backbone: Backbone,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = 0.1,
        image_size: int | Sequence[int] = 224,
        stride: int = 16,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_depth: int = 4,
        decoder_depth: int = 4,
        head: Literal["random", "mean"] = "random",
        dropout: float = 0.1,
        window: int = 7,
        jitter: float = 20.0,
        score: Literal["max", "std", "mean"] = "max",
        pool: int = 16,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", dim=dim, heads=heads, feedforward=feedforward, pool=pool)
        check_range("method", "[0, inf)", encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        check_range("method", "[0, inf)", window=window, jitter=jitter)
        check_range("method", "[0, 1)", dropout=dropout)
        check_choice("method", ("random", "mean"), head=head)
        check_choice("method", ("max", "std", "mean"), score=score)
        if dim % heads or dim % 2:
            raise UserError(f"method.heads={heads} and 2 must divide method.dim={dim}")
        self.backbone = backbone
        self.loss = loss
        self.grid = grid_of(image_size, stride)
        self.score = score
        self.pool = pool
        channels = sum(backbone.channels)
        self.jitter = jitter / math.sqrt(channels)  # norm of the noise over that of the token
        self.register_buffer("allowed", neighbour_mask(*self.grid, window), persistent=False)
        self.positions = LearnedPositions(*self.grid, dim)
        self.embed = nn.Linear(channels, dim)
        self.encoder = NeighbourEncoder(dim, heads, feedforward, encoder_depth, dropout)
        self.decoder = QueryDecoder(
            math.prod(self.grid), dim, heads, feedforward, decoder_depth, dropout
        )
        self.head = nn.Linear(dim, channels)
        for part in (self.embed, self.encoder, self.decoder, self.head):
            part.apply(init_linear).apply(init_as_one)
        for stack in (self.encoder, self.decoder):
            start_equal(stack.layers)
        self.head_start = head
        if head == "mean":
            silence(self.head)

    def reconstruct(self, features: Tensor) -> Tensor:
        """Rebuild (B, C, h, w) features, in float32; with jitter in training."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = self.embed(add_jitter(tokens, self.jitter if self.training else 0.0))
        positions = self.positions()
        encoded = self.encoder(tokens, positions, self.allowed)
        decoded = self.head(self.decoder(encoded, positions, self.allowed))
        return decoded.float().transpose(1, 2).unflatten(2, self.grid)

    def learn(self) -> None:
        """Start the head at the mean feature if `head` says so."""
        if self.head_start == "mean":
            features = (self.features(self.backbone, b) for b in self.normal_batches("train"))
            answer_with_mean(self.head, (aggregate(maps, self.grid) for maps in features))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance of features rebuilt from jittered ones to the clean ones."""
        target = aggregate(self.features(self.backbone, batch), self.grid).float()
        return loss_terms(self.loss, self.reconstruct(target), target)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        features = aggregate(self.backbone(image), self.grid).float()
        distance = (self.reconstruct(features) - features).norm(dim=1, keepdim=True)
        anomaly_map = resize(distance, image.shape[-2:])  # (B, 1, H, W)
        if self.score == "max":
            return Prediction(anomaly_map, pooled_maximum(anomaly_map, self.pool))
        flat = anomaly_map.flatten(1)
        return Prediction(
            anomaly_map, flat.mean(dim=1) if self.score == "mean" else flat.std(1, unbiased=False)
        )


class QueryDecoder(nn.Module):
    """Layers that each start from a learned query; the last layer's output is normalised.

    The output of one layer reaches the next as keys and values only.

    Args:
        positions: Number of tokens N.
        dim: Width of a token.
        heads: Attention heads.
        feedforward: Width of the hidden layers.
        depth: Number of layers.
        dropout: See `QueryDecoderLayer`.
    """

    def __init__(
        self, positions: int, dim: int, heads: int, feedforward: int, depth: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            QueryDecoderLayer(positions, dim, heads, feedforward, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, encoded: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """Map (B, N, dim), (N, dim) and (N, N) bool to (B, N, dim)."""
        output = encoded
        for layer in self.layers:
            output = layer(encoded, output, positions, allowed)
        return self.norm(output)


class QueryDecoderLayer(nn.Module):
    """Attends with its own learned query to the encoder's output, then to the previous layer's.

    Args:
        positions: Number of tokens N.
        dim: Width of a token.
        heads: Attention heads.
        feedforward: Width of the hidden layer.
        dropout: Share of attention weights, the hidden layer and the three residuals that is
            dropped.
    """

    def __init__(
        self, positions: int, dim: int, heads: int, feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(positions, dim))
        self.to_encoded = Attention(dim, heads, dropout)
        self.to_previous = Attention(dim, heads, dropout)
        self.mlp = relu_mlp(dim, feedforward, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, encoded: Tensor, previous: Tensor, positions: Tensor, allowed: Tensor
    ) -> Tensor:
        """Map two (B, N, dim), (N, dim) and (N, N) bool to (B, N, dim)."""
        query = self.query.expand(len(encoded), -1, -1)
        mixed = self.to_encoded(query + positions, encoded + positions, encoded, allowed)
        tokens = self.norm1(query + self.dropout(mixed))
        mixed = self.to_previous(tokens + positions, previous + positions, previous, allowed)
        tokens = self.norm2(tokens + self.dropout(mixed))
        return self.norm3(tokens + self.dropout(self.mlp(tokens)))
