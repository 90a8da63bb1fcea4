"""PNG files that are either whole or not there."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from anomaly_lit.types import UserError


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
    write_png(content.getvalue(), Path(path))


def write_png(content: bytes, path: Path) -> None:
    """Write the bytes of a PNG file beside its place and move them there."""
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
