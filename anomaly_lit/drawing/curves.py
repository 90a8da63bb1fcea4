"""Curves of a test: ROC, precision-recall, per-region overlap, and values in a table."""

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
    """A row of the table beside the curves."""

    name: str
    values: dict[str, float]
    colour: str
    dashes: Any
    width: float


def save_curves(path: str | Path, curves: dict[str, dict[str, Any]], title: str) -> None:
    """Draw ROC, precision-recall, per-region overlap and score histogram into one PNG file.

    Several categories are thin lines, their mean a bold one; each has its row in a table of values
    beside the axes. What is undefined or absent is said in its place.

    Args:
        path: File to write, ending in .png.
        curves: For each category a dict with ``roc`` (fpr, tpr), ``pr`` (recall, precision),
            ``pro`` (fpr, overlap) or None, ``scores`` (N,) float, ``labels`` (N,) bool,
            ``threshold`` float or None, and ``values`` with ``image_auroc``, ``image_ap`` and
            ``pixel_aupro``, NaN where undefined.
        title: Written above the axes.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
    save_figure(lambda: _curves_figure(curves, title), path)


def _curves_figure(curves: dict[str, dict[str, Any]], title: str) -> Figure:
    from matplotlib.figure import Figure

    entries = _entries(curves)
    names = max((len(entry.name) for entry in entries), default=0)
    side, gap, left = 3.3, 0.85, 0.75  # inches
    table = left + 2 * side + gap + 0.5
    columns = [table + 0.6 + max(1.0, 0.098 * names) + 0.78 * (i + 1) for i in range(len(VALUES))]
    height = max(2 * side + 2.25, 0.27 * len(entries) + 2.2)
    figure = Figure(figsize=(columns[-1] + 0.3, height), dpi=120, facecolor="white")
    width = figure.get_figwidth()

    def axes(column: int, row: int) -> Axes:
        x, y = left + column * (side + gap), height - 0.95 - side - row * (side + gap)
        return figure.add_axes((x / width, y / height, side / width, side / height))

    letter = min(14.0, 72 * (width - 0.6) / (0.62 * max(1, len(title))))
    figure.text(
        left / width,
        1 - 0.32 / height,
        title,
        fontsize=letter,
        fontweight="bold",
        va="center",
        parse_math=False,
    )
    lines = entries[: len(curves)]
    _draw_curves(axes(0, 0), lines, curves, "roc")
    _draw_curves(axes(1, 0), lines, curves, "pr")
    _draw_curves(axes(0, 1), lines, curves, "pro")
    draw_histogram(axes(1, 1), curves)
    _draw_table(figure, entries, table, columns)
    return figure


def _entries(curves: dict[str, dict[str, Any]]) -> list[_Entry]:
    """A row for each category, and a last one for the mean where there are several."""
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
    if kind == "roc":  # what chance would give
        axes.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=1)
    mean = np.mean(found, axis=0)
    if len(curves) > 1:
        axes.plot(grid, mean, color=MEAN_COLOUR, linewidth=2.4, zorder=4)
    if kind == "pro":
        colour = MEAN_COLOUR if len(curves) > 1 else PALETTE[0]
        axes.fill_between(grid, mean, color=colour, alpha=0.08, linewidth=0)


def _usable(line: Line | None, kind: str) -> Line | None:
    """The finite points from left to right, or None where there is no curve to draw."""
    if line is None:
        return None
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in line)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 2:
        return None
    # Points of one recall: precision falls as false positives come in; elsewhere curves rise.
    order = np.lexsort((-y if kind == "pr" else y, x))
    x, y = x[order], y[order]
    return (np.r_[0.0, x], np.r_[y[0], y]) if kind == "pr" and x[0] > 0 else (x, y)


def _step(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Precision at the first recall reached, the rule that average precision sums."""
    return y[np.searchsorted(x, grid, side="left").clip(max=len(x) - 1)]


def _thin(x: np.ndarray, y: np.ndarray, points: int = 3000) -> Line:
    """At most so many points, evenly along the curve: a pixel curve may have millions."""
    if len(x) <= points:
        return x, y
    length = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
    kept = np.searchsorted(length, np.linspace(0, length[-1], points)).clip(max=len(x) - 1)
    kept = np.unique(np.r_[0, kept, len(x) - 1])
    return x[kept], y[kept]


def _draw_table(figure: Figure, entries: list[_Entry], left: float, columns: list[float]) -> None:
    """The legend: line, category and values in aligned columns; positions in inches."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()

    def write(x: float, y: float, text: str, **look: Any) -> None:
        figure.text(x / width, y / height, text, va="center", parse_math=False, **look)

    def rule(start: float, end: float, y: float, **look: Any) -> None:
        line = Line2D([start / width, end / width], [y / height] * 2, **look)
        line.set_transform(figure.transFigure)
        figure.add_artist(line)

    y = height - 1.05
    write(left, y, "category", fontsize=9, color="#555555")
    for x, name in zip(columns, VALUES, strict=True):
        write(x, y, name, fontsize=9, color="#555555", ha="right")
    rule(left, columns[-1], y - 0.15, color="#999999", linewidth=0.7)
    y -= 0.34
    incomplete = False
    for entry in entries:
        if len(entries) > 1 and entry is entries[-1]:
            rule(left, columns[-1], y + 0.08, color="#999999", linewidth=0.7)
            y -= 0.08
        rule(
            left,
            left + 0.45,
            y,
            color=entry.colour,
            linestyle=entry.dashes,
            linewidth=max(1.6, entry.width),
        )
        weight = "bold" if entry.width > 2 else "normal"
        write(left + 0.6, y, entry.name, fontsize=9, fontweight=weight)
        for x, key in zip(columns, VALUES.values(), strict=True):
            undefined = math.isnan(entry.values[key])
            incomplete |= undefined
            write(
                x,
                y,
                "undefined" if undefined else f"{entry.values[key]:.3f}",
                fontsize=7.5 if undefined else 9,
                fontweight="normal" if undefined else weight,
                color="#777777" if undefined else "black",
                ha="right",
            )
        y -= 0.27
    notes = ["AUROC and AP: images", f"AUPRO: pixels, up to a false-positive rate of {FPR_LIMIT}"]
    if len(entries) > 1:
        notes.append("mean: over the categories" + (" where it is defined" if incomplete else ""))
    for note in notes:
        y -= 0.17
        write(left, y + 0.1, note, fontsize=7.5, color="#555555")
