"""Panels, overlays and curves as PNG files.

Heat maps show raw anomaly values on a scale that the caller fixes (``low``, ``high``), so that two
pictures of one run can be compared. Nothing here normalises a picture by its own extremes, and
nothing computed here goes back into a metric.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomaly_lit.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[int, int, int]

TRUTH_COLOUR: Colour = (60, 230, 90)
PREDICTION_COLOUR: Colour = (80, 225, 255)  # a hue that the heat scale does not contain
UNDEFINED_COLOUR: Colour = (128, 128, 128)  # anomaly values that are NaN
TEXT_COLOUR: Colour = (34, 34, 34)

LARGEST_TILE = 512  # pixels of a panel tile's longer side
SMALLEST_TILE = 192  # smaller pictures are magnified by a whole factor
OPACITY = 0.85  # of the heat at the upper end of the scale


# --- heat maps -----------------------------------------------------------------------------------


def colour_map(anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colours of an anomaly map on a scale whose lightness grows with the anomaly.

    The scale is matplotlib's *inferno*, even to the eye and safe for colour-blind readers.

    Args:
        anomaly_map: (H, W) float, any range. NaN is drawn grey.
        low: Value drawn in the darkest colour; smaller values are clipped to it.
        high: Value drawn in the brightest colour; larger values are clipped to it. Where ``high``
            does not exceed ``low`` every value above ``low`` is drawn in the brightest colour.

    Returns:
        (H, W, 3) uint8.
    """
    return np.take(_heat_scale(), _levels(anomaly_map, low, high), axis=0)


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    low: float,
    high: float,
    outline: np.ndarray | None = None,
) -> np.ndarray:
    """Heat over the photograph, the more opaque the more anomalous.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W) float, any range. The photograph stays as it is where this is NaN.
        low: As in :func:`colour_map`; here the heat is invisible.
        high: As in :func:`colour_map`; here the heat is strongest.
        outline: (H, W) bool, region whose outline is drawn, usually the predicted one.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: The arrays do not have one size.
    """
    _check_sizes(image, anomaly_map, outline)
    levels = _levels(anomaly_map, low, high)
    heat = Image.fromarray(np.take(_heat_scale(), levels, axis=0))
    opacity = Image.fromarray(np.take(_opacity_scale(), levels))
    blended = np.array(Image.composite(heat, Image.fromarray(image), opacity))
    return blended if outline is None else draw_outline(blended, outline, PREDICTION_COLOUR)


def _levels(anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Steps of the scale as (H, W) uint8: 0 at low, 254 at high, 255 where the value is NaN."""
    precision = np.promote_types(anomaly_map.dtype, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        levels = np.subtract(anomaly_map, low, dtype=precision)
        levels *= 254 / max(high - low, 1e-30)  # all but a step where high does not exceed low
    np.clip(levels, 0, 254, out=levels)
    levels[np.isnan(levels)] = 255
    return np.rint(levels, out=levels).astype(np.uint8)


@lru_cache(maxsize=1)
def _heat_scale() -> np.ndarray:
    """(256, 3) uint8, a colour for each level."""
    import matplotlib

    colours = matplotlib.colormaps["inferno"](np.linspace(0, 1, 255), bytes=True)[:, :3]
    return np.concatenate((colours, [UNDEFINED_COLOUR])).astype(np.uint8)


@lru_cache(maxsize=1)
def _opacity_scale() -> np.ndarray:
    """(256,) uint8; a power above 1 keeps the heat of normal areas from tinting the photograph."""
    opacity = 255 * OPACITY * np.linspace(0, 1, 255) ** 1.5
    return np.append(opacity.round(), 0).astype(np.uint8)


# --- outlines ------------------------------------------------------------------------------------


def draw_outline(
    image: np.ndarray, mask: np.ndarray, colour: Colour = TRUTH_COLOUR, width: int | None = None
) -> np.ndarray:
    """Draw a line around a mask that is seen on dark and on bright pictures.

    The line runs just outside the mask, so that it hides nothing of a small defect, and has a rim
    of the opposite lightness. Where the mask reaches the picture's edge it runs inside.

    Args:
        image: (H, W, 3) uint8, not changed.
        mask: (H, W) bool.
        colour: RGB of the line.
        width: Pixels of the line; by default it grows with the picture, from 1 to about 5.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: The arrays do not have one size.
    """
    _check_sizes(image, mask)
    drawn = image.copy()
    if not mask.any():
        return drawn
    width = 1 + round(math.sqrt(max(mask.shape)) / 16) if width is None else width
    rim = max(1, width // 2)

    rows, columns = _bounds(mask, margin=width + rim)
    part = mask[rows, columns]
    line = _grow(part, width)
    around = _grow(line, rim)
    line &= ~part
    around &= ~part
    line |= part & _edge(mask.shape, width)[rows, columns]
    around |= part & _edge(mask.shape, width + rim)[rows, columns]

    drawn[rows, columns][around] = (0, 0, 0) if _lightness(colour) > 110 else (255, 255, 255)
    drawn[rows, columns][line] = colour
    return drawn


def _grow(mask: np.ndarray, steps: int) -> np.ndarray:
    """Dilate by about a disc: steps to four and to eight neighbours take turns."""
    for step in range(steps):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        source = grown.copy() if step % 2 else mask
        grown[:, 1:] |= source[:, :-1]
        grown[:, :-1] |= source[:, 1:]
        mask = grown
    return mask


def _edge(shape: tuple[int, ...], width: int) -> np.ndarray:
    edge = np.ones(shape, dtype=bool)
    edge[width : shape[0] - width, width : shape[1] - width] = False
    return edge


def _bounds(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    def span(axis: int) -> slice:
        inside = np.flatnonzero(mask.any(axis=axis))
        return slice(max(0, int(inside[0]) - margin), int(inside[-1]) + margin + 1)

    return span(1), span(0)


def _lightness(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


# --- panels --------------------------------------------------------------------------------------


def panel(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    gt_mask: np.ndarray | None,
    low: float,
    high: float,
    caption: str,
    outline: np.ndarray | None = None,
) -> Image.Image:
    """Put input, truth, anomaly map and overlay side by side above one line of text.

    A tile's longer side has 192 to 512 pixels. Where a picture must shrink, a tile's pixel shows
    the largest anomaly and any truth below it, so that neither a peak nor a thin defect vanishes.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W) float, any range.
        gt_mask: (H, W) bool, or None where no truth is known, which the tile then says.
        low: As in :func:`colour_map`.
        high: As in :func:`colour_map`.
        caption: Such as category, defect type, score, threshold and verdict.
        outline: (H, W) bool, predicted region to outline in the overlay.

    Returns:
        An RGB picture.

    Raises:
        ValueError: The arrays do not have one size.
    """
    _check_sizes(image, anomaly_map, gt_mask, outline)
    size = _tile_size(anomaly_map.shape)
    photo = _fit_image(image, size)
    values = _fit_values(anomaly_map, size)
    region = None if outline is None else _fit_values(outline, size)
    if gt_mask is None:
        truth, heading = _blank_tile(size, "no truth"), "truth"
    else:
        truth = draw_outline(photo, _fit_values(gt_mask, size))
        heading = "truth" if gt_mask.any() else "truth: no defect"
    tiles = {
        "input": photo,
        heading: truth,
        "anomaly map": colour_map(values, low, high),
        "overlay": overlay(photo, values, low, high, region),
    }
    return _compose(tiles, caption, low, high)


def training_panel(
    image: np.ndarray,
    caption: str,
    corrupted: np.ndarray | None = None,
    corruption: np.ndarray | None = None,
    prompt: np.ndarray | None = None,
) -> Image.Image:
    """Put what training sees of one image side by side above one line of text.

    Args:
        image: (H, W, 3) uint8.
        caption: Such as the category and the file's name.
        corrupted: (H, W, 3) uint8, shown as it is and with its corruption outlined.
        corruption: (H, W) bool; comes with ``corrupted``.
        prompt: (H, W, 3) uint8.

    Raises:
        ValueError: The arrays do not have one size.
    """
    _check_sizes(image, corruption)
    size = _tile_size(image.shape)
    tiles = {"image": _fit_image(image, size)}
    if corrupted is not None and corruption is not None:
        tiles["corrupted"] = _fit_image(corrupted, size)
        heading = "corruption" if corruption.any() else "corruption: none"
        tiles[heading] = draw_outline(tiles["corrupted"], _fit_values(corruption, size))
    if prompt is not None:
        tiles["prompt"] = _fit_image(prompt, size)
    return _compose(tiles, caption, 0.0, 1.0)


def contact_sheet(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange pictures of any sizes in rows of so many columns.

    Raises:
        ValueError: There is no picture, or less than one column.
    """
    if not panels or columns < 1:
        raise ValueError(
            f"a contact sheet needs pictures and columns, found {len(panels)} and {columns}"
        )
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    gap = 8
    widths = [max(picture.width for picture in panels[i::columns]) for i in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1))
    sheet = Image.new("RGB", size, (255, 255, 255))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            corner = (gap + sum(widths[:j]) + gap * j, gap + sum(heights[:i]) + gap * i)
            sheet.paste(picture, corner)
    return sheet


def _compose(tiles: dict[str, np.ndarray], caption: str, low: float, high: float) -> Image.Image:
    height, width = next(iter(tiles.values())).shape[:2]
    cell = max(width, 144)  # room for a heading over a narrow strip
    letter = int(np.clip(cell / 19, 13, 19))
    gap, margin = letter, max(8, letter // 2)
    top = margin + round(1.6 * letter)
    step = cell + gap
    total = (2 * margin + len(tiles) * step - gap, top + height + round(1.9 * letter) + margin)
    sheet = Image.new("RGB", total, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (heading, tile) in enumerate(tiles.items()):
        left = margin + i * step
        draw.text((left, margin), heading, TEXT_COLOUR, _font(letter))
        sheet.paste(Image.fromarray(tile), (left, top))
        if heading == "anomaly map":
            _draw_scale(sheet, (left + cell, margin), cell, letter, low, high)
    line = round(top + height + 0.5 * letter)
    text, font = _fit_text(caption, total[0] - 2 * margin, letter + 1)
    draw.text((margin, line), text, TEXT_COLOUR, font)
    return sheet


def _draw_scale(
    sheet: Image.Image,
    corner: tuple[int, int],
    cell: int,
    letter: int,
    low: float,
    high: float,
) -> None:
    """The colours between low and high, right-aligned in the heading line if there is room."""
    font = _font(letter - 3)
    lower, upper = f"{low:.3g}", f"{high:.3g}"
    bar = 3 * letter
    right = corner[0] - round(font.getlength(upper))
    left = right - bar - 8 - round(font.getlength(lower))
    if corner[0] - left > cell - _font(letter).getlength("anomaly map") - letter:
        return
    draw = ImageDraw.Draw(sheet)
    ramp = colour_map(np.tile(np.linspace(0, 1, bar), (letter - 5, 1)), 0, 1)
    sheet.paste(Image.fromarray(ramp), (right - bar - 4, corner[1] + 4))
    draw.text((left, corner[1] + 2), lower, TEXT_COLOUR, font)
    draw.text((right, corner[1] + 2), upper, TEXT_COLOUR, font)


def _tile_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width at which a picture is shown."""
    longer = max(shape)
    if longer < SMALLEST_TILE:
        factor = math.ceil(SMALLEST_TILE / longer)
        return shape[0] * factor, shape[1] * factor
    scale = min(1.0, LARGEST_TILE / longer)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[0] <= size[0]:
        return _repeat(image, size)
    picture = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    return np.array(picture)


def _fit_values(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Repeat values to a multiple of their size, or keep the largest of each block of pixels."""
    if values.shape[0] <= size[0] and values.shape[1] <= size[1]:
        return _repeat(values, size)
    largest = np.logical_or if values.dtype == bool else np.fmax  # fmax passes over NaN
    for axis in (0, 1):
        starts = np.arange(size[axis]) * values.shape[axis] // size[axis]
        values = largest.reduceat(values, starts, axis=axis)
    return values


def _repeat(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    factor = size[0] // array.shape[0]
    return array if factor == 1 else array.repeat(factor, axis=0).repeat(factor, axis=1)


def _blank_tile(size: tuple[int, int], text: str) -> np.ndarray:
    tile = Image.new("RGB", size[::-1], (236, 236, 236))
    text, font = _fit_text(text, size[1] - 4, 16)
    centre = (size[1] / 2, size[0] / 2)
    ImageDraw.Draw(tile).text(centre, text, (110, 110, 110), font, anchor="mm")
    return np.array(tile)


def _fit_text(text: str, width: int, letter: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """One line no wider than so many pixels: smaller letters first, then an ellipsis."""
    text = " ".join(text.splitlines())
    smallest = min(11, letter)
    while letter > smallest and _font(letter).getlength(text) > width:
        letter -= 1
    font = _font(letter)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    return text, font


@lru_cache(maxsize=32)
def _font(letter: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=letter)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow returns when given a size
    return font


def _check_sizes(image: np.ndarray, *others: np.ndarray | None) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be (H, W, 3) uint8, found {image.shape} {image.dtype}")
    for other in others:
        if other is not None and other.shape != image.shape[:2]:
            raise ValueError(
                f"the map or mask has shape {other.shape}, the image {image.shape[:2]}: "
                "bring the map to the image's size first"
            )


# --- files ---------------------------------------------------------------------------------------


def save_image(picture: Image.Image | np.ndarray, path: str | Path) -> None:
    """Write a PNG file that is either whole or not there; missing folders are made.

    Args:
        picture: A Pillow image, or an (H, W, 3) uint8 array.
        path: File to write or to replace, ending in .png.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    content = io.BytesIO()
    picture.save(content, format="PNG", compress_level=4)
    _write(content.getvalue(), Path(path))


def _write(content: bytes, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG files: let the name {path} end in .png")
    unfinished = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        finally:
            if unfinished.exists():
                unfinished.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write the picture {path}: {error.strerror}; choose an output folder that "
            "you can write to"
        ) from error


# --- curves --------------------------------------------------------------------------------------

# Okabe and Ito's palette without yellow (faint on white) and black (kept for the mean).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
MEAN_COLOUR = "#111111"
VALUES = {"AUROC": "image_auroc", "AP": "image_ap", "AUPRO": "pixel_aupro"}
FPR_LIMIT = 0.3
GRID = np.linspace(0, 1, 501)

Line = tuple[np.ndarray, np.ndarray]
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
    _save_figure(lambda: _curves_figure(curves, title), path)


def save_loss_curves(path: str | Path, history: dict[str, list[tuple[int, float]]]) -> None:
    """Draw loss terms against the step into one PNG file, an axes for each term.

    Args:
        path: File to write, ending in .png.
        history: (step, value) pairs by log key, such as ``train/loss`` and ``val/loss``. Keys that
            differ only in the part before the slash share their axes.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
    _save_figure(lambda: _loss_figure(history), path)


def _save_figure(draw: Callable[[], Figure], path: str | Path) -> None:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says
        figure = draw()
        FigureCanvasAgg(figure).print_png(content)
    _write(content.getvalue(), Path(path))


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
    _draw_histogram(axes(1, 1), curves)
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
    _dress(axes, *titles[kind])
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
        _note(axes, absent[kind])
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


def _draw_histogram(axes: Axes, curves: dict[str, dict[str, Any]]) -> None:
    scores, labels, thresholds, aligned = _pool_scores(curves)
    name = "(score - threshold) / deviation of normal scores" if aligned else "score"
    _dress(axes, "Scores of images", name, "share of the images")
    if not len(scores):
        _note(axes, "no scores")
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
    """Scores and labels of all categories, thresholds to draw, and whether they were aligned.

    Categories with their own thresholds have their own scales of scores: there the threshold is
    moved to 0 and the deviation of the normal scores to 1, where all of them can be measured.
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
    """Range without far outliers (three quartile distances, by class); never empty."""
    low, high = math.inf, -math.inf
    for part in (scores[labels], scores[~labels]):
        if len(part):
            first, third = np.percentile(part, (25, 75))
            reach = 3 * (third - first)
            low = min(low, max(float(part.min()), first - reach))
            high = max(high, min(float(part.max()), third + reach))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


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
        _dress(grid[0], "Loss", "step", "")
        _note(grid[0], "no losses were logged")
    for axes, (term, stages) in zip(grid, terms.items(), strict=False):
        _dress(axes, term, "step", "")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _draw_losses(axes, stages)
    return figure


def _draw_losses(axes: Axes, stages: dict[str, np.ndarray]) -> None:
    looks = {"train": ("train", PALETTE[0]), "val": ("held-out", PALETTE[1])}
    spare = list(PALETTE[2:])
    finite = [points[np.isfinite(points[:, 1]), 1] for points in stages.values()]
    values = np.concatenate(finite)
    if not len(values):
        _note(axes, "no finite value")
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
    """Moving average over the finite values."""
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    if len(losses) < 2 * window:
        return steps, losses
    kernel = np.ones(window) / window
    return np.convolve(steps, kernel, "valid"), np.convolve(losses, kernel, "valid")


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, color="#888888")
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")


def _note(axes: Axes, text: str) -> None:
    """Say in empty axes why they are empty."""
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
