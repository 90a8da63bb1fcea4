"""MFRNet: what its description promises, and its blocks against loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomaly_lit.masks import CrossedMasks, NoMask
from anomaly_lit.methods.mfrnet import score_of
from anomaly_lit.methods.mfrnet.network import (
    HybridBlock,
    MultiPoolingAttention,
    RestorationNetwork,
    init_fan_out,
)
from anomaly_lit.types import UserError

MakeBatch = Callable[..., Any]
Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def method(small_method: Build, fit: Callable[..., None], make_batch: MakeBatch) -> Any:
    method = small_method("mfrnet")
    fit(method, make_batch(), 1)
    return method.eval()


class Echo(nn.Module):
    """A restoration that changes nothing."""

    def forward(self, visible: Tensor, hidden: Tensor) -> Tensor:
        return visible


def partition(method: Any, size: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return CrossedMasks([size], 3).for_scoring(*method.grid, generator)[0]


def test_a_position_is_restored_without_its_own_cell(method: Any) -> None:
    """Other features within one set of hidden cells change nothing of what is restored there."""
    hidden = partition(method)
    features = torch.rand(1, sum(method.backbone.channels), *method.grid)
    first = method.restore(features, hidden)
    for number in range(len(hidden)):
        changed = torch.where(hidden[number][:, None], torch.rand_like(features), features)
        second = method.restore(changed, hidden)
        mine = hidden[number][:, None].expand_as(first)
        torch.testing.assert_close(second[mine], first[mine])
        assert not torch.allclose(second[~mine], first[~mine])


def test_the_masks_of_scoring_are_drawn_once_from_their_seed(small_method: Build) -> None:
    """On the CPU: the same on every device, and nothing that an exported network would draw."""
    method = small_method("mfrnet", mask_seed=5)
    wanted = method.mask.for_scoring(*method.grid, torch.Generator().manual_seed(5))
    assert torch.equal(method.hidden, torch.stack(wanted))
    assert not any("hidden" in name for name in method.state_dict())
    assert not torch.equal(method.hidden, small_method("mfrnet", mask_seed=6).hidden)


def test_a_network_that_echoes_restores_the_fill_everywhere(method: Any) -> None:
    method.restoration = nn.ModuleList([Echo()])
    with torch.no_grad():
        method.fill.copy_(torch.rand_like(method.fill))
    features = torch.rand(2, sum(method.backbone.channels), *method.grid)
    restored = method.restore(features, partition(method))
    torch.testing.assert_close(restored, method.fill.expand_as(restored))


def test_what_no_set_hides_is_the_mean_over_the_sets(method: Any) -> None:
    method.restoration = nn.ModuleList([Echo()])
    features = torch.rand(2, sum(method.backbone.channels), *method.grid)
    hidden = NoMask()(2, *method.grid, torch.Generator())
    torch.testing.assert_close(method.restore(features, hidden), features)


def test_channels_lie_between_their_percentiles(
    small_method: Build, fit: Callable[..., None], make_batch: MakeBatch
) -> None:
    method = small_method("mfrnet")
    fit(method, make_batch(4), 1)
    scaled = method.scaled(method.backbone(make_batch(4)["image"]))
    inside = ((scaled >= -1e-4) & (scaled <= 1 + 1e-4)).float().mean()
    assert inside > 0.97
    low, high = method.low.clone(), method.high.clone()
    other = small_method("mfrnet")
    other.load_state_dict(method.state_dict())
    fit(other, make_batch(2), 1)  # goes on from a checkpoint
    assert torch.equal(other.low, low)
    assert torch.equal(other.high, high)


def test_spread_is_that_of_held_out_maps(method: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(3)
    method.normal_batches = lambda split: [batch] if split == "holdout" else []
    with torch.no_grad():
        method.calibrate()
    maps = method.differences(batch["image"])  # (passes, 2, B, h, w)
    expected = torch.stack([maps[:, 0].std(), maps[:, 1].std()])
    torch.testing.assert_close(method.spread, expected)
    method.normal_batches = lambda split: []
    with torch.no_grad():
        method.calibrate()
    torch.testing.assert_close(method.spread, expected)


def test_score_is_the_sum_of_both_maps_over_their_spread(
    method: Any, make_batch: MakeBatch
) -> None:
    image = make_batch(2)["image"]
    method.smoothing = 0.0
    method.spread.copy_(torch.tensor([2.0, 4.0]))
    with torch.inference_mode():
        pixel, structure = method.differences(image).mean(dim=0)
        expected = pixel / 2 + structure / 4
        found = method(image)
    grown = nn.functional.interpolate(
        expected[:, None], (64, 64), mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(found.anomaly_map, grown)
    torch.testing.assert_close(found.score, grown.amax(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    "changes", [{"combine": "product"}, {"restoration": "per_stage"}, {"structure_weight": 0.0}]
)
def test_other_readings_train_and_score(
    small_method: Build, fit: Callable[..., None], make_batch: MakeBatch, changes: dict[str, Any]
) -> None:
    method = small_method("mfrnet", **changes)
    fit(method, make_batch(), 2)
    with torch.inference_mode():
        assert method.eval().score_batch(make_batch()).anomaly_map.isfinite().all()
    stages = len(method.backbone.channels) if "restoration" in changes else 1
    assert len(method.restoration) == stages


def test_attention_looks_at_pooled_maps() -> None:
    torch.manual_seed(0)
    attention = MultiPoolingAttention(8, 2, [1, 2])
    x = torch.randn(1, 8, 4, 6)
    tokens = []
    for size, refine in zip((1, 2), attention.refine, strict=True):
        pooled = torch.zeros(1, 8, size, size)
        for i in range(size):
            for j in range(size):
                rows = slice(i * 4 // size, (i + 1) * 4 // size)
                columns = slice(j * 6 // size, (j + 1) * 6 // size)
                pooled[0, :, i, j] = x[0, :, rows, columns].mean(dim=(1, 2))
        tokens += list(refine(pooled)[0].flatten(1).T)
    context = attention.norm(torch.stack(tokens))
    keys, values = attention.key_value(context).chunk(2, dim=-1)
    expected = torch.zeros(1, 8, 4, 6)
    for i in range(4):
        for j in range(6):
            query = attention.query(x[0, :, i, j])
            mixed = []
            for own in (slice(0, 4), slice(4, 8)):
                weights = (keys[:, own] @ query[own] / math.sqrt(4)).softmax(dim=0)
                mixed.append(weights @ values[:, own])
            expected[0, :, i, j] = attention.output(torch.cat(mixed))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-6)


def test_block_adds_position_attention_and_convolution() -> None:
    torch.manual_seed(0)
    block = HybridBlock(8, 2, [1, 2])
    x = torch.randn(2, 8, 4, 4)

    def normed(norm: nn.LayerNorm, value: Tensor) -> Tensor:
        return torch.stack(
            [torch.stack([norm(c) for c in image.flatten(1).T]).T.view(8, 4, 4) for image in value]
        )

    expected = x + block.position(x)
    expected = expected + block.attention(normed(block.norm1, expected))
    expected = expected + block.mlp(normed(block.norm2, expected))
    torch.testing.assert_close(block(x), expected)
    assert block.mlp[1].groups == 32


def test_network_keeps_the_size_and_leaves_out_pools_that_pool_nothing() -> None:
    network = RestorationNetwork(5, [8, 16], [1, 1], 8, [1, 2, 4, 8], (8, 12))
    assert network(torch.rand(2, 5, 8, 12), torch.zeros(2, 1, 8, 12)).shape == (2, 5, 8, 12)
    assert [level[0].attention.pools for level in network.levels] == [(1, 2, 4), (1, 2)]


def test_parameters_are_as_many_as_the_docstring_says(published_method: Build) -> None:
    method = published_method("mfrnet", 256)
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(17.03, abs=0.005)
    assert sum(method.backbone.channels) == 960


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grid": 7}, "multiple of 2"),
        ({"depths": [1]}, "one entry for each"),
        ({"head_dim": 5}, "head_dim=5"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    small_method: Build, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        small_method("mfrnet", **changes)


def test_rules_for_the_score() -> None:
    anomaly_map = torch.rand(2, 1, 20, 30)
    flat = anomaly_map.flatten(1)
    torch.testing.assert_close(score_of(anomaly_map, "max"), flat.max(dim=1).values)
    torch.testing.assert_close(score_of(anomaly_map, "mean"), flat.mean(dim=1))
    torch.testing.assert_close(score_of(anomaly_map, "std"), flat.std(dim=1, correction=0))
    top = flat.sort(dim=1).values[:, -6:].mean(dim=1)  # a hundredth of 600 pixels
    torch.testing.assert_close(score_of(anomaly_map, "top"), top)


@torch.no_grad()
def test_a_wild_channel_does_not_decide_the_pixel_map(method: Any, make_batch: MakeBatch) -> None:
    method.high.copy_(method.low + 1e-3)  # features far beyond 1
    pixel = method.differences(make_batch()["image"])[:, 0]
    assert pixel.min() >= 0
    assert pixel.max() <= 1


def test_start_follows_the_fan_out() -> None:
    torch.manual_seed(0)
    wide, deep = nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
    for layer, fan_out in ((wide, 64 * 9), (deep, 9)):
        init_fan_out(layer)
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert not layer.bias.any()
