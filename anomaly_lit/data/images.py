"""Reading pictures of any kind as 8-bit RGB, and one geometry for images, masks and maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from anomaly_lit.data.opening import MAX_PIXELS, ORIENTATION, open_picture, pages_of, upright
from anomaly_lit.data.truth import Region, read_mask
from anomaly_lit.types import Sample, UserError, check_choice

LARGEST = 16384  # pixels of a side that a method sees
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MASK_RULES = ("keep", "nearest", "area", "any")

READING = 2  # raise it when reading or resizing gives other pixels: caches are then rebuilt

T = TypeVar("T", bound=np.generic)
Pixels = npt.NDArray[np.uint8]  # (H, W, 3)
Map = npt.NDArray[np.float32]  # (H, W)


def read_image(path: str | Path | IO[bytes], max_pixels: int | None = MAX_PIXELS) -> Pixels:
    """Read a picture as 8-bit RGB of shape (H, W, 3), upright as a viewer shows it.

    The EXIF orientation is applied; of several frames the first is read. Bilevel, grey, palette,
    CMYK and YCbCr pictures become RGB; transparency is dropped, never blended. Grey values of 16
    (or 32) bits are divided by 257; of a 16-bit colour picture Pillow keeps the upper byte.
    The largest value of a floating-point grey picture tells its range: [0, 1], [0, 255] or
    [0, 65535].

    Args:
        path: A file's path, or an open file.
        max_pixels: A larger picture is refused before memory is spent on it; None sets no limit.

    Raises:
        UserError: The file does not exist, is damaged, too large or no picture, or has unknown
            values.
    """
    with open_picture(path, max_pixels) as file:
        file.load()
        return as_rgb(file)


class Header(NamedTuple):
    """What a picture says of itself before its pixels are decoded."""

    size: tuple[int, int]  # (H, W) after EXIF orientation
    mode: str  # Pillow's name
    orientation: int  # of EXIF: 1 is upright, 5 to 8 exchange height and width
    pages: int = 1  # pages or frames in the file, of which the first is read


def read_header(path: str | Path, max_pixels: int | None = None) -> Header:
    """Read a picture's header, without decoding pixels.

    Args:
        path: Path of the file.
        max_pixels: As for `read_image`.

    Raises:
        UserError: The file does not exist, is too large, or is no picture.
    """
    with open_picture(path, max_pixels) as file:
        width, height = file.size
        # Pillow turns a TIFF's size itself. In a PNG, EXIF may also follow the pixels: getexif
        # would decode all of them to look there
        known = file.format in ("JPEG", "MPO", "TIFF", "WEBP") or "exif" in file.info
        orientation = file.getexif().get(ORIENTATION, 1) if known else 1
        if orientation in (5, 6, 7, 8) and file.format != "TIFF":
            width, height = height, width
        return Header((height, width), file.mode, orientation, pages_of(file))


def read_sample(
    sample: Sample, resize: Resize, max_pixels: int | None = None
) -> tuple[Pixels, Region | None]:
    """Read one sample's image (h, w, 3) and its mask (h, w), if it has one, both resized.

    Args:
        sample: The image and its mask.
        resize: Their geometry.
        max_pixels: As for `read_image`; `setup` has compared all sizes with it already.

    Raises:
        UserError: A file cannot be read, or the mask has another size than its image.
    """
    image = read_image(sample.path, max_pixels)
    if sample.mask_path is None:
        return resize.image(image), None
    mask = read_mask(sample.mask_path, max_pixels)
    check_sizes(sample, image.shape[:2], mask.shape)
    return resize.image(image), resize.mask(mask)


def check_sizes(sample: Sample, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raise UserError if the sizes (H, W) of an image and its mask differ."""
    if image != mask:
        raise UserError(
            f"{sample.mask_path}: the mask is {mask[1]}x{mask[0]} pixels, "
            f"its image {sample.path} is {image[1]}x{image[0]}; draw the mask at the image's size"
        )


class Resize:
    """The geometry that takes the original picture to what a method sees, and maps back.

    Args:
        image_size: Height and width, or one number for both.
        policy: `stretch` resizes the whole picture to `image_size` and may change its proportions;
            `pad` keeps the proportions and fills both sides equally with black.
        center_crop: Height and width to cut from the middle afterwards, which loses defects near
            the border; None keeps everything.
        interpolation: `bilinear`, `bicubic` or `lanczos`, all with antialiasing.
        mask_resize: Which pixels of a resized truth mask are true: `keep` (half of the pixel's area
            is, and no region vanishes), `nearest` (the nearest pixel is), `area` (half of its area
            is) or `any` (any part of it is).

    Raises:
        UserError: A size is not positive, the crop exceeds the image, or a name is unknown.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        policy: str = "stretch",
        center_crop: int | Sequence[int] | None = None,
        interpolation: str = "bilinear",
        mask_resize: str = "keep",
    ) -> None:
        check_choice("dataset", ("stretch", "pad"), resize=policy)
        check_choice("dataset", FILTERS, interpolation=interpolation)
        check_choice("dataset", MASK_RULES, mask_resize=mask_resize)
        self.full = _pair(image_size, "image_size")
        self.size = self.full if center_crop is None else _pair(center_crop, "dataset.center_crop")
        if self.size[0] > self.full[0] or self.size[1] > self.full[1]:
            raise UserError(
                f"dataset.center_crop={list(self.size)} is larger than image_size={list(self.full)}"
            )
        self.policy = policy
        self.interpolation = interpolation
        self.mask_resize = mask_resize

    def __repr__(self) -> str:
        crop = "" if self.size == self.full else f", center_crop={list(self.size)}"
        masks = "" if self.mask_resize == "keep" else f", mask_resize={self.mask_resize}"
        return f"Resize({list(self.full)}, {self.policy}{crop}, {self.interpolation}{masks})"

    def image(self, image: Pixels) -> Pixels:
        """Resize an 8-bit image (H, W, 3) to (h, w, 3)."""
        height, width = self._inner(image.shape[:2])
        if image.shape[:2] != (height, width):
            picture = Image.fromarray(image)
            image = np.array(picture.resize((width, height), FILTERS[self.interpolation]))
        return self._cut(self._frame(image, np.uint8(0)))

    def mask(self, mask: Region) -> Region:
        """Resize a truth mask (H, W) to (h, w), by default without losing a small defect.

        With `keep` a pixel is true where at least half of the area it covers is true. A region is a
        set of pixels that touch by side or corner at the original size. If none of its pixels would
        remain, it keeps the pixel it covers best and all that it covers at least half as well.
        Only a centre crop can remove a region.
        """
        return self._cut(
            self._frame(_resize_mask(mask, self._inner(mask.shape), self.mask_resize), np.False_)
        )

    def restore(self, anomaly_map: npt.NDArray[np.floating], size: Sequence[int]) -> Map:
        """Resize a map (h, w) bilinearly to the original picture of `size` (H, W).

        Where a centre crop cut the picture away, the result has the map's smallest value.
        """
        lowest = anomaly_map.min()
        whole = np.full(self.full, lowest, dtype=np.float32)
        top, left = _margins(self.full, self.size)
        whole[top : top + self.size[0], left : left + self.size[1]] = anomaly_map
        height, width = self._inner(tuple(size))
        top, left = _margins(self.full, (height, width))
        inner = Image.fromarray(whole[top : top + height, left : left + width])
        return np.asarray(inner.resize((size[1], size[0]), Image.Resampling.BILINEAR))

    def _inner(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Size of the resized picture before padding."""
        if self.policy == "stretch":
            return self.full
        scale = min(self.full[0] / size[0], self.full[1] / size[1])
        height, width = (max(1, round(length * scale)) for length in size)
        return min(height, self.full[0]), min(width, self.full[1])

    def _frame(self, inner: npt.NDArray[T], value: T) -> npt.NDArray[T]:
        if inner.shape[:2] == self.full:
            return inner
        framed = np.full((*self.full, *inner.shape[2:]), value, dtype=inner.dtype)
        top, left = _margins(self.full, inner.shape)
        framed[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return framed

    def _cut(self, array: npt.NDArray[T]) -> npt.NDArray[T]:
        if self.size == self.full:
            return array
        top, left = _margins(self.full, self.size)
        return array[top : top + self.size[0], left : left + self.size[1]]


def as_rgb(picture: Image.Image) -> Pixels:
    """Convert a Pillow image as `read_image` converts its file.

    Raises:
        UserError: Its values have an unknown range.
    """
    picture = upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = _to_8_bits(np.asarray(picture), is_float=picture.mode == "F")
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("P", "PA", "La", "RGBa"):  # drops transparency after the colours are known
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _to_8_bits(values: npt.NDArray[np.generic], is_float: bool) -> Pixels:
    """Convert grey values (H, W) of 16 bits, 32 bits or floating point to 8 bits."""
    numbers = values.astype(np.float64)
    low, high = numbers.min(), numbers.max()
    if not (low >= 0 and high <= 65535):  # true for NaN as well
        raise UserError(
            f"grey values from {low:g} to {high:g}, expected 0 to 65535; convert the file to 8 bits"
        )
    if not is_float:
        scale = 1 / 257
    elif high <= 1:
        scale = 255.0
    else:
        scale = 1.0 if high <= 255 else 1 / 257
    return np.rint(numbers * scale).astype(np.uint8)


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    numbers = [value, value] if isinstance(value, int) else list(value)
    whole = all(isinstance(number, int) and number > 0 for number in numbers)
    if len(numbers) != 2 or not whole or max(numbers) > LARGEST:
        raise UserError(
            f"{name}={value}: give one positive whole number or [height, width], at most {LARGEST}"
        )
    return numbers[0], numbers[1]


def _margins(outer: Sequence[int], inner: Sequence[int]) -> tuple[int, int]:
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def _resize_mask(mask: Region, size: tuple[int, int], rule: str) -> Region:
    if mask.shape == size or not mask.any():
        return mask if mask.shape == size else np.zeros(size, dtype=bool)
    if rule == "nearest":
        picture = Image.fromarray(mask.astype(np.uint8))
        return np.array(picture.resize((size[1], size[0]), Image.Resampling.NEAREST)) > 0
    share = _coverage(mask, _edges(mask.shape[0], size[0]), _edges(mask.shape[1], size[1]))
    kept = share > 1e-9 if rule == "any" else share >= 0.5
    if rule != "keep":
        return kept
    regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    for number, box in enumerate(ndimage.find_objects(regions), start=1):
        _keep_region(kept, regions[box] == number, box, mask.shape)
    return kept


def _keep_region(
    kept: Region, region: Region, box: tuple[slice, slice], shape: tuple[int, ...]
) -> None:
    """Set the pixels that a region covers best if `kept` has none of its pixels."""
    cells, edges = [], []
    for axis in range(2):
        scale = kept.shape[axis] / shape[axis]
        first = int(box[axis].start * scale + 1e-9)
        last = int(np.ceil(box[axis].stop * scale - 1e-9))
        cells.append(slice(first, last))
        edges.append(_edges(shape[axis], kept.shape[axis])[first : last + 1] - box[axis].start)
    view = kept[cells[0], cells[1]]
    covered = _coverage(region, edges[0], edges[1])
    if not (view & (covered > 1e-6)).any():
        view |= covered >= covered.max() / 2


def _edges(length: int, cells: int) -> npt.NDArray[np.float64]:
    return np.linspace(0, length, cells + 1)


def _coverage(
    mask: Region, rows: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the exact share of each cell between edges that is true; outside the mask is false."""
    by_row = _integrate(mask.astype(np.float64), rows) / np.diff(rows)[:, None]
    by_cell = _integrate(by_row.T, columns) / np.diff(columns)[:, None]
    return by_cell.T + 1e-9  # a half stays a half whatever the rounding


def _integrate(
    values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Integrate the step function `values` (n, ...) along its first axis between edges."""
    edges = np.clip(edges, 0, len(values))
    whole = np.minimum(edges.astype(int), len(values) - 1)
    sums = np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])
    below = sums[whole] + (edges - whole)[:, None] * values[whole]
    return np.diff(below, axis=0)
