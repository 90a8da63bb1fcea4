"""What a threshold from a few held-out images can promise, and the pixel threshold."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from anomaly_lit.calibration import (
    colour_range,
    exceeds,
    outline_of,
    pixel_threshold,
    promise,
    promise_sentence,
    rule_of,
    threshold_at,
    verdict,
)

CASES = [(1, 0.01), (3, 0.01), (20, 0.01), (99, 0.01), (100, 0.01), (20, 0.1), (250, 0.02)]


def true_rates(count: int, fpr: float, trials: int = 3000) -> torch.Tensor:
    """The share of normal images above the threshold, in many repetitions; scores are normal."""
    generator = torch.Generator().manual_seed(count)
    draws = torch.randn(trials, count, generator=generator, dtype=torch.float64) * 3 + 7
    thresholds = torch.tensor([threshold_at(draw, fpr)[0] for draw in draws])
    return torch.from_numpy(stats.norm.sf((thresholds.numpy() - 7) / 3))


@pytest.mark.parametrize(("count", "fpr"), CASES)
def test_the_interval_covers_the_true_rate_as_often_as_it_says(count: int, fpr: float) -> None:
    rates, found = true_rates(count, fpr), promise(count, fpr)
    covered = float(((rates >= found["low"]) & (rates <= found["high"])).double().mean())
    below_free = float((rates <= found["high_free"]).double().mean())
    noise = 4 * (0.95 * 0.05 / len(rates)) ** 0.5
    if found["rule"] == "prediction limit":  # at least 95 %, by two rules together
        assert covered > 0.95 - noise
        assert below_free > 0.95 - noise
    else:
        assert covered == pytest.approx(0.95, abs=noise)
        assert below_free == pytest.approx(0.95, abs=noise)


@pytest.mark.parametrize(("count", "fpr"), [(5, 0.1), (30, 0.01), (150, 0.01)])
def test_the_rate_stays_below_the_free_limit_whatever_the_distribution(
    count: int, fpr: float
) -> None:
    generator = torch.Generator().manual_seed(count)
    draws = -torch.rand(3000, count, generator=generator, dtype=torch.float64).log()  # long tail
    thresholds = torch.tensor([threshold_at(draw.square(), fpr)[0] for draw in draws])
    rates = (-thresholds.sqrt()).exp()
    assert (rates <= promise(count, fpr)["high_free"]).double().mean() > 0.95 - 0.016


@settings(deadline=None)
@given(st.integers(1, 2000), st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.5, 0.9]))
def test_promises_are_consistent(count: int, fpr: float) -> None:
    found = promise(count, fpr)
    assert 0 <= found["low"] < found["high"] <= 1
    assert found["rule"] == rule_of(count, fpr) == threshold_at(torch.arange(count), fpr)[1]
    assert found["resolved"] == (count >= found["needed"])
    assert rule_of(found["needed"], fpr) == "quantile"
    if count >= found["needed_for_double"]:
        assert found["high"] <= 2 * fpr
    assert json.loads(json.dumps(found)) == found


def test_the_quantile_s_interval_is_that_of_the_order_statistic() -> None:
    found = promise(100, 0.01)  # the second highest of 100
    assert found["low"] == pytest.approx(stats.beta.ppf(0.025, 2, 99))
    assert found["high"] == pytest.approx(stats.beta.ppf(0.975, 2, 99))
    assert promise(99, 0.01)["high_free"] == pytest.approx(1 - 0.05 ** (1 / 99))


def test_more_images_promise_more() -> None:
    assert promise(800, 0.01)["high"] < 0.02 < promise(100, 0.01)["high"]
    highs = [promise(count, 0.01)["high"] for count in (5, 10, 20, 40, 80)]
    assert highs == sorted(highs, reverse=True)


def test_the_sentence_speaks_of_the_category_with_the_fewest_images() -> None:
    categories = {"bolt": {"count": 20}, "cloth": {"count": 150}}
    few = promise_sentence({"fpr": 0.01, "categories": categories})
    assert re.search(r"bolt from 20 held-out .*fewest of 2 categories.*too few.*takes 100", few)
    assert "if scores are normally distributed" in few
    enough = promise_sentence({"fpr": 0.01, "categories": {"cloth": {"count": 150}}})
    assert re.search(r"cloth from 150 .*between 0\.16 % and 3\.7 %; 800 images", enough)
    assert "would" not in promise_sentence({"fpr": 0.01, "categories": {"cloth": {"count": 900}}})


def test_without_held_out_images_the_sentence_names_the_way_out() -> None:
    assert promise(0, 0.01)["rule"] == "none"
    assert re.search(r"every verdict is unknown.*dataset\.holdout", promise_sentence({}))


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=80),
    st.sampled_from([0.001, 0.01, 0.1, 0.3]),
)
def test_pixel_threshold_is_the_lowest_value_that_few_enough_exceed(
    values: list[float], fpr: float
) -> None:
    threshold = pixel_threshold(torch.tensor(values), len(values), fpr)
    assert threshold in values
    assert sum(value > threshold for value in values) <= fpr * len(values) + 1e-9
    lower = [value for value in values if value < threshold]
    if lower:
        assert sum(value > max(lower) for value in values) > fpr * len(values) - 1e-9


def test_a_score_at_the_threshold_stays_good_in_another_batch() -> None:
    threshold = 0.05520697683
    assert verdict(threshold * (1 + 1e-6), threshold)["verdict"] == "good"
    assert verdict(threshold * (1 + 1e-4), threshold)["verdict"] == "defect"
    assert exceeds(torch.tensor([-2.0, -1.999]), -2.0).tolist() == [False, True]


def test_pixel_threshold_needs_the_highest_values_only() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    kept = values.topk(51).values
    assert pixel_threshold(kept, 5000, 0.01) == pixel_threshold(values, 5000, 0.01)


def test_without_a_range_of_maps_there_is_no_outline_and_colours_span_the_map() -> None:
    limits = {"threshold": 1.0, "count": 3}
    anomaly_map = torch.arange(6.0).reshape(2, 3).numpy()
    assert colour_range(limits, anomaly_map) == (0, 5)
    assert outline_of("defect", anomaly_map, limits) is None
