"""ADTR against its formulas written out, and the facts its description states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anomaly_lit.losses import total
from anomaly_lit.methods.adtr import DecoderLayer, push
from anomaly_lit.types import UserError

Build = MakeBatch = Fit = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("adtr")


def slow_attention(part: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One image, one head and one query at a time."""
    q, k, v = part.query(query), part.key(key), part.value(value)
    width = q.shape[-1] // part.heads
    mixed = torch.zeros_like(q)
    for head in range(part.heads):
        own = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            weights = torch.stack([q[i, own] @ row[own] / math.sqrt(width) for row in k])
            for weight, row in zip(weights.softmax(0), v, strict=True):
                mixed[i, own] += weight * row[own]
    return part.output(mixed)


def test_decoder_layer_equals_its_formula() -> None:
    layer = DecoderLayer(8, heads=2, feedforward=16, dropout=0.0)
    tokens, encoded, positions = torch.randn(3, 6, 8)
    expected = layer.norm1(
        tokens + slow_attention(layer.to_itself, tokens + positions, tokens + positions, tokens)
    )
    mixed = slow_attention(layer.to_encoded, expected + positions, encoded + positions, encoded)
    expected = layer.norm2(expected + mixed)
    expected = layer.norm3(expected + layer.mlp[3](layer.mlp[0](expected).clamp(min=0)))
    found = layer(tokens[None], encoded[None], positions)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_starts_from_a_query_that_ignores_the_image(
    method: Any, small_method: Build
) -> None:
    """Without the encoder's output only the query is left; with `query=input` the image is."""
    features = torch.rand(2, sum(method.backbone.channels), *method.grid)
    for own, blind in ((method, True), (small_method("adtr", query="input"), False)):
        own.eval()
        own.encoder = torch.nn.Identity()
        own.encoder.forward = lambda tokens, positions: torch.zeros_like(tokens)
        with torch.no_grad():
            first, second = own.reconstruct(features)
        assert torch.equal(first, second) == blind


def test_positions_reach_queries_and_keys_alone(method: Any) -> None:
    """Were all values equal, no position could show in the output of a layer."""
    layer = method.decoder[0].eval()
    places, dim = method.positions.shape
    same = torch.randn(1, 1, dim).expand(1, places, dim)
    found = layer(same, same, torch.randn(places, dim))
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "millions"), [(256, 7.87), (512, 8.26)])
def test_parameters_are_as_many_as_stated(
    published_method: Build, size: int, millions: float
) -> None:
    method = published_method("adtr", size)
    assert sum(method.backbone.channels) == 720
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_gap_is_the_pseudo_huber_distance_at_each_position(method: Any) -> None:
    method.eval()
    features = torch.rand(1, sum(method.backbone.channels), *method.grid)
    with torch.no_grad():
        rebuilt, gap = method.reconstruct(features), method.gap(features)
    for row in range(method.grid[0]):
        for column in range(method.grid[1]):
            error = [
                abs(float(a - b))
                for a, b in zip(
                    rebuilt[0, :, row, column], features[0, :, row, column], strict=True
                )
            ]
            expected = math.sqrt((sum(error) / len(error)) ** 2 + 1) - 1
            assert float(gap[0, 0, row, column]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_masks_pull_normal_positions_and_push_the_others(method: Any) -> None:
    gap = torch.rand(3, 1, 4, 4)
    truth = (torch.rand(3, 1, 4, 4) < 0.3).float()
    truth[0] = 0
    method.alpha = 0.1
    terms = method.by_mask(gap, truth)
    pull = pushed = 0.0
    for image in range(3):
        near = (
            sum(
                float(g)
                for g, y in zip(gap[image].flatten(), truth[image].flatten(), strict=True)
                if not y
            )
            / 16
        )
        far = (
            sum(
                float(g)
                for g, y in zip(gap[image].flatten(), truth[image].flatten(), strict=True)
                if y
            )
            / 16
        )
        pull += near / 3
        pushed += -math.log(1 - math.exp(-far)) / 3 if far else 0
    assert float(terms["pull"]) == pytest.approx(pull, rel=1e-5)
    assert float(terms["push"]) == pytest.approx(0.1 * pushed, rel=1e-5)


def test_labels_pull_or_push_the_largest_gaps(method: Any) -> None:
    method.grid, method.top, method.alpha = (4, 10), 0.1, 1.0
    gap = torch.rand(2, 1, 4, 10)
    terms = method.by_label(gap, torch.tensor([False, True]))
    largest = [sum(sorted(part.flatten().tolist())[-4:]) / 4 for part in gap]
    assert float(terms["pull"]) == pytest.approx(largest[0] / 2, rel=1e-5)
    assert float(terms["push"]) == pytest.approx(-math.log(1 - math.exp(-largest[1])) / 2, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("rebuilt", ["exactly", "badly"])
def test_terms_and_gradients_are_finite_where_all_is_normal_or_nothing(
    method: Any, value: float, rebuilt: str
) -> None:
    gap = torch.zeros(2, 1, 4, 4) if rebuilt == "exactly" else torch.full((2, 1, 4, 4), 50.0)
    gap.requires_grad_()
    truth = torch.full((2, 1, 4, 4), value)
    both = {
        **method.by_mask(gap, truth),
        "labels": total(method.by_label(gap, truth[:, 0, 0, 0] > 0)),
    }
    total(both).backward()
    assert all(term.isfinite() for term in both.values())
    assert gap.grad is not None
    assert gap.grad.isfinite().all()
    if value == 0:
        assert both["push"] == 0


def test_push_falls_with_the_distance() -> None:
    everything = torch.ones(1, dtype=torch.bool)
    near, far = (push(torch.tensor([d]), everything) for d in (0.1, 2.0))
    assert near > far > 0
    assert push(torch.tensor([0.1]), ~everything) == 0


@pytest.mark.slow
@pytest.mark.parametrize("anomalies", ["masks", "labels", "outliers"])
def test_anomalies_end_farther_from_their_reconstruction_than_without(
    anomalies: str, small_method: Build, fit: Fit, make_batch: MakeBatch
) -> None:
    batch = make_batch()
    batch["outlier"] = 1 - batch["corrupted"].roll(16, dims=-1)
    strange = batch["outlier" if anomalies == "outliers" else "corrupted"]

    def ratio(method: Any) -> float:
        fit(method, batch, 60)
        with torch.no_grad():
            method.eval()
            gaps = [method.gap(method.describe(part)).amax() for part in (strange, batch["image"])]
        return float(gaps[0] / gaps[1])

    learned = small_method("adtr", anomalies=anomalies, alpha=1.0)
    assert ratio(learned) > ratio(small_method("adtr"))


def test_needs_follow_what_is_learned_from(small_method: Build) -> None:
    needs = {
        kind: small_method("adtr", anomalies=kind).needs
        for kind in ("none", "masks", "labels", "outliers")
    }
    assert needs == {
        "none": frozenset(),
        "masks": {"corrupted"},
        "labels": {"corrupted"},
        "outliers": {"outlier"},
    }
    assert small_method("adtr", anomalies="masks").training_backbones() == {}
    assert list(small_method("adtr", anomalies="outliers").training_backbones()) == ["backbone"]


def test_a_validation_without_outliers_pulls_alone(
    small_method: Build, make_batch: MakeBatch
) -> None:
    terms = small_method("adtr", anomalies="outliers").eval().losses(make_batch())
    assert terms["push"] == 0
    assert terms["pull"] > 0


def test_without_weight_only_the_pull_is_left(small_method: Build, make_batch: MakeBatch) -> None:
    terms = small_method("adtr", anomalies="masks", alpha=0.0).losses(make_batch())
    assert total(terms) == terms["pull"]


def test_score_of_an_image_rises_with_a_block_in_it(
    method: Any, fit: Fit, make_batch: MakeBatch
) -> None:
    batch = make_batch()
    fit(method, batch, 80)
    with torch.no_grad():
        clean, corrupted = (method.eval()(batch[of]).score for of in ("image", "corrupted"))
    assert (corrupted > clean).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heads": 3}, "heads=3"),
        ({"anomalies": "some"}, "anomalies=some"),
        ({"top": 0}, "top=0"),
        ({"query": "none"}, "query=none"),
        ({"score": "std"}, "score=std: choose max or mean"),
        ({"alpha": -1}, "alpha=-1"),
    ],
)
def test_impossible_values_are_refused(
    changes: dict[str, Any], text: str, small_method: Build
) -> None:
    with pytest.raises(UserError, match=text):
        small_method("adtr", **changes)
