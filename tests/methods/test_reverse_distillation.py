"""Reverse Distillation against its description: counts, losses and maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import CosineLoss, FlatCosineLoss
from anomaly_lit.methods.reverse_distillation import gives_negative
from anomaly_lit.methods.reverse_distillation.network import Block, Bottleneck, Decoder
from anomaly_lit.nn.aggregate import resize
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

RESNET18, WIDE = [64, 128, 256], [256, 512, 1024]
Build = Callable[..., Any]


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("reverse_distillation").eval()


def count(*parts: nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def wave(step: float, *shape: int) -> Tensor:
    """Values sin(step * 1), sin(step * 2), ... in this shape."""
    number = int(torch.tensor(shape).prod())
    return torch.sin(step * torch.arange(1, number + 1, dtype=torch.float64)).reshape(shape)


@pytest.mark.parametrize(
    ("channels", "kind", "depth", "depths", "base_width", "expected"),
    [
        (RESNET18, "basic", 2, [2, 2, 2], 64, (12_205_312 - 525_312, 3_703_168)),
        (RESNET18, "basic", 3, [3, 4, 6], 64, (16_925_952 - 525_312, 5_770_624)),
        (WIDE, "bottleneck", 3, [3, 4, 6], 64, (39_222_272 - 8_392_704, 15_821_824)),
        (WIDE, "bottleneck", 3, [3, 4, 6], 128, (67_277_824 - 8_392_704, 24_917_504)),
    ],
)
def test_parameters_are_those_of_the_authors_networks(
    channels: list[int],
    kind: Any,
    depth: int,
    depths: list[int],
    base_width: int,
    expected: tuple[int, int],
) -> None:
    """For ResNet-18, 34, 50 and WideResNet-50, without those that the code never uses."""
    with torch.device("meta"):
        bottleneck = Bottleneck(channels, kind, depth, base_width, 1.0)
        decoder = Decoder(channels, kind, depths, base_width, 1.0, signed=False)
    assert (count(bottleneck), count(decoder)) == expected


def test_the_published_method_has_83_8_million_trainable_parameters(
    published_method: Build,
) -> None:
    with torch.device("meta"):
        method = published_method("reverse_distillation", 256)
    assert count(method.bottleneck, method.decoder) == 83_802_624
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 83_802_624


@pytest.mark.parametrize("width", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_rebuilt_maps_have_the_teacher_s_shapes(kind: Any, width: float) -> None:
    channels = [8, 16, 32]
    maps = [torch.rand(2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16), strict=True)]
    embedding = Bottleneck(channels, kind, 2, 64, width)(maps)
    assert embedding.shape == (2, 64, 2, 3)
    rebuilt = Decoder(channels, kind, [1, 2, 1], 64, width, signed=False)(embedding)
    assert [map_.shape for map_ in rebuilt] == [map_.shape for map_ in maps]


def test_a_block_that_doubles_equals_its_convolutions() -> None:
    torch.manual_seed(0)
    block = Block(6, 4, "basic", 64, 1.0, "double").eval()
    x = torch.randn(1, 6, 2, 3)
    first, _, _, second, _ = block.layers
    beside = block.shortcut[0]
    scale = (1 + 1e-5) ** -0.5  # of batch normalisation that has seen nothing
    doubled = torch.zeros(2, 1, 4, 4, 6)
    for number, layer in enumerate((first, beside)):
        for i in range(4):
            for j in range(6):
                weight = layer.weight[:, :, i % 2, j % 2]  # (6, 4)
                doubled[number, 0, :, i, j] = x[0, :, i // 2, j // 2] @ weight * scale
    inner = F.conv2d(F.relu(doubled[0]), second.weight, padding=1) * scale
    torch.testing.assert_close(block(x), F.relu(inner + doubled[1]), rtol=1e-4, atol=1e-5)


def golden() -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(2, 4, 8, 8), (2, 8, 4, 4), (2, 16, 2, 2)]
    given = [wave(0.1, *shape) for shape in shapes]
    return given, [wave(s, *shape) for s, shape in zip((0.13, 0.11, 0.12), shapes, strict=True)]


def test_losses_have_the_values_of_a_calculation_by_hand() -> None:
    pairs = list(zip(*golden(), strict=True))
    flat = sum(float(FlatCosineLoss()(rebuilt, given)) for given, rebuilt in pairs)
    position = sum(float(CosineLoss()(rebuilt, given)) for given, rebuilt in pairs)
    assert flat == pytest.approx(2.529959, abs=1e-6)
    assert position == pytest.approx(2.540005, abs=1e-6)


def test_the_map_is_the_sum_over_scales(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, rebuilt = golden()
    monkeypatch.setattr(method.backbone, "forward", lambda image: given)
    monkeypatch.setattr(method, "rebuild", lambda features: rebuilt)
    monkeypatch.setattr(method, "check_size", lambda image: None)
    method.smoothing = 0.0
    anomaly_map, score = method(torch.zeros(2, 3, 16, 16))
    assert float(anomaly_map.mean()) == pytest.approx(2.543692, abs=1e-6)
    assert float(anomaly_map.max()) == float(score.max()) == pytest.approx(3.803682, abs=1e-6)
    method.combine = "product"
    product = torch.ones(2, 1, 16, 16, dtype=torch.float64)
    for one, other in zip(given, rebuilt, strict=True):
        product *= resize(1 - F.cosine_similarity(one, other)[:, None], (16, 16))
    assert torch.allclose(method(torch.zeros(2, 3, 16, 16)).anomaly_map, product)


def test_maps_may_be_resized_as_squares_of_pixels(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, rebuilt = golden()
    monkeypatch.setattr(method.backbone, "forward", lambda image: given)
    monkeypatch.setattr(method, "rebuild", lambda features: rebuilt)
    monkeypatch.setattr(method, "check_size", lambda image: None)
    method.smoothing, method.align_corners = 0.0, False
    gaps = [
        1 - F.cosine_similarity(one, other)[:, None]
        for one, other in zip(given, rebuilt, strict=True)
    ]
    whole = sum(F.interpolate(gap, (16, 16), mode="bilinear") for gap in gaps)
    assert torch.allclose(method(torch.zeros(2, 3, 16, 16)).anomaly_map, whole)


def test_perfectly_rebuilt_features_of_any_length_are_normal(
    method: Any, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "rebuild", lambda features: [2.5 * map_ for map_ in features])
    batch = make_batch()
    assert float(method.losses(batch)["distance"]) == pytest.approx(0, abs=1e-5)
    assert float(method(batch["image"]).anomaly_map.abs().max()) < 1e-5


def test_flat_and_position_agree_where_all_positions_have_one_length() -> None:
    given, rebuilt = (F.normalize(torch.randn(2, 6, 4, 5), dim=1) for _ in range(2))
    torch.testing.assert_close(FlatCosineLoss()(given, rebuilt), CosineLoss()(given, rebuilt))


def test_signed_teachers_are_rebuilt_before_the_last_relu() -> None:
    torch.manual_seed(0)
    channels = [8, 16, 32]
    decoders = [Decoder(channels, "basic", [1, 1, 1], 64, 1.0, signed) for signed in (False, True)]
    decoders[1].load_state_dict(decoders[0].state_dict())
    embedding = torch.randn(2, 64, 2, 2)
    plain, signed = (decoder.eval()(embedding) for decoder in decoders)
    assert all(bool((map_ < 0).any()) for map_ in signed)
    assert all(torch.equal(a, F.relu(b)) for a, b in zip(plain, signed, strict=True))


@pytest.mark.parametrize(
    ("name", "negative"), [("resnet18.tv_in1k", False), ("tf_efficientnet_lite0.in1k", True)]
)
def test_the_decoder_ends_in_relu_where_the_teacher_does(
    small_method: Build, name: str, negative: bool
) -> None:
    teacher = Backbone(name, [1, 2, 3], weights="random")
    state = torch.get_rng_state()
    assert gives_negative(teacher) == negative
    assert torch.equal(torch.get_rng_state(), state)
    config = {"name": name, "out_indices": [1, 2, 3], "weights": "random"}
    backbone = {"_target_": "anomaly_lit.nn.backbone.Backbone", **config}
    assert small_method("reverse_distillation", backbone=backbone).decoder.signed == negative


def test_the_score_may_be_the_mean_of_the_top_pixels(
    small_method: Build, make_batch: Build
) -> None:
    method = small_method("reverse_distillation", score="top").eval()
    anomaly_map, score = method(make_batch(3)["image"])
    top = anomaly_map.flatten(1).sort(dim=1).values[:, -40:]  # 1 % of 64 x 64
    assert torch.allclose(score, top.mean(dim=1))


def test_a_size_whose_embedding_would_not_fit_names_the_nearest(method: Any) -> None:
    with pytest.raises(UserError, match=r"80 is no multiple of 32.*set image_size to 64 or 96"):
        method(torch.rand(1, 3, 80, 96))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_depths": [1, 1]}, "decoder_depths="),
        ({"squeeze_depth": 0}, "squeeze_depth=0"),
        ({"width": 0.0}, "width=0"),
        ({"smoothing": -1.0}, "smoothing=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    small_method: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_method("reverse_distillation", **changes)


def test_a_teacher_that_is_no_pyramid_is_refused(small_method: Build) -> None:
    flat = Backbone("test_vit.r160_in1k", [1, 2, 3], weights="random")
    with pytest.raises(UserError, match=r"strides \[16, 16, 16\].*out_indices=\[1, 2, 3\]"):
        small_method("reverse_distillation", backbone=flat)
