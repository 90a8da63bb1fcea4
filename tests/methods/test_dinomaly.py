"""Dinomaly against its formulas, and the numbers that its description states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import total
from anomaly_lit.methods.dinomaly import Dinomaly, recentred
from anomaly_lit.methods.dinomaly.network import DecoderBlock, LinearAttention
from anomaly_lit.nn.aggregate import resize
from anomaly_lit.nn.rebuilding import gap, scored
from anomaly_lit.optim import StableAdamW
from anomaly_lit.schedules import Cosine
from anomaly_lit.types import UserError

Build = Callable[..., Any]
DINOMALY2 = {"bottleneck": "narrow", "recentering": "target", "attention_eps": 1e-8}


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("dinomaly")


class Teacher(nn.Module):
    """As wide as a transformer, and nothing else."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels, self.strides, self.prefix_tokens = [dim, dim], [14, 14], 1


def wave(step: float, of: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """Values of(step * 1), of(step * 2), ... in this shape."""
    number = int(torch.tensor(shape).prod())
    return of(step * torch.arange(1, number + 1, dtype=torch.float64)).reshape(shape)


def golden() -> list[tuple[Tensor, Tensor]]:
    """Given and rebuilt maps of two groups."""
    shape = (2, 8, 4, 4)
    given = [wave(0.1, torch.sin, *shape), wave(0.1, torch.cos, *shape)]
    rebuilt = [wave(0.13, torch.sin, *shape), wave(0.07, torch.cos, *shape)]
    return [(e, d.requires_grad_()) for e, d in zip(given, rebuilt, strict=True)]


@pytest.mark.parametrize(
    ("dim", "changes", "expected"),
    [
        (384, {}, 15_377_280),
        (768, {}, 61_425_408),
        (1024, {}, 109_163_520),
        (384, DINOMALY2, 15_279_232),
        (768, DINOMALY2, 60_049_408),
        (1024, DINOMALY2, 106_280_192),
    ],
)
def test_parameters_are_those_of_the_authors_networks(
    dim: int, changes: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        method = Dinomaly(Teacher(dim), StableAdamW, **changes)  # type: ignore[arg-type]
    assert sum(p.numel() for p in method.parameters()) == expected
    assert sum(p.numel() for p in method.decoder[0].parameters()) == {
        384: 1_774_464, 768: 7_087_872, 1024: 12_596_224
    }[dim]  # fmt: skip


def test_the_published_method_trains_61_4_million_parameters(published_method: Build) -> None:
    with torch.device("meta"):
        method = published_method("dinomaly", 392)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 61_425_408
    assert method.backbone.prefix_tokens == 5


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_linear_attention_equals_its_weights_written_out(eps: float) -> None:
    torch.manual_seed(0)
    attention = LinearAttention(8, 2, eps)
    tokens = torch.randn(3, 5, 8)
    q, k = (F.elu(part(tokens)) + 1 for part in (attention.query, attention.key))
    v, mixed = attention.value(tokens), torch.zeros(3, 5, 8)
    for head in (slice(0, 4), slice(4, 8)):
        weights = q[..., head] @ k[..., head].transpose(1, 2)  # (B, N, N)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
        mixed[..., head] = weights @ v[..., head]
    expected = attention.output(mixed)
    torch.testing.assert_close(attention(tokens, tokens, tokens), expected, rtol=1e-5, atol=1e-6)


def test_the_decoder_knows_no_positions() -> None:
    torch.manual_seed(0)
    block, tokens = DecoderBlock(8, LinearAttention(8, 2)), torch.randn(2, 6, 8)
    order = torch.randperm(6)
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, (0.598146, 0.604762)), (0.9, (0.111257, 0.106066))]
)
def test_easy_positions_get_less_gradient_and_the_loss_stays(
    method: Any, share: float, expected: tuple[float, float]
) -> None:
    """Values calculated by hand."""
    pairs = golden()
    loss = torch.stack([method.loose_distance(e, d, share) for e, d in pairs]).mean()
    assert float(loss) == pytest.approx(0.886004, abs=1e-6)
    loss.backward()
    found = [float(d.grad.abs().sum()) for _, d in pairs]
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_map_is_the_mean_over_groups() -> None:
    maps = torch.stack([resize(gap(e, d), (8, 8)) for e, d in golden()]).mean(dim=0)
    assert float(maps.mean()) == pytest.approx(0.886443, abs=1e-6)
    assert float(maps.max()) == pytest.approx(1.299207, abs=1e-6)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_patch_counts_at_its_corner_or_at_its_centre(
    small_method: Build, make_batch: Build, aligned: bool
) -> None:
    method, image = small_method("dinomaly", align_corners=aligned).eval(), make_batch()["image"]
    gaps = [gap(given, rebuilt) for given, rebuilt in method.compare(method.backbone(image))]
    found = method(image).anomaly_map
    size = image.shape[-2:]
    torch.testing.assert_close(found, scored(gaps, size, aligned).anomaly_map)
    assert not torch.allclose(found, scored(gaps, size, not aligned).anomaly_map)


def test_the_schedule_is_the_authors() -> None:
    """Theirs reaches the full rate at step 99, a step earlier: at step 50 it is 50/99 of it."""
    schedule = Cosine(warmup=0.01, end=0.1)
    steps = (0, 50, 100, 5050)
    found = [2e-3 * schedule(step / 10_000) for step in steps]
    assert found == pytest.approx([0, 1.0e-3, 2e-3, 1.1e-3], rel=1e-3)


def test_prefix_tokens_pass_the_decoder_but_are_not_compared(
    method: Any, make_batch: Build
) -> None:
    features = method.eval().backbone(make_batch()["image"])
    assert len(features) == 4
    pairs = method.compare(features)
    assert all(e.shape == d.shape == (2, 64, 4, 4) for e, d in pairs)
    other = [*features[:2], *(tokens + 1 for tokens in features[2:])]
    for (given, rebuilt), (same, moved) in zip(pairs, method.compare(other), strict=True):
        assert torch.equal(given, same)
        assert not torch.equal(rebuilt, moved)


def test_a_recentred_target_has_mean_zero_and_variance_one() -> None:
    map_, prefix = torch.randn(2, 16, 3, 4), torch.randn(2, 16, 1, 5)
    found = recentred(map_, prefix)
    away = map_[1, :, 2, 3] - prefix[1, :, 0, 0]
    expected = (away - away.mean()) / away.std(correction=0)
    torch.testing.assert_close(found[1, :, 2, 3], expected)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(2, 3, 4), rtol=0, atol=1e-6)


def test_recentering_changes_the_target_or_the_input(
    small_method: Build, make_batch: Build
) -> None:
    image = make_batch()["image"]
    plain, target, taken = (
        small_method("dinomaly", recentering=how).eval() for how in ("none", "target", "input")
    )
    features = plain.backbone(image)
    pairs, moved, off = (each.compare(features) for each in (plain, target, taken))
    for i in range(2):
        assert torch.equal(pairs[i][1], moved[i][1])  # bottleneck and decoder see the same
        assert torch.equal(moved[i][0], recentred(features[i], features[2 + i]))
        assert torch.equal(off[i][0], features[i] - features[2 + i][..., :1])
        assert not torch.equal(pairs[i][1], off[i][1])


def test_dropout_is_the_only_noise_and_only_in_training(method: Any, make_batch: Build) -> None:
    features = method.backbone(make_batch()["image"])
    first, second = method.train().compare(features), method.compare(features)
    assert not torch.equal(first[0][1], second[0][1])
    first, second = method.eval().compare(features), method.compare(features)
    assert torch.equal(first[0][1], second[0][1])


def test_the_first_layer_of_the_bottleneck_may_have_a_rate_of_its_own(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("dinomaly", first_rate=0.1, bottleneck="narrow", schedule=None)
    trainer = fit(method, make_batch(), 2)
    rest, own = trainer.optimizers[0].param_groups
    assert own["params"] == list(method.bottleneck[0].parameters())
    assert own["lr"] == pytest.approx(0.1 * rest["lr"])
    trained = [p for p in method.parameters() if p.requires_grad]
    assert len(rest["params"]) + len(own["params"]) == len(trained)


@pytest.mark.parametrize("changes", [DINOMALY2, {"attention": "softmax"}, {"recentering": "input"}])
def test_every_switch_trains(
    small_method: Build, fit: Build, make_batch: Build, changes: dict[str, Any]
) -> None:
    method, batch = small_method("dinomaly", **changes), make_batch()
    fit(method, batch, 2)
    assert total(method.losses(batch)).isfinite()
    assert method.eval()(batch["image"]).score.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"easy_share": 1.0}, r"easy_share=1\.0"),
        ({"attention_eps": -1.0}, "attention_eps=-1"),
        ({"first_rate": 0.0}, "first_rate=0"),
        ({"depth": 3}, "depth=3 must be a multiple of the 2 maps"),
        ({"heads": 5}, "heads=5 must divide the 64 channels"),
    ],
)
def test_numbers_out_of_range_are_refused(
    small_method: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_method("dinomaly", **changes)


def test_recentering_without_a_class_token_is_refused() -> None:
    teacher = Teacher(64)
    teacher.prefix_tokens = 0
    with pytest.raises(UserError, match=r"recentering=target needs the class token.*prefix=true"):
        Dinomaly(teacher, StableAdamW, recentering="target")  # type: ignore[arg-type]


def test_a_size_that_the_patch_does_not_divide_is_refused_before_training(
    published_method: Build,
) -> None:
    assert published_method("dinomaly", 392).multiple == 14
