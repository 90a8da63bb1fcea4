from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from anomaly_lit.data.images import Header, Resize, read_header, read_image
from anomaly_lit.data.truth import read_mask
from anomaly_lit.types import UserError

COLOUR = (204, 102, 51)  # in the web palette
GREY = 120


def saved(tmp_path: Path, picture: Image.Image, name: str = "a.png", **options: object) -> Path:
    path = tmp_path / name
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_colour_pictures_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (6, 4), COLOUR)
    name = {"CMYK": "a.tif", "YCbCr": "a.tif"}.get(mode, "a.png")
    image = read_image(saved(tmp_path, picture.convert(mode), name))
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - COLOUR).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_pictures_become_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), GREY * 257, dtype=np.uint16))
    else:
        picture = Image.new("L", (6, 4), GREY).convert(mode, dither=Image.Dither.NONE)
    expected = 0 if mode == "1" else GREY
    assert (read_image(saved(tmp_path, picture)) == expected).all()
    assert read_image(tmp_path / "a.png").shape == (4, 6, 3)


def test_bilevel_white_is_255(tmp_path: Path) -> None:
    assert (read_image(saved(tmp_path, Image.new("1", (4, 4), 1))) == 255).all()


@pytest.mark.parametrize(("scale", "name"), [(1 / 255, "unit"), (1.0, "bytes"), (257.0, "words")])
def test_floating_point_pictures_are_scaled_by_their_range(
    tmp_path: Path, scale: float, name: str
) -> None:
    values = np.array([[0, 51], [102, 255]], dtype=np.float32)
    image = read_image(saved(tmp_path, Image.fromarray(values * scale), f"{name}.tif"))
    np.testing.assert_array_equal(image[..., 0], values.astype(np.uint8))


def test_grey_values_out_of_range_are_refused_with_the_path(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((4, 4), -1, dtype=np.float32)), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: .*-1"):
        read_image(path)


def test_palette_transparency_is_dropped(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), COLOUR).convert("P")
    image = read_image(saved(tmp_path, picture, transparency=picture.getpixel((0, 0))))
    assert np.abs(image.astype(int) - COLOUR).max() <= 2


def test_alpha_is_dropped_and_not_blended(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path, Image.new("RGBA", (4, 4), (*COLOUR, 0))))
    assert (image == COLOUR).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation_is_applied_to_pixels_and_header(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.new("RGB", (6, 4), COLOUR), name, exif=exif)
    assert read_image(path).shape == (6, 4, 3)
    assert read_header(path) == Header((6, 4), "RGB", 6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_header_is_read_without_the_pixels(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[:2000])
    assert read_header(path) == Header((64, 48), "RGB", 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_truncated_pictures_are_refused_with_the_path(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=rf"cut\.{suffix}: .*damaged"):
        read_image(path)


def test_text_with_a_pictures_name_is_refused_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture")
    for read in (read_image, read_mask, read_header):
        with pytest.raises(UserError, match=r"note\.png: not an image"):
            read(tmp_path / "note.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode_are_true_above_zero(tmp_path: Path, mode: str) -> None:
    truth = np.zeros((4, 6), dtype=bool)
    truth[1, 2] = True
    if mode == "I;16":
        picture = Image.fromarray(truth.astype(np.uint16))
    elif mode == "P":
        picture = Image.fromarray(truth.astype(np.uint8))
        picture.putpalette([0, 0, 0, 0, 0, 0])  # the index counts, not its colour
    else:
        picture = Image.fromarray(truth.astype(np.uint8) * 255).convert(mode)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, picture)), truth)


def test_stretch_fills_and_pad_keeps_proportions() -> None:
    image = np.full((100, 50, 3), 200, dtype=np.uint8)
    assert (Resize(64).image(image) == 200).all()
    padded = Resize(64, "pad").image(image)
    assert padded.shape == (64, 64, 3)
    assert (padded[:, 16:48] == 200).all()
    assert not padded[:, :16].any()
    assert not padded[:, 48:].any()


def test_resize_to_height_and_width() -> None:
    resize = Resize([32, 64], center_crop=[16, 48])
    assert resize.size == (16, 48)
    assert resize.image(np.zeros((50, 50, 3), dtype=np.uint8)).shape == (16, 48, 3)
    assert resize.mask(np.ones((50, 50), dtype=bool)).shape == (16, 48)


def test_image_at_its_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Resize(32).image(image), image)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": [1, 2, 3]}, "image_size"),
        ({"image_size": 32, "policy": "fit"}, "dataset.resize=fit"),
        ({"image_size": 32, "interpolation": "cubic"}, "dataset.interpolation=cubic"),
        ({"image_size": 32, "center_crop": 48}, "center_crop"),
    ],
)
def test_wrong_geometry_names_the_setting(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(UserError, match=name.replace("[", r"\[")):
        Resize(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (30, 200)])
def test_restored_map_peaks_where_the_defect_was(policy: str, size: tuple[int, int]) -> None:
    resize = Resize(64, policy)
    mask = np.zeros(size, dtype=bool)
    mask[10:20, 35:45] = True
    restored = resize.restore(resize.mask(mask).astype(np.float32), size)
    assert restored.shape == size
    assert restored.dtype == np.float32
    found = ndimage.center_of_mass(restored)
    assert np.abs(np.subtract(found, (14.5, 39.5))).max() < 2


def test_restored_map_is_lowest_where_the_crop_had_cut() -> None:
    resize = Resize(64, center_crop=32)
    restored = resize.restore(np.linspace(1, 2, 32 * 32).reshape(32, 32), (128, 128))
    assert restored.min() == restored[0, 0] == 1
    assert restored[:28].max() == 1
    assert restored.max() == pytest.approx(2, abs=0.05)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """A few rectangles, from single pixels to large, some of them touching."""
    height, width = draw(st.integers(16, 90)), draw(st.integers(16, 90))
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(draw(st.integers(1, 5))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        rows, columns = draw(st.integers(1, height)), draw(st.integers(1, 6))
        mask[top : top + rows, left : left + columns] = True
    return mask


@settings(max_examples=80, deadline=None)
@given(mask=masks(), size=st.integers(4, 64), policy=st.sampled_from(["stretch", "pad"]))
def test_no_region_vanishes_when_a_mask_is_resized(
    mask: np.ndarray, size: int, policy: str
) -> None:
    small = Resize(size, policy).mask(mask)
    inner = (size, size)
    if policy == "pad":
        scale = size / max(mask.shape)
        inner = tuple(max(1, round(length * scale)) for length in mask.shape)
        margins = [(size - length) // 2 for length in inner]
        small = small[margins[0] : margins[0] + inner[0], margins[1] : margins[1] + inner[1]]
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    for number in range(1, count + 1):
        rows, columns = np.nonzero(regions == number)
        cells = [  # the cells that a pixel of the region lies in, wholly or in part
            (y, x)
            for row, column in zip(rows, columns, strict=True)
            for y in touched(row, mask.shape[0], inner[0])
            for x in touched(column, mask.shape[1], inner[1])
        ]
        assert any(small[cell] for cell in cells)


def touched(pixel: int, length: int, cells: int) -> range:
    return range(pixel * cells // length, -(-(pixel + 1) * cells // length))


def test_resizing_a_mask_keeps_the_area_of_a_blob() -> None:
    rows, columns = np.mgrid[:200, :300]
    disc = (rows - 90) ** 2 + (columns - 140) ** 2 < 60**2
    for size in (32, 64, 256):
        assert Resize(size).mask(disc).mean() == pytest.approx(disc.mean(), rel=0.03)


def test_a_thin_scratch_stays_a_line_of_one_pixel() -> None:
    mask = np.zeros((256, 256), dtype=bool)
    mask[101, 20:220] = True
    small = Resize(64).mask(mask)
    assert ndimage.label(small, structure=np.ones((3, 3)))[1] == 1
    assert small.sum() == 50
    assert small.any(axis=1).sum() == 1


def test_an_empty_mask_stays_empty_and_a_full_one_full() -> None:
    assert not Resize(32).mask(np.zeros((100, 70), dtype=bool)).any()
    assert Resize(32).mask(np.ones((100, 70), dtype=bool)).all()


def test_reading_needs_no_open_file_afterwards(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 4)))
    read_image(path), read_mask(path), read_header(path)
    path.unlink()  # fails on Windows where a file is still open
    assert not path.exists()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("keep", [[1, 0], [0, 1]]),  # the small region keeps its pixel
        ("area", [[1, 0], [0, 0]]),
        ("any", [[1, 1], [0, 1]]),
        ("nearest", [[1, 0], [0, 0]]),
    ],
)
def test_rules_for_resized_masks(rule: str, expected: list[list[int]]) -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4, :5] = True
    mask[7, 7] = True
    resize = Resize(2, mask_resize=rule)
    assert resize.mask(mask).tolist() == [[bool(v) for v in row] for row in expected]
    assert ("mask_resize" in repr(resize)) == (rule != "keep")


def test_an_unknown_rule_for_masks_is_named() -> None:
    with pytest.raises(UserError, match=r"dataset\.mask_resize=half: choose keep, nearest"):
        Resize(2, mask_resize="half")
