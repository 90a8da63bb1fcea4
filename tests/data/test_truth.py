"""What in a mask counts as marked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from anomaly_lit.data.truth import look_at_mask, read_mask

SIZE = (120, 160)


def blob() -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Two marks that cover 9.8 % of the picture."""
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    return ((rows - 45) ** 2 + (columns - 60) ** 2 < 22**2) | (
        (rows - 95) ** 2 + (columns - 130) ** 2 < 10.7**2
    )


TRUTH = blob()


def saved(tmp_path: Path, picture: Image.Image, name: str = "mask.png", **options: Any) -> Path:
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def grey(marked: int = 255, other: int = 0) -> Image.Image:
    return Image.fromarray(np.where(TRUTH, marked, other).astype(np.uint8))


def with_palette(indices: np.ndarray[Any, Any], *colours: tuple[int, int, int]) -> Image.Image:
    picture = Image.fromarray(indices.astype(np.uint8))
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def with_alpha(colour: Any, alpha: Any) -> Image.Image:
    pixels = np.zeros((*SIZE, 4), np.uint8)
    pixels[..., :3] = np.asarray(colour)[..., None]
    pixels[..., 3] = alpha
    return Image.fromarray(pixels)


WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def test_the_marks_cover_what_the_examples_say() -> None:
    assert abs(TRUTH.mean() - 0.098) < 0.001


@pytest.mark.parametrize(
    "picture",
    [
        grey(),
        grey(1),
        grey(7),
        grey().convert("1"),
        Image.fromarray(TRUTH.astype(np.uint16) * 65535),
        Image.fromarray(TRUTH.astype(np.uint16)),
        grey().convert("RGB"),
        Image.fromarray(np.where(TRUTH[..., None], RED, BLACK).astype(np.uint8)),
        with_palette(TRUTH, BLACK, WHITE),
        with_palette(TRUTH, BLACK, (1, 0, 0)),
        with_palette(~TRUTH, WHITE, BLACK),
        with_palette(~TRUTH, RED, BLACK),
        with_palette(TRUTH, BLACK, BLACK),
        with_alpha(255 * TRUTH, 255),
        with_alpha(255, 255 * TRUTH),
        with_alpha(255 * ~TRUTH, 255 * TRUTH),
        with_alpha(0, 255 * TRUTH),
        with_alpha(255, 255 * TRUTH).convert("LA"),
        with_alpha(255, 255 * TRUTH).convert("RGBa").convert("RGBA"),
    ],
    ids=[
        "0 and 255", "0 and 1", "0 and 7", "bilevel", "16 bits", "16 bits, 0 and 1", "RGB", "red",
        "palette", "dark palette", "white is index 0", "red is index 0", "all colours are black",
        "opaque", "white under alpha 0", "black marks on transparent white",
        "black marks on transparent black", "grey with alpha", "premultiplied",
    ],
)  # fmt: skip
def test_lossless_masks_are_read_to_the_pixel(tmp_path: Path, picture: Image.Image) -> None:
    np.testing.assert_array_equal(read_mask(saved(tmp_path, picture)), TRUTH)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_black_is_not_marked_in_other_colour_spaces(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path, grey().convert("RGB").convert(mode), "mask.tif")
    np.testing.assert_array_equal(read_mask(path), TRUTH)


@pytest.mark.parametrize("transparent", [0, b"\x00\xff"], ids=["one index", "a table"])
def test_a_transparent_colour_of_a_palette_is_not_marked(tmp_path: Path, transparent: Any) -> None:
    picture = with_palette(TRUTH, WHITE, WHITE)
    path = saved(tmp_path, picture, transparency=transparent)
    np.testing.assert_array_equal(read_mask(path), TRUTH)


def test_class_indices_all_count(tmp_path: Path) -> None:
    classes = TRUTH.astype(np.uint8)
    classes[:60] *= 3
    for number, picture in enumerate(
        [Image.fromarray(classes), with_palette(classes, BLACK, RED, WHITE, (0, 0, 9))]
    ):
        path = saved(tmp_path, picture, f"{number}.png")
        np.testing.assert_array_equal(read_mask(path), TRUTH)
        assert "values" in look_at_mask(path).doubts()


LOSSY = [("mask.jpg", {"quality": quality, "subsampling": 2}) for quality in (40, 75, 90, 100)] + [
    ("mask.webp", {"quality": 60}),
    ("mask.jp2", {"irreversible": True, "quality_layers": [30]}),
    ("mask.tif", {"compression": "jpeg", "quality": 60}),
]
if features.check("avif"):
    LOSSY.append(("mask.avif", {"quality": 50}))


@pytest.mark.parametrize(("name", "options"), LOSSY)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossy_masks_keep_their_area_and_say_so(
    tmp_path: Path, name: str, options: dict[str, Any], mode: str
) -> None:
    path = saved(tmp_path, grey().convert(mode), name, **options)
    with Image.open(path) as file:
        gained = float((np.asarray(file.convert("L")) > 0).mean() / TRUTH.mean())
    mask = look_at_mask(path)
    assert abs(mask.region.mean() / TRUTH.mean() - 1) < 0.03
    assert (mask.region ^ TRUTH).mean() < 0.05 * TRUTH.mean()
    assert gained == 1 or "lossy" in mask.doubts()


def test_red_marks_in_a_jpeg_keep_their_area(tmp_path: Path) -> None:
    picture = Image.fromarray(np.where(TRUTH[..., None], RED, BLACK).astype(np.uint8))
    region = read_mask(saved(tmp_path, picture, "mask.jpg", quality=75))
    assert abs(region.mean() / TRUTH.mean() - 1) < 0.05


def test_a_black_jpeg_marks_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("L", (64, 64)), "mask.jpg")
    assert not read_mask(path).any()


def test_a_lossless_webp_is_read_to_the_pixel(tmp_path: Path) -> None:
    classes = TRUTH.astype(np.uint8)
    classes[:60] *= 5
    picture = Image.fromarray(classes).convert("RGB")
    path = saved(tmp_path, picture, "mask.webp", lossless=True)
    np.testing.assert_array_equal(read_mask(path), TRUTH)


def test_masks_are_questioned_in_words(tmp_path: Path) -> None:
    doubts = look_at_mask(saved(tmp_path, grey(0, 255))).doubts()  # black on white
    assert doubts == {"most": "90% of the image is marked"}
    assert look_at_mask(saved(tmp_path, grey())).doubts() == {}
    assert [*look_at_mask(saved(tmp_path, grey(0))).doubts()] == ["empty"]
    ramp = np.tile(np.arange(256, dtype=np.uint8), (40, 1))
    assert [*look_at_mask(saved(tmp_path, Image.fromarray(ramp))).doubts()] == ["most", "soft"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_palette_shows_what_its_colours_show(data: st.DataObject) -> None:
    colour = st.tuples(*[st.integers(0, 255)] * 3)
    colours = data.draw(st.lists(colour, min_size=2, max_size=6, unique=True))
    indices = data.draw(
        st.lists(st.integers(0, len(colours) - 1), min_size=12, max_size=12).map(np.array)
    ).reshape(3, 4)
    file = io.BytesIO()
    with_palette(indices, *colours).save(file, "PNG")
    expected = np.array(colours)[indices].max(axis=2) > 0
    np.testing.assert_array_equal(look_at_mask(file).region, expected)  # type: ignore[arg-type]
