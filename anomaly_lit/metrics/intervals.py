"""Intervals of image metrics, by resampling images."""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_lit.metrics.functional import as_float, rank_items
from anomaly_lit.metrics.ranking import NAN


def bootstrap_interval(
    scores: Tensor,
    labels: Tensor,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return bootstrap percentile intervals of AUROC and AP (Efron, Tibshirani, 1993, chapter 13).

    The bootstrap is stratified: normal and anomalous items are drawn separately, with replacement,
    so that a resample has as many of each as the data. Items are drawn by rank, so the order in
    which they are given does not matter.

    Args:
        scores: (N,) unbounded scores.
        labels: (N,) bool.
        resamples: number of resamples.
        confidence: share of the resamples inside the interval.
        seed: of a separate generator; the global random state is not touched.

    Returns:
        {"auroc": (low, high), "ap": (low, high)}, 0-d float64, NaN if a class is missing.
    """
    ranking = rank_items(scores, labels)
    if ranking.undefined:
        return {"auroc": (NAN, NAN), "ap": (NAN, NAN)}
    scores, order = as_float(scores.flatten()).cpu().sort(descending=True)
    labels = labels.flatten().cpu()[order]
    last = torch.unique_consecutive(scores, return_counts=True)[1].cumsum(0) - 1  # ends of ties
    generator = torch.Generator().manual_seed(seed)
    step = max(1, 2**22 // len(scores))  # 32 MiB for each float64 array
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    parts = [_resample(labels, last, size, generator) for size in sizes]
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    found = torch.cat(parts, dim=1).quantile(ends, dim=1)  # (2 ends, 2 metrics)
    return {"auroc": (found[0, 0], found[1, 0]), "ap": (found[0, 1], found[1, 1])}


def _resample(labels: Tensor, last: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return AUROC and AP of `size` resamples: (2, size) float64."""
    true = _draw(labels, size, generator).cumsum(1)[:, last]  # (size, distinct scores)
    false = _draw(~labels, size, generator).cumsum(1)[:, last]
    positives, negatives = true[:, -1:], false[:, -1:]
    zero = true.new_zeros(size, 1)
    gained = true.diff(dim=1, prepend=zero) / positives
    above = (torch.cat([zero, false[:, :-1]], dim=1) + false) / (2 * negatives)
    area = 1 - (gained * above).sum(1)
    precision = true / (true + false).clamp(min=1)
    return torch.stack([area, (gained * precision).sum(1)])


def _draw(chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return how often each chosen item is drawn, one draw per chosen item: (size, N) float64."""
    places = chosen.nonzero().squeeze(1)
    drawn = torch.randint(len(places), (size, len(places)), generator=generator)
    count = torch.zeros(size, len(chosen), dtype=torch.float64)
    return count.scatter_add_(1, places[drawn], torch.ones_like(drawn, dtype=torch.float64))
