"""Thresholds and colour ranges, from held-out normal images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor


def threshold_at(scores: Tensor, fpr: float) -> tuple[float, str]:
    """The score that about ``fpr`` of normal images exceed, and the rule that gave it.

    ``quantile``: with at least 1 / fpr scores, the least of them that at most ``fpr`` of them
    exceed. ``prediction limit``: fewer scores cannot resolve the rate, and half of their own
    kind would exceed the greatest of a few; then the one-sided limit for one more draw from a
    normal distribution of their mean and deviation, mean + t * s * sqrt(1 + 1 / n), Student's t
    with n - 1 degrees of freedom, or their greatest where that is more. ``maximum``: one score.

    Args:
        scores: (n,) of held-out normal images, n > 0.
        fpr: Share allowed above, in (0, 1).
    """
    ordered = scores.double().sort().values
    count, greatest = len(ordered), float(ordered[-1])
    if count * fpr >= 1 - 1e-9:
        return float(ordered[max(0, math.ceil((1 - fpr) * count - 1e-9) - 1)]), "quantile"
    if count == 1:
        return greatest, "maximum"
    spread = float(ordered.std()) * math.sqrt(1 + 1 / count)
    limit = float(ordered.mean()) + float(stats.t.ppf(1 - fpr, count - 1)) * spread
    return max(greatest, limit), "prediction limit"


def verdict(score: float, threshold: float) -> dict[str, Any]:
    """Threshold and verdict of one image; `unknown` without a threshold or a finite score."""
    if math.isnan(threshold):
        return {"threshold": None, "verdict": "unknown"}
    if not math.isfinite(score):
        return {"threshold": threshold, "verdict": "unknown"}
    return {"threshold": threshold, "verdict": "defect" if score > threshold else "good"}


def limits_of(calibration: dict[str, Any], category: str | None) -> dict[str, Any]:
    """Calibration of a category, of all together if unknown, empty where there is none."""
    if not calibration:
        return {}
    return calibration["categories"].get(category, calibration["all"])


def colour_range(limits: dict[str, Any], anomaly_map: np.ndarray) -> tuple[float, float]:
    """The values at which colours begin and end.

    They begin half-way between the median and the high end (99.9 %) of normal maps, and end at
    three times that high end above the median, or at the map's own peak if that is higher: what is
    normal stays dark in every picture, and a strong defect shows its shape instead of one blot.
    Without held-out images the map's own range.
    """
    if not limits:
        return float(anomaly_map.min()), float(anomaly_map.max())
    low, high = limits["map_median"], limits["map_high"]
    end = low + 3 * max(high - low, 1e-12)
    return (low + high) / 2, max(end, float(anomaly_map.max()))


def outline_of(verdict: str, anomaly_map: np.ndarray, limits: dict[str, Any]) -> np.ndarray | None:
    """Where a defect lies: (H, W) bool, three times as far out as normal maps reach.

    None where there is no defect, or no such place.
    """
    if verdict != "defect" or not limits:
        return None
    low, high = limits["map_median"], limits["map_high"]
    outline = anomaly_map > low + 3 * (high - low)
    return outline if outline.any() else None
