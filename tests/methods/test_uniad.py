"""UniAD against its formulas written out, and the facts its description states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomaly_lit.losses import total
from anomaly_lit.methods.uniad import QueryDecoder
from anomaly_lit.nn.aggregate import aggregate
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.neighbours import (
    LearnedPositions,
    NeighbourEncoder,
    answer_with_mean,
    neighbour_mask,
)
from anomaly_lit.types import UserError

ROWS, COLUMNS, DIM = 4, 5, 8


@pytest.fixture
def method(small_method: Callable[..., Any]) -> Any:
    return small_method("uniad")


def slow_attention(part: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """One image, one head and one query at a time."""
    q, k, v = part.query(query), part.key(key), part.value(value)
    width = q.shape[-1] // part.heads
    mixed = torch.zeros_like(q)
    for head in range(part.heads):
        own = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            seen = [j for j in range(len(k)) if allowed[i, j]]
            weights = torch.stack([q[i, own] @ k[j, own] / math.sqrt(width) for j in seen])
            for weight, j in zip(weights.softmax(0), seen, strict=True):
                mixed[i, own] += weight * v[j, own]
    return part.output(mixed)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(ROWS * COLUMNS, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("rows", "columns", "window"), [(4, 5, 3), (9, 6, 5), (14, 14, 7)])
def test_neighbour_mask_equals_a_loop_over_pairs(rows: int, columns: int, window: int) -> None:
    allowed = neighbour_mask(rows, columns, window)
    for i in range(rows * columns):
        for j in range(rows * columns):
            near = abs(i // columns - j // columns) <= window // 2
            near &= abs(i % columns - j % columns) <= window // 2
            assert allowed[i, j] == (not near)


def test_neighbour_mask_leaves_the_stated_number_of_keys() -> None:
    allowed = neighbour_mask(14, 14, 7)
    assert allowed[7 * 14 + 7].sum() == 196 - 49  # a position in the middle
    assert allowed[0].sum() == 196 - 16  # a corner
    assert neighbour_mask(14, 14, 0).all()


def test_window_that_covers_the_map_is_refused() -> None:
    with pytest.raises(UserError, match="window"):
        neighbour_mask(7, 7, 7)
    assert neighbour_mask(7, 8, 7).any(dim=1).all()


def test_encoder_equals_its_formula(tokens: Tensor) -> None:
    encoder = NeighbourEncoder(DIM, heads=2, feedforward=16, depth=2).eval()
    positions = torch.rand(ROWS * COLUMNS, DIM)
    allowed = neighbour_mask(ROWS, COLUMNS, 3)
    expected = tokens
    for layer in encoder.layers:
        placed = expected + positions
        mixed = slow_attention(layer.attention, placed, placed, expected, allowed)
        expected = layer.norm1(expected + mixed)
        expected = layer.norm2(expected + layer.mlp[3](layer.mlp[0](expected).clamp(min=0)))
    found = encoder(tokens[None], positions, allowed)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_decoder_asks_the_encoder_then_the_layer_before(tokens: Tensor) -> None:
    decoder = QueryDecoder(ROWS * COLUMNS, DIM, heads=2, feedforward=16, depth=2, dropout=0.0)
    positions = torch.rand(ROWS * COLUMNS, DIM)
    allowed = neighbour_mask(ROWS, COLUMNS, 3)
    expected = tokens
    for layer in decoder.layers:
        t = layer.query
        mixed = slow_attention(layer.to_encoded, t + positions, tokens + positions, tokens, allowed)
        t = layer.norm1(t + mixed)
        mixed = slow_attention(
            layer.to_previous, t + positions, expected + positions, expected, allowed
        )
        t = layer.norm2(t + mixed)
        expected = layer.norm3(t + layer.mlp[3](layer.mlp[0](t).clamp(min=0)))
    expected = decoder.norm(expected)
    found = decoder(tokens[None], positions, allowed)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_values_carry_no_position_code(tokens: Tensor) -> None:
    """Were all values equal, no position could show in the output."""
    encoder = NeighbourEncoder(DIM, heads=2, feedforward=16, depth=1).eval()
    allowed = neighbour_mask(ROWS, COLUMNS, 3)
    same = tokens[:1].expand(1, ROWS * COLUMNS, DIM)
    found = encoder(same, torch.randn(ROWS * COLUMNS, DIM), allowed)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=1e-4, atol=1e-5)


def test_position_code_holds_the_column_then_the_row() -> None:
    code = LearnedPositions(3, 4, 6)
    expected = torch.stack(
        [torch.cat([code.column[c], code.row[r]]) for r in range(3) for c in range(4)]
    )
    assert torch.equal(code(), expected)
    assert (expected >= 0).all()
    assert (expected < 1).all()


def test_jitter_is_off_in_evaluation_and_leaves_the_target_alone(
    method: Any, make_batch: Callable[..., Any]
) -> None:
    features = torch.rand(2, sum(method.backbone.channels), *method.grid)
    method.eval()
    assert torch.equal(method.reconstruct(features), method.reconstruct(features))
    method.train()
    assert not torch.equal(method.reconstruct(features), method.reconstruct(features))
    targets = []
    method.loss.register_forward_hook(lambda loss, given, out: targets.append(given[1]))
    for _ in range(2):
        method.losses(make_batch())
    assert torch.equal(targets[0], targets[1])


def test_jitter_has_the_published_scale(published_method: Callable[..., Any]) -> None:
    method = published_method("uniad", 224)
    assert method.jitter == pytest.approx(20 / math.sqrt(272))  # 1.21 of the token's norm


def test_anomaly_map_is_the_norm_of_the_error_and_the_score_its_greatest_mean(
    method: Any, make_batch: Callable[..., Any]
) -> None:
    image = make_batch(1)["image"]
    method.eval()
    with torch.inference_mode():
        maps = [
            nn.functional.interpolate(f, method.grid, mode="bilinear", align_corners=True)
            for f in method.backbone(image)
        ]
        given = torch.cat(maps, dim=1)
        error = (method.reconstruct(given) - given).square().sum(dim=1, keepdim=True).sqrt()
        expected = nn.functional.interpolate(error, (64, 64), mode="bilinear", align_corners=True)
        found = method(image)
    torch.testing.assert_close(found.anomaly_map, expected)
    windows = [expected[0, 0, r : r + 16, c : c + 16].mean() for r in range(49) for c in range(49)]
    torch.testing.assert_close(found.score[0], torch.stack(windows).max())


def test_constant_features_give_a_finite_map(method: Any) -> None:
    method.eval()
    features = torch.zeros(1, sum(method.backbone.channels), *method.grid)
    assert method.reconstruct(features).isfinite().all()


def test_gradient_does_not_reach_the_backbone(method: Any, make_batch: Callable[..., Any]) -> None:
    total(method.losses(make_batch())).backward()
    assert all(parameter.grad is None for parameter in method.backbone.parameters())


@pytest.mark.parametrize(("size", "millions"), [(224, 7.717), (256, 7.78), (320, 7.93)])
def test_parameters_are_as_many_as_published(
    published_method: Callable[..., Any], size: int, millions: float
) -> None:
    method = published_method("uniad", size)
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert len(method.decoder.layers[0].query) == (size // 16) ** 2
    assert isinstance(method.backbone, Backbone)
    assert sum(method.backbone.channels) == 272


def test_image_size_that_no_map_fits_is_refused(published_method: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="image_size=250"):
        published_method("uniad", 250)


@pytest.mark.parametrize("name", ["uniad", "onenip"])
def test_a_head_that_starts_at_the_mean_answers_with_it(
    name: str,
    small_method: Callable[..., Any],
    make_batch: Callable[..., Any],
    fit: Callable[..., None],
) -> None:
    method, batch = small_method(name, head="mean", schedule=lambda done: 0.0), make_batch(3)
    assert not method.head.weight.any()
    fit(method, batch, 1)  # at a rate of zero: only the start is left
    maps = aggregate(method.backbone(batch["image"]), method.grid)
    torch.testing.assert_close(method.head.bias, maps.mean(dim=(0, 2, 3)))
    method.head.bias.data.zero_()
    fit(method, batch, 1)  # it has learned once
    assert not method.head.bias.any()


def test_a_head_that_starts_at_the_mean_keeps_the_tokens_of_images_apart(
    small_method: Callable[..., Any],
) -> None:
    generator = torch.Generator().manual_seed(0)

    def kept(head: str) -> float:
        method = small_method("uniad", head=head, feedforward=256)
        images, channels = 16, method.head.out_features
        own = torch.rand(images, channels, 1, 1, generator=generator.manual_seed(0))
        place = torch.rand(1, channels, *method.grid, generator=generator)
        maps = 0.2 * own + place
        if head == "mean":
            answer_with_mean(method.head, [maps])
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
        method.train()
        for _ in range(40):
            optimizer.zero_grad()
            (method.reconstruct(maps) - maps).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 0.1)
            optimizer.step()
        method.eval()
        with torch.no_grad():
            tokens = method.embed(maps.flatten(2).transpose(1, 2))
            return method.encoder(tokens, method.positions(), method.allowed).var(dim=0).mean()

    assert kept("mean") > 3 * kept("random")
