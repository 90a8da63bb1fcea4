"""Geometry of the page's plots; the template draws them as SVG.

matplotlib's SVG is not used. It takes 36 ms a plot (1.4 ms here) and half a second to import, and a
report may have a plot for each of hundreds of rows. Its points also show no names when the pointer
rests on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 320, 56, 24, 10, 40  # of a plot, in pixels


class Axis(NamedTuple):
    """A range of values and the pixels that it spans."""

    title: str
    low: float
    high: float
    start: int
    end: int
    log: bool

    def at(self, value: float) -> float:
        """Return the pixel of a value, to a tenth."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return pixels and texts of five values, evenly spaced on the axis."""
        values = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            if self.log:
                values.append(self.low * (self.high / self.low) ** share)
            else:
                values.append(self.low + share * (self.high - self.low))
        return [(self.at(v), f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}") for v in values]


class Plot(NamedTuple):
    """A line, or named points with a line along the best of them."""

    x: Axis
    y: Axis
    line: list[tuple[float, float]]
    points: Sequence[tuple[str, float, float]] = ()


def scatter(points: Sequence[tuple[str, float, float]], x_title: str, y_title: str) -> Plot:
    """Plot named points, with a line through those that none beats in both (less x, more y)."""
    best: list[tuple[float, float]] = []
    for _, x, y in sorted(points, key=lambda p: (p[1], -p[2])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return Plot(
        _x_axis(x_title, [x for _, x, _ in points], log=True),
        _y_axis(y_title, [y for *_, y in points]),
        best,
        points,
    )


def curve(points: Sequence[tuple[float, float]], x_title: str, y_title: str) -> Plot:
    """Plot one line through some points."""
    xs, ys = zip(*points, strict=True)
    return Plot(_x_axis(x_title, xs), _y_axis(y_title, ys), list(points))


def _x_axis(title: str, values: Sequence[float], log: bool = False) -> Axis:
    if log and min(values) > 0:
        low, high = min(values) / 1.3, max(values) * 1.3
    else:
        low, high, log = *_wider(values), False
    return Axis(title, low, high, LEFT, WIDTH - RIGHT, log)


def _y_axis(title: str, values: Sequence[float]) -> Axis:
    return Axis(title, *_wider(values), HEIGHT - BOTTOM, TOP, False)


def _wider(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin
