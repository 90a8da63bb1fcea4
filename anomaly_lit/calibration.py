"""Thresholds and colour ranges from held-out normal images, and what a threshold can promise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

CONFIDENCE = 0.95  # of the intervals in a promise
ROUNDING = 1e-5  # share of a threshold by which a score changes with the size of its batch
LEAST_RISE = 1e-9  # tolerance for rounding errors in count * fpr


def threshold_at(scores: Tensor, fpr: float) -> tuple[float, str]:
    """Return the score that about `fpr` of normal images exceed, and the rule that gave it.

    - `quantile`: with at least 1 / fpr scores, the lowest score that at most `fpr` of them exceed.
    - `prediction limit`: fewer scores cannot resolve the rate, and a new image of the same kind
      easily exceeds the largest of a few. The threshold is then the one-sided limit for one more
      draw from a normal distribution with their mean and standard deviation s, which is
      mean + t * s * sqrt(1 + 1 / n) with Student's t of n - 1 degrees of freedom, or the largest
      score if that is higher.
    - `maximum`: a single score is its own threshold.

    Args:
        scores: (n,) of held-out normal images, n > 0.
        fpr: Share allowed above the threshold, in (0, 1).
    """
    ordered = scores.double().sort().values
    count, greatest = len(ordered), float(ordered[-1])
    rule = rule_of(count, fpr)
    if rule == "quantile":
        return float(ordered[_rank_below(count, fpr)]), rule
    if rule == "maximum":
        return greatest, rule
    limit = float(ordered.mean()) + _factor(count, fpr) * float(ordered.std())
    return max(greatest, limit), rule


def rule_of(count: int, fpr: float) -> str:
    """Return the rule that `threshold_at` applies to `count` > 0 scores."""
    if count * fpr >= 1 - LEAST_RISE:
        return "quantile"
    return "maximum" if count == 1 else "prediction limit"


def _rank_below(count: int, fpr: float) -> int:
    """Return how many scores lie below the lowest one that at most `fpr` of `count` exceed."""
    return max(0, math.ceil((1 - fpr) * count - LEAST_RISE) - 1)


def _factor(count: int, fpr: float) -> float:
    """Return how many deviations the prediction limit lies above the mean."""
    return float(special.stdtrit(count - 1, 1 - fpr)) * math.sqrt(1 + 1 / count)


def pixel_threshold(highest: Tensor, count: int, fpr: float) -> float:
    """Return the lowest pixel value that at most a share `fpr` of `count` pixels exceed.

    The result is exact and one of the values. The pixels of an image depend on each other, so no
    interval is given for the rate on new images.

    Args:
        highest: The highest of the values, at least floor(fpr * count) + 1 of them.
        count: Number of pixels in all held-out maps.
        fpr: Share allowed above the threshold, in (0, 1).
    """
    above = count - _rank_below(count, fpr)
    return float(highest.sort(descending=True).values[above - 1])


def promise(count: int, fpr: float) -> dict[str, Any]:
    """Return what a threshold from `count` held-out normal images can promise.

    The true false-alarm rate of a threshold is the share of all normal images above it. It depends
    on which images happened to be held out. The interval covers it with a probability of 95 %,
    provided that future normal images are like the held-out ones, which training never saw.

    - `quantile`, `maximum`: the rate of the k-th lowest of n scores is distributed as Beta(n - k +
      1, k), whatever the distribution of the scores (Wilks, 1941). The interval is its central 95
      %. Ties only lower the rate.
    - `prediction limit`: assumes that scores are normally distributed. The threshold is the higher
      of the limit and the largest score. The upper end of the interval is therefore the lower of
      their two upper ends, and the lower end allows for both (Bonferroni): the interval covers the
      rate with at least 95 %.

    Returns:
        `count`, `fpr`, `rule`; `resolved`: whether there are enough images to show a rate of `fpr`
        without assuming a distribution of the scores; `needed`: the least number of images for
        that; `low` and `high`: the interval, as shares; `high_free`: with 95 % confidence the rate
        is at most this, whatever the distribution of the scores; `needed_for_double`: the least
        number of images with which the interval ends at or below twice `fpr`. Without images the
        rule is `none` and the interval contains all rates.
    """
    found: dict[str, Any] = {
        "count": count,
        "fpr": fpr,
        "rule": rule_of(count, fpr) if count else "none",
        "needed": math.ceil(1 / fpr - LEAST_RISE),
        "needed_for_double": _needed_for_double(fpr),
    }
    found["resolved"] = found["rule"] == "quantile"
    tail = (1 - CONFIDENCE) / 2
    if not count:
        return found | {"low": 0.0, "high": 1.0, "high_free": 1.0}
    above = count - 1 - _rank_below(count, fpr) if found["resolved"] else 0
    low, high = (_rate_of_rank(count, above, share) for share in (tail, 1 - tail))
    if found["rule"] == "prediction limit":
        low = min(_rate_of_rank(count, above, tail / 2), _rate_of_limit(count, fpr, tail / 2))
        high = min(high, _rate_of_limit(count, fpr, 1 - tail))
    return found | {
        "low": low,
        "high": high,
        "high_free": _rate_of_rank(count, above, CONFIDENCE),
    }


def _rate_of_rank(count: int, above: int, share: float) -> float:
    """Return the `share` quantile of a threshold's rate if `above` of `count` scores exceed it."""
    return float(special.betaincinv(above + 1, count - above, share))


@cache
def _rate_of_limit(count: int, fpr: float, share: float) -> float:
    """Return the `share` quantile of a prediction limit's rate, for normally distributed scores.

    In units of the true deviation the limit is Z / sqrt(n) + factor * S, with Z standard normal and
    (n - 1) S^2 chi-squared of n - 1 degrees of freedom: the probability that it exceeds a value is
    integrated over the quantiles of S. (The equivalent noncentral t distribution is not computed
    reliably this far out.)
    """
    factor, root = _factor(count, fpr), math.sqrt(count)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    squares = 2 * special.gammaincinv((count - 1) / 2, (nodes + 1) / 2)  # chi-squared
    deviations = np.sqrt(squares / (count - 1))

    def excess(value: float) -> float:
        higher = special.ndtr((factor * deviations - value) * root)
        return float((weights * higher).sum()) / 2 - share

    # the highest limits have the lowest rates
    reach = 10 / root + factor * float(deviations.max())
    return float(special.ndtr(-optimize.brentq(excess, -10 / root, reach)))


@cache
def _needed_for_double(fpr: float) -> int:
    """Return the least number of images with which a quantile's interval ends at or below 2 fpr."""
    above = 1
    while True:  # the rate is least certain with the fewest images that allow this many above
        count = math.ceil(above / fpr - LEAST_RISE)
        if _rate_of_rank(count, above, (1 + CONFIDENCE) / 2) <= min(1, 2 * fpr):
            return count
        above += 1


def promise_sentence(calibration: Mapping[str, Any]) -> str:
    """Return what the thresholds can promise, as a readable sentence.

    If there are several categories, it is about the one with the fewest held-out images.

    Args:
        calibration: As made by `Evaluation`; empty without held-out images.
    """
    categories: Mapping[str, Any] = calibration.get("categories", {})
    if not categories:
        return (
            "no held-out normal image, so there is no threshold and every verdict is unknown: set "
            "dataset.holdout above 0, and have at least two normal training images per category"
        )
    name = min(categories, key=lambda category: categories[category]["count"])
    found = promise(categories[name]["count"], calibration["fpr"])
    count, asked = found["count"], _percent(found["fpr"])
    images = f"{count} held-out normal image{'s'[: count != 1]}"
    subject = f"threshold of {name} from {images}"
    if len(categories) > 1:
        subject += f" (the fewest of {len(categories)} categories)"
    interval = f"between {_percent(found['low'])} and {_percent(found['high'])}"
    wish = ""
    if count < found["needed_for_double"]:
        double = _percent(2 * found["fpr"])
        wish = f"; {found['needed_for_double']} images would keep it below {double}"
    if found["resolved"]:
        return (
            f"{subject}, for a false-alarm rate of {asked}: with 95 % confidence the true rate "
            f"lies {interval}{wish}"
        )
    if found["rule"] == "prediction limit":
        interval += (
            " if scores are normally distributed, and at or below "
            f"{_percent(found['high_free'])} in any case"
        )
    return (
        f"{subject}, too few for a false-alarm rate of {asked} (that takes {found['needed']}): "
        f"with 95 % confidence the true rate lies {interval}{wish}"
    )


def _percent(share: float) -> str:
    if share < 1e-5:
        return "0 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def exceeds(scores: Tensor, threshold: float) -> Tensor:
    """Return which scores lie above a threshold by more than rounding, of any shape.

    A threshold may be the score of a held-out image, which should not become a defect when it is
    scored in another batch.
    """
    return scores > threshold + ROUNDING * abs(threshold)


def verdict(score: float, threshold: float) -> dict[str, Any]:
    """Return threshold and verdict of an image; `unknown` without a threshold or a finite score."""
    if math.isnan(threshold):
        return {"threshold": None, "verdict": "unknown"}
    if not math.isfinite(score):
        return {"threshold": threshold, "verdict": "unknown"}
    found = bool(exceeds(torch.tensor(score, dtype=torch.float64), threshold))
    return {"threshold": threshold, "verdict": "defect" if found else "good"}


def limits_of(calibration: dict[str, Any], category: str | None) -> dict[str, Any]:
    """Return a category's calibration; for an unknown one, that of all images; {} if none."""
    if not calibration:
        return {}
    return calibration["categories"].get(category, calibration["all"])


def colour_range(limits: dict[str, Any], anomaly_map: np.ndarray) -> tuple[float, float]:
    """Return the values at which the colour scale begins and ends.

    It begins half-way between the median and the high end (99.9 %) of normal maps. It ends three
    times as far above the median as that high end, or at the map's own peak if that is higher.
    Normal areas thus stay dark in every figure, and a strong defect shows its shape instead of a
    blot. Without held-out maps it is the map's own range.
    """
    if "map_median" not in limits:
        return float(anomaly_map.min()), float(anomaly_map.max())
    low, high = limits["map_median"], limits["map_high"]
    end = low + 3 * max(high - low, 1e-12)
    return (low + high) / 2, max(end, float(anomaly_map.max()))


def outline_of(verdict: str, anomaly_map: np.ndarray, limits: dict[str, Any]) -> np.ndarray | None:
    """Return where a defect is, (H, W) bool, or None if there is nothing to outline.

    The region lies more than three times as far above the median of normal maps as their high end
    (99.9 %). None if the verdict is not `defect`, no map was held out, or no value is that high.
    """
    if verdict != "defect" or "map_median" not in limits:
        return None
    low, high = limits["map_median"], limits["map_high"]
    outline = anomaly_map > low + 3 * (high - low)
    return outline if outline.any() else None
