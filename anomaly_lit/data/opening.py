"""Opening pictures: which formats, how large they may be, and what went wrong in words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps

from anomaly_lit.data.packed import packed_picture
from anomaly_lit.folders import formats
from anomaly_lit.types import UserError

MAX_PIXELS = 200_000_000  # of a picture, unless a setting says otherwise; about 0.6 GB as RGB
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 exchange width and height
OF_ONE_PICTURE = ("MPO", "PSD")  # their further frames are a camera's previews, or layers
SUBFILE_TYPE = 0x00FE  # the TIFF tag; its lowest bit marks a smaller copy of another page


@contextmanager
def open_picture(
    path: str | Path | IO[bytes], max_pixels: int | None = None
) -> Iterator[Image.Image]:
    """Open a picture; its pixels are not decoded yet.

    Args:
        path: A file's path, that of a picture packed in a file, or an open file.
        max_pixels: A larger picture is refused before memory is spent on it; None sets no limit.

    Raises:
        UserError: Opening the picture, or anything done with it meanwhile, failed.
    """
    try:
        file = packed_picture(path) if isinstance(path, str | Path) else None
        if file is None:
            with _GUARD.lifted():
                file = Image.open(path, formats=formats())
        with file:
            check_pixels(file.size, max_pixels)
            yield file
    except Exception as error:  # a decoder may raise anything on malformed bytes
        raise UserError(f"{path}: {_cause(error)}") from error


def check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    """Raise UserError where a picture is too large.

    Args:
        size: Width and height, in any order.
        max_pixels: The limit; None for none.
    """
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise UserError(
            f"the picture is {size[0]}x{size[1]}, {size[0] * size[1] / 1e6:.4g} megapixels, more "
            f"than max_pixels={max_pixels}: raise it (null: no limit) or shrink the picture"
        )


def checked_pixels(max_pixels: int | None, name: str) -> int | None:
    """Return a limit of pixels if it is a valid one; raise UserError if not.

    Args:
        max_pixels: The limit; None for none.
        name: Of the setting.
    """
    whole = isinstance(max_pixels, int) and not isinstance(max_pixels, bool)
    if max_pixels is not None and not (whole and max_pixels > 0):
        raise UserError(f"{name}={max_pixels}: give a positive whole number, or null for no limit")
    return max_pixels


def upright(picture: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF orientation says; itself where there is none."""
    if picture.getexif().get(ORIENTATION, 1) == 1:
        return picture
    return ImageOps.exif_transpose(picture)


def pages_of(picture: Image.Image) -> int:
    """Return how many pages or frames an opened file has; the first of them is open afterwards.

    Previews of a picture and its layers do not count.
    """
    if picture.format in OF_ONE_PICTURE:
        return 1
    if picture.format == "TIFF":
        return _tiff_pages(picture)
    try:
        return int(getattr(picture, "n_frames", 1))
    except Exception:  # damaged after the first frame, which can be read
        return 2


def _tiff_pages(picture: Image.Image) -> int:
    pages, number = 1, 1
    while True:
        try:
            picture.seek(number)
        except EOFError:
            break
        except Exception:  # a page of a kind that Pillow does not open; none after it is found
            pages += 1
            break
        tags = getattr(picture, "tag_v2", {})
        pages += not tags.get(SUBFILE_TYPE, 0) & 1
        number += 1
    picture.seek(0)
    return pages


class _Guard:
    """Lifts Pillow's limit of pixels as long as any thread is opening a file.

    Opening reads only the header; our own limit is checked next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limit: int | None = None

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    Image.MAX_IMAGE_PIXELS = self._limit


_GUARD = _Guard()


def _cause(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "the file may not be read (permissions)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return f"the image is damaged or not supported ({error})"
