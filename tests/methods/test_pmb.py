"""PMB's memories against plain loops, its laterals, and the error that a histogram tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.methods.pmb import background_level
from anomaly_lit.methods.pmb.network import PartitionMemory, address, cut, entropy, joined
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def memory(parts: int = 2, slots: int = 5) -> PartitionMemory:
    torch.manual_seed(0)
    return PartitionMemory(4, parts, slots, block=2, temperature=0.1)


# ---------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_windows_put_together_are_the_map(parts: int) -> None:
    map_ = torch.randn(2, 3, 8, 12)
    windows = cut(map_, parts)
    assert windows.shape == (2, parts**2, 96 // parts**2, 3)
    assert torch.equal(joined(windows, parts, (8, 12)), map_)
    last = map_[1, :, -8 // parts :, -12 // parts :]
    assert torch.equal(windows[1, -1], last.flatten(1).T)


def test_weights_are_a_shrunk_softmax() -> None:
    logits = 3 * torch.randn(7, 6)
    found = address(logits)
    for row, weights in zip(logits, found, strict=True):
        raw = [math.exp(float(x)) for x in row]
        raw = [x / sum(raw) for x in raw]
        kept = [w if w > 1 / 6 else 0.0 for w in raw]
        expected = torch.tensor([w / sum(kept) for w in kept])
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(7))


def test_slots_that_are_all_alike_are_read_alike() -> None:
    """The shrinkage leaves nothing of such a row."""
    found = address(torch.tensor([[2.0, 2.0, 2.0, 2.0], [9.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(found[0], torch.full((4,), 0.25))
    assert torch.equal(found[1], torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_each_window_reads_its_own_slots() -> None:
    part, map_ = memory(), torch.randn(2, 4, 8, 8)
    found, attention = part(map_)
    queries = part.query(map_)  # (2, 4, 4, 4)
    read = torch.empty_like(queries)
    for image in range(2):
        for row in range(4):
            for column in range(4):
                number = 2 * (row // 2) + column // 2
                slots = part.slots[number]
                cosine = F.cosine_similarity(queries[image, :, row, column], slots, dim=1)
                weights = address(cosine / 0.1)
                place = 2 * (row % 2) + column % 2
                torch.testing.assert_close(attention[image, number, place], weights)
                read[image, :, row, column] = weights @ slots
    torch.testing.assert_close(found, part.restore(read))


def test_gradient_of_a_window_touches_its_own_slots_only() -> None:
    part = memory()
    found, _ = part(torch.randn(1, 4, 8, 8))
    found[..., :4, 4:].sum().backward()  # the second of four windows
    touched = part.slots.grad.flatten(1).abs().sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, False]


def test_a_query_sees_its_block_and_the_eight_around_it() -> None:
    part, map_ = memory(), torch.randn(1, 4, 12, 12, requires_grad=True)
    part.query(map_)[0, :, 2, 2].sum().backward()
    seen = map_.grad[0].abs().sum(dim=0) > 0
    assert seen[2:8, 2:8].all()
    assert seen.sum() == 36


def test_entropy_is_that_of_the_attention() -> None:
    _, attention = memory()(torch.randn(2, 4, 8, 8))
    expected = torch.distributions.Categorical(attention).entropy().mean()
    torch.testing.assert_close(entropy(attention), expected, atol=1e-5, rtol=1e-4)


def test_a_map_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(UserError, match="map of 8 x 6 cannot be divided into 2 x 2 parts of block"):
        memory()(torch.randn(1, 4, 8, 6))


def test_a_size_that_does_not_fit_is_refused_before_training(published_method: Build) -> None:
    assert published_method("pmb", 256).multiple == 64


# -------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "laterals", [["pmb", "skip", "pmb"], ["skip", "pmb", "skip"], ["none", "none", "pmb"]]
)
def test_laterals_alternate_in_either_order(
    laterals: list[str], small_method: Build, make_batch: Build
) -> None:
    method = small_method("pmb", laterals=laterals)
    assert sorted(method.memories) == [str(n) for n, kind in enumerate(laterals) if kind == "pmb"]
    rebuilt, attentions = method.rebuild(make_batch()["image"])
    assert rebuilt.shape == (2, 3, 64, 64)
    assert 0 <= rebuilt.min() <= rebuilt.max() <= 1
    assert len(attentions) == laterals.count("pmb")


def test_a_closed_lateral_hands_nothing_on(small_method: Build, make_batch: Build) -> None:
    method = small_method("pmb", laterals=["none", "none", "pmb"]).eval()
    image = make_batch()["image"]
    *_, deepest = method.encoder(2 * image - 1)
    remembered, _ = method.memories["2"](deepest)
    expected = method.decoder([None, None, remembered])
    torch.testing.assert_close(method.rebuild(image)[0], expected)


def test_one_partition_serves_all_stages(small_method: Build) -> None:
    method = small_method("pmb", partition=2)
    assert [m.slots.shape[0] for m in method.memories.values()] == [4, 4]


def test_parameters_of_the_full_network(published_method: Build) -> None:
    method = published_method("pmb", 256)
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(42.4, abs=0.1)


def test_losses_are_those_of_reconstruction_and_reading(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("pmb").eval(), make_batch()
    losses = method.losses(batch)
    rebuilt, attentions = method.rebuild(batch["image"])
    torch.testing.assert_close(losses["pixel"], F.mse_loss(rebuilt, batch["image"]))
    expected = 2e-4 * sum(entropy(attention) for attention in attentions)
    torch.testing.assert_close(losses["entropy"], expected)
    assert set(losses) == {"pixel", "structure", "entropy"}
    plain = small_method("pmb", laterals=["none", "skip", "skip"])
    assert set(plain.losses(batch)) == {"pixel", "structure"}


def test_slots_learn_faster(small_method: Build, fit: Build, make_batch: Build) -> None:
    method = small_method("pmb", memory_rate=7.0)
    trainer = fit(method, make_batch(), 1)
    others, slots = trainer.optimizers[0].param_groups
    assert slots["lr"] == pytest.approx(7 * others["lr"])
    assert len(slots["params"]) == 2
    together = len(others["params"]) + len(slots["params"])
    assert together == len(list(method.parameters()))


# ------------------------------------------------------------------- error of the background


def slow_level(values: list[float], bins: int, box: int, level: float) -> float:
    largest = max(values)
    counts = [0] * bins
    for value in values:
        counts[min(int(value / largest * bins), bins - 1)] += 1
    half = box // 2
    mean = [
        sum(counts[n] for n in range(k - half, k + half + 1) if 0 <= n < bins) / box
        for k in range(bins)
    ]
    mode = mean.index(max(mean))
    for k in range(mode + 1, bins):
        if mean[k] < level * mean[mode]:
            return (k + 0.5) / bins * largest
    return largest


@pytest.mark.parametrize(("bins", "box", "level"), [(256, 5, 0.05), (32, 1, 0.2), (16, 3, 0.5)])
def test_level_is_where_the_histogram_has_fallen(bins: int, box: int, level: float) -> None:
    torch.manual_seed(0)
    difference = torch.randn(3, 1, 40, 40).abs() * torch.tensor([0.1, 0.02, 0.3]).view(3, 1, 1, 1)
    difference[0, 0, :4, :4] = 0.9
    found = background_level(difference, bins, box, level).flatten()
    expected = [slow_level(d.flatten().double().tolist(), bins, box, level) for d in difference]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def with_difference(method: Any, monkeypatch: pytest.MonkeyPatch, difference: Tensor) -> Any:
    monkeypatch.setattr(method, "difference", lambda image: difference)
    return method.eval()(torch.zeros(len(difference), 3, 64, 64))


def test_a_constant_difference_leaves_nothing_and_a_bright_square_stays(
    small_method: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = small_method("pmb", smoothing=0.0)
    difference = torch.full((3, 1, 64, 64), 0.1)
    difference[1] += 0.02 * torch.rand(64, 64)
    difference[1, 0, 20:30, 20:30] = 0.7
    difference[2] = 0.0
    found = with_difference(method, monkeypatch, difference).anomaly_map
    assert found[0].max() == 0
    assert (found[1, 0, 20:30, 20:30] > 0.5).all()
    found[1, 0, 20:30, 20:30] = 0
    assert found[1].max() < 0.02
    assert found[2].max() == 0


def test_score_is_the_mean_of_the_largest_differences_before_the_cut(
    small_method: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    difference = torch.rand(2, 1, 64, 64)
    expected = difference.flatten(1).sort(dim=1).values[:, -20:].mean(dim=1)
    for hee in (True, False):
        method = small_method("pmb", smoothing=0.0, hee=hee)
        found = with_difference(method, monkeypatch, difference)
        torch.testing.assert_close(found.score, expected)
    assert torch.equal(found.anomaly_map, difference)


def test_the_cut_costs_no_parameter_and_stays_below_that_of_normal_images(
    small_method: Build, fit: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = small_method("pmb", smoothing=0.0), make_batch()
    assert method.guard == torch.inf
    count = sum(p.numel() for p in method.parameters())
    assert count == sum(p.numel() for p in small_method("pmb", hee=False).parameters())
    fit(method, batch, 1)
    with torch.no_grad():
        values = method.eval().difference(batch["image"]).flatten().sort().values
    torch.testing.assert_close(method.guard, values[int(0.995 * len(values)) - 1])
    method.guard.fill_(0.05)
    difference = torch.full((1, 1, 64, 64), 0.2)
    found = with_difference(method, monkeypatch, difference).anomaly_map
    torch.testing.assert_close(found, torch.full_like(found, 0.15))


def test_errors_say_what_to_change(small_method: Build) -> None:
    with pytest.raises(UserError, match="give one of none, skip, pmb for each of the 3 stages"):
        small_method("pmb", laterals=["pmb", "pmb"])
    with pytest.raises(UserError, match="and not none for the last"):
        small_method("pmb", laterals=["pmb", "pmb", "none"])
    with pytest.raises(UserError, match=r"partition=\[1, 2\]: give 3 numbers"):
        small_method("pmb", partition=[1, 2])
    with pytest.raises(UserError, match=r"method\.slots=1: it must be at least 2"):
        small_method("pmb", slots=1)
    with pytest.raises(UserError, match=r"method\.box=4 must be odd"):
        small_method("pmb", box=4)
