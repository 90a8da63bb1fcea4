"""Parts that Dinomaly and INP-Former share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anomaly_lit.nn.aggregate import resize, smooth, top_mean
from anomaly_lit.nn.rebuilding import (
    check_depth,
    heads_of,
    init_truncated,
    mirrored_groups,
    scored,
    to_map,
    to_tokens,
)
from anomaly_lit.types import UserError


def test_tokens_are_positions_row_by_row() -> None:
    maps = torch.rand(2, 5, 3, 4)
    tokens = to_tokens(maps)
    assert torch.equal(tokens[1, 2 * 4 + 3], maps[1, :, 2, 3])
    assert torch.equal(to_map(tokens, (3, 4)), maps)


def test_the_last_blocks_of_a_decoder_are_the_first_group() -> None:
    outputs = [torch.full((1, 2, 3), float(i)) for i in range(1, 9)]
    found = mirrored_groups(outputs, 2)
    assert [float(each[0, 0, 0]) for each in found] == [6.5, 2.5]
    assert [float(each[0, 0, 0]) for each in mirrored_groups(outputs, 8)] == list(range(8, 0, -1))


def test_depth_and_heads_that_do_not_fit_are_refused() -> None:
    check_depth(8, 2)
    with pytest.raises(UserError, match=r"depth=7 must be a multiple of the 2 maps"):
        check_depth(7, 2)
    assert [heads_of(dim, None) for dim in (384, 768, 1024, 32)] == [6, 12, 16, 1]
    with pytest.raises(UserError, match="heads=5 must divide the 384"):
        heads_of(384, 5)


def test_weights_start_in_a_narrow_cut_normal_distribution() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 300)
    init_truncated(layer)
    weights = layer.weight.detach()
    assert float(weights.abs().max()) <= 0.03
    assert float(weights.std()) == pytest.approx(0.01, rel=0.03)
    assert not layer.bias.any()


@pytest.mark.parametrize("size", [(56, 56), (56, 84)])
def test_a_score_is_the_top_of_the_map_at_256_pixels(size: tuple[int, int]) -> None:
    gaps = [torch.rand(2, 1, size[0] // 14, size[1] // 14) for _ in range(2)]
    anomaly_map, score = scored(gaps, size)
    assert anomaly_map.shape == (2, 1, *size)
    mean = (resize(gaps[0], size) + resize(gaps[1], size)) / 2
    wide = (256, 256 * size[1] // size[0])
    smoothed = smooth(nn.functional.interpolate(mean, wide, mode="bilinear"), 4.0, 2)
    assert torch.allclose(score, top_mean(smoothed))
    flat, _ = scored([torch.ones(1, 1, 4, 4)], (56, 56))
    assert torch.allclose(flat, torch.ones(1, 1, 56, 56))  # no lower at the borders


def test_the_value_of_a_patch_can_be_put_at_its_centre() -> None:
    patches = torch.zeros(1, 1, 8, 8)
    patches[..., 2, 5] = 1
    anomaly_map, _ = scored([patches], (112, 112), align_corners=False)
    weights, places = anomaly_map[0, 0] / anomaly_map.sum(), torch.arange(112.0)
    assert float(weights.sum(1) @ places) == pytest.approx(2 * 14 + 6.5, abs=0.05)
    assert float(weights.sum(0) @ places) == pytest.approx(5 * 14 + 6.5, abs=0.05)
