from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from anomaly_lit.drawing import pictures
from anomaly_lit.types import UserError

# fmt: off
MVTEC = [
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut",
    "pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
]
# fmt: on


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
    shown = lightness(pictures.colour_map(ordered, low, low + span)[0])
    assert (np.diff(shown) >= -0.7).all()  # the table holds whole numbers


def test_values_outside_the_scale_look_like_its_ends():
    colours = pictures.colour_map(np.array([[-np.inf, -5.0, 0.0, 1.0, 7.0, np.inf]]), 0, 1)
    assert colours.dtype == np.uint8
    assert (colours[0, :3] == (0, 0, 3)).all()  # ends of matplotlib's inferno
    assert (colours[0, 3:] == (252, 254, 164)).all()


def test_the_middle_of_the_scale_is_the_middle_of_inferno():
    assert pictures.colour_map(np.array([[0.5]]), 0, 1)[0, 0].tolist() == [187, 55, 84]


def test_one_value_has_one_colour_in_every_picture():
    first = pictures.colour_map(np.array([[0.3, 0.9]]), 0, 1)
    second = pictures.colour_map(np.array([[0.3, -50.0]]), 0, 1)
    assert (first[0, 0] == second[0, 0]).all()


@pytest.mark.parametrize("high", [2.0, 1.0])
def test_a_scale_without_extent_is_a_step_at_low(high: float):
    colours = pictures.colour_map(np.array([[1.0, 2.0, 2.1]]), 2.0, high)
    assert colours[0].tolist() == [[0, 0, 3], [0, 0, 3], [252, 254, 164]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_is_grey_on_the_map_and_leaves_the_photograph_alone(dtype: type):
    image = photo(8, 8)
    anomaly_map = np.ones((8, 8), dtype=dtype)
    anomaly_map[2, 3] = np.nan
    given = anomaly_map.copy()
    assert (pictures.colour_map(anomaly_map, 0, 1)[2, 3] == pictures.UNDEFINED_COLOUR).all()
    assert (pictures.overlay(image, anomaly_map, 0, 1)[2, 3] == image[2, 3]).all()
    np.testing.assert_array_equal(anomaly_map, given)


def test_an_undefined_scale_draws_everything_as_undefined():
    colours = pictures.colour_map(np.ones((2, 2)), math.nan, math.nan)
    assert (colours == pictures.UNDEFINED_COLOUR).all()


def test_overlay_keeps_normal_areas_and_covers_anomalous_ones_more_and_more():
    image = np.full((1, 101, 3), 120, dtype=np.uint8)
    anomaly_map = np.linspace(0, 1, 101)[None]
    blended = pictures.overlay(image, anomaly_map, 0, 1)
    assert (blended[0, 0] == 120).all()
    change = np.abs(blended[0, :11].astype(int) - 120).max()
    assert change <= 6  # the lowest tenth of the scale is as good as untouched
    heat = pictures.colour_map(anomaly_map, 0, 1)[0, -1].astype(int)
    assert np.abs(blended[0, -1] - heat).max() < 30
    assert (image == 120).all()


def test_overlay_outlines_the_region_it_is_given():
    image, region = np.zeros((64, 48, 3), dtype=np.uint8), disc(64, 48)
    drawn = pictures.overlay(image, np.zeros((64, 48)), 0, 1, region)
    line = (drawn == pictures.PREDICTION_COLOUR).all(axis=2)
    assert line.any()
    assert not drawn[ndimage.binary_erosion(region)].any()


# --- outlines


@pytest.mark.parametrize("width", [1, 2, 5])
def test_outline_touches_the_boundary_all_around_and_hides_nothing_of_the_mask(width: int):
    image, mask = photo(60, 80), disc(60, 80)
    drawn = pictures.draw_outline(image, mask, (255, 0, 255), width)
    line = (drawn == (255, 0, 255)).all(axis=2)
    neighbours = ndimage.binary_dilation(mask) & ~mask
    assert line[neighbours].all()
    assert (drawn[mask] == image[mask]).all()
    reach = ndimage.distance_transform_edt(~mask)
    assert width - 0.5 <= reach[line].max() <= width * math.sqrt(2)
    assert (drawn[reach > 2 * width + 2] == image[reach > 2 * width + 2]).all()


@pytest.mark.parametrize("shade", [0, 60, 128, 200, 255])
@pytest.mark.parametrize("colour", [pictures.TRUTH_COLOUR, (200, 30, 30), (20, 20, 60)])
def test_outline_stands_out_on_any_shade(shade: int, colour: pictures.Colour):
    image = np.full((40, 40, 3), shade, dtype=np.uint8)
    drawn = pictures.draw_outline(image, disc(40, 40), colour)
    contrast = np.abs(lightness(drawn) - shade).max()
    assert contrast > 90


def test_outline_of_a_mask_that_fills_the_picture_runs_inside():
    drawn = pictures.draw_outline(np.zeros((20, 30, 3), dtype=np.uint8), np.ones((20, 30), bool))
    line = (drawn == pictures.TRUTH_COLOUR).all(axis=2)
    assert line[0].all()
    assert line[:, -1].all()
    assert not line[5:-5, 5:-5].any()


def test_outline_of_nothing_changes_nothing():
    image = photo(10, 10)
    assert (pictures.draw_outline(image, np.zeros((10, 10), bool)) == image).all()


def test_outline_grows_with_the_picture():
    def area(side: int) -> int:
        mask = np.zeros((side, side), bool)
        mask[side // 2 :] = True  # a straight boundary: the line's rows are its width
        drawn = pictures.draw_outline(np.zeros((side, side, 3), np.uint8), mask)
        return int((drawn[: side // 2, side // 2] == pictures.TRUTH_COLOUR).all(axis=1).sum())

    assert [area(side) for side in (32, 256, 1024, 4000)] == [1, 2, 3, 5]


# --- panels


@pytest.mark.parametrize(
    "size", [(1, 1), (32, 32), (33, 57), (256, 256), (640, 256), (256, 640), (37, 1900), (2100, 41)]
)
@pytest.mark.parametrize("known", [True, False])
def test_panel_shows_any_size_with_tiles_up_to_512(size: tuple[int, int], known: bool):
    truth = disc(*size) if known else None
    shown = pictures.panel(
        photo(*size), np.zeros(size), truth, 0, 1, "category / type  score 0.5", disc(*size)
    )
    assert shown.mode == "RGB"
    assert shown.height <= 512 + 90
    assert shown.width <= 4 * (512 + 20) + 20
    tile = max(pictures._tile_size(size))
    assert 192 <= tile <= 512


def test_panel_says_that_no_truth_is_known():
    arguments = (photo(64, 64), np.zeros((64, 64)))
    none = np.array(pictures.panel(*arguments, None, 0, 1, ""))
    good = np.array(pictures.panel(*arguments, np.zeros((64, 64), bool), 0, 1, ""))
    assert (none == 236).all(axis=2).sum() > 20_000  # a plain tile
    assert not (good == 236).all(axis=2).sum() > 1_000


def test_panel_of_a_large_picture_keeps_a_peak_and_a_thin_defect():
    size = (1500, 2000)
    anomaly_map, truth = np.zeros(size, dtype=np.float32), np.zeros(size, bool)
    anomaly_map[700, 900] = 1
    truth[100, 300] = True
    shown = np.array(
        pictures.panel(np.zeros((*size, 3), np.uint8), anomaly_map, truth, 0, 1, "peak")
    )
    tiles = shown[45:-60]  # without the headings, whose scale holds every colour
    assert (tiles == (252, 254, 164)).all(axis=2).sum() == 1
    assert (tiles == pictures.TRUTH_COLOUR).all(axis=2).any()


def test_shrunk_map_passes_over_nan_where_a_number_is_known():
    values = np.array([[np.nan, 2.0, np.nan, np.nan]] * 4)
    assert pictures._fit_values(values, (2, 2))[:, 0].tolist() == [2.0, 2.0]
    assert np.isnan(pictures._fit_values(values, (2, 2))[:, 1]).all()


def test_caption_never_leaves_the_panel():
    for caption in ("x" * 500, "word " * 90, "line\nbreak", "", "Zahnbürste / Fehler"):
        text, font = pictures._fit_text(caption, 400, 14)
        assert font.getlength(text) <= 400
        assert "\n" not in text


def test_caption_becomes_smaller_before_it_is_cut():
    caption = "toothbrush / defective  score 0.798  threshold 0.310  anomalous"
    text, font = pictures._fit_text(caption, 420, 18)
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
        pictures.panel(image, anomaly_map, truth, 0, 1, "")


def test_contact_sheet_holds_every_picture_untouched():
    sizes = [(30, 20), (10, 50), (25, 25), (40, 5), (8, 8)]
    panels = [Image.fromarray(photo(*size, seed=i)) for i, size in enumerate(sizes)]
    sheet = np.array(pictures.contact_sheet(panels, columns=2))
    for part in panels:
        wanted = np.array(part)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, wanted.shape)
        assert (windows == wanted).all(axis=(3, 4, 5)).any()


@pytest.mark.parametrize(("count", "columns"), [(0, 2), (3, 0)])
def test_contact_sheet_of_nothing_is_refused(count: int, columns: int):
    with pytest.raises(ValueError, match="contact sheet"):
        pictures.contact_sheet([Image.new("RGB", (4, 4))] * count, columns)


# --- files


def test_saved_picture_is_whole_and_alone(tmp_path: Path):
    image = photo(12, 9)
    path = tmp_path / "new" / "deep" / "a.png"
    pictures.save_image(np.zeros((3, 3, 3), np.uint8), path)
    pictures.save_image(image, path)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert (np.array(Image.open(path)) == image).all()


def test_interrupted_write_leaves_the_old_picture_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.png"
    pictures.save_image(photo(4, 4), path)
    before = path.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        pictures.save_image(photo(5, 5), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_unwritable_place_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "a.png"
    with pytest.raises(UserError, match=r"file.a\.png.*choose an output folder"):
        pictures.save_image(photo(4, 4), path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png"):
        pictures.save_image(photo(4, 4), tmp_path / "folder.png")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_name_of_another_format_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a\.jpg end in \.png"):
        pictures.save_image(photo(4, 4), tmp_path / "a.jpg")


# --- curves


def curve(seed: int, threshold: float | None = 1.0, overlap: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    scores = np.r_[rng.normal(0, 1, 30), rng.normal(2, 1, 40)]
    labels = np.arange(70) >= 30
    order = np.argsort(-scores)
    hits = np.r_[0, np.cumsum(labels[order])]
    misses = np.r_[0, np.cumsum(~labels[order])]
    fpr = np.linspace(0, 1, 50)
    return {
        "roc": (misses / 30, hits / 40),
        "pr": (hits[1:] / 40, hits[1:] / (hits + misses)[1:]),
        "pro": (fpr, fpr**0.2) if overlap else None,
        "scores": scores,
        "labels": labels,
        "threshold": threshold,
        "values": {
            "image_auroc": 0.9,
            "image_ap": 0.8,
            "pixel_aupro": 0.7 if overlap else math.nan,
        },
    }


def nothing() -> dict[str, Any]:
    undefined = np.array([math.nan])
    return {
        "roc": (undefined, undefined),
        "pr": None,
        "pro": None,
        "scores": undefined,
        "labels": np.array([False]),
        "threshold": None,
        "values": dict.fromkeys(("image_auroc", "image_ap", "pixel_aupro"), math.nan),
    }


def render(curves: dict[str, Any], title: str = "Title") -> Figure:
    figure = pictures._curves_figure(curves, title)
    FigureCanvasAgg(figure).draw()
    return figure


def words(figure: Figure) -> list[str]:
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    return inside + [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("names", [MVTEC, [f"category {i} " + "long " * 8 for i in range(40)]])
def test_table_of_many_categories_overlaps_neither_axes_nor_itself(names: list[str]):
    figure = render({name: curve(i) for i, name in enumerate(names)})
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text.get_window_extent(renderer) for text in figure.texts]
    drawn = texts + [line.get_window_extent(renderer) for line in figure.lines]
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert box is not None
        assert not any(box.overlaps(other) for other in drawn)
    for i, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in texts[i + 1 :])
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def test_lines_of_fifteen_categories_all_look_different():
    entries = pictures._entries({name: curve(i) for i, name in enumerate(MVTEC)})
    assert len({(entry.colour, entry.dashes) for entry in entries}) == 16


def test_table_shows_the_values_and_their_mean_over_what_is_defined():
    figure = render({"a": curve(0), "b": curve(1, overlap=False)})
    found = words(figure)
    assert found.count("0.900") == 3
    assert found.count("0.700") == 2  # of one category, and so of the mean
    assert found.count("undefined") == 1
    assert "mean: over the categories where it is defined" in found


def test_a_single_category_has_one_bold_line_and_no_mean():
    figure = render({"a": curve(0)})
    assert "mean" not in words(figure)
    bold = [line for line in figure.axes[1].lines if line.get_linewidth() > 2]
    assert len(bold) == 1


@pytest.mark.parametrize("curves", [{}, {"a": nothing()}, {"a": nothing(), "b": nothing()}])
def test_what_is_undefined_is_said_and_never_a_crash(curves: dict[str, Any], tmp_path: Path):
    pictures.save_curves(tmp_path / "curves.png", curves, "nothing")
    assert Image.open(tmp_path / "curves.png").width > 500
    found = words(render(curves))
    assert sum(text.startswith("undefined: needs") for text in found) == 3
    assert "no scores" in found
    assert found.count("undefined") == 3 * len(curves) + 3 * (len(curves) > 1)


def test_one_undefined_category_leaves_the_curves_of_the_others():
    alone = render({"a": curve(0)}).axes[0].lines[0].get_ydata()
    both = render({"a": curve(0), "b": nothing()}).axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(both))


@pytest.mark.parametrize("name", ["$a_b", "_hidden", r"\frac{", "a" * 90, "%s {}"])
def test_any_name_may_stand_in_the_figure(name: str, tmp_path: Path):
    pictures.save_curves(tmp_path / "curves.png", {name: curve(0), "b": curve(1)}, name)
    pictures.save_loss_curves(tmp_path / "loss.png", {f"train/{name}": [(0, 1.0), (1, 0.5)]})
    assert len(list(tmp_path.iterdir())) == 2


def test_precision_follows_the_rule_that_average_precision_sums():
    line = pictures._usable((np.array([1.0, 0.5, 0.5]), np.array([0.6, 0.7, 1.0])), "pr")
    assert line is not None
    assert pictures._step(np.array([0.0, 0.25, 0.5, 0.51, 1.0]), *line).tolist() == [
        1.0,
        1.0,
        1.0,
        0.6,
        0.6,
    ]


def test_thinned_curve_keeps_its_ends_and_its_shape():
    x = np.linspace(0, 1, 200_000)
    y = x**0.05
    thin_x, thin_y = pictures._thin(x, y)
    assert len(thin_x) <= 3002
    assert (thin_x[0], thin_x[-1], thin_y[-1]) == (0, 1, 1)
    assert np.abs(np.interp(x[1:], thin_x, thin_y) - y[1:]).max() < 1e-3


def test_scores_of_categories_with_their_own_thresholds_are_aligned_at_them():
    far = curve(1)
    far["scores"] = 1000 * far["scores"]
    far["threshold"] = 1000.0
    scores, labels, thresholds, aligned = pictures._pool_scores({"a": curve(1), "b": far})
    assert aligned
    assert thresholds == [0.0]
    assert len(labels) == 140
    np.testing.assert_allclose(scores[:70], scores[70:])


def test_scores_stay_raw_for_one_threshold_or_none():
    for threshold in (1.0, None):
        curves = {"a": curve(0, threshold), "b": curve(1, threshold)}
        scores, _, thresholds, aligned = pictures._pool_scores(curves)
        assert not aligned
        assert thresholds == ([] if threshold is None else [1.0])
        np.testing.assert_array_equal(scores[:70], curves["a"]["scores"])


def test_far_scores_do_not_flatten_the_histogram():
    scores = np.r_[np.linspace(0, 1, 50), np.linspace(2, 3, 50), 1e9]
    low, high = pictures._histogram_range(scores, np.arange(101) >= 50)
    assert low == 0
    assert high < 6


@pytest.mark.parametrize("scores", [[1.0], [1.0, 1.0, 1.0], [0.0, 1e-12]])
def test_histogram_of_equal_or_single_scores_is_drawn(scores: list[float]):
    curves = nothing() | {"scores": np.array(scores), "labels": np.arange(len(scores)) > 0}
    assert "no scores" not in words(render({"a": curves}))


def test_loss_terms_have_their_own_axes_and_share_them_between_stages():
    history = {
        "train/loss": [(i, 1 - i / 100) for i in range(200)],
        "val/loss": [(99, 0.2), (199, -0.8)],
        "train/reconstruction": [(0, 1.0), (1, math.nan)],
        "train/broken": [(0, math.nan)],
        "val/empty": [],
    }
    figure = pictures._loss_figure(history)
    FigureCanvasAgg(figure).draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", "reconstruction", "broken"]
    legends = [axes.get_legend() for axes in figure.axes]
    assert [text.get_text() for text in legends[0].get_texts()] == ["train", "held-out"]
    assert [text.get_text() for text in legends[1].get_texts()] == ["train (1 not finite)"]
    assert figure.axes[2].texts[0].get_text() == "no finite value"


def test_no_losses_are_said(tmp_path: Path):
    pictures.save_loss_curves(tmp_path / "loss.png", {})
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_the_module_brings_neither_torch_nor_pyplot_nor_an_early_matplotlib(tmp_path: Path):
    code = (
        "import sys; from anomaly_lit import pictures; "
        "assert not {'torch', 'matplotlib'} & set(sys.modules); "
        "pictures.save_curves(sys.argv[1], {}, ''); "
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
