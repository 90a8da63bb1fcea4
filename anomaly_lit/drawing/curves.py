"""Curves of a test: ROC, precision-recall, per-region overlap, and a legend with the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anomaly_lit.drawing.axes import MEAN_COLOUR, PALETTE, Line, save_figure, style_axes, write_note
from anomaly_lit.drawing.histogram import draw_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
VALUES = {"AUROC": "image_auroc", "AP": "image_ap", "AUPRO": "pixel_aupro"}
FPR_LIMIT = 0.3
GRID = np.linspace(0, 1, 501)

Interpolate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class _Entry(NamedTuple):
    """A row of the legend: a category, or the mean."""

    name: str
    values: dict[str, float]
    colour: str
    dashes: Any
    width: float


def save_curves(path: str | Path, curves: dict[str, dict[str, Any]], title: str) -> None:
    """Draw ROC, precision-recall, per-region overlap and score histogram into one PNG file.

    Several categories are thin lines, and their mean is a bold one. The legend beside the axes
    has a row of values for each. Where something is undefined or absent, the figure says so.

    Args:
        path: File to write, ending in .png.
        curves: For each category a dict with `roc` (fpr, tpr), `pr` (recall, precision),
            `pro` (fpr, overlap) or None, `scores` (N,) float, `labels` (N,) bool,
            `threshold` float or None, and `values` with `image_auroc`, `image_ap` and
            `pixel_aupro`, each in [0, 1], or NaN where undefined.
        title: Written above the axes.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
    save_figure(lambda: _curves_figure(curves, title), path)


def _curves_figure(curves: dict[str, dict[str, Any]], title: str) -> Figure:
    from matplotlib.figure import Figure

    entries = _entries(curves)
    labels = _labels(entries)
    side, gap, left, top = 3.3, 0.85, 0.75, 0.95  # inches
    plots = left + 2 * side + gap
    width = plots + 1.1 + 0.0753 * len(labels[0])  # a letter of 9 points
    height = max(top + 2 * side + gap + 0.45, 0.21 * len(entries) + 2.2)
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    place = {
        "left": left / width,
        "right": plots / width,
        "top": 1 - top / height,
        "bottom": 1 - (top + 2 * side + gap) / height,
        "wspace": gap / side,
        "hspace": gap / side,
    }
    (roc, pr), (pro, scores) = figure.subplots(2, 2, gridspec_kw=place)
    lines = entries[: len(curves)]
    _draw_curves(roc, lines, curves, "roc")
    _draw_curves(pr, lines, curves, "pr")
    _draw_curves(pro, lines, curves, "pro")
    draw_histogram(scores, curves)
    _draw_legend(figure, entries, labels, ((plots + 0.3) / width, 1 - 0.6 / height))
    letter = min(14.0, 72 * (width - 0.6) / (0.62 * max(1, len(title))))
    look = {"fontsize": letter, "fontweight": "bold", "ha": "left", "parse_math": False}
    figure.suptitle(title, x=left / width, y=1 - 0.22 / height, **look)
    return figure


def _entries(curves: dict[str, dict[str, Any]]) -> list[_Entry]:
    """Return a row for each category, and one for the mean if there are several."""
    values = [
        {key: float(curve.get("values", {}).get(key, math.nan)) for key in VALUES.values()}
        for curve in curves.values()
    ]
    if len(curves) == 1:
        return [_Entry(_shorten(next(iter(curves))), values[0], PALETTE[0], "-", 2.4)]
    entries = [
        _Entry(
            _shorten(name),
            value,
            PALETTE[i % len(PALETTE)],
            DASHES[i // len(PALETTE) % len(DASHES)],
            1.1,
        )
        for i, (name, value) in enumerate(zip(curves, values, strict=True))
    ]
    if entries:
        mean = {key: _mean(value[key] for value in values) for key in VALUES.values()}
        entries.append(_Entry("mean", mean, MEAN_COLOUR, "-", 2.4))
    return entries


def _shorten(name: str) -> str:
    return name if len(name) <= 28 else name[:26] + "…"


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _draw_curves(
    axes: Axes, entries: list[_Entry], curves: dict[str, dict[str, Any]], kind: str
) -> None:
    titles = {
        "roc": ("ROC, images", "false-positive rate", "true-positive rate"),
        "pr": ("Precision and recall, images", "recall", "precision"),
        "pro": ("Per-region overlap, pixels", "false-positive rate", "mean overlap of a region"),
    }
    absent = {
        "roc": "undefined: needs normal\nand anomalous images",
        "pr": "undefined: needs\nanomalous images",
        "pro": "undefined: needs\ntruth masks of defects",
    }
    limit = FPR_LIMIT if kind == "pro" else 1.0
    style_axes(axes, *titles[kind])
    axes.set_xlim(-0.015 * limit, 1.015 * limit)
    axes.set_ylim(-0.015, 1.02)

    interpolate: Interpolate = _step if kind == "pr" else np.interp
    style = "steps-pre" if kind == "pr" else "default"
    grid = limit * GRID
    found = []
    for entry, curve in zip(entries, curves.values(), strict=True):
        line = _usable(curve.get(kind), kind)
        if line is None:
            continue
        found.append(interpolate(grid, *line))
        x, y = _thin(*line)
        axes.plot(
            x,
            y,
            color=entry.colour,
            linestyle=entry.dashes,
            linewidth=entry.width,
            drawstyle=style,
        )
    if not found:
        write_note(axes, absent[kind])
        return
    if kind == "roc":  # what guessing would give
        axes.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=1)
    mean = np.mean(found, axis=0)
    if len(curves) > 1:
        axes.plot(grid, mean, color=MEAN_COLOUR, linewidth=2.4, zorder=4)
    if kind == "pro":
        colour = MEAN_COLOUR if len(curves) > 1 else PALETTE[0]
        axes.fill_between(grid, mean, color=colour, alpha=0.08, linewidth=0)


def _usable(line: Line | None, kind: str) -> Line | None:
    """Return the finite points from left to right, or None if there is no curve to draw."""
    if line is None:
        return None
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in line)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 2:
        return None
    # At one recall, precision falls as false positives are added; the other curves rise.
    order = np.lexsort((-y if kind == "pr" else y, x))
    x, y = x[order], y[order]
    return (np.r_[0.0, x], np.r_[y[0], y]) if kind == "pr" and x[0] > 0 else (x, y)


def _step(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the precision where each recall of the grid is first reached, as in AP."""
    return y[np.searchsorted(x, grid, side="left").clip(max=len(x) - 1)]


def _thin(x: np.ndarray, y: np.ndarray, points: int = 3000) -> Line:
    """Keep at most so many points, spread along the curve: a pixel curve may have millions."""
    if len(x) <= points:
        return x, y
    length = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
    kept = np.searchsorted(length, np.linspace(0, length[-1], points)).clip(max=len(x) - 1)
    kept = np.unique(np.r_[0, kept, len(x) - 1])
    return x[kept], y[kept]


def _labels(entries: list[_Entry]) -> list[str]:
    """Return the legend's texts, padded to one length: a head, then names and values."""
    shown = [
        ["undefined" if math.isnan(value) else f"{value:.3f}" for value in entry.values.values()]
        for entry in entries
    ]
    values = [list(VALUES), *shown]
    names = ["category", *(entry.name for entry in entries)]
    widths = [2 + max(map(len, column)) for column in zip(*values, strict=True)]
    longest = max(map(len, names))
    return [
        f"{name:{longest}}" + "".join(map(str.rjust, row, widths))
        for name, row in zip(names, values, strict=True)
    ]


def _draw_legend(
    figure: Figure, entries: list[_Entry], labels: list[str], corner: tuple[float, float]
) -> None:
    """Draw a legend that is also a table: letters of one width keep its columns aligned."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="none")]
    for entry in entries:
        look = {"color": entry.colour, "linestyle": entry.dashes}
        handles.append(Line2D([], [], linewidth=max(1.6, entry.width), **look))
    notes = ["AUROC and AP: images", f"AUPRO: pixels, up to a false-positive rate of {FPR_LIMIT}"]
    if len(entries) > 1:
        incomplete = any("undefined" in label for label in labels)
        notes.append("mean: over the categories" + " where it is defined" * incomplete)
    legend = figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=corner,
        prop={"family": "monospace", "size": 9},
        title="\n".join(notes),
        title_fontsize=7.5,
        alignment="left",
        handlelength=2.4,
        labelspacing=0.7,
        frameon=False,
    )
    for text, row in zip(legend.get_texts(), [None, *entries], strict=True):
        text.set_parse_math(False)
        if row is None:
            text.set_color("#555555")
        elif row.width > 2:
            text.set_fontweight("bold")
