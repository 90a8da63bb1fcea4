"""Shifts, attention and memories against slow loops; the score, its parts and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.data.images import Resize
from anomaly_lit.inference.detector import Detector
from anomaly_lit.inference.openvino import OpenVINO
from anomaly_lit.losses import total
from anomaly_lit.methods.video_ae import memory, network
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.mark.parametrize("causal", [False, True])
def test_shift_moves_an_eighth_of_the_channels_each_way(causal: bool) -> None:
    clip = torch.randn(2, 4, 16, 3, 3)
    found = network.shift_frames(clip, causal)
    for time in range(4):
        for channel in range(16):
            source: int | None = time
            if channel < 2 and not causal:
                source = time + 1 if time < 3 else None
            if 2 <= channel < 4:
                source = time - 1 if time else None
            expected = torch.zeros(2, 3, 3) if source is None else clip[:, source, channel]
            assert torch.equal(found[:, time, channel], expected)


def test_a_single_frame_is_not_shifted() -> None:
    clip = torch.randn(2, 1, 16, 3, 3)
    assert torch.equal(network.shift_frames(clip, causal=False), clip)


def test_plain_shift_takes_a_sixteenth_of_each_segment_from_the_next() -> None:
    x = torch.randn(1, 64, 2, 2)  # 4 segments of 16 channels
    found = network.shift_segments(x, 4)
    for segment in range(4):
        first = 16 * segment
        expected = x[:, first + 16] if segment < 3 else torch.zeros(1, 2, 2)
        assert torch.equal(found[:, first], expected)
        assert torch.equal(found[:, first + 1 : first + 16], x[:, first + 1 : first + 16])


def test_attention_weighs_channels_by_their_means() -> None:
    part, x = network.ChannelAttention(32), torch.randn(2, 32, 4, 5)
    y = part.convolutions(x)
    first, second = part.weights[0], part.weights[2]
    for row in range(2):
        means = y[row].mean(dim=(1, 2))
        hidden = (first.weight[:, :, 0, 0] @ means + first.bias).relu()
        weights = (second.weight[:, :, 0, 0] @ hidden + second.bias).sigmoid()
        expected = x[row] + y[row] * weights[:, None, None]
        torch.testing.assert_close(part(x)[row], expected)


def make_memory(items: int = 4, channels: int = 6) -> memory.Memory:
    torch.manual_seed(0)
    return memory.Memory(items, channels)


def test_reading_is_a_softmax_over_the_items() -> None:
    part, x = make_memory(), torch.randn(2, 6, 3, 2)
    recall = part(x)
    for image in range(2):
        for row in range(3):
            for column in range(2):
                query = F.normalize(x[image, :, row, column], dim=0)
                weights = torch.stack([query @ item for item in part.items]).softmax(dim=0)
                read = sum(w * item for w, item in zip(weights, part.items, strict=True))
                torch.testing.assert_close(recall.out[image, :, row, column], read)
                nearest = min(float((query - item).square().sum()) for item in part.items)
                assert float(recall.distance[image, row, column]) == pytest.approx(
                    nearest, abs=1e-5
                )


def test_items_move_towards_the_queries_nearest_to_them() -> None:
    part, query = make_memory(), F.normalize(torch.randn(12, 6), dim=1)
    found = part.updated(query)
    similarity = query @ part.items.T
    for number, item in enumerate(part.items):
        share = similarity[:, number].softmax(dim=0)
        share = share / share.max()
        moved = item.clone()
        for row in range(12):
            if int(similarity[row].argmax()) == number:
                moved = moved + share[row] * query[row]
        torch.testing.assert_close(found[number], moved / moved.norm())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_patterns_that_differ_cost_nothing_and_equal_ones_all() -> None:
    def recall(query: Tensor, weights: Tensor) -> memory.Recall:
        return memory.Recall(query, query, weights, query[None, :, :1])

    crisp = torch.eye(3)
    assert memory.dispersion(recall(torch.eye(3), crisp)) == 0
    same = F.normalize(torch.ones(3, 3), dim=1)
    torch.testing.assert_close(memory.dispersion(recall(same, crisp)), torch.tensor(1.0))
    assert memory.entropy(recall(same, crisp)).abs() < 1e-6
    even = torch.full((3, 3), 1 / 3)
    torch.testing.assert_close(memory.entropy(recall(same, even)), torch.tensor(3.0).log())


def test_triplet_loss_is_mnad_s() -> None:
    part, x = make_memory(), torch.randn(1, 6, 2, 2)
    recall, expected = part(x), 0.0
    for query in recall.query:
        near = sorted(float((query - item).norm()) for item in part.items)
        expected += max(0.0, near[0] - near[1] + 1.0) / 4
    assert float(memory.separation(recall, part.items)) == pytest.approx(expected, abs=1e-5)


def test_items_have_no_gradient_and_stay_in_evaluation(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("video_ae"), make_batch()
    before = [part.items.clone() for part in method.memories()]
    total(method.losses(batch)).backward()
    method.eval().predict_batch(batch)
    method.validation_step(batch, 0, 1)
    assert all(a.equal(m.items) for a, m in zip(before, method.memories(), strict=True))
    assert not any(part.items.requires_grad for part in method.memories())
    assert len(before) == 3  # the finest level has no way across
    fit(method, batch, 1)
    for old, part in zip(before, method.memories(), strict=True):
        assert not old.equal(part.items)
        torch.testing.assert_close(part.items.norm(dim=1), torch.ones(len(old)))


def test_losses_are_those_of_the_frame_and_of_the_memories(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("video_ae", gradient_weight=1.0).eval(), make_batch()
    with torch.no_grad():
        found, recalls = method.network(2 * batch["frames"] - 1)
        terms = method.losses(batch)
    target = 2 * batch["image"] - 1
    torch.testing.assert_close(terms["frame"], F.mse_loss(found, target))
    compact = sum(
        F.mse_loss(recall.query, own.items[(recall.query @ own.items.T).argmax(dim=1)])
        for recall, own in zip(recalls, method.memories(), strict=True)
    )
    torch.testing.assert_close(terms["compact"], 0.1 * compact / 3)  # a mean over channels too
    apart = sum(memory.dispersion(recall) for recall in recalls) / 3
    torch.testing.assert_close(terms["separate"], 0.1 * apart)
    down = (found[:, :, 1:] - found[:, :, :-1]).abs() - (target[:, :, 1:] - target[:, :, :-1]).abs()
    right = (found[..., 1:] - found[..., :-1]).abs() - (target[..., 1:] - target[..., :-1]).abs()
    torch.testing.assert_close(terms["gradient"], down.abs().mean() + right.abs().mean())


def test_score_adds_noise_and_distance_in_the_range_of_training(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("video_ae", smoothing=0.0), make_batch()
    fit(method, batch, 1)
    method.eval()
    with torch.no_grad():
        found = method.test_step(batch, 0)
        output, recalls = method.network(2 * batch["frames"] - 1)
    error = ((output + 1) / 2 - batch["image"]).square()
    torch.testing.assert_close(found.anomaly_map, error.mean(dim=1, keepdim=True))
    noise = -10 * (1 / error.mean(dim=(1, 2, 3))).log10()
    distance = recalls[0].distance.mean(dim=(1, 2))
    torch.testing.assert_close(found.parts, torch.stack([noise, distance], dim=1))
    low, high = method.ranges[:, 0], method.ranges[:, 1]
    torch.testing.assert_close(low, found.parts.amin(dim=0))
    torch.testing.assert_close(high, found.parts.amax(dim=0))
    scaled = (found.parts - low) / (high - low)
    torch.testing.assert_close(found.score, 0.6 * scaled[:, 0] + 0.4 * scaled[:, 1])
    torch.testing.assert_close(method.predict_batch(batch).score, found.score)


def test_an_image_alone_is_a_clip_that_stands_still(small_method: Build, make_batch: Build) -> None:
    method, batch = small_method("video_ae").eval(), make_batch()
    still = batch["image"][:, None].expand(-1, 4, -1, -1, -1)
    with torch.no_grad():
        assert torch.equal(method(batch["image"]).score, method(batch["image"], still).score)
        assert not torch.equal(method(batch["image"]).score, method.predict_batch(batch).score)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "rebuild"},
        {"shift": "plain", "channels": [16, 16, 16, 64]},
        {"shift": "none", "attention": False},
        {"causal": True, "dispersion": False},
        {"entropy_weight": 0.1, "skip_memory": [0, 0, 2]},
    ],
)
def test_other_readings_train(
    changes: dict[str, Any], small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("video_ae", **changes), make_batch()
    fit(method, batch, 1)
    assert method.eval().predict_batch(batch).score.isfinite().all()


def test_parameters_are_as_many_as_said(published_method: Build) -> None:
    method = published_method("video_ae", 64)
    named = list(method.named_parameters())
    added = [p for name, p in named if name.split(".")[1] in ("shifts", "attention", "fuse")]
    assert sum(p.numel() for _, p in named) / 1e6 == pytest.approx(21.7, abs=0.05)
    assert sum(p.numel() for p in added) / 1e6 == pytest.approx(6.1, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "guess"}, r"method\.task=guess: choose predict or rebuild"),
        ({"shift": "left"}, r"method\.shift=left: choose conv, plain or none"),
        ({"skip_memory": [20, 1, 0]}, r"skip_memory=\[20, 1, 0\] three, each 0 or at least 2"),
        ({"memory": 1}, r"method\.memory=1"),
        ({"error_weight": 2.0}, r"method\.error_weight=2.0"),
        ({"shift": "plain"}, r"for shift=plain the last must be a multiple of 64"),
    ],
)
def test_unknown_and_impossible_values_are_named(
    changes: dict[str, Any], words: str, small_method: Build
) -> None:
    with pytest.raises(UserError, match=words):
        small_method("video_ae", **changes)


def test_clips_of_another_length_and_export_are_refused(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("video_ae").eval(), make_batch()
    with pytest.raises(UserError, match=r"set dataset\.layout\.frames to the same number"):
        method(batch["image"], batch["frames"][:, 1:])
    with pytest.raises(UserError, match="images of 60 x 64: 60 is no multiple of 8"):
        method(batch["image"][..., :60, :])
    with pytest.raises(UserError, match="VideoAE reads the frames before an image"):
        OpenVINO(method, "bolt", batch["image"])


def test_a_detector_hands_the_frames_before_each_image_on(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("video_ae"), make_batch()
    image = (batch["image"] * 255).round().byte()
    frames = (batch["frames"] * 255).round().byte()
    detector = Detector(method, Resize(64), {})
    found = detector.predict(
        [picture.permute(1, 2, 0).numpy() for picture in image],
        batch_size=1,
        frames=[[frame.permute(1, 2, 0).numpy() for frame in clip] for clip in frames],
    )
    with torch.no_grad():
        expected = method(image / 255, frames / 255).score
    assert detector.frames == 4
    assert [one.score for one in found] == pytest.approx(expected.tolist(), rel=1e-5)
