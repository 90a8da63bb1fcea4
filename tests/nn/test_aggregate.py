from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from anomaly_lit.nn.aggregate import aggregate, check_multiple, resize, shrink, smooth, top_mean
from anomaly_lit.types import UserError


def resized_by_hand(map_: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with aligned corners: corner pixels keep their values."""
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = i * (map_.shape[0] - 1) / (height - 1)
            x = j * (map_.shape[1] - 1) / (width - 1)
            top, left = min(int(y), map_.shape[0] - 2), min(int(x), map_.shape[1] - 2)
            v, u = y - top, x - left
            result[i, j] = (
                (1 - v) * (1 - u) * map_[top, left]
                + (1 - v) * u * map_[top, left + 1]
                + v * (1 - u) * map_[top + 1, left]
                + v * u * map_[top + 1, left + 1]
            )
    return result


def averaged_by_hand(map_: np.ndarray) -> np.ndarray:
    """Mean of 3 x 3; zeros outside count, so borders lose."""
    padded = np.pad(map_, 1)
    rows, columns = map_.shape
    return np.array(
        [[padded[i : i + 3, j : j + 3].sum() / 9 for j in range(columns)] for i in range(rows)]
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [(8, 6), (5, 9), (16, 12), (20, 30)])
def test_shrinking_is_torchs_antialiased_resizing(size: tuple[int, int], autocast: bool) -> None:
    torch.manual_seed(0)
    feature = torch.randn(2, 3, 16, 12)
    expected = torch.nn.functional.interpolate(feature, size, mode="bilinear", antialias=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = shrink(feature, size)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("average", [False, True])
def test_aggregation_follows_the_formulas(average: bool) -> None:
    torch.manual_seed(0)
    stages = [torch.rand(2, 3, 6, 6), torch.rand(2, 2, 3, 3)]
    found = aggregate(stages, (5, 7), average)
    assert found.shape == (2, 5, 5, 7)
    for image in range(2):
        maps = [stage[image, c].numpy() for stage in stages for c in range(stage.shape[1])]
        for channel, map_ in enumerate(maps):
            expected = resized_by_hand(map_, 5, 7)
            expected = averaged_by_hand(expected) if average else expected
            np.testing.assert_allclose(found[image, channel].numpy(), expected, atol=1e-6)


def test_resize_keeps_the_corners() -> None:
    map_ = torch.rand(1, 1, 4, 4)
    large = resize(map_, (9, 11))
    assert torch.equal(large[..., [0, -1], :][..., [0, -1]], map_[..., [0, -1], :][..., [0, -1]])


def test_resize_may_treat_values_as_squares_of_pixels() -> None:
    map_ = torch.arange(4.0).view(1, 1, 1, 4)
    found = resize(map_, (1, 8), align_corners=False)
    assert found.flatten().tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 9.5])
@pytest.mark.parametrize("size", [(32, 32), (7, 40), (1, 5)])
def test_smoothing_equals_scipy_s(sigma: float, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, 2, *size)
    found = smooth(maps, sigma)
    for image in range(2):
        for channel in range(2):
            expected = ndimage.gaussian_filter(
                maps[image, channel].double().numpy(), sigma, truncate=4.0, mode="reflect"
            )
            np.testing.assert_allclose(found[image, channel].numpy(), expected, atol=2e-6)


def test_no_smoothing_leaves_the_map_alone() -> None:
    map_ = torch.rand(1, 1, 4, 4)
    assert smooth(map_, 0.0) is map_


def test_a_gaussian_may_be_cut_elsewhere() -> None:
    """Against scipy, whose cut is given in deviations."""
    map_ = torch.rand(1, 1, 12, 9, generator=torch.Generator().manual_seed(3))
    expected = ndimage.gaussian_filter(map_[0, 0].numpy(), sigma=4, radius=2)
    np.testing.assert_allclose(smooth(map_, 4.0, 2)[0, 0].numpy(), expected, rtol=1e-5)
    assert torch.equal(smooth(map_, 0.0, 2), map_)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 9), (1.0, 96), (0.001, 1)])
def test_the_mean_of_the_top_share_equals_a_sort(share: float, count: int) -> None:
    maps = torch.randn(3, 1, 12, 8, generator=torch.Generator().manual_seed(2))
    expected = [sorted(one.flatten().tolist(), reverse=True)[:count] for one in maps]
    wanted = torch.tensor([sum(values) / count for values in expected])
    assert torch.allclose(top_mean(maps, share), wanted, atol=1e-6)


def test_sides_that_are_no_multiple_get_the_nearest() -> None:
    check_multiple((28, 42), 14, "the patch")
    with pytest.raises(UserError, match=r"28 x 40: 40 .*14, the patch; set .* to 28 or 42"):
        check_multiple((28, 40), 14, "the patch")
