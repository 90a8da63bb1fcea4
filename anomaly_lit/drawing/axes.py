"""What all figures with axes share: colours, style, and the way into a PNG file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomaly_lit.drawing.png import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow (faint on white) and black (reserved for the mean).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MEAN_COLOUR = "#111111"

Line = tuple[np.ndarray, np.ndarray]


def save_figure(draw: Callable[[], Figure], path: str | Path) -> None:
    """Draw a figure in matplotlib's default style and write it as a PNG file."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    with matplotlib.style.context("default"):  # ignores the user's matplotlibrc
        figure = draw()
        FigureCanvasAgg(figure).print_png(content, pil_kwargs={"compress_level": 3})
    write_png(content.getvalue(), Path(path))


def style_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes a title, labels, a pale grid, and no frame at the top and on the right."""
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, color="#888888")
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")


def write_note(axes: Axes, text: str) -> None:
    """Write into empty axes why they are empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(
        0.5,
        0.5,
        text,
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=9,
        color="#777777",
        parse_math=False,
    )
