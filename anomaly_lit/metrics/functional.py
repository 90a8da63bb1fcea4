"""Metrics of anomaly detection as functions of raw scores or of maps and masks.

Scores are not squashed, clipped or normalised; for conventions see `anomaly_lit.metrics.ranking`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_lit.metrics.ranking import (
    AUPIMO_LIMITS,
    Ranking,
    rank,
    ranking_aupimo,
    ranking_aupro,
    ranking_auroc,
    ranking_average_precision,
    ranking_curves,
    ranking_f1_max,
)
from anomaly_lit.metrics.regions import Regions, find_regions
from anomaly_lit.types import UserError


def rank_items(scores: Tensor, labels: Tensor) -> Ranking:
    """Order the scores of items; arguments and errors as in `auroc`."""
    scores, labels = scores.flatten(), labels.flatten()
    if labels.dtype != torch.bool or scores.shape != labels.shape:
        raise UserError(
            f"found {len(scores)} scores and {len(labels)} labels of type {labels.dtype};"
            " give one boolean label, true where anomalous, for each score"
        )
    scores = as_float(scores)
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"score {index} is {scores[index].item()}; scores must be finite")
    return rank(scores, scores[labels])


def as_float(scores: Tensor) -> Tensor:
    """Return float32 for shorter floats, which it holds exactly, and float64 for other types."""
    if scores.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return scores.float()
    return scores.double()


def _rank_maps(anomaly_map: Tensor, gt_mask: Tensor) -> Ranking:
    regions = check_maps(anomaly_map, gt_mask)
    scores = as_float(anomaly_map).flatten(1)
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
    """Check shapes and types, then find the regions on the maps' device."""
    check_shapes(anomaly_map, gt_mask)
    return find_regions(gt_mask).to(anomaly_map.device)


def check_shapes(anomaly_map: Tensor, gt_mask: Tensor) -> None:
    """Raise if shapes or types of maps and masks do not fit.

    Raises:
        UserError: shapes differ, are not (B, 1, H, W), or the mask is not boolean.
    """
    if anomaly_map.shape != gt_mask.shape or anomaly_map.ndim != 4 or anomaly_map.shape[1] != 1:
        raise UserError(
            f"found anomaly_map {tuple(anomaly_map.shape)} and gt_mask {tuple(gt_mask.shape)};"
            " give both as (B, 1, H, W), at the resolution that is to be scored"
        )
    if gt_mask.dtype != torch.bool:
        raise UserError(f"gt_mask is of type {gt_mask.dtype}; give a boolean mask (mask > 0)")


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve: how often an anomalous item outranks a normal one.

    Args:
        scores: unbounded scores of any real type and shape, larger is more anomalous.
        labels: bool of the same shape, true where anomalous. Maps and masks work too.

    Returns:
        0-d float64 tensor in [0, 1], NaN if a class is missing; a tie counts one half.

    Raises:
        UserError: shapes differ, labels are not boolean, or a score is not finite.
    """
    return ranking_auroc(rank_items(scores, labels)).value


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of (gain in recall) x precision over scores; arguments as in `auroc`."""
    return ranking_average_precision(rank_items(scores, labels)).value


def f1_max(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest F1 over all thresholds, and its highest threshold (score >= threshold).

    Arguments and errors as in `auroc`.
    """
    best, threshold = ranking_f1_max(rank_items(scores, labels))
    return best.value, threshold


def aupro(anomaly_map: Tensor, gt_mask: Tensor, limit: float = 0.3) -> Tensor:
    """Return the area under per-region overlap up to a false positive rate, divided by that rate.

    The conventions are those of the official MVTec evaluation: regions are the 8-connected
    components of each mask at the given resolution, every region has the same weight, false
    positives are counted on all pixels outside regions (also in images without defects), ties enter
    together, and the curve is cut at `limit` by linear interpolation.

    Args:
        anomaly_map: (B, 1, H, W), unbounded, any real type.
        gt_mask: (B, 1, H, W) bool.
        limit: the largest false positive rate, in (0, 1].

    Returns:
        0-d float64 tensor in [0, 1], NaN without regions or without normal pixels.

    Raises:
        UserError: shapes or types do not fit, the limit is outside (0, 1], or a map is not finite.
    """
    return ranking_aupro(_rank_maps(anomaly_map, gt_mask), check_limit(limit)).value


def check_limit(limit: float) -> float:
    """Return a limit, and raise if it is outside (0, 1]."""
    if not 0 < limit <= 1:
        raise UserError(f"the false positive limit is {limit}; give a number above 0, at most 1")
    return limit


def aupimo(
    anomaly_map: Tensor, gt_mask: Tensor, limits: tuple[float, float] = AUPIMO_LIMITS
) -> Tensor:
    """Return anomalous images' mean AUPIMO; see `ranking_aupimo`, arguments as in `aupro`."""
    return ranking_aupimo(_rank_maps(anomaly_map, gt_mask), limits).value


def curves(anomaly_map: Tensor, gt_mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the ROC, precision-recall and per-region overlap curves; arguments as in `aupro`."""
    return ranking_curves(_rank_maps(anomaly_map, gt_mask))


def item_curves(scores: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the ROC and precision-recall curves of scores; arguments as in `auroc`."""
    found = ranking_curves(rank_items(scores, labels))
    return {name: found[name] for name in ("roc", "pr")}


def limits_of(limits: Sequence[float]) -> tuple[float, ...]:
    """Return the distinct limits, checked, in the given order."""
    return tuple(dict.fromkeys(check_limit(float(limit)) for limit in limits))
