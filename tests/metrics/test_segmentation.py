from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from anomaly_lit.metrics import SegmentationMetrics, f1_max, segmentation
from anomaly_lit.types import UserError


def sample(seed: int = 0, images: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(images, 1, 20, 20, generator=generator) < 0.1
    masks[::3] = False
    return torch.randn(masks.shape, generator=generator) + 2 * masks, masks


@settings(deadline=None)
@given(st.integers(0, 50), st.floats(-2, 3, width=32))
def test_values_equal_scikit_learn_s(seed: int, threshold: float) -> None:
    maps, masks = sample(seed)
    found = segmentation(maps, masks, threshold)
    truth, marked = masks.flatten().numpy(), (maps > threshold).flatten().numpy()
    expected = {
        "precision": sklearn_metrics.precision_score(truth, marked, zero_division=0),
        "recall": sklearn_metrics.recall_score(truth, marked),
        "f1": sklearn_metrics.f1_score(truth, marked),
        "iou": sklearn_metrics.jaccard_score(truth, marked),
    }
    for name, value in expected.items():
        assert float(found[f"segmentation_{name}"]) == pytest.approx(value, abs=1e-12)


def test_batches_of_any_size_give_the_values_of_the_function() -> None:
    maps, masks = sample()
    for size in (1, 4, 6):
        metric = SegmentationMetrics(0.7)
        for start in range(0, len(maps), size):
            metric.update(maps[start : start + size], masks[start : start + size])
        assert metric.compute() == segmentation(maps, masks, 0.7)


def test_a_pixel_at_the_threshold_is_not_marked() -> None:
    maps, masks = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[True, True]]]])
    assert float(segmentation(maps, masks, 1.0)["segmentation_recall"]) == 0.5


def test_no_threshold_is_better_than_the_best_one() -> None:
    maps, masks = sample()
    best, threshold = f1_max(maps, masks)  # marks pixels at the threshold as well
    below = torch.nextafter(threshold.float(), torch.tensor(-torch.inf))
    assert segmentation(maps, masks, float(below))["segmentation_f1"] == pytest.approx(float(best))
    for other in (-1.0, 0.0, 1.0, 2.0):
        assert segmentation(maps, masks, other)["segmentation_f1"] <= best


def test_without_an_anomalous_pixel_all_is_undefined() -> None:
    maps, masks = sample()
    assert all(v.isnan() for v in segmentation(maps, torch.zeros_like(masks), 0.0).values())


def test_nothing_marked_has_precision_zero() -> None:
    maps, masks = sample()
    assert all(float(value) == 0 for value in segmentation(maps, masks, 100.0).values())


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    maps, masks = sample()
    with pytest.raises(UserError, match="boolean"):
        SegmentationMetrics(0.0).update(maps, masks.float())
    with pytest.raises(UserError, match=r"\(6, 1, 20, 10\)"):
        segmentation(maps, masks[..., :10], 0.0)
