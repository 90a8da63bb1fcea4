from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from anomaly_lit.masks import BlockMask, CrossedMasks, FixedRatioMask, NoMask, RandomMask
from anomaly_lit.types import UserError

MASKS = [NoMask(), RandomMask(), RandomMask(0.2, 0.4), FixedRatioMask(0.3), BlockMask()]


def draw(mask: Callable[..., Tensor], batch: int = 4, seed: int = 0, side: int = 8) -> Tensor:
    return mask(batch, side, side + 2, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_a_mask_is_one_set_of_hidden_positions_per_image(mask: Callable[..., Tensor]) -> None:
    hidden = draw(mask)
    assert hidden.shape == (1, 4, 8, 10)
    assert hidden.dtype == torch.bool


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_the_generator_alone_decides(mask: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    first = draw(mask, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, draw(mask, seed=5))
    assert torch.equal(state, torch.get_rng_state())  # the global state is left alone


def test_seeds_and_images_differ() -> None:
    hidden = draw(FixedRatioMask(0.5))[0]
    assert not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden, draw(FixedRatioMask(0.5), seed=1)[0])


def test_none_hides_nothing() -> None:
    assert not draw(NoMask()).any()


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 0.999, 1.0])
def test_fixed_ratio_is_exact_and_rounded_down(ratio: float) -> None:
    hidden = FixedRatioMask(ratio)(50, 10, 10, torch.Generator().manual_seed(0))
    assert hidden.sum(dim=(0, 2, 3)).tolist() == [int(100 * ratio + 1e-9)] * 50


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.4), (0.5, 0.5)])
def test_random_share_is_uniform_between_its_bounds(low: float, high: float) -> None:
    share = draw(RandomMask(low, high), batch=2000, side=20)[0].float().mean(dim=(1, 2)).numpy()
    assert share.min() >= low - 1 / 440
    assert share.max() <= high
    if high > low:
        scaled = (share + 0.5 / 440 - low) / (high - low)
        assert stats.kstest(scaled, "uniform").pvalue > 0.01


def test_every_position_is_hidden_equally_often() -> None:
    hidden = draw(FixedRatioMask(0.25), batch=4000)[0].float().mean(dim=0)
    assert hidden.min() > 0.21
    assert hidden.max() < 0.29


def test_some_image_hides_nothing_and_none_hides_everything() -> None:
    count = RandomMask()(5000, 4, 4, torch.Generator().manual_seed(0)).sum(dim=(0, 2, 3))
    assert count.min() == 0
    assert count.max() == 15  # the share is below one


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.1)])
def test_shares_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="low="):
        RandomMask(low, high)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="ratio"):
        FixedRatioMask(ratio)


@pytest.mark.parametrize("sets", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_crossed_sets_hide_every_position_once(size: int, sets: int) -> None:
    hidden = draw(CrossedMasks([size], sets), batch=3, side=11)
    assert hidden.shape == (sets, 3, 11, 13)
    assert (hidden.sum(dim=0) == 1).all()


def test_crossed_sets_are_whole_cells_of_nearly_equal_number() -> None:
    hidden = draw(CrossedMasks([3], 4), batch=2, side=8)  # 3 x 4 cells on 8 x 10 positions
    counts = []
    for chosen in hidden.flatten(0, 1):
        count = 0
        for top in range(0, 8, 3):
            for left in range(0, 10, 3):
                cell = chosen[top : top + 3, left : left + 3]
                assert cell.all() or not cell.any()
                count += int(cell.all())
        counts.append(count)
    assert counts == [3] * 8


def test_two_crossed_sets_are_complements_and_images_differ() -> None:
    one, other = draw(CrossedMasks([2], 2), batch=3)
    assert torch.equal(one, ~other)
    assert not torch.equal(one[0], one[1])


def test_every_size_is_drawn_in_training_and_used_in_scoring() -> None:
    mask = CrossedMasks([1, 4], 2)
    runs = {int(draw(mask, seed=seed)[0, 0, 0, :4].float().diff().abs().sum()) for seed in range(9)}
    assert len(runs) > 1  # cells of four and of one
    generator = torch.Generator().manual_seed(0)
    assert [len(sets) for sets in mask.for_scoring(8, 8, generator)] == [2, 2]
    assert len(CrossedMasks([1, 4], 2, [4]).for_scoring(8, 8, generator)) == 1


def test_a_map_with_fewer_cells_than_sets_is_refused() -> None:
    with pytest.raises(UserError, match="fewer than sets=5 cells of side 4"):
        draw(CrossedMasks([4], 5), side=6)
    assert len(CrossedMasks([2, 4], 5).for_scoring(6, 8, torch.Generator())) == 1
    with pytest.raises(UserError, match="sets=1"):
        CrossedMasks([4], 1)


@pytest.mark.parametrize(("ratio", "side"), [(0.0, 2), (0.4, 2), (0.9, 3), (1.0, 5)])
def test_blocks_are_hidden_whole_or_not_at_all(ratio: float, side: int) -> None:
    hidden = BlockMask(ratio, side)(6, 8, 10, torch.Generator().manual_seed(0))[0]
    rows, columns = -(-8 // side), -(-10 // side)
    for image in hidden:
        whole = 0
        for row in range(rows):
            for column in range(columns):
                block = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
                assert block.all() or not block.any()
                whole += int(block.all())
        assert whole == int(ratio * rows * columns + 1e-6)


def test_blocks_hide_nothing_in_scoring() -> None:
    (hidden,) = BlockMask(0.9).for_scoring(8, 10, torch.Generator().manual_seed(0))
    assert hidden.shape == (1, 1, 8, 10)
    assert not hidden.any()


@pytest.mark.parametrize("numbers", [{"ratio": 1.5}, {"side": 0}])
def test_impossible_blocks_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(UserError, match="="):
        BlockMask(**numbers)  # type: ignore[arg-type]
