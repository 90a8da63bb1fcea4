"""PNI's features, histogram, network and score against slow loops of the paper's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.methods.pni.network import NeighbourNetwork, describe
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def trained(small_method: Build, fit: Build, make_batch: Build) -> Build:
    """Builds ``trained(**changes)``: a tiny PNI with a bank, a histogram and a network."""

    def build(**changes: Any) -> Any:
        method = small_method("pni", **changes)
        fit(method, make_batch(), 2)
        return method.eval()

    return build


def averaged(values: Tensor, count: int) -> Tensor:
    """Adaptive average of a vector, written out: group i reaches from floor to ceil."""
    length = len(values)
    groups = [
        values[i * length // count : -(-(i + 1) * length // count)].mean() for i in range(count)
    ]
    return torch.stack(groups)


def test_features_are_those_of_patchcore() -> None:
    """Unfold, resize the unfolded patches, average: in that order, position by position."""
    torch.manual_seed(0)
    maps, dim = [torch.randn(1, 6, 4, 4), torch.randn(1, 10, 2, 2)], 8
    found = describe(maps, 3, dim, (4, 4))[0]
    unfolded = [F.unfold(m, 3, padding=1).unflatten(2, m.shape[-2:]) for m in maps]
    coarse = F.interpolate(unfolded[1], (4, 4), mode="bilinear", align_corners=False)
    for row in range(4):
        for column in range(4):
            parts = [averaged(m[0, :, row, column], dim) for m in (unfolded[0], coarse)]
            expected = averaged(torch.cat(parts), dim)
            torch.testing.assert_close(found[row, column], expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------ a plain PatchCore


def mean_of_patch(values: Tensor, row: int, column: int, reach: int) -> Tensor:
    """Mean of a (C, h, w) map over a square; zeros lie beyond the border."""
    total = torch.zeros(len(values))
    for r in range(row - reach, row + reach + 1):
        for c in range(column - reach, column + reach + 1):
            if 0 <= r < values.shape[1] and 0 <= c < values.shape[2]:
                total += values[:, r, c]
    return total / (2 * reach + 1) ** 2


def means_of_patches(values: Tensor, reach: int) -> Tensor:
    _, height, width = values.shape
    rows = [[mean_of_patch(values, r, c, reach) for c in range(width)] for r in range(height)]
    return torch.stack([torch.stack(row) for row in rows])  # (h, w, C)


def between(values: Tensor, row: float, column: float) -> Tensor:
    """Value of a (h, w, C) map at a place, from the four nearest positions."""
    row, column = (
        min(max(place, 0.0), size - 1.0)
        for place, size in ((row, values.shape[0]), (column, values.shape[1]))
    )
    top, left = int(row), int(column)
    below, right = min(top + 1, len(values) - 1), min(left + 1, values.shape[1] - 1)
    down, along = row - top, column - left
    upper = (1 - along) * values[top, left] + along * values[top, right]
    lower = (1 - along) * values[below, left] + along * values[below, right]
    return (1 - down) * upper + down * lower


def patchcore_features(maps: list[Tensor], reach: int) -> Tensor:
    """Patches of one image, (h, w, C): means of each map, the coarse one resized, joined."""
    fine, coarse = (means_of_patches(values, reach) for values in maps)
    shrink = len(coarse) / len(fine)
    found = torch.zeros(*fine.shape[:2], fine.shape[2] + coarse.shape[2])
    for row, column in np.ndindex(*fine.shape[:2]):
        place = [(at + 0.5) * shrink - 0.5 for at in (row, column)]
        found[row, column] = torch.cat([fine[row, column], between(coarse, *place)])
    return found


def farthest_first(patches: Tensor, count: int) -> Tensor:
    """Greedy coreset of (n, C) patches, from the first one on."""
    kept = [0]
    while len(kept) < count:
        gaps = torch.stack([(patches - patches[one]).norm(dim=1) for one in kept])
        kept.append(int(gaps.amin(dim=0).argmax()))
    return patches[kept]


def test_without_conditions_it_is_patchcore(small_method: Build, fit: Build) -> None:
    """Three images make the bank; another one is scored."""
    method = small_method(
        "pni", conditions=[], dim=None, border=True, patch=3, share=0.1, projection=10_000,
        smoothing=0,
    )  # fmt: skip
    torch.manual_seed(1)
    image = torch.rand(4, 3, 64, 64)
    maps = [[values[n] for values in method.backbone(image)] for n in range(4)]
    patches = [patchcore_features(own, reach=1) for own in maps]
    bank = farthest_first(torch.cat(patches[:3]).flatten(0, 1), math.ceil(0.1 * 3 * 64))
    fit(method, {"image": image[:3], "category": ["a"] * 3}, 1)
    torch.testing.assert_close(method.bank.items, bank, rtol=1e-4, atol=1e-5)
    expected = torch.zeros(8, 8)
    for row, column in np.ndindex(8, 8):
        expected[row, column] = min((patches[3][row, column] - item).norm() for item in bank)
    found = method.eval().score_patches(method.describe(method.backbone(image[3:])))[0]
    torch.testing.assert_close((found + math.log(0.99)) / 0.99, expected, rtol=1e-4, atol=1e-4)
    map_, score = method(image[3:])
    torch.testing.assert_close(score[0], 0.99 * expected.max() - math.log(0.99))
    for row, column in ((0, 0), (5, 17), (28, 31), (63, 40)):
        distance = between(expected[..., None], (row + 0.5) / 8 - 0.5, (column + 0.5) / 8 - 0.5)
        torch.testing.assert_close(map_[0, 0, row, column], 0.99 * distance[0] - math.log(0.99))


# -------------------------------------------------------------------------------- the network


def network(**changes: Any) -> NeighbourNetwork:
    torch.manual_seed(0)
    arguments = {"dim": 5, "classes": 7, "reach": 1, "width": 12, "depth": 3, "dropout": 0.5,
                 "neighbour_dim": None, "include_center": False}  # fmt: skip
    return NeighbourNetwork(**(arguments | changes)).eval()


@pytest.mark.parametrize("include_center", [False, True])
def test_neighbours_are_the_window_without_its_centre(include_center: bool) -> None:
    patches = torch.randn(2, 4, 3, 5)
    found = network(include_center=include_center).neighbours(patches, torch.arange(24))
    for index in range(24):
        image, row, column = index // 12, index % 12 // 3, index % 3
        expected = []
        for r in range(row - 1, row + 2):
            for c in range(column - 1, column + 2):
                if (r, c) == (row, column) and not include_center:
                    continue
                inside = 0 <= r < 4 and 0 <= c < 3
                expected.append(patches[image, r, c] if inside else torch.zeros(5))
        assert torch.equal(found[index], torch.stack(expected))


def test_the_network_never_sees_the_patch_it_guesses() -> None:
    part, patches = network(), torch.randn(1, 5, 5, 5)
    changed = patches.clone()
    changed[0, 2, 2] += 10
    index = torch.tensor([12, 13])
    before, after = part(patches, index), part(changed, index)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    seeing = network(include_center=True)
    assert not torch.equal(seeing(patches, index)[0], seeing(changed, index)[0])


def test_parameters_of_the_full_network(published_method: Build) -> None:
    method = published_method("pni", 480)
    count = sum(p.numel() for p in method.network.parameters() if p.ndim == 2)
    assert count == 80 * 1024 * 2048 + 9 * 2048**2  # 205.5 M with biases and norms
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(205.5, abs=0.1)
    assert method.grid == (60, 60)
    small = network(dim=1024, reach=4, width=2048, neighbour_dim=128)
    assert small.layers[0].weight.numel() == 80 * 128 * 2048  # 21 M
    assert not small.project.weight.requires_grad


# ------------------------------------------------------------------------ bank and histogram


def test_bank_holds_a_share_of_the_patches_away_from_the_border(
    trained: Build, make_batch: Build
) -> None:
    method = trained()
    image = make_batch()["image"]
    patches = method.describe(method.backbone(image))[:, 1:-1, 1:-1].flatten(0, 2)
    assert len(method.bank) == math.ceil(0.25 * len(patches))
    gaps = (method.bank.items[:, None] - patches).norm(dim=2)
    assert gaps.amin(dim=1).max() < 1e-5
    gaps = (method.bank.items[:, None] - method.bank.items[:8]).norm(dim=2)
    assert torch.equal(method.parents.items, gaps.argmin(dim=1))
    whole = trained(border=True)
    assert len(whole.bank) == math.ceil(0.25 * 2 * 64)


def test_bank_is_a_share_of_all_patches_chosen_from_some(trained: Build) -> None:
    assert len(trained(candidates=20, share=0.1).bank) == math.ceil(0.1 * 2 * 36)
    assert len(trained(candidates=5, share=0.1).bank) == 5


def test_histogram_counts_neighbouring_positions(trained: Build, make_batch: Build) -> None:
    method = trained()
    patches = method.describe(method.backbone(make_batch()["image"]))
    counts = torch.zeros(len(method.bank), 8, 8)
    for image in range(2):
        for row in range(1, 7):
            for column in range(1, 7):
                gaps = (method.bank.items - patches[image, row, column]).norm(dim=1)
                item = int(gaps.argmin())
                for r in range(row - 1, row + 2):
                    for c in range(column - 1, column + 2):
                        counts[item, r, c] += 1
    torch.testing.assert_close(method.histogram.items, counts / counts.sum(dim=0))
    torch.testing.assert_close(method.histogram.items.sum(dim=0), torch.ones(8, 8))


# ----------------------------------------------------------------------------------- the score


def test_score_is_the_distance_to_the_nearest_allowed_item(
    trained: Build, make_batch: Build
) -> None:
    method = trained(tau=0.9)
    patches = method.describe(method.backbone(make_batch()["image"]))
    found = method.score_patches(patches).detach()
    items, limit = method.bank.items, 0.9 / len(method.bank)
    logits = method.network(patches, torch.arange(128)) / 2.0
    guess = logits.softmax(dim=1).view(2, 8, 8, -1).detach()
    different = 0
    for image, row, column in np.ndindex(2, 8, 8):
        gaps = [float((patches[image, row, column] - item).norm()) for item in items]
        scores = []
        seen = method.histogram.items[:, row, column]
        told = guess[image, row, column]
        for share in ([float(told[int(p)]) for p in method.parents.items], seen.tolist()):
            allowed = [c for c in range(len(items)) if share[c] > limit]
            likeliest = max(allowed, key=lambda c: 0.99 * math.exp(-0.99 * gaps[c]))
            scores.append(-math.log(0.99 * math.exp(-0.99 * gaps[likeliest])))
        different += scores[0] != scores[1]
        assert float(found[image, row, column]) == pytest.approx(sum(scores) / 2, rel=1e-4)
    assert different  # or the two conditions were not told apart


@pytest.mark.parametrize("changes", [{"tau": -1.0}, {"conditions": []}])
def test_with_all_items_allowed_the_score_is_patchcores_distance(
    changes: dict[str, Any], trained: Build, make_batch: Build
) -> None:
    method = trained(**changes)
    patches = method.describe(method.backbone(make_batch()["image"]))
    distance, _ = method.bank.nearest(patches.flatten(0, 2))
    expected = 0.99 * distance.view(2, 8, 8) - math.log(0.99)
    torch.testing.assert_close(method.score_patches(patches), expected)


def test_fewer_items_are_allowed_as_tau_grows(trained: Build, make_batch: Build) -> None:
    method = trained()
    patches, index = method.describe(method.backbone(make_batch()["image"])), torch.arange(128)
    counts = []
    for tau in (-1.0, 0.1, 0.5, 1.0, 3.0, 1e9):
        method.tau = tau
        counts.append([allowed.sum(dim=1) for allowed in method.allowed_items(patches, index)])
    for fewer, more in zip(counts[1:], counts[:-1], strict=True):
        for one, other in zip(fewer, more, strict=True):
            assert (one <= other).all()
            assert (one >= 1).all()
    assert (counts[0][0] == len(method.bank)).all()


def test_border_of_the_map_repeats_what_is_inside(
    trained: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, image = trained(), make_batch()["image"]
    drawn = torch.rand(2, 8, 8)
    monkeypatch.setattr(method, "score_patches", lambda patches: drawn)
    prediction = method(image)
    torch.testing.assert_close(prediction.score, drawn[:, 1:-1, 1:-1].amax(dim=(1, 2)))
    monkeypatch.setattr(method, "ring", 0)
    torch.testing.assert_close(method(image).score, drawn.amax(dim=(1, 2)))


def test_blocks_of_positions_change_no_score(
    trained: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = trained()
    patches = method.describe(method.backbone(make_batch()["image"]))
    expected = method.score_patches(patches)
    monkeypatch.setattr(method, "patches", 7)
    torch.testing.assert_close(method.score_patches(patches), expected)


def test_loss_guesses_the_nearest_code(trained: Build, make_batch: Build) -> None:
    method, batch = trained(), make_batch()
    patches = method.describe(method.backbone(batch["image"]))
    index = method.draw_positions(2)
    row, column = index % 64 // 8, index % 8
    assert ((row > 0) & (row < 7) & (column > 0) & (column < 7)).all()
    wanted = torch.cdist(patches.flatten(0, 2)[index], method.bank.items[:8]).argmin(dim=1)
    expected = F.cross_entropy(method.network(patches, index), wanted)
    torch.testing.assert_close(method.losses(batch)["neighbourhood"], expected)


def test_without_a_network_nothing_is_trained(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("pni", conditions=["position"])
    trainer = fit(method, make_batch(), 5)
    assert trainer.global_step == 0
    assert method.eval()(make_batch()["image"]).score.isfinite().all()


def test_a_bank_smaller_than_the_codes_is_the_codes(trained: Build, make_batch: Build) -> None:
    method = trained(codes=500, share=0.1)
    assert torch.equal(method.parents.items, torch.arange(len(method.bank)))
    assert method(make_batch()["image"]).score.isfinite().all()


def test_errors_say_what_to_change(small_method: Build, make_batch: Build) -> None:
    with pytest.raises(UserError, match="train first, or load a checkpoint"):
        small_method("pni").eval()(make_batch()["image"])
    with pytest.raises(
        UserError, match=r"conditions=\['neighbor'\]: choose neighbourhood or position"
    ):
        small_method("pni", conditions=["neighbor"])
    with pytest.raises(UserError, match=r"method\.patch=4 must be odd"):
        small_method("pni", patch=4)
    with pytest.raises(UserError, match=r"method\.codes=1: it must be at least 2"):
        small_method("pni", codes=1)
    with pytest.raises(UserError, match=r"method\.patch=9 leaves no position of a map of 8 x 8"):
        small_method("pni", patch=9)
