from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from anomaly_lit.drawing import heat, outline, panels


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((y - 0.6 * height) / (0.2 * height)) ** 2 + ((x - 0.4 * width) / (0.2 * width)) ** 2 < 1


def lightness(colours: np.ndarray) -> np.ndarray:
    return colours @ np.array([0.2126, 0.7152, 0.0722])


# --- heat maps


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=50),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_a_larger_anomaly_is_never_drawn_darker(values: list[float], low: float, span: float):
    ordered = np.sort(np.array([values], dtype=np.float32))
    shown = lightness(heat.colour_map(ordered, low, low + span)[0])
    assert (np.diff(shown) >= -0.7).all()  # the table holds whole numbers


def test_values_outside_the_scale_look_like_its_ends():
    colours = heat.colour_map(np.array([[-np.inf, -5.0, 0.0, 1.0, 7.0, np.inf]]), 0, 1)
    assert colours.dtype == np.uint8
    assert (colours[0, :3] == (0, 0, 3)).all()  # ends of matplotlib's inferno
    assert (colours[0, 3:] == (252, 254, 164)).all()


def test_the_middle_of_the_scale_is_the_middle_of_inferno():
    assert heat.colour_map(np.array([[0.5]]), 0, 1)[0, 0].tolist() == [187, 55, 84]


def test_one_value_has_one_colour_in_every_picture():
    first = heat.colour_map(np.array([[0.3, 0.9]]), 0, 1)
    second = heat.colour_map(np.array([[0.3, -50.0]]), 0, 1)
    assert (first[0, 0] == second[0, 0]).all()


@pytest.mark.parametrize("high", [2.0, 1.0])
def test_a_scale_without_extent_is_a_step_at_low(high: float):
    colours = heat.colour_map(np.array([[1.0, 2.0, 2.1]]), 2.0, high)
    assert colours[0].tolist() == [[0, 0, 3], [0, 0, 3], [252, 254, 164]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_is_grey_on_the_map_and_leaves_the_photograph_alone(dtype: type):
    image = photo(8, 8)
    anomaly_map = np.ones((8, 8), dtype=dtype)
    anomaly_map[2, 3] = np.nan
    given = anomaly_map.copy()
    assert (heat.colour_map(anomaly_map, 0, 1)[2, 3] == heat.UNDEFINED_COLOUR).all()
    assert (heat.overlay(image, anomaly_map, 0, 1)[2, 3] == image[2, 3]).all()
    np.testing.assert_array_equal(anomaly_map, given)


def test_an_undefined_scale_draws_everything_as_undefined():
    colours = heat.colour_map(np.ones((2, 2)), math.nan, math.nan)
    assert (colours == heat.UNDEFINED_COLOUR).all()


def test_overlay_keeps_normal_areas_and_covers_anomalous_ones_more_and_more():
    image = np.full((1, 101, 3), 120, dtype=np.uint8)
    anomaly_map = np.linspace(0, 1, 101)[None]
    blended = heat.overlay(image, anomaly_map, 0, 1)
    assert (blended[0, 0] == 120).all()
    change = np.abs(blended[0, :11].astype(int) - 120).max()
    assert change <= 6  # the lowest tenth of the scale is as good as untouched
    hottest = heat.colour_map(anomaly_map, 0, 1)[0, -1].astype(int)
    assert np.abs(blended[0, -1] - hottest).max() < 30
    assert (image == 120).all()


def test_overlay_outlines_the_region_it_is_given():
    image, region = np.zeros((64, 48, 3), dtype=np.uint8), disc(64, 48)
    drawn = heat.overlay(image, np.zeros((64, 48)), 0, 1, region)
    line = (drawn == outline.PREDICTION_COLOUR).all(axis=2)
    assert line.any()
    assert not drawn[ndimage.binary_erosion(region)].any()


# --- outlines


@pytest.mark.parametrize("width", [1, 2, 5])
def test_outline_touches_the_boundary_all_around_and_hides_nothing_of_the_mask(width: int):
    image, mask = photo(60, 80), disc(60, 80)
    drawn = outline.draw_outline(image, mask, (255, 0, 255), width)
    line = (drawn == (255, 0, 255)).all(axis=2)
    neighbours = ndimage.binary_dilation(mask) & ~mask
    assert line[neighbours].all()
    assert (drawn[mask] == image[mask]).all()
    reach = ndimage.distance_transform_edt(~mask)
    assert width - 0.5 <= reach[line].max() <= width * math.sqrt(2)
    assert (drawn[reach > 2 * width + 2] == image[reach > 2 * width + 2]).all()


@pytest.mark.parametrize("shade", [0, 60, 128, 200, 255])
@pytest.mark.parametrize("colour", [outline.TRUTH_COLOUR, (200, 30, 30), (20, 20, 60)])
def test_outline_stands_out_on_any_shade(shade: int, colour: outline.Colour):
    image = np.full((40, 40, 3), shade, dtype=np.uint8)
    drawn = outline.draw_outline(image, disc(40, 40), colour)
    contrast = np.abs(lightness(drawn) - shade).max()
    assert contrast > 90


def test_outline_of_a_mask_that_fills_the_picture_runs_inside():
    drawn = outline.draw_outline(np.zeros((20, 30, 3), dtype=np.uint8), np.ones((20, 30), bool))
    line = (drawn == outline.TRUTH_COLOUR).all(axis=2)
    assert line[0].all()
    assert line[:, -1].all()
    assert not line[5:-5, 5:-5].any()


def test_outline_of_nothing_changes_nothing():
    image = photo(10, 10)
    assert (outline.draw_outline(image, np.zeros((10, 10), bool)) == image).all()


def test_outline_grows_with_the_picture():
    def area(side: int) -> int:
        mask = np.zeros((side, side), bool)
        mask[side // 2 :] = True  # a straight boundary: the line's rows are its width
        drawn = outline.draw_outline(np.zeros((side, side, 3), np.uint8), mask)
        return int((drawn[: side // 2, side // 2] == outline.TRUTH_COLOUR).all(axis=1).sum())

    assert [area(side) for side in (32, 256, 1024, 4000)] == [1, 2, 3, 5]


# --- panels


@pytest.mark.parametrize(
    "size", [(1, 1), (32, 32), (33, 57), (256, 256), (640, 256), (256, 640), (37, 1900), (2100, 41)]
)
@pytest.mark.parametrize("known", [True, False])
def test_panel_shows_any_size_with_tiles_up_to_512(size: tuple[int, int], known: bool):
    truth = disc(*size) if known else None
    shown = panels.panel(
        photo(*size), np.zeros(size), truth, 0, 1, "category / type  score 0.5", disc(*size)
    )
    assert shown.mode == "RGB"
    assert shown.height <= 512 + 90
    assert shown.width <= 4 * (512 + 20) + 20
    tile = max(panels._tile_size(size))
    assert 192 <= tile <= 512


def test_panel_says_that_no_truth_is_known():
    arguments = (photo(64, 64), np.zeros((64, 64)))
    none = np.array(panels.panel(*arguments, None, 0, 1, ""))
    good = np.array(panels.panel(*arguments, np.zeros((64, 64), bool), 0, 1, ""))
    assert (none == 236).all(axis=2).sum() > 20_000  # a plain tile
    assert not (good == 236).all(axis=2).sum() > 1_000


@pytest.mark.parametrize("size", [(32, 32), (640, 256), (1500, 2000)])
def test_panel_without_a_map_shows_the_image_and_the_whole_caption(size: tuple[int, int]):
    image, caption = photo(*size), "bolt / scratch: score 0.7981, threshold 0.3102: defect"
    alone = panels.panel(image, None, None, 0, 1, caption)
    with_truth = panels.panel(image, None, disc(*size), 0, 1, caption)
    assert np.array_equal(np.array(alone), np.array(with_truth))
    shown, tile = np.array(alone), panels._fit_image(image, panels._tile_size(size))
    height, width = tile.shape[:2]
    corners = [(y, x) for y in range(60) for x in range(10)]
    y, x = next(
        (y, x) for y, x in corners if np.array_equal(shown[y : y + height, x : x + width], tile)
    )
    assert (shown[y : y + height, x + width :] == 255).all()  # no second tile
    assert panels._fit_text(caption, alone.width - 2 * x, 14)[0] == caption


def test_panel_of_a_large_picture_keeps_a_peak_and_a_thin_defect():
    size = (1500, 2000)
    anomaly_map, truth = np.zeros(size, dtype=np.float32), np.zeros(size, bool)
    anomaly_map[700, 900] = 1
    truth[100, 300] = True
    shown = np.array(panels.panel(np.zeros((*size, 3), np.uint8), anomaly_map, truth, 0, 1, "peak"))
    tiles = shown[45:-60]  # without the headings, whose scale holds every colour
    assert (tiles == (252, 254, 164)).all(axis=2).sum() == 1
    assert (tiles == outline.TRUTH_COLOUR).all(axis=2).any()


def test_shrunk_map_passes_over_nan_where_a_number_is_known():
    values = np.array([[np.nan, 2.0, np.nan, np.nan]] * 4)
    assert panels._fit_values(values, (2, 2))[:, 0].tolist() == [2.0, 2.0]
    assert np.isnan(panels._fit_values(values, (2, 2))[:, 1]).all()


def test_caption_never_leaves_the_panel():
    for caption in ("x" * 500, "word " * 90, "line\nbreak", "", "Zahnbürste / Fehler"):
        text, font = panels._fit_text(caption, 400, 14)
        assert font.getlength(text) <= 400
        assert "\n" not in text


def test_caption_becomes_smaller_before_it_is_cut():
    caption = "toothbrush / defective  score 0.798  threshold 0.310  anomalous"
    text, font = panels._fit_text(caption, 420, 18)
    assert text == caption
    assert font.size < 18


@pytest.mark.parametrize(
    ("image", "anomaly_map", "truth"),
    [
        (photo(8, 8)[..., 0], np.zeros((8, 8)), None),
        (photo(8, 8).astype(np.float32), np.zeros((8, 8)), None),
        (photo(8, 8), np.zeros((8, 9)), None),
        (photo(8, 8), np.zeros((1, 8, 8)), None),
        (photo(8, 8), np.zeros((8, 8)), np.zeros((9, 8), bool)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(image: Any, anomaly_map: Any, truth: Any):
    with pytest.raises(ValueError, match="8"):
        panels.panel(image, anomaly_map, truth, 0, 1, "")


def test_contact_sheet_holds_every_picture_untouched():
    sizes = [(30, 20), (10, 50), (25, 25), (40, 5), (8, 8)]
    parts = [Image.fromarray(photo(*size, seed=i)) for i, size in enumerate(sizes)]
    sheet = np.array(panels.contact_sheet(parts, columns=2))
    for part in parts:
        wanted = np.array(part)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, wanted.shape)
        assert (windows == wanted).all(axis=(3, 4, 5)).any()


@pytest.mark.parametrize(("count", "columns"), [(0, 2), (3, 0)])
def test_contact_sheet_of_nothing_is_refused(count: int, columns: int):
    with pytest.raises(ValueError, match="contact sheet"):
        panels.contact_sheet([Image.new("RGB", (4, 4))] * count, columns)
