"""The streaming engine against the exact one: its error never passes the bound it reports."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anomaly_lit.metrics import PixelMetrics
from anomaly_lit.metrics.streaming import Bins

ALLOWED = {"pixel_ap": 5e-4}  # true error; 1e-4 for all others
EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-30, 1.0, 1 + 2**-23, 1e30, -1e30, 3.4e38, -3.4e38]


def compute(engine: str, maps, masks, center: float = 0.0, batch: int = 4):
    metric = PixelMetrics(engine=engine, center=center)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, mask in zip(maps.split(batch), masks.split(batch), strict=True):
            metric.update(part, mask)
        return metric.compute()


def check_bounds(maps, masks, center: float = 0.0) -> dict[str, torch.Tensor]:
    exact = compute("exact", maps, masks, center)
    values = compute("streaming", maps, masks, center)
    for key, value in exact.items():
        if key == "pixel_f1max_threshold":
            continue
        if value.isnan():
            assert values[key].isnan(), key
        else:
            assert (values[key] - value).abs() <= values[f"{key}_bound"], key
            assert 0 <= values[key] <= 1, key
    return values


def smooth_maps(images: int = 28, size: int = 128):
    """Blurred noise, with bumps that a mask covers in part."""
    numbers = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] / size
    maps = np.empty((images, 1, size, size), np.float32)
    masks = np.zeros(maps.shape, bool)
    for index in range(images):
        noise = ndimage.gaussian_filter(numbers.standard_normal((size, size)), 2)
        maps[index, 0] = noise / noise.std()
        for _ in range(numbers.integers(1, 4) if index % 4 else 0):
            y, x = numbers.uniform(0.1, 0.9, 2)
            height, width = numbers.uniform(0.02, 0.1, 2)
            distance = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2
            masks[index, 0] |= distance < 1
            maps[index, 0] += numbers.uniform(1, 5) * np.exp(-distance / 3)
    return torch.from_numpy(maps) / 2, torch.from_numpy(masks)


def with_outlier(scores: torch.Tensor) -> torch.Tensor:
    scores = scores.clone()
    scores[0, 0, 7, 7] = 1e5
    return scores


MONOTONE = {
    "raw": lambda s: s,
    "plus_100": lambda s: s + 100,
    "outlier": with_outlier,
    "exp": lambda s: (5 * s).exp(),
    "sigmoid": lambda s: (4 * s).sigmoid(),
    "times_1e-6": lambda s: s * 1e-6,
}


@pytest.mark.parametrize("name", MONOTONE)
def test_monotone_maps_of_the_scores_stay_within_the_promise(name: str) -> None:
    maps, masks = smooth_maps()
    maps = MONOTONE[name](maps)
    center = float(maps[~masks.flatten(1).any(1)].median())
    values = check_bounds(maps, masks, center)
    exact = compute("exact", maps, masks)
    for key, value in exact.items():
        if f"{key}_bound" in values:
            assert values[f"{key}_bound"] <= 1e-3, key
            assert (values[key] - value).abs() <= ALLOWED.get(key, 1e-4), key


def random_masks(seed: int, shape=(4, 1, 16, 16), share: float = 0.15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(shape, generator=generator) < share
    masks[0] = False
    masks[1, 0, 3, 3] = True
    return masks


def adversarial(kind: str, masks: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(masks.shape, generator=generator, dtype=torch.float64) + masks
    sign = noise.sign()
    return {
        "all_equal": torch.full(masks.shape, 0.25),
        "negative_zero": torch.where(noise > 0, 0.0, -0.0),
        "orders_of_magnitude": sign * 10 ** (15 * noise.clamp(-1, 1)),
        "denormals": noise * 1e-41,
        "negatives": -noise.exp() * 1e3,
        "integers": (3 * noise).round().long(),
        "booleans": noise > 0.5,
        "float16": noise.half(),
        "bfloat16": noise.bfloat16(),
        "float64_close": 5 + noise * 1e-12,
        "one_bin_far_away": (1e6 + noise).float(),
        "one_bin_worst_order": 1e6 - masks.double() * 0.5,
        "one_bin_best_order": 1e6 + masks.double() * 0.5,
        "largest": noise.clamp(-1, 1) * 3e38,
    }[kind]


KINDS = [
    "all_equal", "negative_zero", "orders_of_magnitude", "denormals", "negatives", "integers",
    "booleans", "float16", "bfloat16", "float64_close", "one_bin_far_away", "one_bin_worst_order",
    "one_bin_best_order", "largest",
]  # fmt: skip


@pytest.mark.parametrize("center", [0.0, 0.3, 1.0, -1e6, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_on_adversarial_scores(kind: str, center: float) -> None:
    masks = random_masks(0)
    check_bounds(adversarial(kind, masks), masks, center)


scores = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(EXTREMES)


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(scores | st.integers(-2, 2).map(float), min_size=36, max_size=36),
    seed=st.integers(0, 10_000),
    share=st.floats(0, 1),
    center=scores,
)
def test_the_bound_holds_on_any_scores(values, seed: int, share: float, center: float) -> None:
    maps = torch.tensor(values, dtype=torch.float32).view(4, 1, 3, 3)
    masks = torch.rand(maps.shape, generator=torch.Generator().manual_seed(seed)) < share
    check_bounds(maps, masks, center)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 400),
    scale=st.sampled_from([2.0**-149, 1e-6, 1e-3, 1.0, 1e4]),
    center=st.sampled_from([0.0, 0.5, 1.0, 100.0]),
)
def test_the_bound_holds_where_bins_are_crowded(seed: int, steps: int, scale, center) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(4, 1, 12, 12, generator=generator) < 0.2
    close = torch.randint(0, steps, masks.shape, generator=generator) + masks * (steps // 3)
    check_bounds(700 + close * 2.0**-14 * scale, masks, center)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(scores, min_size=2, max_size=40), center=scores)
def test_bins_keep_the_order(values: list[float], center: float) -> None:
    ordered = torch.tensor(values, dtype=torch.float32).sort().values
    bins = Bins(center)
    found = bins.of(ordered)
    assert (found.diff() >= 0).all()
    assert found.min() >= 0
    assert found.max() < bins.count
    lowest = bins.lowest(found)
    assert (lowest <= ordered).all()
    assert torch.equal(bins.of(lowest), found)
    assert (bins.of(torch.nextafter(lowest, torch.tensor(-torch.inf))) < found)[
        lowest > -torch.inf
    ].all()


def test_the_state_stays_below_64_mb_for_any_center() -> None:
    for center in (0.0, 1e-40, 0.5, 1.0, 100.0, -3.4e38, 3.4e38):
        metric = PixelMetrics(engine="streaming", center=center)
        metric.update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
        assert metric.histogram.numel() * 8 < 64e6, center


def test_single_pixel_defects_are_exact() -> None:
    maps, masks = torch.rand(6, 1, 16, 16), torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    for index in range(1, 6):
        masks[index, 0, index, 3] = True
    check_bounds(maps, masks)


def test_a_hundred_thousand_regions_are_weighed_alike() -> None:
    masks = torch.zeros(2, 1, 700, 700, dtype=torch.bool)
    masks[:, :, ::3, ::3] = True
    masks[1, 0, 3, 4] = True
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(masks.shape, generator=generator) + masks
    values = check_bounds(maps, masks)
    assert int(masks.sum()) > 100_000
    assert values["pixel_aupro_bound"] < 1e-4


def test_wide_bounds_are_marked_unreliable_with_advice() -> None:
    torch.manual_seed(0)
    maps, masks = 30 + torch.rand(2, 1, 32, 32) * 0.05, torch.zeros(2, 1, 32, 32) > 0
    masks[0, 0, :9] = True
    metric = PixelMetrics(engine="streaming")
    metric.update(maps, masks)
    with pytest.warns(UserWarning, match=r"pixel_ap \(\+-0\..*engine='exact'"):
        metric.compute()
    metric = PixelMetrics(engine="streaming", center=float(maps.median()))
    metric.update(maps, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()


def test_the_threshold_splits_the_scores_as_the_bins_do() -> None:
    maps, masks = smooth_maps(8, 64)
    values = compute("streaming", maps, masks)
    found = maps >= values["pixel_f1max_threshold"]
    f1 = 2 * (found & masks).sum() / (found.sum() + masks.sum())
    assert abs(f1 - values["pixel_f1max"]) < 1e-6


def test_auto_is_exact_up_to_its_limit_and_equals_streaming_beyond() -> None:
    maps, masks = smooth_maps(9, 32)
    for limit, engine in ((9 * 32 * 32, "exact"), (5 * 32 * 32, "streaming")):
        metric = PixelMetrics(exact_pixels=limit)
        for part, mask in zip(maps.split(2), masks.split(2), strict=True):
            metric.update(part, mask)
        values, expected = metric.compute(), compute(engine, maps, masks)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(values[key], value) or value.isnan(), key
        assert bool(metric.normal) == (engine == "exact")


def test_an_unused_histogram_takes_no_memory_and_reset_frees_it() -> None:
    metric = PixelMetrics(exact_pixels=10)
    assert metric.histogram.untyped_storage().nbytes() == 8
    metric.update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    assert metric.histogram.untyped_storage().nbytes() > 2**20
    metric.reset()
    assert metric.histogram.untyped_storage().nbytes() == 8
    assert metric.compute()["pixel_auroc"].isnan()


def test_curves_of_the_bins_follow_the_exact_ones() -> None:
    maps, masks = smooth_maps(8, 64)
    exact, streaming = PixelMetrics(engine="exact"), PixelMetrics(engine="streaming")
    for metric in (exact, streaming):
        metric.update(maps, masks)
    for name in ("roc", "pro"):
        (x, y), (rough_x, rough_y) = exact.curves()[name], streaming.curves()[name]
        grid = np.linspace(0.01, 1, 50)
        np.testing.assert_allclose(
            np.interp(grid, rough_x, rough_y), np.interp(grid, x, y), atol=1e-3
        )
