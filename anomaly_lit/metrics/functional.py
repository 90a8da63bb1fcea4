"""Ranking metrics of anomaly detection, computed on raw scores.

Every metric here depends on the order of the scores alone, so each is read off one `Ranking`: the
scores of anomalous items from the highest down, with the counts of normal items above them. Two
rankings exist: `rank` orders all scores (a group is one distinct score: a tie), and the streaming
engine gives bins (a group is all the scores of one bin, whose order is unknown). In a bin each
metric has a lowest and a highest possible value; the sums of these are the `low` and `high` of an
`Estimate`.

Conventions. A tie counts one half in AUROC, and all items of a tie enter a curve together, as in
scikit-learn. Nothing is squashed, clipped or normalised. With one class only every metric is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomaly_lit.metrics.regions import Regions, find_regions
from anomaly_lit.types import UserError

ROUNDING = 1e-11  # float64 sums of the lows and highs may round by less than this
AUPIMO_LIMITS = (1e-5, 1e-4)
NAN = torch.tensor(torch.nan, dtype=torch.float64)


class Estimate(NamedTuple):
    """A metric with the range in which its exact value lies; 0-d float64 tensors on the CPU."""

    value: Tensor
    low: Tensor
    high: Tensor

    @property
    def bound(self) -> Tensor:
        """Largest possible distance between the value and the exact metric."""
        return torch.maximum(self.high - self.value, self.value - self.low) + ROUNDING


UNDEFINED = Estimate(NAN, NAN, NAN)


class Ranking(NamedTuple):
    """Groups that hold an anomalous item, highest score first; float64 on the CPU, shapes (G,).

    `before` counts the items of higher groups, the plain name those of this group as well.
    """

    threshold: Tensor  # lowest score of the group
    true: Tensor  # anomalous items up to and with this group
    false_before: Tensor  # normal items
    false: Tensor
    overlap: Tensor  # mean over regions of the part that is found, in [0, 1]
    recall: Tensor  # mean over anomalous images of the part of their anomalous pixels found
    normal_before: Tensor  # pixels of images without any defect
    normal: Tensor
    positives: int
    negatives: int
    normals: int  # pixels of images without any defect
    tied: bool  # a group is one distinct score, so that nothing is unknown
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
    """Order scores exactly; scikit-learn's treatment of ties.

    Args:
        scores: (N,) scores of normal and anomalous items together (where `normal` is given: the
            pixels of images that have a defect).
        positive: (P,) scores of the anomalous items, which are also among `scores`.
        normal: (M,) scores of the pixels of images without defects.
        area: (P,) pixels of the region of each anomalous pixel.
        image_area: (P,) anomalous pixels in the image of each anomalous pixel.
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
    """Ascending; numpy's vectorised sort is many times faster than torch's on a CPU."""
    if scores.is_cuda:
        return scores.sort().values
    return torch.from_numpy(np.sort(scores.cpu().numpy()))


def _count_above(ascending: Tensor, threshold: Tensor, with_ties: bool) -> Tensor:
    position = torch.searchsorted(ascending, threshold, right=not with_ties)
    return (len(ascending) - position).cpu().double()


def _before(cumulated: Tensor) -> Tensor:
    return torch.cat([cumulated.new_zeros(1), cumulated[:-1]])


def ranking_auroc(ranking: Ranking) -> Estimate:
    """Chance that an anomalous item outranks a normal one; a tie counts one half.

    sum_g p_g (N - (F_before + F) / 2) / (P N), off by at most sum_g p_g n_g / (2 P N) in bins.
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
    """Sum over thresholds of the gain in recall times the precision (scikit-learn's AP).

    In a bin of p anomalous and n normal items, below T anomalous and F normal ones, the j-th
    anomalous item has a precision between (T + j) / (T + j + F + n), all normal items first, and
    (T + p) / (T + p + F), all anomalous items first and tied. The value takes the normal items
    as evenly spread, n j / (p + 1) of them above the j-th. Sums over j are integrals, exact for
    p = 1, on the safe side for the low end.
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
    """Integral over x of x / (x (1 + slope) + offset), the precision at the x-th anomalous item."""
    growth = 1 + slope
    ratio = torch.log1p(growth * (stop - start) / (growth * start + offset))
    return (stop - start) / growth - offset / growth.square() * ratio


def ranking_f1_max(ranking: Ranking) -> tuple[Estimate, Tensor]:
    """Largest F1 = 2 T / (T + F + P) over all thresholds, and that threshold (score >= it).

    In bins the value is the F1 at the best lower edge of a bin, which is attained; no threshold
    inside a bin can pass 2 T / (T + F_before + P).
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
    """Area under the per-region overlap over false positive rates in [0, limit], over limit.

    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 4.2, with the
    conventions of the official evaluation code: see `aupro`. In a bin the curve stays in the
    rectangle between the bin's two corners.
    """
    if ranking.undefined:
        return UNDEFINED
    x, y = _points(ranking.false_before, ranking.false, ranking.overlap, ranking.negatives)
    area = _area(x, y, 0.0, limit, ranking.slack[0])
    return Estimate(area.value, area.value, area.value) if ranking.tied else area


def ranking_aupimo(ranking: Ranking, limits: tuple[float, float] = AUPIMO_LIMITS) -> Estimate:
    """Mean over anomalous images of the recall, over log false positive rates of normal images.

    The mean of AUPIMO (Bertoldo et al., 2024, https://arxiv.org/abs/2401.01984): the rate counts
    only pixels of images without defects, and the area in log10 of the rate within `limits` is
    divided by its width. The mean of areas is the area under the mean, so that no per-image
    curve is kept. NaN where the normal pixels cannot show the lower limit.
    """
    low, high = limits
    if ranking.undefined or ranking.normals * low < 1:
        return UNDEFINED
    x, y = _points(ranking.normal_before, ranking.normal, ranking.recall, ranking.normals)
    area = _area(x.log(), y, float(np.log(low)), float(np.log(high)), ranking.slack[1])
    return Estimate(area.value, area.value, area.value) if ranking.tied else area


def _points(before: Tensor, after: Tensor, y: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The corners of a curve from (0, 0) to (1, 1), two for each group: (2 G + 2,)."""
    x = torch.stack([before, after], dim=1).flatten() / total
    y = torch.stack([_before(y), y], dim=1).flatten()
    zero, one = y.new_zeros(1), y.new_ones(1)
    return torch.cat([zero, x, one]), torch.cat([zero, y, one])


def _area(x: Tensor, y: Tensor, low: float, high: float, slack: float) -> Estimate:
    """Area under the polygon (x, y) between two abscissas, over their distance.

    A segment that crosses a limit is cut there by linear interpolation. `low` and `high` of the
    estimate take each segment at its start and at its end.
    """
    start, stop = x[:-1].clamp(low, high), x[1:].clamp(low, high)
    width = stop - start
    rise, run = y.diff(), x.diff()
    inside = width > 0

    def height(at: Tensor) -> Tensor:
        part = torch.where(inside, (at - x[:-1]) / run, 0.0)
        return y[:-1] + rise * part.nan_to_num(1.0)  # a segment from log 0 has its end's height

    area = (width * (height(start) + height(stop)) / 2)[inside].sum()
    bottom, top = (width * y[:-1])[inside].sum(), (width * y[1:])[inside].sum()
    span = high - low
    return _within(area / span, bottom / span - slack, top / span + slack)


def _within(value: Tensor, low: Tensor, high: Tensor) -> Estimate:
    low, high = low.clamp(0, 1), high.clamp(0, 1)
    return Estimate(torch.minimum(torch.maximum(value, low), high), low, high)


def ranking_curves(ranking: Ranking) -> dict[str, tuple[Tensor, Tensor]]:
    """Every curve at all its corners.

    Returns:
        "roc" (fpr, tpr), "pr" (recall, precision) and "pro" (fpr, overlap): pairs of float64
        tensors, (2 G + 2,) for roc and pro, (G + 1,) for pr, which starts at recall 0 and
        precision 1; empty where a class is missing.
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


def _rank_items(scores: Tensor, labels: Tensor) -> Ranking:
    scores, labels = scores.flatten(), labels.flatten()
    if labels.dtype != torch.bool or scores.shape != labels.shape:
        raise UserError(
            f"found {len(scores)} scores and {len(labels)} labels of type {labels.dtype};"
            " give one boolean label, true where anomalous, for each score"
        )
    scores = _as_float(scores)
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"score {index} is {scores[index].item()}; scores must be finite")
    return rank(scores, scores[labels])


def _as_float(scores: Tensor) -> Tensor:
    """float32 for the shorter floats, which it holds exactly; float64 for all other types."""
    if scores.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return scores.float()
    return scores.double()


def _rank_maps(anomaly_map: Tensor, gt_mask: Tensor) -> Ranking:
    regions = check_maps(anomaly_map, gt_mask)
    scores = _as_float(anomaly_map).flatten(1)
    if not scores.isfinite().all():
        index = int((~scores.isfinite().all(1)).nonzero()[0])
        raise UserError(f"the anomaly map of image {index} holds NaN or infinity")
    positive = scores.flatten()[regions.position]
    anomalous, normal = scores[regions.defective].flatten(), scores[~regions.defective].flatten()
    return rank(
        anomalous,
        positive,
        normal,
        regions.area,
        regions.image_area,
        regions.number,
        int(regions.defective.sum()),
    )


def check_maps(anomaly_map: Tensor, gt_mask: Tensor) -> Regions:
    """Refuse shapes and types that do not fit; then find the regions, on the maps' device."""
    if anomaly_map.shape != gt_mask.shape or anomaly_map.ndim != 4 or anomaly_map.shape[1] != 1:
        raise UserError(
            f"found anomaly_map {tuple(anomaly_map.shape)} and gt_mask {tuple(gt_mask.shape)};"
            " give both as (B, 1, H, W), at the resolution that is to be scored"
        )
    if gt_mask.dtype != torch.bool:
        raise UserError(f"gt_mask is of type {gt_mask.dtype}; give a boolean mask (mask > 0)")
    return find_regions(gt_mask).to(anomaly_map.device)


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve: the chance that an anomalous item outranks a normal one.

    Args:
        scores: unbounded scores of any real type and shape, larger is more anomalous.
        labels: bool of the same shape, true where anomalous. Masks and maps fit as well.

    Returns:
        0-d float64 tensor in [0, 1], NaN if a class is missing; a tie counts one half.

    Raises:
        UserError: shapes differ, labels are not boolean, or a score is not finite.
    """
    return ranking_auroc(_rank_items(scores, labels)).value


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Sum over distinct scores of (recall gained) x precision; arguments as in `auroc`."""
    return ranking_average_precision(_rank_items(scores, labels)).value


def f1_max(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest F1 over all thresholds and the highest threshold that gives it (score >= threshold).

    Arguments and errors as in `auroc`.
    """
    best, threshold = ranking_f1_max(_rank_items(scores, labels))
    return best.value, threshold


def aupro(anomaly_map: Tensor, gt_mask: Tensor, limit: float = 0.3) -> Tensor:
    """Area under the per-region overlap curve up to a false positive rate, divided by it.

    The conventions are those of the official MVTec evaluation: regions are 8-connected components
    of each mask at the resolution given here, every region weighs the same, false positives are
    counted on all pixels outside regions, images without defects included, ties enter together,
    and the curve is cut at `limit` by linear interpolation.

    Args:
        anomaly_map: (B, 1, H, W), unbounded, any real type.
        gt_mask: (B, 1, H, W) bool.
        limit: largest false positive rate, in (0, 1].

    Returns:
        0-d float64 tensor in [0, 1], NaN without regions or without normal pixels.

    Raises:
        UserError: shapes or types do not fit, the limit is outside (0, 1], or a map is not finite.
    """
    return ranking_aupro(_rank_maps(anomaly_map, gt_mask), check_limit(limit)).value


def check_limit(limit: float) -> float:
    """Refuse a limit outside (0, 1]."""
    if not 0 < limit <= 1:
        raise UserError(f"the false positive limit is {limit}; give a number above 0, at most 1")
    return limit


def aupimo(
    anomaly_map: Tensor, gt_mask: Tensor, limits: tuple[float, float] = AUPIMO_LIMITS
) -> Tensor:
    """Mean AUPIMO over the anomalous images; see `ranking_aupimo`, arguments as in `aupro`."""
    return ranking_aupimo(_rank_maps(anomaly_map, gt_mask), limits).value


def curves(anomaly_map: Tensor, gt_mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The ROC, precision-recall and per-region overlap curves; arguments as in `aupro`."""
    return ranking_curves(_rank_maps(anomaly_map, gt_mask))


def item_curves(scores: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The ROC and precision-recall curves of scores; arguments as in `auroc`."""
    found = ranking_curves(_rank_items(scores, labels))
    return {name: found[name] for name in ("roc", "pr")}


def bootstrap_interval(
    scores: Tensor,
    labels: Tensor,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Percentile bootstrap intervals of AUROC and AP (Efron and Tibshirani, 1993, chapter 13).

    Stratified: normal and anomalous items are drawn with replacement each from their own, so
    that a resample has as many of both as the data. Items are drawn by their place in the order
    of the scores: the order in which they are given does not matter.

    Args:
        scores: (N,) unbounded scores.
        labels: (N,) bool.
        resamples: number of resamples.
        confidence: share of the resamples inside the interval.
        seed: of a generator of its own; global random state is not touched.

    Returns:
        {"auroc": (low, high), "ap": (low, high)}, 0-d float64, NaN if a class is missing.
    """
    ranking = _rank_items(scores, labels)
    if ranking.undefined:
        return {"auroc": (NAN, NAN), "ap": (NAN, NAN)}
    scores, order = _as_float(scores.flatten()).cpu().sort(descending=True)
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
    """AUROC and AP of `size` resamples: (2, size) float64."""
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
    """How often each chosen item is drawn, as many draws as items: (size, N) float64."""
    places = chosen.nonzero().squeeze(1)
    drawn = torch.randint(len(places), (size, len(places)), generator=generator)
    count = torch.zeros(size, len(chosen), dtype=torch.float64)
    return count.scatter_add_(1, places[drawn], torch.ones_like(drawn, dtype=torch.float64))


def limits_of(limits: Sequence[float]) -> tuple[float, ...]:
    """Distinct, checked limits, in the order given."""
    return tuple(dict.fromkeys(check_limit(float(limit)) for limit in limits))
