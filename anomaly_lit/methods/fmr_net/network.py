"""Encoder, memory, rearrangement of laterals and decoder of FMR-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.neighbours import neighbour_mask
from anomaly_lit.nn.ranks import mean_of_marked, sum_of_ranks

SHARPNESS = 0.05  # width of the gate around its threshold, in units of the patch score
QUANTILE = 0.95  # of normal patches whose score lies below the threshold
SLOTS_MARGIN = 0.5  # largest cosine of two slots that costs nothing
DEFECT_MARGIN = 0.3  # largest cosine of a defect with a slot that costs nothing
TINY = 1e-30  # the smallest sum of which a logarithm is taken


class Encoder(nn.Module):
    """Stages that halve the map, and one map that joins all their scales.

    Args:
        widths: Channels of the stages, finest first.
        dim: Channels of the joined map.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(conv(given, made, 2), conv(made, made))
            for given, made in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.join = nn.Conv2d(sum(widths), dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, 3, H, W) to (B, dim, h, w) and the stages' maps, finest first."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        size = image.shape[-2:]
        scales = [F.interpolate(map_, size, mode="bilinear") for map_ in maps[:-1]]
        return self.join(torch.cat([*scales, image], dim=1)), maps


class Recall(NamedTuple):
    """What the memory makes of a map of N = h * w positions."""

    out: Tensor  # (B, dim, h, w)
    token: Tensor  # (B, N, dim), of length 1
    cosine: Tensor  # (B, N, slots)
    gate: Tensor  # (B, 1, h, w) in [0, 1], near 1 at defects

    def score(self) -> Tensor:
        """Return the patch score, (B, N) in [0, 2]: one minus the cosine to the nearest slot."""
        return 1 - self.cosine.amax(dim=-1)


class ContrastiveMemory(nn.Module):
    """Tells normal positions by their nearest slot, and replaces the others by slots (CMFM).

    Args:
        dim: Channels of the map, and length of a slot.
        slots: Number of slots.
        temperature: Divides cosines before the softmax of reading.
    """

    threshold: Tensor

    def __init__(self, dim: int, slots: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.slots = nn.Parameter(torch.randn(slots, dim))
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1))
        self.restore = nn.Conv2d(dim, dim, 1)
        self.register_buffer("threshold", torch.ones(()))

    def tokens(self, map_: Tensor) -> Tensor:
        """Return directions of all positions, (B, N, dim), each of length 1."""
        return F.normalize(self.project(map_).flatten(2).mT.float(), dim=-1)

    def forward(self, map_: Tensor) -> Recall:
        """Replace what looks like a defect in a (B, dim, h, w) map by what the slots say."""
        size = map_.shape[-2:]
        token, slots = self.tokens(map_), self.slots.float()
        with torch.autocast(map_.device.type, enabled=False):
            cosine = token @ F.normalize(slots, dim=-1).T
            read = (cosine / self.temperature).softmax(dim=-1) @ F.normalize(slots, dim=-1)
            score = (1 - cosine.amax(dim=-1)).unflatten(1, size)[:, None]
            gate = ((score - self.threshold) / SHARPNESS).sigmoid()
        remembered = self.restore(read.mT.unflatten(2, size).to(map_.dtype))
        return Recall((1 - gate) * map_ + gate * remembered, token, cosine, gate)

    def start(self, centres: Tensor, tokens: Tensor) -> None:
        """Begin with cluster centres (slots, dim) and the scores of normal tokens (N, dim)."""
        self.slots.copy_(F.normalize(centres, dim=-1))
        cosine = (tokens @ self.slots.T).amax(dim=1)
        self.threshold.copy_(torch.quantile(1 - cosine, QUANTILE))

    def move_threshold(self, scores: Tensor, momentum: float) -> None:
        """Move the threshold towards the quantile of normal scores, (M,), where others are NaN."""
        found = torch.nanquantile(scores, QUANTILE)
        moved = momentum * self.threshold + (1 - momentum) * found
        self.threshold.copy_(torch.where(found.isnan(), self.threshold, moved))

    def spread(self) -> Tensor:
        """Return the mean excess of the cosines of different slots over a margin."""
        slots = F.normalize(self.slots.float(), dim=-1)
        excess = (slots @ slots.T - SLOTS_MARGIN).relu()
        count = len(slots)
        return (excess.sum() - excess.diagonal().sum()) / (count * (count - 1))


def contrast(recall: Recall, defect: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """Pull normal positions to their nearest slot, away from other slots and from defects.

    The mean over normal positions, with nearest slot j and cosines s, of

        -log(exp(s_j / t) / (sum_k exp(s_k / t) + sum over chosen defects q of exp(s_qj / t)))

    plus the mean excess of the defects' largest cosine over a margin. Positions are those of the
    batches of all ranks; see `mean_of_marked`.

    Args:
        recall: What the memory made of a batch.
        defect: (M,) bool, M = B * N: true at synthetic defects.
        chosen: (K,) positions, of which those in `defect` count as defects.
        temperature: t.
    """
    cosine = recall.cosine.flatten(0, 1)  # (M, slots)
    nearest = cosine.amax(dim=1) / temperature
    own = cosine.argmax(dim=1)
    rivals = ((cosine[chosen] - 1) / temperature).exp() * defect[chosen, None]  # (K, slots)
    of_slot = (sum_of_ranks(rivals.sum(dim=0)) + TINY).log() + 1 / temperature
    below = torch.logaddexp((cosine / temperature).logsumexp(dim=1), of_slot[own])
    pulled = mean_of_marked(below - nearest, ~defect)
    excess = (cosine[chosen].amax(dim=1) - DEFECT_MARGIN).relu()
    return pulled + mean_of_marked(excess, defect[chosen])


class Rearrangement(nn.Module):
    """Rewrites a lateral where there is a defect, from normal patches found elsewhere (GFRM).

    A texton is the patch of the lateral around a position of the memory's map, a little larger than
    that position. Each is compared with all others; what looks like a defect is left out, and so
    are the position itself and its neighbours. The result is pasted back; overlaps are averaged.

    Args:
        channels: Channels of the lateral.
        stride: Positions of the lateral per position of the memory's map.
        overlap: Positions that a texton reaches beyond its own.
        temperature: Divides cosines before the softmax; for `texton` only.
        kind: `texton` compares textons by their cosine, `attention` by learned projections.
        heads: Heads of the attention; divides the values of a texton.
        dim: Length of a projected texton in a head.
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        overlap: int,
        temperature: float,
        kind: str,
        heads: int = 4,
        dim: int = 64,
    ) -> None:
        super().__init__()
        self.size = stride + 2 * overlap
        self.stride = stride
        self.overlap = overlap
        self.temperature = temperature
        self.heads = heads if kind == "attention" else 1
        length = channels * self.size**2
        self.query = nn.Linear(length, heads * dim) if kind == "attention" else None
        self.key = nn.Linear(length, heads * dim) if kind == "attention" else None

    def weights(self, textons: Tensor, gate: Tensor) -> Tensor:
        """Return how much of each texton goes into each, (B, heads, N, N); rows sum to 1."""
        if self.query is None or self.key is None:
            unit = F.normalize(textons.float(), dim=-1)[:, None]
            logits = unit @ unit.mT / self.temperature
        else:
            query, key = (
                part(textons).unflatten(2, (self.heads, -1)).transpose(1, 2).float()
                for part in (self.query, self.key)
            )
            logits = query @ key.mT / math.sqrt(query.shape[-1])
        normal = torch.log(1 - gate.flatten(1).clamp(max=0.999))  # (B, N)
        rows, columns = gate.shape[-2:]
        apart = neighbour_mask(rows, columns, 3).to(gate.device)
        logits = logits + normal[:, None, None]
        return logits.masked_fill(~apart, -torch.inf).softmax(dim=-1)

    def forward(self, lateral: Tensor, gate: Tensor) -> Tensor:
        """Rewrite (B, C, stride * h, stride * w) where the gate (B, 1, h, w) is open."""
        cut = {"kernel_size": self.size, "padding": self.overlap, "stride": self.stride}
        textons = F.unfold(lateral, **cut).mT  # (B, N, C * size^2)
        with torch.autocast(lateral.device.type, enabled=False):
            weight = self.weights(textons, gate.float())
            parts = textons.float().unflatten(2, (self.heads, -1)).transpose(1, 2)
            found = (weight @ parts).transpose(1, 2).flatten(2)
        share = gate.flatten(1)[..., None]
        mixed = ((1 - share) * textons + share * found).mT.to(lateral.dtype)
        size = lateral.shape[-2:]
        times = F.unfold(torch.ones_like(lateral[:1, :1]), **cut)
        times = F.fold(times, size, **cut)
        return F.fold(mixed, size, **cut) / times


class Decoder(nn.Module):
    """Doubles the map stage by stage; joins the lateral of each size but the coarsest.

    Args:
        widths: Channels of the encoder's stages, finest first.
        dim: Channels of the memory's map.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        made = [*reversed(widths[:-1]), max(widths[0] // 2, 1)]  # coarsest first
        given = [dim, *made[:-1]]
        joined = [*reversed(widths[:-1]), 0]
        self.up = nn.ModuleList(conv(a, b) for a, b in zip(given, made, strict=True))
        self.mix = nn.ModuleList(conv(a + b, a) for a, b in zip(made, joined, strict=True))
        self.out = nn.Conv2d(made[-1], 3, 3, padding=1)

    def forward(self, x: Tensor, laterals: Sequence[Tensor]) -> Tensor:
        """Map (B, dim, h, w) and laterals, finest first, to (B, 3, H, W) in [0, 1]."""
        others: list[Tensor | None] = [*reversed(laterals), None]
        for up, mix, lateral in zip(self.up, self.mix, others, strict=True):
            x = up(F.interpolate(x, scale_factor=2, mode="bilinear"))
            x = mix(x if lateral is None else torch.cat([x, lateral], dim=1))
        return self.out(x).sigmoid()


def conv(given: int, made: int, stride: int = 1) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU()
    )
