"""CMA-AE's memory and gates against plain loops, its losses, its map and its segmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anomaly_lit.methods.cma_ae.network import ClearMemory, cover
from anomaly_lit.nn.autoencoder import Decoder, Encoder
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def memory(gates: str, items: int = 6) -> ClearMemory:
    torch.manual_seed(0)
    return ClearMemory(5, items, 0.2, gates)


def test_reading_is_a_shrunk_softmax_of_cosines() -> None:
    part, z = memory("lstm"), torch.randn(2, 5, 3, 2)
    found, attention = part.read(z)
    for image in range(2):
        for place in range(6):
            token = z[image, :, place // 2, place % 2]
            raw = [math.exp(float(F.cosine_similarity(token, m, dim=0)) / 0.2) for m in part.items]
            weights = [value / sum(raw) for value in raw]
            kept = [w if w > 1 / 6 else 0.0 for w in weights]
            kept = [w / sum(kept) for w in kept]
            torch.testing.assert_close(
                attention[image, place], torch.tensor(kept), atol=1e-5, rtol=0
            )
            expected = sum(w * m for w, m in zip(kept, part.items, strict=True))
            torch.testing.assert_close(found[image, :, place // 2, place % 2], expected)


@pytest.mark.parametrize("gates", ["lstm", "convex"])
def test_gates_open_and_shut(gates: str) -> None:
    """All of the encoding and nothing of the memory is the identity; the reverse is the memory."""
    part, z = memory(gates), torch.randn(2, 5, 3, 2)
    with torch.no_grad():
        part.gate.weight.zero_()
        part.gate.bias[:5] = 100.0
        part.gate.bias[5:] = -100.0
        torch.testing.assert_close(part(z).out, z)
        part.gate.bias.neg_()
        torch.testing.assert_close(part(z).out, part.read(z)[0])


def test_forget_gate_starts_open_and_input_gate_half_open() -> None:
    bias = memory("lstm").gate.bias
    assert torch.equal(bias, torch.tensor([1.0] * 5 + [0.0] * 5))


def test_kinds_of_gates() -> None:
    z = torch.randn(2, 5, 3, 2)
    assert torch.equal(memory("none")(z).out, z)
    assert not list(memory("none").parameters())
    only = memory("memory")
    torch.testing.assert_close(only(z).out, only.read(z)[0])
    convex = memory("convex")
    recall = convex(z)
    torch.testing.assert_close(
        recall.out, recall.forget * z + (1 - recall.forget) * convex.read(z)[0]
    )


def test_entropy_is_that_of_the_attention() -> None:
    recall = memory("lstm")(torch.randn(2, 5, 3, 2))
    rows = recall.attention.flatten(0, 1)
    expected = torch.distributions.Categorical(rows).entropy().mean()
    torch.testing.assert_close(recall.entropy(), expected, atol=1e-5, rtol=1e-4)


def test_decoder_mirrors_the_encoder_and_takes_what_is_handed_on() -> None:
    stages = Encoder([4, 6, 8, 10])(torch.rand(2, 3, 32, 48))
    assert [tuple(m.shape[1:]) for m in stages] == [(4, 16, 24), (6, 8, 12), (8, 4, 6), (10, 2, 3)]
    for given in (1, 2, 4):
        decoder = Decoder([10, 8, 6, 4], given).eval()
        repaired = decoder(stages[::-1][:given])
        assert repaired.shape == (2, 3, 32, 48)
        assert 0 <= repaired.min() <= repaired.max() <= 1


def test_parameters_of_the_full_network(published_method: Build) -> None:
    method = published_method("cma_ae", 256)
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(18.0, abs=0.05)  # the gates' convolutions are most of it


def test_loss_repairs_the_corrupted_image(small_method: Build, make_batch: Build) -> None:
    method, batch = small_method("cma_ae", gate_weight=0.5).eval(), make_batch()
    losses = method.losses(batch)
    repaired, recalls = method.repair(batch["corrupted"])
    torch.testing.assert_close(losses["l1"], F.l1_loss(repaired, batch["image"]))
    entropy = 2e-4 * sum(recall.entropy() for recall in recalls)
    torch.testing.assert_close(losses["entropy"], entropy)
    gate = 0.0
    for recall in recalls:
        kept = recall.forget.mean(dim=1, keepdim=True)
        clean = 1 - cover(batch["corruption"], kept.shape[-2:])
        gate += 0.5 * F.binary_cross_entropy(kept, clean) / 2
    torch.testing.assert_close(losses["gate"], gate)
    assert set(losses) == {"l1", "ssim", "msgms", "entropy", "gate"}


def test_gates_in_and_out_of_the_corruption_are_told(
    small_method: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = small_method("cma_ae").eval(), make_batch()
    told: dict[str, Any] = {}
    monkeypatch.setattr(method, "report", told.update)
    method.memories[0].gate.weight.data.zero_()
    method.losses(batch)
    assert float(told["gate_inside"]) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-5)
    assert float(told["gate_outside"]) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-5)
    method.losses({**batch, "corruption": torch.zeros_like(batch["corruption"])})
    assert told["gate_inside"] == 0


@pytest.mark.parametrize("fuse", ["sum", "prod"])
def test_map_adds_or_multiplies_residuals(
    fuse: str, small_method: Build, make_batch: Build
) -> None:
    method, image = small_method("cma_ae", fuse=fuse, smoothing=0.0).eval(), make_batch()["image"]
    with torch.no_grad():
        repaired, _ = method.repair(image)
        maps = [
            F.interpolate(1 - F.cosine_similarity(a, b)[:, None], (64, 64), mode="bilinear")
            for a, b in zip(method.backbone(image), method.backbone(repaired), strict=True)
        ]
        found = method(image).anomaly_map
    expected = (
        sum(maps) if fuse == "sum" else (maps[0] + 1e-4) * (maps[1] + 1e-4) * (maps[2] + 1e-4)
    )
    torch.testing.assert_close(found, expected)


def test_an_image_repaired_to_itself_shows_nothing(
    small_method: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, image = small_method("cma_ae").eval(), make_batch()["image"]
    monkeypatch.setattr(method, "repair", lambda x: (x, []))
    assert method(image).anomaly_map.abs().max() < 1e-5


def test_backbone_is_asked_only_when_scoring(small_method: Build) -> None:
    assert small_method("cma_ae").training_backbones() == {}


def test_segmentation_takes_its_threshold_from_normal_images(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("cma_ae"), make_batch()
    assert method.map_mean.isnan()
    fit(method, batch, 1)
    with torch.no_grad():
        maps = method.eval()(batch["image"]).anomaly_map
    torch.testing.assert_close(method.map_mean, maps.mean())
    torch.testing.assert_close(method.map_std, maps.std(unbiased=False), rtol=1e-3, atol=1e-6)


def test_segmentation_is_opened_and_loses_small_regions(small_method: Build) -> None:
    from skimage.morphology import opening, remove_small_objects

    method = small_method("cma_ae", least_region=10)
    method.map_mean.fill_(0.0)
    method.map_std.fill_(0.1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 1, 8, 10, generator=generator)
    anomaly_map = F.interpolate(noise, (40, 50), mode="bilinear") - 0.3
    found = method.segment(anomaly_map)[:, 0].numpy()
    for mask, map_ in zip(found, anomaly_map[:, 0].numpy(), strict=True):
        high = np.pad(map_ > 0.3, 1, mode="edge")
        opened = opening(high, np.ones((3, 3), dtype=bool))[1:-1, 1:-1]
        assert np.array_equal(mask, remove_small_objects(opened, max_size=9, connectivity=1))
        assert mask.any()


def test_numbers_out_of_range_are_named(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"method\.memories=9 must lie in 1 to 3"):
        small_method("cma_ae", memories=9)


def test_items_start_from_encodings_and_carry_signal() -> None:
    part, z = memory("lstm", items=20), 3 * torch.randn(4, 5, 6, 6)
    before = part(z).share()
    part.start(z, torch.Generator().manual_seed(0))
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    assert all((rows == item).all(dim=1).any() for item in part.items)
    after = part(z).share()
    assert 0 < before < after < 1
    assert memory("none")(z).share() == 0


def test_memories_start_from_all_batches(
    small_method: Build, fit: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from the same images in one batch."""
    batch, found = make_batch(4), []
    for parts in (1, 4):
        method = small_method("cma_ae")
        halves = [{"image": part} for part in batch["image"].chunk(parts)]
        monkeypatch.setattr(method, "normal_batches", lambda *_, halves=halves: halves)
        method.learn()
        found.append([part.items.clone() for part in method.memories])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_learning_starts_every_memory(small_method: Build, fit: Build, make_batch: Build) -> None:
    method = small_method("cma_ae")
    before = [part.items.clone() for part in method.memories]
    fit(method, make_batch(), 1)
    for part, old in zip(method.memories, before, strict=True):
        assert (part.items - old).abs().mean() > 0.05  # far more than a step changes
