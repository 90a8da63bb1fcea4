"""Histograms of the scores of normal and of anomalous images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from anomaly_lit.drawing.axes import MEAN_COLOUR, PALETTE, style_axes, write_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_histogram(axes: Axes, curves: dict[str, dict[str, Any]]) -> None:
    """Draw how the scores of normal and of anomalous images are spread, with the thresholds.

    Args:
        axes: Axes to draw into.
        curves: As in `curves.save_curves`.
    """
    scores, labels, thresholds, aligned = _pool_scores(curves)
    name = "(score - threshold) / deviation of normal scores" if aligned else "score"
    style_axes(axes, "Scores of images", name, "share of the images")
    if not len(scores):
        write_note(axes, "no scores")
        return
    low, high = _histogram_range(scores, labels)
    edges = np.linspace(low, high, int(np.clip(1.5 * math.sqrt(len(scores)), 10, 30)) + 1)
    inside = scores.clip(low, high)
    top = 0.0
    for label, text, colour in ((False, "normal", PALETTE[0]), (True, "anomalous", PALETTE[1])):
        chosen = inside[labels == label]
        share = np.histogram(chosen, edges)[0] / max(1, len(chosen))
        top = max(top, share.max())
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(share, edges, color=colour, linewidth=1.4, label=f"{text} ({len(chosen)})")
    for i, threshold in enumerate(thresholds):
        axes.axvline(
            threshold,
            ymax=0.89,  # the legend is above
            color=MEAN_COLOUR,
            linewidth=1.4 if len(thresholds) == 1 else 0.8,
            linestyle="--",
            label=None if i else "threshold",
        )
    axes.set_ylim(0, 1.22 * top)
    axes.legend(
        loc="upper center", ncols=3, fontsize=8, frameon=False, handlelength=1.3, columnspacing=1.2
    )
    beyond = int(((scores < low) | (scores > high)).sum())
    if beyond:
        axes.set_title(
            f"{beyond} beyond, in the outer bins", loc="right", fontsize=7, color="#555555"
        )


def _pool_scores(
    curves: dict[str, dict[str, Any]],
) -> tuple[np.ndarray, np.ndarray, list[float], bool]:
    """Return scores and labels of all categories, thresholds, and whether scores were aligned.

    Categories with different thresholds score on different scales. If every category has a
    threshold and normal scores that vary, the scores are aligned: the threshold becomes 0 and the
    standard deviation of the normal scores becomes 1.
    """
    parts = []
    for curve in curves.values():
        scores = np.asarray(curve.get("scores", ()), dtype=np.float64).ravel()
        labels = np.asarray(curve.get("labels", ()), dtype=bool).ravel()
        finite = np.isfinite(scores)
        threshold = curve.get("threshold")
        if finite.any():
            value = math.nan if threshold is None else float(threshold)
            parts.append((scores[finite], labels[finite], value))
    thresholds = sorted({value for *_, value in parts if math.isfinite(value)})
    spreads = [scores[~labels].std() if (~labels).any() else 0.0 for scores, labels, _ in parts]
    complete = all(spread > 0 for spread in spreads) and all(
        math.isfinite(value) for *_, value in parts
    )
    aligned = len(thresholds) > 1 and complete
    if aligned:
        parts = [
            ((scores - value) / spread, labels, 0.0)
            for (scores, labels, value), spread in zip(parts, spreads, strict=True)
        ]
        thresholds = [0.0]
    if not parts:
        return np.empty(0), np.empty(0, dtype=bool), [], False
    pooled = np.concatenate([scores for scores, *_ in parts])
    return pooled, np.concatenate([labels for _, labels, _ in parts]), thresholds, aligned


def _histogram_range(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return a range without each class's far outliers (three quartile distances); never empty."""
    low, high = math.inf, -math.inf
    for part in (scores[labels], scores[~labels]):
        if len(part):
            first, third = np.percentile(part, (25, 75))
            reach = 3 * (third - first)
            low = min(low, max(float(part.min()), first - reach))
            high = max(high, min(float(part.max()), third + reach))
    return (low, high) if high > low else (low - 0.5, low + 0.5)
