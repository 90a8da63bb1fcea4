"""INP-Former against its formulas, and the numbers that its description states."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.losses import scale_gradient, total
from anomaly_lit.methods.inp_former import (
    INPFormer,
    batch_dice,
    hard_coherence,
    residual,
    soft_coherence,
)
from anomaly_lit.methods.inp_former.network import DecoderBlock, Extractor
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.rebuilding import gap, scored, to_map, to_tokens
from anomaly_lit.optim import StableAdamW
from anomaly_lit.runs.checks import check_synthesis
from anomaly_lit.types import UserError

Build = Callable[..., Any]


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("inp_former")


class Teacher(nn.Module):
    """As wide as a transformer, and nothing else."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels, self.strides, self.prefix_tokens = [dim, dim], [14, 14], 0


def wave(step: float, of: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """Values of(step * 1), of(step * 2), ... in this shape."""
    number = int(torch.tensor(shape).prod())
    return of(step * torch.arange(1, number + 1, dtype=torch.float64)).reshape(shape)


def count(*parts: nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    ("dim", "bottleneck", "extractor", "block", "expected"),
    [
        (384, 1_181_568, 1_776_768, 1_774_470, 17_154_096),
        (768, 4_722_432, 7_092_480, 7_087_884, 68_517_984),
        (1024, 8_393_728, 12_602_368, 12_596_240, 121_766_016),
    ],
)
def test_parameters_are_those_of_the_authors_networks(
    dim: int, bottleneck: int, extractor: int, block: int, expected: int
) -> None:
    with torch.device("meta"):
        method = INPFormer(Teacher(dim), StableAdamW)  # type: ignore[arg-type]
    assert count(method.bottleneck) == bottleneck
    assert count(method.extractor) == extractor
    assert count(method.decoder[0]) == block
    assert count(method) == expected


def test_the_published_method_trains_68_5_million_parameters(published_method: Build) -> None:
    with torch.device("meta"):
        method = published_method("inp_former", 392)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 68_517_984


def test_a_decoder_block_equals_loops_over_heads_and_prototypes() -> None:
    torch.manual_seed(0)
    block, tokens, prototypes = DecoderBlock(8, 2), torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    nn.init.uniform_(block.scale, 0.5, 2)
    normed = block.norm1(prototypes)[0]
    q, k, v = block.query(block.norm1(tokens))[0], block.key(normed), block.value(normed)
    mixed = torch.zeros(5, 8)
    for head, own in enumerate((slice(0, 4), slice(4, 8))):
        for n in range(5):
            for m in range(3):
                cosine = F.cosine_similarity(q[n, own], k[m, own], dim=0)
                mixed[n, own] += (block.scale[head] * cosine).clamp(min=0) * v[m, own]
    z = block.output(mixed)  # nothing of the token is added
    torch.testing.assert_close(block(tokens, prototypes)[0], z + block.mlp(block.norm2(z)))


def test_nothing_passes_by_the_prototypes() -> None:
    block = DecoderBlock(8, 2)
    for layer in (block.output, block.mlp[-1]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert not block(torch.randn(2, 5, 8), torch.randn(2, 3, 8)).any()


def test_prototypes_are_of_one_image_and_know_no_positions() -> None:
    torch.manual_seed(0)
    extractor, tokens = Extractor(8, 2, 6), torch.randn(3, 7, 8)
    found = extractor(tokens)
    assert found.shape == (3, 6, 8)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(extractor(tokens[1:2])[0], found[1])
    torch.testing.assert_close(extractor(tokens[:, torch.randperm(7)]), found)


def test_moved_patches_move_the_map(method: Any, make_batch: Build) -> None:
    features = method.eval().backbone(make_batch()["image"])
    order = torch.randperm(16)
    moved = [to_map(to_tokens(each)[:, order], (4, 4)) for each in features]
    before, after = method.compare(features), method.compare(moved)
    torch.testing.assert_close(before.prototypes, after.prototypes)
    for one, other in zip(before.rebuilt, after.rebuilt, strict=True):
        torch.testing.assert_close(to_tokens(one)[:, order], to_tokens(other))


def test_coherence_has_the_values_of_a_calculation_by_hand() -> None:
    tokens, prototypes = wave(0.1, torch.sin, 2, 16, 8), wave(0.37, torch.sin, 2, 3, 8)
    assert float(hard_coherence(tokens, prototypes)) == pytest.approx(0.192711, abs=1e-6)
    assert float(soft_coherence(tokens, prototypes)) == pytest.approx(0.245250, abs=1e-6)


def golden() -> list[tuple[Tensor, Tensor]]:
    shape = (2, 8, 4, 4)
    given = [wave(0.1, torch.sin, *shape), wave(0.1, torch.cos, *shape)]
    rebuilt = [wave(0.13, torch.sin, *shape), wave(0.07, torch.cos, *shape)]
    return [(e, d.requires_grad_()) for e, d in zip(given, rebuilt, strict=True)]


def test_soft_mining_has_the_values_of_a_calculation_by_hand(method: Any) -> None:
    pairs = golden()
    mined = [(e, scale_gradient(d, method.factor(e, d))) for e, d in pairs]
    loss = torch.stack([method.distance(d, e) for e, d in mined]).mean()
    assert float(loss) == pytest.approx(0.886004, abs=1e-6)
    loss.backward()
    found = [float(d.grad.abs().sum()) for _, d in pairs]
    assert found == pytest.approx([0.780199, 0.871863], abs=1e-6)


def test_factors_follow_the_error_of_a_position(method: Any, small_method: Build) -> None:
    given, rebuilt = golden()[0]
    factor = method.factor(given, rebuilt)
    errors = 1 - F.cosine_similarity(given, rebuilt)
    assert float(factor[1, 0, 2, 3]) == pytest.approx(float(errors[1, 2, 3] / errors.mean()) ** 3)
    assert float(factor.mean()) >= 1
    plain = small_method("inp_former", gamma=0.0)
    assert torch.equal(plain.factor(given, rebuilt), torch.ones(2, 1, 4, 4, dtype=torch.float64))


def test_the_backbone_and_its_tokens_take_no_gradient(method: Any, make_batch: Build) -> None:
    total(method.losses(make_batch())).backward()
    assert all(p.grad is None for p in method.backbone.parameters())
    assert method.extractor.query.grad.abs().sum() > 0


@pytest.mark.parametrize("aligned", [True, False])
def test_a_new_data_set_may_be_scored_by_the_nearest_prototype(
    small_method: Build, make_batch: Build, aligned: bool
) -> None:
    method = small_method("inp_former", score="inp_distance", align_corners=aligned).eval()
    image = make_batch()["image"]
    tokens, prototypes, given, _ = method.compare(method.backbone(image))
    nearest = torch.ones(2, 16, 1)
    for b in range(2):
        for n in range(16):
            cosine = F.cosine_similarity(tokens[b, n], prototypes[b], dim=1)
            nearest[b, n, 0] = 1 - cosine.max()
    expected = scored([to_map(nearest, given[0].shape[-2:])], (64, 64), aligned)
    torch.testing.assert_close(method(image).anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_patch_counts_at_its_corner_or_at_its_centre(
    small_method: Build, make_batch: Build, aligned: bool
) -> None:
    method, image = small_method("inp_former", align_corners=aligned).eval(), make_batch()["image"]
    _, _, given, rebuilt = method.compare(method.backbone(image))
    gaps = [gap(one, other) for one, other in zip(given, rebuilt, strict=True)]
    found = method(image).anomaly_map
    torch.testing.assert_close(found, scored(gaps, (64, 64), aligned).anomaly_map)
    assert not torch.allclose(found, scored(gaps, (64, 64), not aligned).anomaly_map)


@pytest.mark.parametrize("mse", ["mean", "sum"])
def test_the_parts_of_the_second_version_train(
    small_method: Build, fit: Build, make_batch: Build, mse: str
) -> None:
    method, batch = small_method("inp_former", mse=mse, coherence="soft"), make_batch()
    fit(method, batch, 2)
    terms = method.losses(batch)
    assert set(terms) == {"distance", "mse", "coherence"}
    assert total(terms).isfinite()
    _, _, given, rebuilt = method.eval().compare(method.backbone(batch["image"]))
    halves = [
        (1 - F.cosine_similarity(one, other) + (one - other).norm(dim=1))[:, None] / 2
        for one, other in zip(given, rebuilt, strict=True)
    ]
    torch.testing.assert_close(method(batch["image"]).score, scored(halves, (64, 64)).score)


@pytest.fixture
def headed(small_method: Build) -> Any:
    return small_method("inp_former", head="residual")


def test_the_head_of_a_vit_b_has_3_4_million_parameters() -> None:
    with torch.device("meta"):
        method = INPFormer(Teacher(768), StableAdamW, head="residual")  # type: ignore[arg-type]
    assert count(method.head) == 768 * 256 * 16 + 256 + 256 * 64 * 16 + 64 + 64 * 9 + 1
    assert count(method) == 68_517_984 + count(method.head)


def test_only_the_head_needs_corrupted_images(method: Any, headed: Any, make_batch: Build) -> None:
    assert method.needs == frozenset()
    assert headed.needs == {"corrupted"}
    assert list(headed.training_backbones()) == ["backbone"]
    clean = make_batch()
    del clean["corrupted"], clean["corruption"]
    assert set(method.losses(clean)) == {"distance", "coherence"}


def test_a_run_without_synthesis_is_refused(method: Any, headed: Any) -> None:
    none: Any = SimpleNamespace(synthesis=None, validate_on_synthesis=False)
    check_synthesis(none, method)
    with pytest.raises(UserError, match="INPFormer learns from corrupted images: set synthesis"):
        check_synthesis(none, headed)


def test_residuals_are_the_mean_of_groups_of_weighted_errors() -> None:
    torch.manual_seed(0)
    given, rebuilt = torch.randn(2, 1, 3, 2, 2), torch.randn(2, 1, 3, 2, 2)
    expected = torch.zeros(1, 3, 2, 2)
    for e, d in zip(given, rebuilt, strict=True):
        for i in range(2):
            for j in range(2):
                one, other = e[0, :, i, j], d[0, :, i, j]
                cosine = one @ other / (one.norm() * other.norm())
                expected[0, :, i, j] += (1 - cosine) * (one - other).abs() / 2
    torch.testing.assert_close(residual(list(given), list(rebuilt)), expected)


def test_dice_is_of_the_batch_as_one_image() -> None:
    torch.manual_seed(0)
    found, truth = torch.rand(3, 1, 4, 5), torch.zeros(3, 1, 4, 5)
    truth[0, 0, :2] = 1
    overlap = total_of_squares = 0.0
    for p, t in zip(found.flatten().tolist(), truth.flatten().tolist(), strict=True):
        overlap += p * t
        total_of_squares += p * p + t * t
    expected = 1 - (2 * overlap + 1) / (total_of_squares + 1)
    assert float(batch_dice(found, truth)) == pytest.approx(expected, abs=1e-6)
    assert float(batch_dice(truth, truth)) == 0
    nothing = torch.zeros_like(truth)
    assert float(batch_dice(nothing, nothing)) == 0  # a batch without corruption
    assert 0 < float(batch_dice(found, nothing)) < 1


def test_dice_teaches_the_head_alone(headed: Any, make_batch: Build) -> None:
    headed.train().losses(make_batch())["dice"].backward()
    taught = {name for name, p in headed.named_parameters() if p.grad is not None}
    assert taught == {f"head.{name}" for name, _ in headed.head.named_parameters()}
    assert all(p.grad.any() for p in headed.head.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_rest_learns_as_without_the_head(
    method: Any, headed: Any, make_batch: Build, autocast: bool
) -> None:
    """To the bit, also where autocast keeps rounded weights for the second pass."""
    batch, found = make_batch(), []
    for each in (method, headed):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            terms = each.train().losses(batch)
        total(terms).backward()
        found.append((terms, {n: p.grad for n, p in each.named_parameters()}))
    (without, plain_gradients), (terms, gradients) = found
    assert set(terms) == {*without, "dice"}
    assert all(torch.equal(terms[name], value) for name, value in without.items())
    learned = {n: g for n, g in plain_gradients.items() if g is not None}
    assert learned
    assert all(torch.equal(gradients[name], value) for name, value in learned.items())


def test_weights_are_those_without_the_head(method: Any, headed: Any) -> None:
    state, longer = method.state_dict(), headed.state_dict()
    assert {name for name in longer if name not in state} == {
        f"head.{name}" for name in headed.head.state_dict()
    }
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    assert all(torch.equal(longer[name], value) for name, value in tensors.items())


def test_the_head_learns_from_residuals_without_dropout(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("inp_former", head="residual", dropout=0.5).train(), make_batch()
    one, other = method.losses(batch), method.losses(batch)
    assert not torch.equal(one["distance"], other["distance"])
    assert torch.equal(one["dice"], other["dice"])
    assert all(part.training for part in method.bottleneck)
    method.bottleneck.eval()
    method.losses(batch)
    assert not any(part.training for part in method.bottleneck)


@pytest.mark.parametrize("corrupted", [2, 1, 0])
def test_dice_falls_whatever_share_of_the_batch_is_corrupted(
    headed: Any, fit: Build, make_batch: Build, corrupted: int
) -> None:
    batch = make_batch()
    batch["corrupted"][corrupted:] = batch["image"][corrupted:]
    batch["corruption"][corrupted:] = False
    with torch.no_grad():
        before = headed.losses(batch)["dice"]
        fit(headed, batch, 20)
        assert headed.losses(batch)["dice"] < before


@pytest.mark.parametrize("mse", ["none", "mean"])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_map_is_the_mean_of_reconstruction_and_mask(
    small_method: Build, make_batch: Build, aligned: bool, mse: str
) -> None:
    changes = {"align_corners": aligned, "mse": mse}
    method = small_method("inp_former", head="residual", **changes).eval()
    plain_map = small_method("inp_former", **changes).eval()(make_batch()["image"]).anomaly_map
    image = make_batch()["image"]
    _, _, given, rebuilt = method.compare(method.backbone(image))
    logits = method.head(residual(given, rebuilt))
    assert logits.shape == (2, 1, 16, 16)  # of 4 x 4 patches
    found = F.interpolate(logits, (64, 64), mode="bilinear").sigmoid()
    mask_map = scored([found], (64, 64)).anomaly_map
    prediction = method(image)
    torch.testing.assert_close(prediction.anomaly_map, (plain_map + mask_map) / 2)
    assert prediction.score.shape == (2,)


def test_an_image_that_is_not_square_trains_and_is_scored(
    headed: Any, fit: Build, make_batch: Build
) -> None:
    batch = make_batch(2, 64, 96)
    fit(headed, batch, 2, "bf16-mixed")
    with torch.inference_mode():
        prediction = headed.eval().score_batch(batch)
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    assert prediction.anomaly_map.dtype == torch.float32


def test_a_head_without_reconstruction_is_refused(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"set method\.head=none, or method\.score=reconstruction"):
        small_method("inp_former", head="residual", score="inp_distance")


def test_the_command_line_builds_the_head() -> None:
    line = ["method=inp_former_small", "method.head=residual", "synthesis=draem"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose("train", [*line, "dataset.root=unused", "output_dir=unused"]))
    validate(config)
    with torch.device("meta"):
        method = instantiate(config["method"])
    assert method.needs == {"corrupted"}
    assert count(method.head) > 0
    assert config["dataset"]["synthesis"] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prototypes": 0}, "prototypes=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"gamma": -1.0}, "gamma=-1"),
        ({"depth": 3}, "depth=3 must be a multiple of the 2 maps"),
    ],
)
def test_numbers_out_of_range_are_refused(
    small_method: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_method("inp_former", **changes)


def test_prefix_tokens_are_refused(small_method: Build) -> None:
    backbone = Backbone("test_vit.r160_in1k", [2, 3, 4, 5], weights="random", groups=2, prefix=True)
    with pytest.raises(UserError, match=r"set method\.backbone\.prefix=false"):
        small_method("inp_former", backbone=backbone)
