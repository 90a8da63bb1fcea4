"""The ordering of scores, and the metrics that are read off it.

Every metric here depends only on the order of the scores, so each is read off a `Ranking`: the
scores of anomalous items, highest first, with the counts of normal items above them. There are two
kinds: `rank` orders all scores (a group is one distinct score, that is a tie), and the streaming
engine gives bins (a group is all scores of one bin, whose order is unknown). Within a bin each
metric has a lowest and a highest possible value; their sums are the `low` and `high` of an
`Estimate`.

Conventions: a tie counts one half in AUROC, and all items of a tie enter a curve together, as in
scikit-learn. Scores are not squashed, clipped or normalised. If a class is missing, every metric is
NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-11  # float64 sums of the lows and highs round by less than this
AUPIMO_LIMITS = (1e-5, 1e-4)
NAN = torch.tensor(torch.nan, dtype=torch.float64)


class Estimate(NamedTuple):
    """A metric and the range of its exact value; 0-d float64 tensors on the CPU."""

    value: Tensor
    low: Tensor
    high: Tensor

    @property
    def bound(self) -> Tensor:
        """The largest possible distance between the value and the exact metric."""
        return torch.maximum(self.high - self.value, self.value - self.low) + ROUNDING


UNDEFINED = Estimate(NAN, NAN, NAN)


class Ranking(NamedTuple):
    """Groups that hold an anomalous item, highest score first; float64 on the CPU, shapes (G,).

    Names with `before` count the items of higher groups only, the others also those of this group.
    """

    threshold: Tensor  # lowest score of the group
    true: Tensor  # anomalous items down to and including this group
    false_before: Tensor  # normal items
    false: Tensor
    overlap: Tensor  # mean over regions of the share that is found, in [0, 1]
    recall: Tensor  # mean over anomalous images of the share of anomalous pixels found
    normal_before: Tensor  # pixels of images without any defect
    normal: Tensor
    positives: int
    negatives: int
    normals: int  # pixels of images without any defect
    tied: bool  # a group is one distinct score, so nothing is unknown
    slack: tuple[float, float] = (0.0, 0.0)  # rounding of overlap and recall in fixed point

    @property
    def undefined(self) -> bool:
        """Whether a class is missing."""
        return self.positives == 0 or self.negatives == 0


def rank(
    scores: Tensor,
    positive: Tensor,
    normal: Tensor | None = None,
    area: Tensor | None = None,
    image_area: Tensor | None = None,
    regions: int = 0,
    images: int = 0,
) -> Ranking:
    """Order scores exactly, with ties as in scikit-learn.

    Args:
        scores: (N,) scores of normal and anomalous items together (if `normal` is given: of the
            pixels of images with a defect).
        positive: (P,) scores of the anomalous items, which `scores` also contains.
        normal: (M,) scores of the pixels of images without defects.
        area: (P,) size, in pixels, of each anomalous pixel's region.
        image_area: (P,) number of anomalous pixels in each anomalous pixel's image.
        regions: number of regions.
        images: number of images with a defect.
    """
    normal = scores[:0] if normal is None else normal
    ordered, order = positive.sort(descending=True)
    threshold, count = torch.unique_consecutive(ordered, return_counts=True)
    end = count.cumsum(0)

    def found(size: Tensor | None, total: int) -> Tensor:
        if size is None:
            return torch.zeros(len(end), dtype=torch.float64)
        return (1 / size[order].cpu().double()).cumsum(0)[end.cpu() - 1] / total

    sorted_scores, sorted_normal = _sort(scores), _sort(normal)
    true, true_before = end.cpu().double(), (end - count).cpu().double()
    normal_before = _count_above(sorted_normal, threshold, with_ties=False)
    normal_after = _count_above(sorted_normal, threshold, with_ties=True)
    before = _count_above(sorted_scores, threshold, with_ties=False) + normal_before - true_before
    after = _count_above(sorted_scores, threshold, with_ties=True) + normal_after - true
    return Ranking(
        threshold=threshold.cpu().double(),
        true=true,
        false_before=before,
        false=after,
        overlap=found(area, regions),
        recall=found(image_area, images),
        normal_before=normal_before,
        normal=normal_after,
        positives=len(positive),
        negatives=len(scores) + len(normal) - len(positive),
        normals=len(normal),
        tied=True,
    )


def _sort(scores: Tensor) -> Tensor:
    """Sort in ascending order; on a CPU numpy's vectorised sort is much faster than torch's."""
    if scores.is_cuda:
        return scores.sort().values
    return torch.from_numpy(np.sort(scores.cpu().numpy()))


def _count_above(ascending: Tensor, threshold: Tensor, with_ties: bool) -> Tensor:
    position = torch.searchsorted(ascending, threshold, right=not with_ties)
    return (len(ascending) - position).cpu().double()


def _before(cumulated: Tensor) -> Tensor:
    return torch.cat([cumulated.new_zeros(1), cumulated[:-1]])


def ranking_auroc(ranking: Ranking) -> Estimate:
    """Return how often an anomalous item outranks a normal one; a tie counts one half.

    That is sum_g p_g (N - (F_before + F) / 2) / (P N); with bins it is off by at most sum_g p_g n_g
    / (2 P N).
    """
    if ranking.undefined:
        return UNDEFINED
    share = (ranking.true - _before(ranking.true)) / ranking.positives
    above = (ranking.false_before + ranking.false) / (2 * ranking.negatives)
    value = 1 - (share * above).sum()
    half = (share * (ranking.false - ranking.false_before)).sum() / (2 * ranking.negatives)
    return (
        Estimate(value, value, value)
        if ranking.tied
        else _within(value, value - half, value + half)
    )


def ranking_average_precision(ranking: Ranking) -> Estimate:
    """Return the sum over thresholds of gained recall times precision (scikit-learn's AP).

    In a bin with p anomalous and n normal items, below T anomalous and F normal ones, the j-th
    anomalous item has a precision between (T + j) / (T + j + F + n), if all normal items come
    first, and (T + p) / (T + p + F), if all anomalous items come first and are tied. The value
    assumes that normal items are evenly spread, n j / (p + 1) of them above the j-th. Sums over j
    are computed as integrals, which are exact for p = 1 and on the safe side at the low end.
    """
    if ranking.undefined:
        return UNDEFINED
    true, false, before = ranking.true, ranking.false, _before(ranking.true)
    count = true - before
    if ranking.tied:
        value = (count * true / (true + false)).sum() / ranking.positives
        return Estimate(value, value, value)
    first = before + 1
    low = first / (first + false) + _precision_integral(first, true, false, torch.zeros(()))
    high = count * true / (true + ranking.false_before)
    spread = (false - ranking.false_before) / (count + 1)
    offset = ranking.false_before - spread * before  # normal items above item x: offset + spread x
    ends = first / (first * (1 + spread) + offset) + true / (true * (1 + spread) + offset)
    inner = _precision_integral(first, true, offset, spread)
    middle = torch.where(count > 1, ends / 2 + inner, ends / 2)
    low, high, middle = (part.sum() / ranking.positives for part in (low, high, middle))
    return _within(middle, low, high)


def _precision_integral(start: Tensor, stop: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """Integrate x / (x (1 + slope) + offset), the precision at the x-th anomalous item, over x."""
    growth = 1 + slope
    ratio = torch.log1p(growth * (stop - start) / (growth * start + offset))
    return (stop - start) / growth - offset / growth.square() * ratio


def ranking_f1_max(ranking: Ranking) -> tuple[Estimate, Tensor]:
    """Return the largest F1 = 2 T / (T + F + P) of all thresholds, and its threshold (score >= it).

    With bins the value is the F1 at the best lower edge of a bin, which is attained; no threshold
    inside a bin can exceed 2 T / (T + F_before + P).
    """
    if ranking.undefined:
        return UNDEFINED, NAN
    f1 = 2 * ranking.true / (ranking.true + ranking.false + ranking.positives)
    value, index = f1.max(0)
    threshold = ranking.threshold[index]
    if ranking.tied:
        return Estimate(value, value, value), threshold
    best = 2 * ranking.true / (ranking.true + ranking.false_before + ranking.positives)
    return Estimate(value, value, best.max()), threshold


def ranking_aupro(ranking: Ranking, limit: float = 0.3) -> Estimate:
    """Return the area under per-region overlap up to a false positive rate, divided by that rate.

    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 4.2, with the
    conventions of the official evaluation code: see `aupro`. Within a bin the curve stays in the
    rectangle between the bin's two corners.
    """
    if ranking.undefined:
        return UNDEFINED
    x, y = _points(ranking.false_before, ranking.false, ranking.overlap, ranking.negatives)
    area = _area(x, y, 0.0, limit, ranking.slack[0])
    return Estimate(area.value, area.value, area.value) if ranking.tied else area


def ranking_aupimo(ranking: Ranking, limits: tuple[float, float] = AUPIMO_LIMITS) -> Estimate:
    """Return the mean recall of anomalous images over log false positive rates of normal images.

    The mean of AUPIMO (Bertoldo et al., 2024, https://arxiv.org/abs/2401.01984): the rate counts
    only pixels of images without defects, and the area in log10 of the rate within `limits` is
    divided by its width. The mean of the areas is the area under the mean curve, so no curve per
    image is kept. NaN if there are too few normal pixels to show the lower limit.
    """
    low, high = limits
    if ranking.undefined or ranking.normals * low < 1:
        return UNDEFINED
    x, y = _points(ranking.normal_before, ranking.normal, ranking.recall, ranking.normals)
    area = _area(x.log(), y, float(np.log(low)), float(np.log(high)), ranking.slack[1])
    return Estimate(area.value, area.value, area.value) if ranking.tied else area


def _points(before: Tensor, after: Tensor, y: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the corners of a curve from (0, 0) to (1, 1), two per group: (2 G + 2,)."""
    x = torch.stack([before, after], dim=1).flatten() / total
    y = torch.stack([_before(y), y], dim=1).flatten()
    zero, one = y.new_zeros(1), y.new_ones(1)
    return torch.cat([zero, x, one]), torch.cat([zero, y, one])


def _area(x: Tensor, y: Tensor, low: float, high: float, slack: float) -> Estimate:
    """Return the area under the polygon (x, y) between two x values, divided by their distance.

    A segment that crosses a limit is cut there by linear interpolation. `low` and `high` of the
    estimate use the value at each segment's start and end.
    """
    start, stop = x[:-1].clamp(low, high), x[1:].clamp(low, high)
    width = stop - start
    rise, run = y.diff(), x.diff()
    inside = width > 0

    def height(at: Tensor) -> Tensor:
        part = torch.where(inside, (at - x[:-1]) / run, 0.0)
        return y[:-1] + rise * part.nan_to_num(1.0)  # a segment from log 0 is as high as its end

    area = (width * (height(start) + height(stop)) / 2)[inside].sum()
    bottom, top = (width * y[:-1])[inside].sum(), (width * y[1:])[inside].sum()
    span = high - low
    return _within(area / span, bottom / span - slack, top / span + slack)


def _within(value: Tensor, low: Tensor, high: Tensor) -> Estimate:
    low, high = low.clamp(0, 1), high.clamp(0, 1)
    return Estimate(torch.minimum(torch.maximum(value, low), high), low, high)


def ranking_curves(ranking: Ranking) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every curve at all its corners.

    Returns:
        "roc" (fpr, tpr), "pr" (recall, precision) and "pro" (fpr, overlap): pairs of float64
        tensors, (2 G + 2,) for roc and pro, (G + 1,) for pr, which starts at recall 0 and precision
        1; empty if a class is missing.
    """
    if ranking.undefined:
        empty = torch.empty(0, dtype=torch.float64)
        return dict.fromkeys(("roc", "pr", "pro"), (empty, empty))
    recall = ranking.true / ranking.positives
    precision = ranking.true / (ranking.true + ranking.false)
    zero, one = recall.new_zeros(1), recall.new_ones(1)
    corners = (ranking.false_before, ranking.false)
    return {
        "roc": _points(*corners, recall, ranking.negatives),
        "pr": (torch.cat([zero, recall]), torch.cat([one, precision])),
        "pro": _points(*corners, ranking.overlap, ranking.negatives),
    }
