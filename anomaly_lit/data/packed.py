"""Pictures that lie in one file with others, as in CIFAR and MNIST.

Such a picture has a path like any other: that of its file, with its number as the last part, such
as `cifar-10-batches-py/test_batch/00017`.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from anomaly_lit.data.arrays import read_arrays
from anomaly_lit.types import UserError


def paths_in(file: Path) -> list[str]:
    """Return the paths of all pictures of a file, in order.

    Raises:
        UserError: The file cannot be read or holds no pictures.
    """
    pictures = read_arrays(file).pictures
    if pictures is None:
        raise UserError(f"{file}: it holds no pictures; get it again")
    return [str(file / f"{number:05d}") for number in range(len(pictures))]


def file_of(path: str | Path) -> Path:
    """Return the file that holds a picture: itself, or the one that it is packed in."""
    path = Path(path)
    return path.parent if path.name.isdecimal() and path.parent.is_file() else path


def packed_picture(path: str | Path) -> Image.Image | None:
    """Return a picture that is packed in a file; None where the path names a file of its own.

    Raises:
        UserError: The file cannot be read, or has no picture of that number.
    """
    file = file_of(path)
    if file == Path(path):
        return None
    pictures, number = read_arrays(file).pictures, int(Path(path).name)
    if pictures is None or number >= len(pictures):
        raise UserError(f"{file} has no picture number {number}")
    return Image.fromarray(pictures[number])
