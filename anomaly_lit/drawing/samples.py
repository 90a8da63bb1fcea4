"""Some images of a data set on one sheet, with their truth outlined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from anomaly_lit.drawing.outline import draw_outline
from anomaly_lit.drawing.panels import contact_sheet


def sample_tile(
    image: np.ndarray, mask: np.ndarray | None, caption: str, side: int = 160
) -> Image.Image:
    """Draw an image with its mask's outline, below a caption.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) bool; None draws no outline.
        caption: One or two lines.
        side: Longer side of the image on the tile, in pixels.
    """
    picture = Image.fromarray(image if mask is None else draw_outline(image, mask))
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    tile = Image.new("RGB", (side, side + 26), (255, 255, 255))
    tile.paste(picture.resize((width, height)), (0, 26))
    ImageDraw.Draw(tile).text((1, 0), caption, fill=(40, 40, 40), font_size=10, spacing=1)
    return tile


def sample_sheet(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Arrange tiles, each row on a line of its own, with at most `columns` tiles a row."""
    blank = Image.new("RGB", (1, 1), (255, 255, 255))
    tiles = [tile for row in rows for tile in [*row, *[blank] * (columns - len(row))]]
    return contact_sheet(tiles, columns)
