"""Losses of a training against the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomaly_lit.drawing.axes import PALETTE, Line, save_figure, style_axes, write_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_loss_curves(path: str | Path, history: dict[str, list[tuple[int, float]]]) -> None:
    """Draw loss terms against the step into one PNG file, each term in its own axes.

    Args:
        path: File to write, ending in .png.
        history: (step, value) pairs by log key, such as `train/loss` and `val/loss`. Keys that
            differ only in the part before the slash share their axes.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
    save_figure(lambda: _loss_figure(history), path)


def _loss_figure(history: dict[str, list[tuple[int, float]]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    terms: dict[str, dict[str, np.ndarray]] = {}
    for key, pairs in history.items():
        stage, _, term = key.rpartition("/")
        if pairs:
            terms.setdefault(term, {})[stage] = np.array(sorted(pairs), dtype=np.float64)
    columns = min(3, max(1, len(terms)))
    rows = max(1, math.ceil(len(terms) / columns))
    figure = Figure(figsize=(0.6 + 3.9 * columns, 0.3 + 2.9 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[max(1, len(terms)) :]:
        axes.set_axis_off()
    if not terms:
        style_axes(grid[0], "Loss", "step", "")
        write_note(grid[0], "no losses were logged")
    for axes, (term, stages) in zip(grid, terms.items(), strict=False):
        style_axes(axes, term, "step", "")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _draw_losses(axes, stages)
    return figure


def _draw_losses(axes: Axes, stages: dict[str, np.ndarray]) -> None:
    looks = {"train": ("train", PALETTE[0]), "val": ("held-out", PALETTE[1])}
    spare = list(PALETTE[2:])
    finite = [points[np.isfinite(points[:, 1]), 1] for points in stages.values()]
    values = np.concatenate(finite)
    if not len(values):
        write_note(axes, "no finite value")
        return
    for stage, points in stages.items():
        name, colour = looks.get(stage) or (stage or "value", spare.pop(0) if spare else "#555555")
        steps, losses = points.T
        lost = int((~np.isfinite(losses)).sum())
        name = f"{name} ({lost} not finite)" if lost else name
        many = len(losses) > 60
        if many:
            axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.3)
            steps, losses = _smooth(steps, losses, len(losses) // 40)
        axes.plot(steps, losses, color=colour, linewidth=1.8, marker=None if many else ".")
        axes.plot([], [], color=colour, linewidth=1.8, label=name)
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    elif values.min() < 0 < values.max():
        axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=1)
    axes.legend(fontsize=8, frameon=False)


def _smooth(steps: np.ndarray, losses: np.ndarray, window: int) -> Line:
    """Return the moving average over the finite values."""
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    if len(losses) < 2 * window:
        return steps, losses
    kernel = np.ones(window) / window
    return np.convolve(steps, kernel, "valid"), np.convolve(losses, kernel, "valid")
