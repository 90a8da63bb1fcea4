"""PNG files that are either complete or absent."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from anomaly_lit.types import UserError


def save_image(figure: Image.Image | np.ndarray, path: str | Path) -> None:
    """Write a PNG file that is either complete or absent; create missing folders.

    Args:
        figure: A Pillow image, or an (H, W, 3) uint8 array.
        path: File to write or replace, ending in .png.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
    figure = figure if isinstance(figure, Image.Image) else Image.fromarray(figure)
    content = io.BytesIO()
    figure.save(content, format="PNG", compress_level=4)
    write_png(content.getvalue(), Path(path))


def write_png(content: bytes, path: Path) -> None:
    """Write the bytes of a PNG file beside its place, then move the file there.

    Raises:
        UserError: The path does not end in .png or cannot be written.
    """
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
