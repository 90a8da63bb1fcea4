"""PRN against its formulas written out, and the facts its description states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anomaly_lit.losses import total
from anomaly_lit.methods.prn import check_stages
from anomaly_lit.methods.prn.network import Decoder, Fusion, PatchAttention, cut, join
from anomaly_lit.types import UserError

Build = MakeBatch = Fit = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("prn")


def learned(method: Any, *batches: Any) -> Any:
    """A method that took its prototypes from these batches."""
    method.eval()
    method.normal_batches = lambda split, most: iter(batches)
    with torch.no_grad():
        method.learn()
    return method


# -------------------------------------------------------------------------------- prototypes


def test_an_image_that_is_a_prototype_has_no_residual(
    small_method: Build, make_batch: MakeBatch
) -> None:
    method, batch = small_method("prn", share=1.0), make_batch(3)
    learned(method, batch)
    with torch.no_grad():
        maps = method.describe(batch["image"])
        away = method.describe(1 - batch["image"])
        for feature, other, bank in zip(maps, away, method.prototypes, strict=False):
            assert len(bank) == 3
            assert method.residual(feature, bank).max() < 1e-6
            assert method.residual(other, bank).max() > 1e-3


def test_residual_is_the_squared_difference_to_the_nearest_whole_map(
    small_method: Build, make_batch: MakeBatch
) -> None:
    method = learned(small_method("prn", share=1.0), make_batch(4))
    bank = method.prototypes[1]
    feature = bank.items[[2, 0, 3]] + 0.1 * torch.rand(3, *bank.items.shape[1:])
    for image, found in zip(feature, method.residual(feature, bank), strict=True):
        gaps = [float((image - item).square().sum()) for item in bank.items]
        nearest = bank.items[gaps.index(min(gaps))]
        torch.testing.assert_close(found, (image - nearest) ** 2)


def test_prototypes_are_taken_by_category_and_in_proportion(
    small_method: Build, make_batch: MakeBatch
) -> None:
    """A category may begin within a batch; each has at least one prototype of each stage."""
    batch = make_batch(8)
    first = {"image": batch["image"][:5], "category": ["a"] * 4 + ["b"]}
    second = {"image": batch["image"][5:], "category": ["b", "b", "c"]}
    method = learned(small_method("prn", share=0.5), first, second)
    assert [len(bank) for bank in method.prototypes] == [2 + 2 + 1] * 2
    with torch.no_grad():
        maps = method.describe(batch["image"])
    for feature, bank in zip(maps, method.prototypes, strict=False):
        torch.testing.assert_close(bank.items[-1], feature[-1])  # alone in its category
        means = feature[4:7].mean(0), bank.items[2:4]
        assert means[1].min() >= feature[4:7].min() - 1e-4  # centres lie among their images
        assert means[1].max() <= feature[4:7].max() + 1e-4


def test_without_prototypes_nothing_is_scored(method: Any, make_batch: MakeBatch) -> None:
    with pytest.raises(UserError, match="no prototypes yet: train first"):
        method.eval()(make_batch()["image"])


# ----------------------------------------------------------------------------------- network


@pytest.mark.parametrize("division", [1, 2, 4, 8])
def test_cutting_and_joining_gives_the_same_map(division: int) -> None:
    x = torch.rand(2, 3, 8, 16)
    patches = cut(x, division)
    assert patches.shape == (2, division**2, 3 * 8 * 16 // division**2)
    assert torch.equal(join(patches, x.shape), x)
    tall, wide = 8 // division, 16 // division
    for number in range(division**2):
        row, column = divmod(number, division)
        patch = x[:, :, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
        assert torch.equal(patches[:, number], patch.flatten(1))


def test_attention_between_patches_equals_its_formula() -> None:
    attend, x = PatchAttention(3, 2), torch.rand(2, 3, 4, 6)
    weights = attend.query, attend.key, attend.value
    found = attend(x)
    for image, mixed in zip(x, found, strict=True):
        query, key, value = (weight * image for weight in weights)
        quarters = [(slice(r, r + 2), slice(c, c + 3)) for r in (0, 2) for c in (0, 3)]
        for rows, columns in quarters:
            logits = [
                float((query[:, rows, columns] * key[:, r, c]).sum().detach())
                / math.sqrt(3 * 2 * 3)
                for r, c in quarters
            ]
            shares = torch.tensor(logits).softmax(0)
            expected = sum(
                share * value[:, r, c] for share, (r, c) in zip(shares, quarters, strict=True)
            )
            torch.testing.assert_close(mixed[:, rows, columns], expected, rtol=1e-4, atol=1e-6)


def test_a_single_patch_attends_to_itself() -> None:
    attend, x = PatchAttention(3, 1), torch.rand(2, 3, 4, 6)
    torch.testing.assert_close(attend(x), attend.value * x)


def test_fusion_adds_the_other_stages_to_each() -> None:
    fusion = Fusion([4, 8, 16])
    maps = [torch.rand(2, 4, 16, 8), torch.rand(2, 8, 8, 4), torch.rand(2, 16, 4, 2)]
    for target, found in enumerate(fusion(maps)):
        expected = maps[target].clone()
        for source in {0, 1, 2} - {target}:
            expected = expected + fusion.paths[target][source](maps[source])
        torch.testing.assert_close(found, expected)
        assert found.shape == maps[target].shape
    down = fusion.paths[2][0]
    assert (down.kernel_size, down.stride, down.groups) == ((5, 5), (4, 4), 4)
    assert fusion.paths[1][0].kernel_size == (3, 3)
    assert fusion.paths[0][2][1].kernel_size == (1, 1)


def test_decoder_joins_each_stage_on_its_way_up() -> None:
    decoder = Decoder([4, 8], deepest=16)
    maps = [torch.rand(2, 8, 16, 8), torch.rand(2, 16, 8, 4)]
    found = decoder(maps, torch.rand(2, 16, 4, 2), (64, 32))
    assert found.shape == (2, 1, 64, 32)
    widths = [up[0].in_channels for up in decoder.up]
    assert widths == [24, 12]  # of the way up, the image and its residual


def test_parameters_are_as_many_as_stated(published_method: Build) -> None:
    method = published_method("prn", 256)
    assert [count.items.shape[1:] for count in method.prototypes] == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16)
    ]  # fmt: skip
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(55.70, abs=0.01)
    attention = sum(p.numel() for p in method.segmenter.attention.parameters())
    assert attention / 1e6 == pytest.approx(50.63, abs=0.01)


# -------------------------------------------------------------------------------- anomalies


def test_it_learns_without_any_real_defect(method: Any, fit: Fit, make_batch: MakeBatch) -> None:
    batch = make_batch()
    del batch["seen"], batch["seen_mask"]
    fit(method, batch, 1)
    before = float(total(method.losses(batch)).detach())
    fit(method, batch, 10)
    image, truth = method.draw_images(batch)
    assert image is batch["corrupted"]
    assert truth is batch["corruption"]
    assert float(total(method.losses(batch)).detach()) < before


def drawn(method: Any, batch: Any, times: int) -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(times):
        torch.manual_seed(seed)
        yield method.draw_images(batch)


def test_half_of_the_anomalous_images_show_a_real_defect(
    method: Any, make_batch: MakeBatch
) -> None:
    """And half of these are the real image as it is; normal images stay normal."""
    batch = make_batch(8)
    batch["corruption"] = batch["corruption"].clone()
    batch["corruption"][:4] = False
    batch["corrupted"] = torch.where(batch["corruption"], batch["corrupted"], batch["image"])
    batch["seen"] = batch["seen"] * 0.5
    kinds: list[str] = []
    for image, truth in drawn(method, batch, 60):
        assert torch.equal(image[:4], batch["image"][:4])
        assert not truth[:4].any()
        for row in range(4, 8):
            normal = torch.where(truth[row], 0.0, image[row] - batch["image"][row])
            if torch.equal(image[row], batch["corrupted"][row]):
                kinds.append("synthetic")
            elif torch.equal(image[row], batch["seen"][row]):
                kinds.append("real")
                assert torch.equal(truth[row], batch["seen_mask"][row])
            else:
                kinds.append("extended")
                assert not normal.any()  # outside of the defect, a normal image
    shares = [kinds.count(kind) / len(kinds) for kind in ("synthetic", "real", "extended")]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.08)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"seen_share": 0.0}, "corrupted"), ({"seen_share": 1.0, "real_share": 1.0}, "seen")],
)
def test_shares_of_none_and_of_all(
    changes: Any, kind: str, small_method: Build, make_batch: MakeBatch
) -> None:
    batch = make_batch(4)
    for image, _ in drawn(small_method("prn", **changes), batch, 5):
        assert torch.equal(image, batch[kind])


# ------------------------------------------------------------------------- losses, scores


def test_losses_equal_their_formulas(small_method: Build, make_batch: MakeBatch) -> None:
    method, batch = small_method("prn"), make_batch()
    del batch["seen"]
    learned(method, batch)
    with torch.no_grad():
        found = method.losses(batch)
        share = method.logits(batch["corrupted"]).sigmoid().flatten().tolist()
    truth = batch["corruption"].flatten().tolist()
    distance = focal = 0.0
    for s, y in zip(share, truth, strict=True):
        distance += 0.5 * (s - y) ** 2  # never as far as 1
        right = s if y else 1 - s
        right = right * (1 - 1e-5) + (1 - right) * 1e-5 + 1e-5
        focal += 0.5 * max(1 - right, 0) ** 4 * -math.log(right)
    assert float(found["distance"]) == pytest.approx(distance / len(truth), rel=1e-4)
    assert float(found["focal"]) == pytest.approx(5 * focal / len(truth), rel=1e-3)


def test_score_is_the_mean_of_the_largest_pixels(method: Any, make_batch: MakeBatch) -> None:
    batch = make_batch()
    learned(method, batch)
    with torch.no_grad():
        anomaly_map, score = method(batch["image"])
    assert anomaly_map.min() >= 0
    assert anomaly_map.max() <= 1
    for one, found in zip(anomaly_map, score, strict=True):
        largest = sorted(one.flatten().tolist())[-10:]
        assert float(found) == pytest.approx(sum(largest) / 10, rel=1e-5)


def test_images_of_another_size_are_scored_at_theirs(method: Any, make_batch: MakeBatch) -> None:
    learned(method, make_batch())
    with torch.no_grad():
        found = method(make_batch(2, 96, 80)["image"])
    assert found.anomaly_map.shape == (2, 1, 96, 80)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 72}, "72 is no multiple of 16, .*times method.divisions"),
        ({"divisions": [1, 3]}, "64 is no multiple of 48"),
        ({"divisions": []}, r"method\.divisions=\[\]"),
        ({"share": 0.0}, r"method\.share=0\.0"),
        ({"top": 0, "blocks": 0}, r"method\.blocks=0, method\.top=0"),
        ({"alpha": 2.0, "real_share": -0.1}, r"method\.alpha=2\.0, method\.real_share=-0\.1"),
        ({"changes": 11}, r"method\.changes=11"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: Any, words: str, small_method: Build) -> None:
    with pytest.raises(UserError, match=words):
        small_method("prn", **changes)


@pytest.mark.parametrize("strides", [[4], [4, 8, 8], [4, 16, 32]])
def test_stages_that_do_not_halve_are_refused(strides: list[int]) -> None:
    with pytest.raises(UserError, match=r"out_indices: these stages have strides of \["):
        check_stages(strides)
