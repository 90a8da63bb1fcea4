"""Scores of clips over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from anomaly_lit.drawing.axes import PALETTE, save_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLIPS = 40  # in one picture


class Timeline(NamedTuple):
    """The frames of one clip, in order of time."""

    name: str
    scores: npt.NDArray[np.float64]  # (n,)
    labels: npt.NDArray[np.bool_] | None  # (n,), true where anomalous; None: nobody knows
    auroc: float = math.nan
    threshold: float = math.nan


def save_timeline(path: str | Path, lines: Sequence[Timeline]) -> None:
    """Draw the score of each clip over its frames; intervals labelled as anomalous are shaded.

    Only the first 40 clips are drawn.

    Args:
        path: The PNG file.
        lines: At least one clip.
    """
    save_figure(lambda: _draw(lines[:MOST_CLIPS]), path)


def intervals(labels: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the first and last position of each run of true values."""
    edges = np.flatnonzero(np.diff(np.r_[False, labels, False].astype(np.int8)))
    return [(int(start), int(end) - 1) for start, end in edges.reshape(-1, 2)]


def _draw(lines: Sequence[Timeline]) -> Figure:
    from matplotlib.figure import Figure

    columns = 2 if len(lines) > 1 else 1
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(6.0 * columns, 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, line in zip(grid, lines, strict=False):
        known = "" if math.isnan(line.auroc) else f", AUROC {line.auroc:.3f}"
        style_axes(axes, f"{line.name}{known}", "frame", "score")
        for start, end in [] if line.labels is None else intervals(line.labels):
            axes.axvspan(start - 0.5, end + 0.5, color=PALETTE[1], alpha=0.2, linewidth=0)
        axes.plot(line.scores, color=PALETTE[0], linewidth=1.2)
        if not math.isnan(line.threshold):
            axes.axhline(line.threshold, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_xlim(0, max(1, len(line.scores) - 1))
    for axes in grid[len(lines) :]:
        axes.remove()
    return figure
