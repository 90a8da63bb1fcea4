"""ADTR: anomaly detection transformer with feature reconstruction (You et al., 2022).

A frozen backbone describes the image; a transformer rebuilds the description, and its error is the
anomaly map. A convolution can learn to copy its input, defects included. Here the decoder starts
from one learned query instead of the image, and attention can only mix what the encoder offers:
what does not look like normal training images cannot pass.

ADTR learns from normal images. ADTR+ also learns from anomalies: it pulls normal features and their
reconstruction together and pushes those of anomalies apart (`anomalies`).

No code was published, and we had reading notes of the paper. Where they are silent, we chose:

- post-norm layers with ReLU, dropout 0.1 and Xavier weights, gradients clipped to a norm of 0.1,
  and the largest mean over 16 x 16 pixels as the score, all as in UniAD by the same first author,
  but for its projections to queries, keys and values, which start smaller and equal in all layers;
- timm's padding of EfficientNet-B4 (UniAD's own is `backbone=efficientnet_b4_uniad`);
- the weight of the push (0.1 with masks, 1 with labels), and that 5 % of the positions make the
  score of an image with a label only;
- a position counts as anomalous if any of its pixels is;
- an outlier beside each normal image, where the paper mixes in as many as there are normal images.

The error of normal features is their mean square, which the paper sums over channels: a constant
factor. With EfficientNet-B4 at 256 x 256 there are 7.87 million trainable parameters. Query and
positions belong to places, so a checkpoint is tied to its image size.

Paper: You et al.: ADTR: Anomaly Detection Transformer with Feature Reconstruction. ICONIP 2022,
arXiv:2209.01816.
Status: ADTR works; measured small, on toothbrush at 256 x 256 (experiments/small): image AUROC
91.9, pixel AUROC 98.7, pixel AP 53.4 after 150 steps, as UniAD (91.9, 98.7, 53.0), and 94.4, 98.8,
54.3 after 400, in four resumed parts. ADTR+ does not show the paper's gain: with outliers 55.6,
80.7 and 4.7 after 150 steps, far below ADTR. One seed; not yet at the paper's size.
Note: no code was published; `method.anomalies` makes it ADTR+.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import aggregate, grid_of, pooled_maximum, resize, smooth
from anomaly_lit.nn.attention import Attention
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.neighbours import NeighbourEncoder, answer_with_mean, silence
from anomaly_lit.nn.transformer import init_linear, relu_mlp
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

NEEDS = {"none": (), "masks": ("corrupted",), "labels": ("corrupted",), "outliers": ("outlier",)}


class ADTR(Method):
    """Anomaly detection transformer.

    Args:
        backbone: Frozen feature extractor; the paper takes all five stages of EfficientNet-B4.
        loss: Reconstruction loss on (B, C, h, w) maps, used if `anomalies` is `none`.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        image_size: Height and width of the images, or one number for both.
        stride: Pixels per position of the feature map; divides the image.
        dim: Width of a token, a multiple of `heads`.
        heads: Attention heads.
        feedforward: Width of the hidden layers.
        encoder_depth: Layers of the encoder.
        decoder_depth: Layers of the decoder.
        dropout: Share of attention weights, hidden layers and residuals that is dropped.
        query: What the decoder starts from: `learned`, or `input`, the tokens of the image, for
            ablations.
        head: How the last layer starts: `random`, or `mean`, which outputs the mean training
            feature, for learning rates far above the published one (see `nn.neighbours.silence`).
        anomalies: What ADTR+ learns from besides normal images. `none`: nothing, plain ADTR.
            `masks`: corrupted images with their masks. `labels`: the same images, of which it
            knows only whether they were corrupted. `outliers`: images of something else
            (`outlier_dir`).
        alpha: Weight of the push; None is 0.1 for `masks` and 1 for `labels` and `outliers`.
        top: Share of an image's positions, those farthest from their reconstruction, whose mean is
            pulled or pushed where only a label is known; in (0, 1].
        score: `max` (of the map after `pool`; the paper on MVTec AD) or `mean` of the map (ours for
            small images such as CIFAR-10).
        pool: Side of the averaging window before `max`, in pixels.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: A number is out of range, an option is unknown, or `stride` does not divide the
            image size.
    """

    needs_by_setting: Mapping[str, str] = {"outlier": "method.anomalies=outliers"}

    def __init__(
        self,
        backbone: Backbone,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = 0.1,
        image_size: int | Sequence[int] = 256,
        stride: int = 16,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_depth: int = 4,
        decoder_depth: int = 4,
        dropout: float = 0.1,
        query: Literal["learned", "input"] = "learned",
        head: Literal["random", "mean"] = "random",
        anomalies: Literal["none", "masks", "labels", "outliers"] = "none",
        alpha: float | None = None,
        top: float = 0.05,
        score: Literal["max", "mean"] = "max",
        pool: int = 16,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", dim=dim, heads=heads, feedforward=feedforward, pool=pool)
        check_range("method", "[0, inf)", encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        check_range("method", "[0, inf)", alpha=alpha, smoothing=smoothing)
        check_range("method", "[0, 1)", dropout=dropout)
        check_range("method", "(0, 1]", top=top)
        check_choice("method", NEEDS, anomalies=anomalies)
        check_choice("method", ("learned", "input"), query=query)
        check_choice("method", ("random", "mean"), head=head)
        check_choice("method", ("max", "mean"), score=score)
        if dim % heads:
            raise UserError(f"method.heads={heads} must divide method.dim={dim}")
        self.needs = frozenset(NEEDS[anomalies])
        self.backbone = backbone
        self.loss = loss
        self.grid = grid_of(image_size, stride)
        self.anomalies = anomalies
        self.alpha = (0.1 if anomalies == "masks" else 1.0) if alpha is None else alpha
        self.top = top
        self.score = score
        self.pool = pool
        self.smoothing = smoothing
        channels, places = sum(backbone.channels), math.prod(self.grid)
        self.embed = nn.Linear(channels, dim)
        self.positions = nn.Parameter(torch.rand(places, dim))
        self.query = nn.Parameter(torch.randn(places, dim)) if query == "learned" else None
        self.encoder = NeighbourEncoder(dim, heads, feedforward, encoder_depth, dropout)
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, heads, feedforward, dropout) for _ in range(decoder_depth)
        )
        self.head = nn.Linear(dim, channels)
        for part in (self.embed, self.encoder, self.decoder, self.head):
            part.apply(init_linear)
        self.head_start = head
        if head == "mean":
            silence(self.head)

    # -------------------------------------------------------------------- reconstruction

    def describe(self, image: Tensor) -> Tensor:
        """Return the features of images, (B, C, h, w), in float32."""
        return aggregate(self.backbone(image), self.grid).float()

    def reconstruct(self, features: Tensor) -> Tensor:
        """Rebuild (B, C, h, w) features, in float32."""
        tokens = self.embed(features.flatten(2).transpose(1, 2))  # (B, N, dim)
        encoded = self.encoder(tokens, self.positions)
        decoded = tokens if self.query is None else self.query.expand_as(tokens)
        for layer in self.decoder:
            decoded = layer(decoded, encoded, self.positions)
        return self.head(decoded).float().transpose(1, 2).unflatten(2, self.grid)

    def learn(self) -> None:
        """Start the head at the mean feature if `head` says so."""
        if self.head_start == "mean":
            features = (self.features(self.backbone, b) for b in self.normal_batches("train"))
            answer_with_mean(self.head, (aggregate(maps, self.grid) for maps in features))

    # --------------------------------------------------------------------------- losses

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance of normal features to their reconstruction; with anomalies, a push.

        A validation has no outliers: only normal images are pulled there.
        """
        if self.anomalies == "none":
            features = self.clean(batch, "image")
            return loss_terms(self.loss, self.reconstruct(features), features)
        if self.anomalies == "masks":
            gap = self.gap(self.describe(batch["corrupted"]))
            return self.by_mask(gap, F.adaptive_max_pool2d(batch["corruption"].float(), self.grid))
        if self.anomalies == "labels":
            gap = self.gap(self.describe(batch["corrupted"]))
            return self.by_label(gap, batch["corruption"].flatten(1).any(dim=1))
        given = [of for of in ("image", "outlier") if of in batch]
        features = torch.cat([self.clean(batch, of) for of in given])
        strange = torch.arange(len(features), device=features.device) >= len(batch["image"])
        return self.by_label(self.gap(features), strange)

    def clean(self, batch: Batch, of: str) -> Tensor:
        """Return the features (B, C, h, w) of a batch's images or outliers."""
        return aggregate(self.features(self.backbone, batch, of=of), self.grid).float()

    def gap(self, features: Tensor) -> Tensor:
        """Return the pseudo-Huber distance to the reconstruction, (B, 1, h, w)."""
        absolute = (self.reconstruct(features) - features).abs().mean(dim=1, keepdim=True)
        return (absolute.square() + 1).sqrt() - 1

    def by_mask(self, gap: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Pull normal positions and push anomalous ones, as means over all positions.

        Args:
            gap: (B, 1, h, w).
            truth: (B, 1, h, w) in {0., 1.}.
        """
        near = ((1 - truth) * gap).mean(dim=(1, 2, 3))
        far = (truth * gap).mean(dim=(1, 2, 3))
        anomalous = truth.flatten(1).any(dim=1)
        return {"pull": near.mean(), "push": self.alpha * push(far, anomalous)}

    def by_label(self, gap: Tensor, anomalous: Tensor) -> dict[str, Tensor]:
        """Pull normal images and push anomalous ones, by the mean of their largest gaps.

        Args:
            gap: (B, 1, h, w).
            anomalous: (B,) bool.
        """
        count = max(1, round(self.top * math.prod(self.grid)))
        largest = gap.flatten(1).topk(count).values.mean(dim=1)
        near = torch.where(anomalous, torch.zeros_like(largest), largest)
        return {"pull": near.mean(), "push": self.alpha * push(largest, anomalous)}

    # -------------------------------------------------------------------------- scoring

    def training_backbones(self) -> dict[str, Backbone]:
        """Return none where training reads corrupted images only."""
        return {} if "corrupted" in self.needs else super().training_backbones()

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        features = self.describe(image)
        distance = (self.reconstruct(features) - features).norm(dim=1, keepdim=True)
        anomaly_map = smooth(resize(distance, image.shape[-2:]), self.smoothing)  # (B, 1, H, W)
        if self.score == "mean":
            return Prediction(anomaly_map, anomaly_map.mean(dim=(1, 2, 3)))
        return Prediction(anomaly_map, pooled_maximum(anomaly_map, self.pool))


class DecoderLayer(nn.Module):
    """Post-norm layer: attention among its own tokens, then to the encoder's, then a small MLP.

    Positions are added to queries and keys, never to values.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        feedforward: Width of the hidden layer.
        dropout: Share dropped of attention weights, the hidden layer and the three residuals.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.to_itself = Attention(dim, heads, dropout)
        self.to_encoded = Attention(dim, heads, dropout)
        self.mlp = relu_mlp(dim, feedforward, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, encoded: Tensor, positions: Tensor) -> Tensor:
        """Map two (B, N, dim) and (N, dim) to (B, N, dim)."""
        placed = tokens + positions
        tokens = self.norm1(tokens + self.dropout(self.to_itself(placed, placed, tokens)))
        mixed = self.to_encoded(tokens + positions, encoded + positions, encoded)
        tokens = self.norm2(tokens + self.dropout(mixed))
        return self.norm3(tokens + self.dropout(self.mlp(tokens)))


def push(distance: Tensor, anomalous: Tensor) -> Tensor:
    """Return the mean over images of -log(1 - exp(-distance)), 0 for normal images.

    Args:
        distance: (B,), at least 0; below 1e-6 the term has no gradient.
        anomalous: (B,) bool.
    """
    repelled = -torch.log(-torch.expm1(-distance.clamp(min=1e-6)))
    return torch.where(anomalous, repelled, torch.zeros_like(repelled)).mean()
