"""The formulas against scikit-learn and against a direct reading of the published definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from anomaly_lit.metrics import bootstrap_interval, functional
from anomaly_lit.types import UserError


def official_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Region overlap curve and integral as in the text of the MVTec evaluation: (N, H, W)."""
    false_change, overlap_change, regions = np.zeros(maps.shape), np.zeros(maps.shape), 0
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        false_change[index] = labels == 0
        regions += count
        for region in range(1, count + 1):
            overlap_change[index][labels == region] = 1 / (labels == region).sum()
    order = np.argsort(-maps, axis=None, kind="stable")
    scores = maps.ravel()[order]
    rate = np.cumsum(false_change.ravel()[order]) / false_change.sum()
    overlap = np.cumsum(overlap_change.ravel()[order]) / regions
    last = np.append(np.diff(scores) != 0, True)
    x = np.concatenate([[0.0], rate[last], [1.0]])
    y = np.concatenate([[0.0], overlap[last].clip(max=1), [1.0]])
    inside = x <= limit
    end = np.searchsorted(x, limit, side="right")
    area = np.sum(np.diff(x[inside]) * (y[inside][1:] + y[inside][:-1]) / 2)
    if x[end - 1] < limit:
        height = y[end - 1] + (y[end] - y[end - 1]) * (limit - x[end - 1]) / (x[end] - x[end - 1])
        area += (limit - x[end - 1]) * (height + y[end - 1]) / 2
    return area / limit


def sample(seed: int, tied: bool, images: int = 5, size: int = 24):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(images, 1, size, size, generator=generator) < 0.08
    masks[0] = False
    maps = torch.randn(masks.shape, generator=generator) + 1.5 * masks
    return (maps.mul(2).round() if tied else maps), masks


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_metrics_equal_scikit_learn(seed: int, tied: bool) -> None:
    maps, masks = sample(seed, tied)
    scores, labels = maps.flatten().double(), masks.flatten()
    assert (
        abs(functional.auroc(scores, labels) - sklearn_metrics.roc_auc_score(labels, scores)) < 1e-9
    )
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert abs(functional.average_precision(scores, labels) - expected) < 1e-9
    precision, recall, thresholds = sklearn_metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / (precision + recall).clip(min=1e-12)
    best, threshold = functional.f1_max(scores, labels)
    assert abs(best - f1.max()) < 1e-9
    assert abs(sklearn_metrics.f1_score(labels, scores >= threshold) - best) < 1e-9
    assert threshold in torch.from_numpy(thresholds.copy())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [0.3, 0.1, 0.05, 0.01, 1.0])
def test_aupro_equals_the_official_integration(tied: bool, limit: float) -> None:
    maps, masks = sample(3, tied)
    expected = official_aupro(maps[:, 0].numpy(), masks[:, 0].numpy(), limit)
    assert abs(functional.aupro(maps, masks, limit) - expected) < 1e-9


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.integers(-3, 3) | st.floats(-1e30, 1e30), min_size=2, max_size=30),
    seed=st.integers(0, 1000),
)
def test_ties_and_any_range_equal_scikit_learn(scores: list[float], seed: int) -> None:
    labels = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) < 0.4
    labels[0], labels[1] = True, False
    values = torch.tensor(scores, dtype=torch.float64)
    expected = sklearn_metrics.roc_auc_score(labels, values)
    assert abs(functional.auroc(values, labels) - expected) < 1e-9
    expected = sklearn_metrics.average_precision_score(labels, values)
    assert abs(functional.average_precision(values, labels) - expected) < 1e-9


def test_curves_equal_scikit_learn() -> None:
    maps, masks = sample(4, tied=True)
    found = functional.curves(maps, masks)
    fpr, tpr, _ = sklearn_metrics.roc_curve(
        masks.flatten(), maps.flatten(), drop_intermediate=False
    )
    heights = np.interp(fpr[1:-1], *(part.numpy() for part in found["roc"]))
    np.testing.assert_allclose(heights, tpr[1:-1], atol=1e-12)
    assert np.trapezoid(found["roc"][1], found["roc"][0]) == pytest.approx(
        float(functional.auroc(maps, masks)), abs=1e-12
    )
    precision, recall, _ = sklearn_metrics.precision_recall_curve(masks.flatten(), maps.flatten())
    pairs = set(zip(recall.round(12), precision.round(12), strict=True))
    assert {
        (round(r, 12), round(p, 12))
        for r, p in zip(*map(torch.Tensor.tolist, found["pr"]), strict=True)
    } <= pairs
    assert all(curve[0][0] == 0 for curve in found.values())


def direct_aupimo(maps: torch.Tensor, masks: torch.Tensor, low: float, high: float) -> float:
    """Mean over images of each image's own area: the order of the definition."""
    normal = maps[~masks.flatten(1).any(1)].flatten().numpy()
    areas = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        if not mask.any():
            continue
        positive = anomaly_map[mask].numpy()
        grid = np.exp(np.linspace(np.log(low), np.log(high), 200_001))
        descending = np.sort(normal)[::-1]
        # highest threshold that lets this share of normal pixels pass, in steps
        threshold = descending[np.minimum((grid * len(normal)).astype(int), len(normal) - 1)]
        recall = (positive[None] > threshold[::1000, None]).mean(1)
        areas.append(recall.mean())
    return float(np.mean(areas))


def test_mean_aupimo_is_the_mean_of_the_areas_of_the_images() -> None:
    maps, masks = sample(5, tied=False, images=30, size=64)
    masks[:15] = False
    low, high = 1e-3, 1e-1
    value = functional.aupimo(maps, masks, (low, high))
    assert abs(value - direct_aupimo(maps, masks, low, high)) < 5e-3
    assert functional.aupimo(maps[:1], masks[:1]).isnan()
    assert functional.aupimo(maps, masks, (1e-6, 1e-5)).isnan()  # fewer than 1e6 normal pixels


@pytest.mark.parametrize("label", [True, False])
def test_one_class_is_undefined(label: bool) -> None:
    scores, labels = torch.arange(4.0), torch.full((4,), label)
    assert functional.auroc(scores, labels).isnan()
    assert functional.average_precision(scores, labels).isnan()
    assert all(part.isnan() for part in functional.f1_max(scores, labels))
    maps, masks = scores.view(1, 1, 2, 2), labels.view(1, 1, 2, 2)
    assert functional.aupro(maps, masks).isnan()
    low, high = bootstrap_interval(scores, labels)["auroc"]
    assert low.isnan()
    assert high.isnan()


def test_user_mistakes_are_named() -> None:
    labels = torch.tensor([True, False])
    with pytest.raises(UserError, match="boolean"):
        functional.auroc(torch.zeros(2), labels.float())
    with pytest.raises(UserError, match="score 1 is nan"):
        functional.auroc(torch.tensor([0.0, torch.nan]), labels)
    maps, masks = sample(0, False)
    with pytest.raises(UserError, match="resolution"):
        functional.aupro(maps[..., ::2, ::2], masks)
    with pytest.raises(UserError, match=r"limit is 30"):
        functional.aupro(maps, masks, 30)


def test_scores_of_every_type_are_read_exactly() -> None:
    maps, masks = sample(6, tied=True)
    labels = masks.flatten()
    expected = functional.auroc(maps.flatten(), labels)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8):
        assert functional.auroc(maps.flatten().to(dtype), labels) == expected
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert functional.auroc(close, torch.tensor([False, True])) == 1


def test_intervals_match_a_loop_of_resamples() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(42) < 20
    scores = (torch.randn(42, generator=generator) + labels).mul(4).round()
    found = bootstrap_interval(scores, labels, resamples=4000)
    numbers = np.random.default_rng(0)
    areas, precisions = [], []
    for _ in range(600):
        drawn = np.concatenate([numbers.choice(20, 20), 20 + numbers.choice(22, 22)])
        areas.append(sklearn_metrics.roc_auc_score(labels[drawn], scores[drawn]))
        precisions.append(sklearn_metrics.average_precision_score(labels[drawn], scores[drawn]))
    for name, values in (("auroc", areas), ("ap", precisions)):
        low, high = found[name]
        np.testing.assert_allclose([low, high], np.quantile(values, [0.025, 0.975]), atol=0.03)


def test_intervals_do_not_depend_on_the_order_of_items_or_on_global_seeds() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(30, generator=generator), torch.arange(30) < 12
    order = torch.randperm(30, generator=generator)
    torch.manual_seed(3)
    first = bootstrap_interval(scores, labels, resamples=50)
    state = torch.get_rng_state()
    assert first == bootstrap_interval(scores[order], labels[order], resamples=50)
    assert torch.equal(state, torch.get_rng_state())
    assert first != bootstrap_interval(scores, labels, resamples=50, seed=1)


def grid(rows: list[str]) -> torch.Tensor:
    """A (1, 1, H, W) tensor of one digit each."""
    return torch.tensor([[[[int(cell) for cell in row] for row in rows]]])


def test_the_limit_is_cut_by_linear_interpolation() -> None:
    # the one region is tied with 2 of 5 normal pixels: the curve rises from (0, 0) to (0.4, 1)
    maps, masks = grid(["110", "100"]), grid(["100", "000"]) > 0
    slope = 1 / (2 / 5)
    assert functional.aupro(maps, masks, 0.3) == pytest.approx(0.5 * 0.3 * slope)
    assert functional.aupro(maps, masks, 0.4) == pytest.approx(0.5)
    assert functional.aupro(maps, masks, 1.0) == pytest.approx(0.4 * 0.5 + 0.6)


def test_diagonal_neighbours_are_one_region() -> None:
    maps = grid(["900", "070", "000", "005"])
    masks = grid(["100", "010", "000", "001"]) > 0
    # two regions: {9, 7} and {5}, all above the normal pixels
    overlap = functional.curves(maps, masks)["pro"][1]
    assert sorted(set(overlap.tolist())) == [0.0, 0.25, 0.5, 1.0]


def test_regions_weigh_the_same_whatever_their_size() -> None:
    masks = grid(["11110", "11110", "00000", "00001"]) > 0
    found_large = grid(["22220", "22220", "11111", "11110"])
    found_small = grid(["00000", "00000", "11111", "11112"])
    assert functional.curves(found_large, masks)["pro"][1][2] == 0.5
    assert functional.curves(found_small, masks)["pro"][1][2] == 0.5


def test_images_without_defects_count_for_false_positives_alone() -> None:
    maps, masks = sample(7, tied=False)
    noisy = torch.cat([maps, maps[:1] + 10])
    more = torch.cat([masks, masks[:1]])
    assert not masks[0].any()
    assert functional.aupro(noisy, more) < functional.aupro(maps, masks)
    expected = official_aupro(noisy[:, 0].numpy(), more[:, 0].numpy(), 0.3)
    assert abs(functional.aupro(noisy, more) - expected) < 1e-9


def test_perfect_maps_score_one_at_every_limit() -> None:
    _, masks = sample(8, tied=False)
    for limit in (0.3, 0.01):
        assert functional.aupro(masks.float(), masks, limit) == pytest.approx(1)
