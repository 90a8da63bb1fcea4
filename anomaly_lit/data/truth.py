"""Truth masks: which pixels of a picture count as marked, and which masks look wrong.

A mask is bright where the defect is. What counts is the brightness that a viewer shows on a black
page: the largest of red, green and blue, times the opacity. Two kinds of pictures show nothing that
way, so something else counts:

- in a palette that gives another index the colour of index 0, the index;
- in a picture that is all black and partly opaque, the opacity.

In a lossless file everything above 0 is marked, so that 0 and 1, 0 and 255 and class indices all
work. JPEG and its like surround a mark with faint values, so that in a lossy file only what is
above half of the file's largest value is marked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from anomaly_lit.data.opening import open_picture, upright

LOSSY = ("AVIF", "JPEG", "JPEG2000", "MPO")  # WebP and TIFF may be lossy, too
CLASSES = 16  # masks with more values than this are no class indices
SOFT_SHARE = 0.05  # of a mask's pixels above 0 that may be darker than half of its largest value
MOST = 0.5  # share of an image; a mask that marks more is questioned

Region = npt.NDArray[np.bool_]  # (H, W)


class Mask(NamedTuple):
    """A mask as it was read.

    Attributes:
        region: (H, W), true where it marks a defect.
        values: (H, W), what counted, see above.
        lossy: Whether the file's format alters pixels.
    """

    region: Region
    values: npt.NDArray[Any]
    lossy: bool

    def doubts(self) -> dict[str, str]:
        """Return what is odd about the mask: the kind, and what was found in words.

        The kinds are `empty`, `most` (of the image is marked), `lossy`, `soft` (many faint
        values in a lossless file) and `values` (several values, such as class indices).
        """
        share = float(self.region.mean())
        if share == 0:
            return {"empty": "nothing is marked"}
        found = {"most": f"{share:.0%} of the image is marked"} if share > MOST else {}
        levels, counts = _levels(self.values)
        count = len(levels)
        faint = float(counts[levels < levels[-1] / 2].sum() / counts.sum())
        if self.lossy:
            if count > 1:
                found["lossy"] = f"{faint:.0%} of its pixels above 0 are faint and left out"
        elif count > CLASSES and faint > SOFT_SHARE:
            found["soft"] = f"{faint:.0%} of its pixels are above 0 but below half"
        elif count > 1:
            found["values"] = f"{count} values above 0"
        return found


def read_mask(path: str | Path, max_pixels: int | None = None) -> Region:
    """Read a truth mask as bool of shape (H, W), true where it marks a defect.

    Args:
        path: Of the file.
        max_pixels: As for `open_picture`.

    Raises:
        UserError: The file is absent, damaged, too large or no picture.
    """
    return look_at_mask(path, max_pixels).region


def look_at_mask(path: str | Path, max_pixels: int | None = None) -> Mask:
    """Read a truth mask with what there is to know of it.

    Args:
        path: Of the file.
        max_pixels: As for `open_picture`.

    Raises:
        UserError: As for `read_mask`.
    """
    with open_picture(path, max_pixels) as file:
        lossy = _is_lossy(file, path)
        file.load()
        values = _visible(upright(file))
    floor = values.max(initial=0) / 2 if lossy else 0
    return Mask(np.asarray(values > floor), values, lossy)


def _levels(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int_]]:
    """Return the different values above 0, in order, and how often each occurs."""
    if values.dtype not in (np.uint8, np.bool_):
        return np.unique(values[values > 0], return_counts=True)
    counts = np.bincount(values.ravel(), minlength=256)
    levels = np.flatnonzero(counts)
    levels = levels[levels > 0]
    return levels, counts[levels]


def _is_lossy(file: Image.Image, path: str | Path) -> bool:
    if file.format == "WEBP":
        with open(path, "rb") as raw:
            return raw.read(16)[12:] != b"VP8L"
    return file.format in LOSSY or "jpeg" in str(file.info.get("compression"))


def _visible(picture: Image.Image) -> npt.NDArray[Any]:
    """Return what counts of each pixel, (H, W)."""
    if picture.mode == "P":
        indices = np.asarray(picture)
        table = _swatch(picture)
        if _looks_like_index_0(table, indices):
            return indices
        if "transparency" not in picture.info:
            return _brightness(table)[indices]
    if picture.mode.startswith("I") or picture.mode == "F":
        return np.asarray(picture)
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        return _opaque_brightness(picture)
    if picture.mode in ("1", "L"):
        return np.asarray(picture)
    return _brightness(np.asarray(picture.convert("RGB")))


def _swatch(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the red, green, blue and opacity of each index of a palette, (256, 4)."""
    swatch = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("P")
    swatch.putpalette(picture.getpalette() or [])
    if "transparency" in picture.info:
        swatch.info["transparency"] = picture.info["transparency"]
    return np.asarray(swatch.convert("RGBA"))[0]


def _looks_like_index_0(table: npt.NDArray[np.uint8], indices: npt.NDArray[np.uint8]) -> bool:
    """Whether a palette shows index 0 and another index alike, of those in use."""
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    alike = (table[used[1:]] == table[0]).all(axis=1).any()
    return bool(used[0] == 0 and alike)


def _brightness(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the largest of red, green and blue: (..., 3 or 4) to (...)."""
    return np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])


def _opaque_brightness(picture: Image.Image) -> npt.NDArray[Any]:
    """Return brightness times opacity, 1 to 255 where both are above 0."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    pixels = np.asarray(picture.convert("RGBA"))
    opacity = pixels[..., 3]
    seen = (_brightness(pixels).astype(np.uint16) * opacity + 254) // 255
    black_only = not seen.any() and opacity.min() != opacity.max()
    return opacity if black_only else seen
