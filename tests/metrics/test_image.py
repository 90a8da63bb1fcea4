from __future__ import annotations

import pytest
import torch

from anomaly_lit.metrics import ImageMetrics, functional
from anomaly_lit.types import UserError


def scores_and_labels(count: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3 == 0
    return torch.randn(count, generator=generator) * 40 + 30 * labels, labels


def test_batches_give_the_values_of_the_functions() -> None:
    scores, labels = scores_and_labels()
    metric = ImageMetrics()
    for part in range(0, 37, 5):
        metric.update(scores[part : part + 5], labels[part : part + 5])
    values = metric.compute()
    assert values["image_auroc"] == functional.auroc(scores, labels)
    assert values["image_ap"] == functional.average_precision(scores, labels)
    assert values["image_f1max"] == functional.f1_max(scores, labels)[0]
    assert values["image_f1max_threshold"] == functional.f1_max(scores, labels)[1]
    for name in ("auroc", "ap"):
        assert (
            values[f"image_{name}_low"] <= values[f"image_{name}"] <= values[f"image_{name}_high"]
        )
    assert set(metric.curves()) == {"roc", "pr"}
    metric.reset()
    assert metric.score == []


def test_one_class_is_undefined() -> None:
    metric = ImageMetrics()
    metric.update(torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert all(value.isnan() for value in metric.compute().values())


def test_without_resamples_there_are_no_intervals() -> None:
    metric = ImageMetrics(resamples=0)
    metric.update(*scores_and_labels())
    assert "image_auroc_low" not in metric.compute()


def test_a_bad_score_names_its_image() -> None:
    metric = ImageMetrics()
    metric.update(torch.tensor([1.0, torch.inf]), torch.tensor([True, False]), ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"b\.png"):
        metric.compute()
    with pytest.raises(UserError, match="boolean"):
        ImageMetrics().update(torch.zeros(2), torch.zeros(2))
