from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from anomaly_lit.drawing import curves as drawn_curves
from anomaly_lit.drawing import histogram, loss_curves

# fmt: off
MVTEC = [
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut",
    "pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
]
# fmt: on


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
    figure = drawn_curves._curves_figure(curves, title)
    FigureCanvasAgg(figure).draw()
    return figure


def words(figure: Figure) -> list[str]:
    """Every text outside the axes' own titles and ticks; of the legend's table, every cell."""
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    legend = figure.legends[0]
    cells = [cell for text in legend.get_texts() for cell in re.split(" {2,}", text.get_text())]
    return inside + cells + legend.get_title().get_text().splitlines()


@pytest.mark.parametrize("names", [MVTEC, [f"category {i} " + "long " * 8 for i in range(40)]])
def test_table_of_many_categories_overlaps_neither_axes_nor_itself(names: list[str]):
    figure = render({name: curve(i) for i, name in enumerate(names)})
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    legend = figure.legends[0]
    written = figure.texts + legend.get_texts() + [legend.get_title()]
    if figure._suptitle is not None and figure._suptitle not in written:
        written.append(figure._suptitle)
    texts = [text.get_window_extent(renderer) for text in written]
    lines = [line for line in legend.get_lines() if line.get_linestyle() != "None"]
    assert len(lines) == len(names) + 1
    drawn = texts + [line.get_window_extent(renderer) for line in lines]
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert box is not None
        assert not any(box.overlaps(other) for other in drawn)
    for i, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in texts[i + 1 :])
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def test_lines_of_fifteen_categories_all_look_different():
    entries = drawn_curves._entries({name: curve(i) for i, name in enumerate(MVTEC)})
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
    drawn_curves.save_curves(tmp_path / "curves.png", curves, "nothing")
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
    drawn_curves.save_curves(tmp_path / "curves.png", {name: curve(0), "b": curve(1)}, name)
    loss_curves.save_loss_curves(tmp_path / "loss.png", {f"train/{name}": [(0, 1.0), (1, 0.5)]})
    assert len(list(tmp_path.iterdir())) == 2


def test_precision_follows_the_rule_that_average_precision_sums():
    line = drawn_curves._usable((np.array([1.0, 0.5, 0.5]), np.array([0.6, 0.7, 1.0])), "pr")
    assert line is not None
    assert drawn_curves._step(np.array([0.0, 0.25, 0.5, 0.51, 1.0]), *line).tolist() == [
        1.0,
        1.0,
        1.0,
        0.6,
        0.6,
    ]


def test_thinned_curve_keeps_its_ends_and_its_shape():
    x = np.linspace(0, 1, 200_000)
    y = x**0.05
    thin_x, thin_y = drawn_curves._thin(x, y)
    assert len(thin_x) <= 3002
    assert (thin_x[0], thin_x[-1], thin_y[-1]) == (0, 1, 1)
    assert np.abs(np.interp(x[1:], thin_x, thin_y) - y[1:]).max() < 1e-3


def test_scores_of_categories_with_their_own_thresholds_are_aligned_at_them():
    far = curve(1)
    far["scores"] = 1000 * far["scores"]
    far["threshold"] = 1000.0
    scores, labels, thresholds, aligned = histogram._pool_scores({"a": curve(1), "b": far})
    assert aligned
    assert thresholds == [0.0]
    assert len(labels) == 140
    np.testing.assert_allclose(scores[:70], scores[70:])


def test_scores_stay_raw_for_one_threshold_or_none():
    for threshold in (1.0, None):
        curves = {"a": curve(0, threshold), "b": curve(1, threshold)}
        scores, _, thresholds, aligned = histogram._pool_scores(curves)
        assert not aligned
        assert thresholds == ([] if threshold is None else [1.0])
        np.testing.assert_array_equal(scores[:70], curves["a"]["scores"])


def test_far_scores_do_not_flatten_the_histogram():
    scores = np.r_[np.linspace(0, 1, 50), np.linspace(2, 3, 50), 1e9]
    low, high = histogram._histogram_range(scores, np.arange(101) >= 50)
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
    figure = loss_curves._loss_figure(history)
    FigureCanvasAgg(figure).draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", "reconstruction", "broken"]
    legends = [axes.get_legend() for axes in figure.axes]
    assert [text.get_text() for text in legends[0].get_texts()] == ["train", "held-out"]
    assert [text.get_text() for text in legends[1].get_texts()] == ["train (1 not finite)"]
    assert figure.axes[2].texts[0].get_text() == "no finite value"


def test_no_losses_are_said(tmp_path: Path):
    loss_curves.save_loss_curves(tmp_path / "loss.png", {})
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_the_modules_bring_neither_torch_nor_pyplot_nor_an_early_matplotlib(tmp_path: Path):
    code = (
        "import sys; from anomaly_lit.drawing import curves, loss_curves, panels; "
        "assert not {'torch', 'matplotlib'} & set(sys.modules); "
        "curves.save_curves(sys.argv[1], {}, ''); "
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
