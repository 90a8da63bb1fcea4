"""FMR-Net's memory, contrast, rearrangement, stages and maps against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.losses import MSGMSLoss, gms_map, ssim_map
from anomaly_lit.methods.fmr_net import edge_difference
from anomaly_lit.methods.fmr_net.network import (
    ContrastiveMemory,
    Decoder,
    Encoder,
    Rearrangement,
    contrast,
)
from anomaly_lit.nn.aggregate import resize, smooth
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def memory(dim: int = 6, slots: int = 5) -> ContrastiveMemory:
    torch.manual_seed(0)
    return ContrastiveMemory(dim, slots, 0.1)


# ---------------------------------------------------------------------------------- the memory


def test_memory_replaces_positions_that_are_unlike_all_slots() -> None:
    part, map_ = memory(), torch.randn(2, 6, 3, 4)
    part.threshold.fill_(0.5)
    recall = part(map_)
    token = part.project(map_)
    slots = F.normalize(part.slots, dim=1)
    for image in range(2):
        for place in range(12):
            row, column = place // 4, place % 4
            direction = F.normalize(token[image, :, row, column], dim=0)
            cosine = slots @ direction
            score = 1 - cosine.max()
            gate = 1 / (1 + math.exp(-(float(score) - 0.5) / 0.05))
            assert float(recall.gate[image, 0, row, column]) == pytest.approx(gate, abs=1e-4)
            assert float(recall.score()[image, place]) == pytest.approx(float(score), abs=1e-5)
            read = (cosine / 0.1).softmax(dim=0) @ slots
            remembered = part.restore(read.view(1, 6, 1, 1))[0, :, 0, 0]
            expected = (1 - gate) * map_[image, :, row, column] + gate * remembered
            torch.testing.assert_close(
                recall.out[image, :, row, column], expected, atol=1e-4, rtol=0
            )


def test_gate_is_shut_where_a_position_is_a_slot() -> None:
    part, map_ = memory(slots=12), torch.randn(1, 6, 3, 4)
    with torch.no_grad():
        part.slots.copy_(part.tokens(map_)[0])
    part.threshold.fill_(0.5)
    recall = part(map_)
    assert recall.gate.max() < 1e-4
    torch.testing.assert_close(recall.out, map_, atol=1e-3, rtol=0)
    torch.testing.assert_close(recall.score(), torch.zeros(1, 12), atol=1e-5, rtol=0)


def test_memory_starts_with_centres_and_the_scores_of_normal_positions() -> None:
    part, tokens = memory(), F.normalize(torch.randn(200, 6), dim=1)
    with torch.no_grad():
        part.start(3 * torch.randn(5, 6), tokens)
    torch.testing.assert_close(part.slots.norm(dim=1), torch.ones(5))
    scores = 1 - (tokens @ part.slots.T).amax(dim=1)
    assert float((scores <= part.threshold).float().mean()) == pytest.approx(0.95, abs=0.01)


def test_threshold_follows_normal_positions_only() -> None:
    part = memory()
    part.threshold.fill_(1.0)
    score = torch.cat([torch.linspace(0, 0.2, 101), torch.full((50,), torch.nan)])
    part.move_threshold(score, 0.9)
    assert float(part.threshold) == pytest.approx(0.9 + 0.1 * 0.19, abs=1e-5)
    part.move_threshold(torch.full((151,), torch.nan), 0.9)
    assert float(part.threshold) == pytest.approx(0.919, abs=1e-5)


def test_spread_counts_pairs_of_slots_that_are_too_similar() -> None:
    part = memory()
    slots = F.normalize(part.slots, dim=1)
    pairs = [
        max(0.0, float(slots[i] @ slots[j]) - 0.5) for i in range(5) for j in range(5) if i != j
    ]
    assert float(part.spread()) == pytest.approx(sum(pairs) / 20, abs=1e-6)


@pytest.mark.parametrize("defects", [0, 3, 24])
def test_contrast_is_that_of_the_formula(defects: int) -> None:
    part = memory()
    recall = part(torch.randn(2, 6, 3, 4))
    cosine = recall.cosine.flatten(0, 1)
    defect = torch.arange(24) < defects
    chosen = torch.arange(8)
    found = contrast(recall, defect, chosen, 0.1)
    rivals = [q for q in chosen.tolist() if defect[q]]
    terms = []
    for m in range(defects, 24):
        j = int(cosine[m].argmax())
        below = sum(math.exp(float(s) / 0.1) for s in cosine[m])
        below += sum(math.exp(float(cosine[q, j]) / 0.1) for q in rivals)
        terms.append(-math.log(math.exp(float(cosine[m, j]) / 0.1) / below))
    margin = [max(0.0, float(cosine[q].max()) - 0.3) for q in rivals]
    expected = sum(terms) / max(len(terms), 1) + sum(margin) / max(len(margin), 1)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found.backward()
    assert part.slots.grad.isfinite().all()


# --------------------------------------------------------------------------- the rearrangement


def test_rearrangement_without_a_defect_is_the_identity() -> None:
    for kind in ("texton", "attention"):
        part = Rearrangement(4, 2, 1, 0.05, kind)
        lateral = torch.randn(2, 4, 10, 12)
        torch.testing.assert_close(part(lateral, torch.zeros(2, 1, 5, 6)), lateral)


def test_textons_are_rewritten_from_normal_ones_elsewhere() -> None:
    torch.manual_seed(0)
    part = Rearrangement(3, 2, 1, 0.2, "texton")
    lateral, gate = torch.randn(1, 3, 10, 12), torch.zeros(1, 1, 5, 6)
    gate[0, 0, 1, 2], gate[0, 0, 4, 5] = 1.0, 0.6
    padded = F.pad(lateral, (1, 1, 1, 1))[0]
    places = [(r, c) for r in range(5) for c in range(6)]
    textons = [padded[:, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] for r, c in places]
    total, times = torch.zeros(3, 12, 14), torch.zeros(3, 12, 14)
    for (r, c), texton in zip(places, textons, strict=True):
        weights = []
        for (r2, c2), other in zip(places, textons, strict=True):
            cosine = F.cosine_similarity(texton.flatten(), other.flatten(), dim=0)
            near = abs(r - r2) <= 1 and abs(c - c2) <= 1
            share = 1 - min(float(gate[0, 0, r2, c2]), 0.999)
            weights.append(0.0 if near else share * math.exp(float(cosine) / 0.2))
        found = sum(w / sum(weights) * t for w, t in zip(weights, textons, strict=True))
        g = float(gate[0, 0, r, c])
        total[:, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] += (1 - g) * texton + g * found
        times[:, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] += 1
    expected = (total / times)[:, 1:-1, 1:-1]
    torch.testing.assert_close(part(lateral, gate)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["texton", "attention"])
def test_defects_and_neighbours_give_nothing(kind: str) -> None:
    part = Rearrangement(4, 2, 1, 0.05, kind)
    gate = torch.zeros(1, 1, 6, 6)
    gate[0, 0, 2, 3] = 1.0
    textons = torch.randn(1, 1, 64).expand(1, 36, 64)  # all alike: only the masks tell
    weight = part.weights(textons, gate)
    assert weight.shape == (1, 4 if kind == "attention" else 1, 36, 36)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(weight.shape[:3]))
    assert weight[..., 15].max() < 1e-3
    assert weight[0, :, 15, [8, 9, 10, 14, 15, 16, 20, 21, 22]].max() == 0


# --------------------------------------------------------------------------------- the network


def test_encoder_joins_scales_and_decoder_takes_laterals() -> None:
    encoder = Encoder([4, 6, 8], 10)
    joined, maps = encoder(torch.rand(2, 3, 32, 48))
    assert joined.shape == (2, 10, 4, 6)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 16, 24), (6, 8, 12), (8, 4, 6)]
    restored = Decoder([4, 6, 8], 10)(joined, maps[:-1])
    assert restored.shape == (2, 3, 32, 48)
    assert 0 <= restored.min() <= restored.max() <= 1


def test_joined_width_of_the_paper_s_size(published_method: Build) -> None:
    method = published_method("fmr_net", 256)
    assert method.encoder.join.in_channels == 448
    assert [part.size for part in method.rearrange] == [6, 4]
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(2.25, abs=0.01)


def test_laterals_stay_closed_until_the_restoration(
    small_method: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, image = small_method("fmr_net").eval(), make_batch()["image"]
    seen: dict[str, list[Tensor]] = {}
    decode = method.decoder.forward
    for stage in ("warmup", "memory", "restoration"):
        monkeypatch.setattr(
            method.decoder, "forward", lambda x, laterals: (seen.update({stage: [x, *laterals]}),  # noqa: B023
            decode(x, laterals))[1],
        )  # fmt: skip
        method.restore(image, stage)
    joined, maps = method.encoder(image)
    torch.testing.assert_close(seen["warmup"][0], joined)
    torch.testing.assert_close(seen["memory"][0], method.memory(joined).out)
    assert all(lateral.abs().max() == 0 for lateral in seen["memory"][1:])
    gate = method.memory(joined).gate
    for part, lateral, found in zip(method.rearrange, maps, seen["restoration"][1:], strict=False):
        torch.testing.assert_close(found, part(lateral, gate))


@pytest.mark.parametrize("changes", [{"rearrange": "none"}, {"rearrange": "attention"},
                                     {"shares": [1, 1, 0]}, {"crop": 32}])  # fmt: skip
def test_variants_train(
    changes: dict[str, Any], small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("fmr_net", **changes), make_batch()
    fit(method, batch, 3)
    assert method.eval()(batch["image"]).score.isfinite().all()


def test_losses_of_the_last_stage_restore_the_clean_image(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("fmr_net").eval(), make_batch()
    losses = method.losses(batch)
    restored, _ = method.restore(batch["corrupted"], "restoration")
    away = (restored - batch["image"]).abs()
    torch.testing.assert_close(losses["l1"], away.mean())
    inside = batch["corruption"].expand_as(away)
    torch.testing.assert_close(losses["defects"], away[inside].mean())
    torch.testing.assert_close(losses["edges"], 0.5 * MSGMSLoss()(restored, batch["image"]))
    assert set(losses) == {"l1", "ssim", "edges", "defects", "contrast", "spread"}


def test_memory_is_filled_once_when_its_stage_begins(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("fmr_net", shares=[1, 1, 1])
    started: list[float] = []
    start = method.memory.start
    method.memory.start = lambda *given: (started.append(method.done), start(*given))
    fit(method, make_batch(), 6)
    assert started == [pytest.approx(1 / 3)]
    assert method.memory.threshold < 1


def test_rates_fall_in_both_halves(small_method: Build) -> None:
    method = small_method("fmr_net", shares=[10, 40, 50])
    assert method.rate(0.0, True) == method.rate(0.0, False) == 1
    assert method.rate(0.25, False) == pytest.approx(0.5)
    assert method.rate(0.5, False) == pytest.approx(0.2)
    assert method.rate(0.5, True) == pytest.approx(0.02)
    assert method.rate(0.75, False) == pytest.approx(0.1)
    assert method.rate(1.0, False) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------ the maps


def test_map_is_the_mean_of_three_standardised_maps(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("fmr_net"), make_batch()
    fit(method, batch, 2)
    method.eval()
    image = batch["image"]
    with torch.no_grad():
        restored, _ = method.restore(image, "restoration")
        maps = [
            (image - restored).abs().mean(dim=1),
            1 - ssim_map(restored, image).mean(dim=1),
            edge_difference(restored, image)[:, 0],
        ]
        found = method(image)
    raised = [((m - m.mean()) / m.std()).clamp(min=0) for m in maps]
    expected = smooth(torch.stack(raised).mean(dim=0)[:, None], 1.0)
    torch.testing.assert_close(found.anomaly_map, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.score, found.anomaly_map.amax(dim=(1, 2, 3)))


def test_edges_are_compared_at_three_scales() -> None:
    one, other = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    halves = [(one, other)]
    for _ in range(2):
        halves.append(tuple(F.avg_pool2d(x, 2) for x in halves[-1]))
    expected = sum(resize(1 - gms_map(a, b), (32, 32)) for a, b in halves) / 3
    torch.testing.assert_close(edge_difference(one, other), expected)


def test_fast_scores_are_the_memory_s(small_method: Build, make_batch: Build) -> None:
    method, image = small_method("fmr_net", fast=True).eval(), make_batch()["image"]
    found = method(image)
    score = method.memory(method.encoder(image)[0]).score()
    torch.testing.assert_close(found.score, score.amax(dim=1))
    assert found.anomaly_map.shape == (2, 1, 64, 64)


def test_larger_images_than_the_crops_are_scored(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("fmr_net", crop=32)
    fit(method, make_batch(), 1)
    assert method.eval()(torch.rand(1, 3, 128, 192)).anomaly_map.shape == (1, 1, 128, 192)
    batch = make_batch(2, 64, 96)
    parts = method.train().cropped(batch)
    assert [tuple(p.shape[-2:]) for p in parts] == [(32, 32)] * 3
    assert method.eval().cropped(batch)[0] is batch["corrupted"]


def test_errors_say_what_to_change(small_method: Build) -> None:
    with pytest.raises(UserError, match="give three shares, that of the memory above 0"):
        small_method("fmr_net", shares=[1, 0, 1])
    with pytest.raises(UserError, match="rearrange=textons: choose texton, attention or none"):
        small_method("fmr_net", rearrange="textons")
    with pytest.raises(UserError, match=r"method\.crop=30 must be a multiple of 8"):
        small_method("fmr_net", crop=30)
    with pytest.raises(UserError, match="images of 60 x 64: 60 is no multiple of 8"):
        small_method("fmr_net").eval()(torch.rand(1, 3, 60, 64))
