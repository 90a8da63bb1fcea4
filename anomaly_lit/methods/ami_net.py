"""AMI-Net: adaptive mask inpainting (Luo et al., IEEE T-ASE 22, 2024, arXiv:2412.11802).

A frozen backbone turns an image into one map of multi-scale features. A transformer learns to
inpaint the maps of normal images, of which a random share of the patches is hidden. At test time
the mask is adaptive: a second branch groups the patches of an image around a few cluster centres
and hides those far from their centre, so that defects are hidden before they can be copied. The
anomaly map is the distance between the inpainted and the original features, times their difference
in direction; the score is the map's standard deviation over the image.

Follows the authors' published code where the paper leaves a choice open. Differs from it:

- `jitter` is the norm of the noise relative to that of the token; the code's factor 20 fits its
  width of 768 (20 / sqrt(768) = 0.72) and would be stronger in a narrower network.
- The cluster loss leaves out the distance of a centre to itself instead of adding zeros: the value
  is the same, and there is no gradient of a norm at zero.
- `average=False` and `normalise=True` are the code's variants for other backbones, and
  `score="max"` is the usual score of the field.

Paper: Luo, Yao, Yu, Li: Adaptive Mask Inpainting Network for Industrial Anomaly Detection and
Localization. IEEE T-ASE 22, 2024, arXiv:2412.11802.
Status: works; measured small (experiments/ami_net), not yet at the paper's size.
Note: the authors' code is MIT; written anew from its description.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import loss_terms
from anomaly_lit.masks import Mask
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import aggregate, grid_pair, resize, smooth
from anomaly_lit.nn.attention import init_as_one
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.transformer import (
    TransformerBlock,
    add_jitter,
    init_linear,
    sincos_positions,
)
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range


class AMINet(Method):
    """Adaptive mask inpainting network.

    Args:
        backbone: Frozen feature extractor; the paper takes stages 1-3 of WideResNet-50-2.
        mask: Hides patches in training, (n, B, h, w) bool: n copies of each image are inpainted.
        loss: Reconstruction loss on maps that have a whole patch in the channels of each position.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training; None keeps the rate constant, as
            published.
        grid: Side, or height and width, of the feature map, in positions.
        patch: Side of a patch, in positions; it divides the grid.
        dim: Width of a token, a multiple of 4 and of `heads`.
        heads: Attention heads.
        depth: Transformer blocks of the inpainting network.
        clusters: Cluster centres per image (K).
        cluster_depth: Transformer blocks that form the centres (N_s).
        cluster_weight: Weight of the cluster loss.
        sigma: A patch is hidden if its distance is at least this many standard deviations above the
            mean of its cluster.
        adaptive_mask: Hide patches at test time; if false, nothing is hidden there.
        jitter: Norm of the noise on tokens in training, relative to the norm of the token.
        average: Average each resized stage over 3 x 3 neighbours (WideResNet-50-2 in the code).
        normalise: Scale the channel vectors of the joined stages to unit length (ResNet-101 in the
            code).
        smoothing: Standard deviation of the Gaussian filter on both maps, in pixels.
        score: `std` (the paper's code) or `max` of the map.

    Raises:
        UserError: `patch` does not divide `grid`, `heads` or 4 does not divide `dim`, or a value is
            out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        mask: Mask,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        grid: int | Sequence[int] = 64,
        patch: int = 4,
        dim: int = 768,
        heads: int = 12,
        depth: int = 8,
        clusters: int = 8,
        cluster_depth: int = 1,
        cluster_weight: float = 1.0,
        sigma: float = 0.5,
        adaptive_mask: bool = True,
        jitter: float = 20 / math.sqrt(768),
        average: bool = True,
        normalise: bool = False,
        smoothing: float = 4.0,
        score: Literal["std", "max"] = "std",
    ) -> None:
        super().__init__(optimizer, schedule)
        self.grid = grid_pair(grid)
        check_range("method", "[1, 1024]", grid=self.grid, patch=patch)
        check_range("method", "[1, inf)", dim=dim, heads=heads, clusters=clusters)
        check_range("method", "[0, inf)", depth=depth, cluster_depth=cluster_depth, jitter=jitter)
        check_range("method", "[0, inf)", cluster_weight=cluster_weight, smoothing=smoothing)
        check_range("method", "(-inf, inf)", sigma=sigma)
        if any(side % patch for side in self.grid) or dim % heads or dim % 4:
            raise UserError(
                f"method.patch={patch} must divide method.grid={list(self.grid)}, and "
                f"method.heads={heads} and 4 must divide method.dim={dim}"
            )
        check_choice("method", ("std", "max"), score=score)
        self.backbone = backbone
        self.mask = mask
        self.loss = loss
        self.patch = patch
        self.sigma = sigma
        self.cluster_weight = cluster_weight
        self.adaptive_mask = adaptive_mask
        self.jitter = jitter
        self.average = average
        self.normalise = normalise
        self.smoothing = smoothing
        self.score = score
        self.cells = rows, columns = self.grid[0] // patch, self.grid[1] // patch
        token_dim = sum(backbone.channels) * patch**2
        positions = sincos_positions(dim, rows, columns)
        self.inpainting = InpaintingNetwork(token_dim, dim, heads, depth, positions)
        self.clustering = ClusterBranch(token_dim, dim, heads, cluster_depth, clusters, positions)

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        """Aggregate the stages and cut the map into patches: (B, N, C * patch^2)."""
        aggregated = aggregate(features, self.grid, self.average)
        if self.normalise:
            aggregated = F.normalize(aggregated, dim=1)
        return F.pixel_unshuffle(aggregated, self.patch).flatten(2).transpose(1, 2)

    def map_of(self, tokens: Tensor) -> Tensor:
        """Turn tokens into a map whose positions are whole patches, (B, C * patch^2, h, w)."""
        return tokens.transpose(1, 2).unflatten(2, self.cells)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the inpainting loss over all patches, hidden or not, and the cluster loss.

        The branches share no trainable weights: the cluster loss trains only the clusters. It can
        fall below zero, so the total may become negative.
        """
        target = self.tokens(self.features(self.backbone, batch))
        hidden = self.mask(len(target), *self.cells, self.generator())  # (n, B, rows, columns)
        jitter = self.jitter if self.training else 0.0
        whole = target.repeat(len(hidden), 1, 1)  # (n * B, N, C * patch^2)
        prediction = self.inpainting(whole, hidden.flatten(2).flatten(0, 1), jitter).float()
        terms = loss_terms(self.loss, self.map_of(prediction), self.map_of(whole))
        tokens, centres = self.clustering(target, jitter)
        terms["clusters"] = self.cluster_weight * cluster_loss(tokens, centres)
        return terms

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        target = self.tokens(self.backbone(image))
        hidden = torch.zeros(target.shape[:2], dtype=torch.bool, device=target.device)
        if self.adaptive_mask:
            distance = token_distance(*self.clustering(target))
            hidden = adaptive_mask(distance, self.sigma)
        prediction = self.inpainting(target, hidden).float()
        inpainted = F.pixel_shuffle(self.map_of(prediction), self.patch)
        features = F.pixel_shuffle(self.map_of(target.float()), self.patch)
        distance = (inpainted - features).square().mean(dim=1, keepdim=True)
        direction = 1 - F.cosine_similarity(inpainted, features, dim=1).unsqueeze(1)
        maps = resize(torch.cat([distance, direction], dim=1), image.shape[-2:])
        maps = smooth(maps, self.smoothing)
        anomaly_map = maps[:, :1] * maps[:, 1:]  # (B, 1, H, W)
        if self.score == "std":
            return Prediction(anomaly_map, anomaly_map.std(dim=(1, 2, 3), unbiased=False))
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


class InpaintingNetwork(nn.Module):
    """Vision transformer that rebuilds all patches from the visible ones.

    Hidden patches are replaced by a learned token; unlike in MAE, all tokens pass through all
    blocks and there is no decoder.
    """

    positions: Tensor

    def __init__(self, token_dim: int, dim: int, heads: int, depth: int, positions: Tensor) -> None:
        super().__init__()
        self.embed = nn.Linear(token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*[TransformerBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, token_dim)
        bias = self.embed.bias.detach().clone()  # keeps torch's initialisation, as in the code
        self.apply(init_linear).apply(init_as_one)
        self.embed.bias.data.copy_(bias)

    def forward(self, tokens: Tensor, hidden: Tensor, jitter: float = 0.0) -> Tensor:
        """Map (B, N, token_dim) and (B, N) bool to (B, N, token_dim)."""
        x = self.embed(tokens)
        x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        x = add_jitter(x, jitter) + self.positions
        return self.head(self.norm(self.blocks(x)))


class ClusterBranch(nn.Module):
    """Forms the cluster centres of each image by attention over its patches."""

    positions: Tensor

    def __init__(
        self, token_dim: int, dim: int, heads: int, depth: int, clusters: int, positions: Tensor
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(token_dim, dim)  # keeps torch's initialisation, as in the code
        self.register_buffer("positions", positions, persistent=False)
        self.centres = nn.Parameter(0.02 * torch.randn(clusters, dim))
        self.blocks = nn.Sequential(*[TransformerBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.blocks.apply(init_linear).apply(init_as_one)

    def forward(self, tokens: Tensor, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
        """Map (B, N, token_dim) to embedded patches (B, N, dim) and centres (B, K, dim).

        Noise affects only the centres: distances use the clean patches.
        """
        x = self.embed(tokens)
        noisy = add_jitter(x, jitter) + self.positions
        centres = self.centres.to(x.dtype).expand(len(x), -1, -1)
        mixed = self.blocks(torch.cat([centres, noisy], dim=1))
        return (x + self.positions).float(), self.norm(mixed[:, : len(self.centres)]).float()


def token_distance(tokens: Tensor, centres: Tensor) -> Tensor:
    """Multiply Euclidean distance by one minus cosine: (B, N, D), (B, K, D) to (B, N, K)."""
    with torch.autocast(tokens.device.type, enabled=False):  # subtraction needs full precision
        # by matrix products for any number of tokens: torch's other way has no export to ONNX
        euclidean = torch.cdist(tokens, centres, compute_mode="use_mm_for_euclid_dist")
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(centres, dim=-1).mT
    return euclidean * (1 - cosine)


def cluster_loss(tokens: Tensor, centres: Tensor) -> Tensor:
    """Return the mean distance to the nearest centre, less 0.1 times that between centres.

    It draws patches to their centres and drives centres apart.
    """
    clusters = centres.shape[1]
    near = token_distance(tokens, centres).amin(dim=-1).mean()
    between = token_distance(centres, centres)
    apart = ~torch.eye(clusters, dtype=torch.bool, device=centres.device)
    pairs = max(clusters * (clusters - 1), 1)
    return near - 0.1 * (between * apart).sum(dim=(1, 2)).mean() / pairs


def adaptive_mask(distance: Tensor, sigma: float) -> Tensor:
    """Hide the patches that are far from their centre, cluster by cluster.

    A patch belongs to its nearest centre. In a cluster of two or more, those at or beyond mean +
    sigma * standard deviation (unbiased) of the cluster's distances are hidden; if all are equally
    far, the whole cluster is hidden. In smaller clusters nothing is hidden.

    Args:
        distance: (B, N, K), from each patch to each centre.
        sigma: Any float; larger hides less.

    Returns:
        (B, N) bool, true where hidden.
    """
    nearest, cluster = distance.min(dim=-1)
    member = F.one_hot(cluster, distance.shape[-1]).to(distance.dtype)  # (B, N, K)
    count = member.sum(dim=1)
    mean = (member * nearest[..., None]).sum(dim=1) / count.clamp(min=1)
    deviation = (nearest[..., None] - mean[:, None]) * member
    variance = deviation.square().sum(dim=1) / (count - 1).clamp(min=1)
    threshold = mean + sigma * variance.sqrt()
    threshold = torch.where(count > 1, threshold, torch.inf)
    return nearest >= threshold.gather(1, cluster)
