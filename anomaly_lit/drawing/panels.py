"""Panels: one image with what is known of it, and sheets of panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomaly_lit.drawing.heat import colour_map, overlay
from anomaly_lit.drawing.outline import Colour, check_sizes, draw_outline

TEXT_COLOUR: Colour = (34, 34, 34)
LARGEST_TILE = 512  # pixels of a panel tile's longer side
SMALLEST_TILE = 192  # smaller images are magnified by a whole factor
CAPTION_ROOM = 560  # pixels that a caption may have below a single tile


def panel(
    image: np.ndarray,
    anomaly_map: np.ndarray | None,
    gt_mask: np.ndarray | None,
    low: float,
    high: float,
    caption: str,
    outline: np.ndarray | None = None,
) -> Image.Image:
    """Put input, truth, anomaly map and overlay side by side above one line of text.

    A tile's longer side has 192 to 512 pixels. Where an image must shrink, a pixel of a tile shows
    the largest anomaly and any truth that it covers, so that no peak and no thin defect vanishes.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W) float, any range; None for a method that does not localise. Then the
            panel shows the image alone, without map, truth or overlay.
        gt_mask: (H, W) bool, or None where no truth is known; the panel then says so.
        low: As in `heat.colour_map`.
        high: As in `heat.colour_map`.
        caption: For instance category, defect type, score, threshold and verdict.
        outline: (H, W) bool, predicted region to outline in the overlay.

    Returns:
        An RGB figure.

    Raises:
        ValueError: The arrays differ in size.
    """
    check_sizes(image, anomaly_map, gt_mask, outline)
    size = _tile_size(image.shape[:2])
    photo = _fit_image(image, size)
    if anomaly_map is None:
        return _compose({"input": photo}, caption, low, high)
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
    """Put what training sees of one image side by side, above one line of text.

    Args:
        image: (H, W, 3) uint8.
        caption: For instance the category and the file's name.
        corrupted: (H, W, 3) uint8, shown as it is, and with its corruption outlined.
        corruption: (H, W) bool; given together with `corrupted`.
        prompt: (H, W, 3) uint8.

    Raises:
        ValueError: The arrays differ in size.
    """
    check_sizes(image, corruption)
    size = _tile_size(image.shape[:2])
    tiles = {"image": _fit_image(image, size)}
    if corrupted is not None and corruption is not None:
        tiles["corrupted"] = _fit_image(corrupted, size)
        heading = "corruption" if corruption.any() else "corruption: none"
        tiles[heading] = draw_outline(tiles["corrupted"], _fit_values(corruption, size))
    if prompt is not None:
        tiles["prompt"] = _fit_image(prompt, size)
    return _compose(tiles, caption, 0.0, 1.0)


def contact_sheet(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange panels of any sizes in rows of so many columns.

    Raises:
        ValueError: There is no panel, or less than one column.
    """
    if not panels or columns < 1:
        raise ValueError(
            f"a contact sheet needs panels and columns, found {len(panels)} and {columns}"
        )
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    gap = 8
    widths = [max(part.width for part in panels[i::columns]) for i in range(len(rows[0]))]
    heights = [max(part.height for part in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1))
    sheet = Image.new("RGB", size, (255, 255, 255))
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            corner = (gap + sum(widths[:j]) + gap * j, gap + sum(heights[:i]) + gap * i)
            sheet.paste(part, corner)
    return sheet


def _compose(tiles: dict[str, np.ndarray], caption: str, low: float, high: float) -> Image.Image:
    height, width = next(iter(tiles.values())).shape[:2]
    cell = max(width, 144)  # room for a heading over a narrow strip
    letter = int(np.clip(cell / 19, 13, 19))
    gap, margin = letter, max(8, letter // 2)
    top = margin + round(1.6 * letter)
    step = cell + gap
    caption = " ".join(caption.splitlines())
    below = min(CAPTION_ROOM, math.ceil(_font(letter + 1).getlength(caption)))
    total = (
        2 * margin + max(len(tiles) * step - gap, below),
        top + height + round(1.9 * letter) + margin,
    )
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
    """Draw the colour scale from low to high, at the right of the heading line if it fits."""
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
    """Return the height and width at which an image is shown."""
    longer = max(shape)
    if longer < SMALLEST_TILE:
        factor = math.ceil(SMALLEST_TILE / longer)
        return shape[0] * factor, shape[1] * factor
    scale = min(1.0, LARGEST_TILE / longer)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Repeat pixels to a multiple of an image's size, or shrink it smoothly."""
    if image.shape[0] <= size[0]:
        return _repeat(image, size)
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))


def _fit_values(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Repeat values to a multiple of their size, or keep the largest of each block.

    scikit-image's `block_reduce` needs blocks of one size; these may differ by a pixel.
    """
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
    """Fit text into one line of so many pixels: first by smaller letters, then by an ellipsis."""
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
