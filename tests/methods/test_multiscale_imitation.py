"""Multi-scale imitation's modules, search and costs against plain loops; a search that goes on."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.callbacks.run import ResumeCheckpoint, StepSeeds
from anomaly_lit.methods.multiscale_imitation.network import at_scale, distance, inputs_of
from anomaly_lit.methods.multiscale_imitation.search import (
    Fusion,
    auroc,
    balanced_bce,
    cost,
    defects_in_some,
)
from anomaly_lit.nn.aggregate import smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def method(small_method: Build) -> Any:
    """Two scales of three levels; means and weights as if it had been trained."""
    built = small_method("multiscale_imitation").eval()
    built.fusion.mean.copy_(torch.linspace(0.2, 0.7, 6))
    return built


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------- modules


def test_distance_is_half_the_squared_distance_of_unit_vectors() -> None:
    given, made = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    found = distance(given, made)
    assert found.shape == (2, 1, 3, 4)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                one, other = given[image, :, row, column], made[image, :, row, column]
                gap = (one / one.norm() - other / other.norm()).square().sum() / 2
                assert float(found[image, 0, row, column]) == pytest.approx(float(gap), abs=1e-6)
    assert float(distance(given, -given).mean()) == pytest.approx(2, abs=1e-6)


def test_published_students_have_the_parameters_of_their_layers(published_method: Build) -> None:
    method = published_method("multiscale_imitation", 256)

    def expected(given: int, made: int, entry: int = 0) -> int:
        first = 9 * (entry or given) * made + 2 * made
        blocks = 2 * 2 * (9 * made * made + 2 * made)
        return (given + 1) * entry + first + blocks + made * (made + 1)

    (students,) = method.students
    found = [parameters(level) for level in students.levels]
    assert found == [expected(64, 64, 16), expected(64, 128), expected(128, 256)]
    assert [round(count / 1e6, 2) for count in found] == [0.16, 0.68, 2.72]


def test_students_of_their_own_scales_take_as_many_times_the_parameters(
    small_method: Build,
) -> None:
    shared = small_method("multiscale_imitation")
    own = small_method("multiscale_imitation", share_scales=False)
    assert parameters(own.students) == 2 * parameters(shared.students)


def test_first_input_of_a_resnet_is_the_output_of_its_stem(method: Any) -> None:
    image = torch.rand(1, 3, 64, 64)
    network = method.backbone.network
    stem = network.maxpool(
        network.act1(
            network.bn1(network.conv1((image - method.backbone.mean) / method.backbone.std))
        )
    )
    features = method.backbone(image)
    inputs = inputs_of(features, 2)
    assert torch.equal(inputs[0], stem)
    assert [one is other for one, other in zip(inputs[1:], features[1:3], strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [((256, 256), 0.75, (192, 192)), ((256, 256), 1.5, (384, 384)), ((64, 96), 0.75, (48, 64)),
     ((40, 100), 1.0, (32, 96)), ((32, 32), 0.1, (16, 16))],
)  # fmt: skip
def test_sides_of_scaled_images_are_multiples_of_the_largest_stride(
    size: tuple[int, int], factor: float, expected: tuple[int, int]
) -> None:
    assert at_scale(torch.rand(1, 3, *size), factor, 16).shape[-2:] == expected


def test_an_image_at_its_own_scale_stays_as_it_is() -> None:
    image = torch.rand(1, 3, 64, 96)
    assert at_scale(image, 1.0, 16) is image


def test_scaled_images_are_antialiased() -> None:
    image = torch.rand(2, 3, 64, 64)
    expected = F.interpolate(image, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(at_scale(image, 0.75, 16), expected)


# ---------------------------------------------------------------------------------------- map


def test_map_is_the_weighted_sum_of_the_modules(method: Any) -> None:
    image = torch.rand(2, 3, 64, 64)
    method.fusion.settle(torch.tensor([0.3, 0.2, 0.1, 0.1, 0.2, 0.1]))
    expected = torch.zeros(2, 1, 64, 64)
    (students,) = method.students
    with torch.no_grad():
        for number, side in ((0, 64), (3, 32)):
            seen = F.interpolate(image, (side, side), mode="bilinear", antialias=side < 64)
            stem, *maps = method.backbone(seen)
            before = [F.max_pool2d(stem, 3, 2, 1), *maps]
            for level in range(3):
                made = students.levels[level](before[level])
                gap = 1 - F.cosine_similarity(made, maps[level])[:, None]
                up = F.interpolate(gap, (64, 64), mode="bilinear", align_corners=False)
                share = method.fusion.weights[number + level] / method.fusion.mean[number + level]
                expected += share * up
        found = method(image)
    expected = smooth(expected, method.smoothing)
    torch.testing.assert_close(found.anomaly_map, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.score, found.anomaly_map.amax(dim=(1, 2, 3)))


def test_product_is_over_levels_and_the_sum_over_scales(small_method: Build) -> None:
    method = small_method("multiscale_imitation", fusion="product", smoothing=0.0).eval()
    method.fusion.kept = [0, 2, 4]
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = method.fusion.on_one_scale(method.distances(image, [0, 2, 4]), image.shape[-2:])
        found = method(image).anomaly_map
    torch.testing.assert_close(found, maps[0] * maps[2] + maps[4])


def test_one_scale_of_several_is_the_method_with_one_scale(
    method: Any, small_method: Build
) -> None:
    alone = small_method("multiscale_imitation", scales=[1.0]).eval()
    alone.students.load_state_dict(method.students.state_dict())
    alone.backbone.load_state_dict(method.backbone.state_dict())
    alone.fusion.mean.copy_(method.fusion.mean[:3])
    method.fusion.settle(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(method(image).anomaly_map, alone(image).anomaly_map)


def test_a_module_without_weight_changes_nothing_when_it_is_left_out(method: Any) -> None:
    image, weights = torch.rand(2, 3, 64, 64), torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0, 0.0])
    with torch.no_grad():
        whole = method.fused(image, range(6), weights)
        method.fusion.settle(weights)
        found = method(image).anomaly_map
    assert method.fusion.kept == [0, 2, 3]
    torch.testing.assert_close(found, whole)


def test_what_is_left_out_is_not_computed(method: Any) -> None:
    ran: list[str] = []
    for name, module in method.named_modules():
        if name == "backbone" or (name.startswith("students.0.levels.") and name.count(".") == 3):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    method.fusion.settle(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    with torch.no_grad():
        method(torch.rand(1, 3, 64, 64))
    assert ran == ["backbone", "students.0.levels.1"]


def test_all_modules_can_be_asked_to_compare(method: Any, small_method: Build) -> None:
    method.fusion.settle(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    every = small_method("multiscale_imitation", modules="all").eval()
    every.load_state_dict(method.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = method.fused(image, range(6), torch.full((6,), 1 / 6))
        assert torch.equal(every(image).anomaly_map, expected)


def test_chained_students_are_the_teachers_network(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("multiscale_imitation", student="chained")
    expected = Backbone("resnet18.tv_in1k", [1, 2, 3], weights="random").network
    assert parameters(method.students) == parameters(expected)
    method.students.load_state_dict(
        {f"0.network.{key}": value for key, value in method.backbone.network.state_dict().items()}
    )
    method.eval()
    with torch.no_grad():
        maps = method.distances(torch.rand(1, 3, 64, 64), range(6))
    assert max(float(map_.abs().max()) for map_ in maps.values()) < 1e-5  # a perfect imitation
    fit(method, make_batch(), 3)


# ------------------------------------------------------------------------------------- search


def test_cross_entropy_weighs_both_kinds_alike() -> None:
    logits, truth = torch.randn(2, 1, 4, 5), torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    truth[0, 0, 0, :3] = True
    sums, counts = [0.0, 0.0], [0, 0]
    for logit, true in zip(logits.flatten().tolist(), truth.flatten().tolist(), strict=True):
        share = 1 / (1 + math.exp(-logit))
        sums[true] -= math.log(share if true else 1 - share)
        counts[true] += 1
    expected = (sums[0] / counts[0] + sums[1] / counts[1]) / 2
    assert float(balanced_bce(logits, truth)) == pytest.approx(expected, abs=1e-6)
    assert balanced_bce(logits, torch.zeros_like(truth)).isfinite()


def test_entropy_is_that_of_the_weights() -> None:
    fusion = Fusion(3, 0.5)
    assert float(fusion.entropy().detach()) == pytest.approx(math.log(3))
    with torch.no_grad():
        fusion.alpha.copy_(torch.tensor([2.0, 0.0, -1.0]))
    weights = fusion.alpha.softmax(0).tolist()
    assert sum(weights) == pytest.approx(1)
    assert float(fusion.entropy().detach()) == pytest.approx(-sum(w * math.log(w) for w in weights))


def test_modules_under_half_of_an_equal_weight_are_left_out() -> None:
    fusion = Fusion(4, 0.5)
    fusion.settle(torch.tensor([0.5, 0.3, 0.124, 0.076]))
    assert fusion.kept == [0, 1]
    torch.testing.assert_close(fusion.weights, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    again = Fusion(4, 0.5)
    again.load_state_dict(fusion.state_dict())
    assert again.kept == [0, 1]


def test_descent_finds_the_module_that_sees_the_defects() -> None:
    torch.manual_seed(0)
    fusion, truth = Fusion(3, 0.5), torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    truth[:2, :, 4:9, 4:9] = True
    maps = {n: 1 + 0.3 * torch.randn(4, 1, 16, 16) for n in range(3)}
    maps[1] = maps[1] + 2 * truth
    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        fused = fusion.weighted_sum(maps, truth.shape[-2:], fusion.alpha.softmax(0))
        (balanced_bce(fusion.logits(fused), truth) + 0.01 * fusion.entropy()).backward()
        optimizer.step()
    fusion.settle(fusion.alpha.detach().softmax(0))
    assert fusion.kept == [1]


def test_a_share_of_the_images_has_its_defect(make_batch: Build) -> None:
    batch = make_batch(64)
    parts = batch["image"], batch["corrupted"], batch["corruption"]
    image, truth = defects_in_some(*parts, 0.5, torch.Generator().manual_seed(0))
    defective = truth.flatten(1).any(dim=1)
    assert 20 < int(defective.sum()) < 44
    assert torch.equal(image[defective], batch["corrupted"][defective])
    assert torch.equal(image[~defective], batch["image"][~defective])
    assert torch.equal(truth[defective], batch["corruption"][defective])


def test_the_search_moves_its_own_numbers_only(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, before = small_method("multiscale_imitation"), {}

    def begin(name: str) -> None:
        method.start_stage(name)
        before[name] = copy.deepcopy(method.state_dict())

    method.stages._start = begin
    fit(method, make_batch(), 6)
    after = method.state_dict()
    assert list(before) == ["students", "search"]
    moved = [
        {k for k, v in of.items() if isinstance(v, Tensor) and not v.equal(after[k])}
        for of in before.values()
    ]
    own = {"fusion.alpha", "fusion.slope", "fusion.bias", "fusion.weights"}
    assert moved[1] == own
    assert {"students.0.levels.0.0.weight", "students.0.levels.1.1.running_mean"} < moved[0]


class Stop(pl.Callback):
    """Ends training before a batch, as a failing machine would."""

    def on_train_batch_start(self, trainer: Any, method: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 7:
            raise ConnectionError


def test_a_killed_search_goes_on_where_it_was(
    small_method: Build, fit: Build, make_batch: Build, tmp_path: Path
) -> None:
    def run(folder: str, *more: Any, resume: bool = False) -> Any:
        file = tmp_path / folder / "last.ckpt"
        callbacks = [StepSeeds(0), ResumeCheckpoint(str(file.parent), every_steps=5), *more]
        method = small_method("multiscale_imitation", search_rate=0.5)
        fit(method, make_batch(), 9, callbacks=callbacks, ckpt_path=file if resume else None)
        return method

    whole = run("whole")
    with pytest.raises(ConnectionError):
        run("cut", Stop())
    kept = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["state_dict"]
    assert kept["stages._extra_state"]["started"] == 2
    assert not kept["fusion.alpha"].equal(whole.fusion.alpha)
    again = run("cut", resume=True)
    assert again.fusion.kept == whole.fusion.kept != list(range(6))
    for key, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again.state_dict()[key]), key


def test_inverse_variances_need_no_defects(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("multiscale_imitation", search="normal_only"), make_batch(4)
    assert not method.needs
    assert method.stages.names == ["students"]
    fit(method, batch, 3)
    method.eval()
    with torch.no_grad():
        maps = method.distances(batch["image"], range(6))
    inverse = [float((maps[n] / maps[n].mean()).var()) ** -1 for n in range(6)]
    kept = [n for n in range(6) if inverse[n] > 0.5 * sum(inverse) / 6]
    assert method.fusion.kept == kept
    expected = [inverse[n] / sum(inverse[m] for m in kept) if n in kept else 0.0 for n in range(6)]
    torch.testing.assert_close(method.fusion.weights, torch.tensor(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(method.fusion.mean, torch.stack([maps[n].mean() for n in range(6)]))


def test_without_a_search_all_modules_count_alike(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("multiscale_imitation", search="none")
    fit(method, make_batch(), 3)
    assert method.fusion.kept == list(range(6))
    torch.testing.assert_close(method.fusion.weights, torch.full((6,), 1 / 6))
    assert method.outcome() == {}


def test_held_out_losses_have_the_terms_of_both_stages(method: Any, make_batch: Build) -> None:
    assert set(method.losses(make_batch())) == {
        "level_1", "level_2", "level_3", "detection", "entropy"
    }  # fmt: skip


# ---------------------------------------------------------------------------------- reporting


def test_auroc_is_that_of_scikit_learn() -> None:
    scores, truth = torch.randint(0, 9, (200,)).float(), torch.rand(200) < 0.3
    expected = roc_auc_score(truth.numpy(), scores.numpy())
    assert float(auroc(scores, truth)) == pytest.approx(expected)


def test_cost_counts_what_is_used(method: Any) -> None:
    image, weights = torch.rand(1, 3, 64, 64), torch.full((6,), 1 / 6)
    (students,) = method.students
    teacher = sum(p.numel() for p in method.backbone.parameters())
    level = students.levels[1]

    def of(chosen: list[int]) -> tuple[int, int]:
        with torch.no_grad():
            return cost(method.fused, image, chosen, weights)

    used, products = of([1])
    assert used == teacher + parameters(level)
    convolutions = [m for m in level.modules() if isinstance(m, torch.nn.Conv2d)]
    own = sum(m.weight.numel() * 8 * 8 for m in convolutions)  # the level's map is 8 x 8
    smoothing = 2 * 9 * 64 * 64  # rows and columns of a filter of 4 pixels on each side
    _, of_teacher = cost(lambda image, *_: method.backbone(image), image, [], weights)
    assert products == of_teacher + own + smoothing
    more, several = of([0, 1, 4])
    assert more == used + parameters(students.levels[0])
    assert several > products


def test_a_run_tells_what_the_search_found(
    run_here: Build, mvtec_folder: Path, tmp_path: Path
) -> None:
    outcome = run_here(
        "train", "method=multiscale_imitation_small", "method.backbone.weights=random",
        "method.depth=1", "method.shares=[1,2]", "method.search_rate=0.5", "dataset=mvtec_ad",
        f"dataset.root={mvtec_folder}", "dataset.categories=[bolt]", "dataset.batch_size=2",
        "image_size=64", "trainer=cpu", "trainer.max_steps=9", "trainer.precision=32-true",
        "logger=none", f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["method/modules"] == 6
    assert f"modules_kept: {metrics['method/modules_kept']}" in outcome.out
    assert metrics["method/parameters_after"] <= metrics["method/parameters_before"]
    assert metrics["method/multiply_adds_after"] < metrics["method/multiply_adds_before"]
    assert all(0 <= metrics[f"method/pixel_auroc_{arm}"] <= 1 for arm in ("before", "after"))
    assert "held out" in metrics["method/compared_on"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    kept = checkpoint["state_dict"]["fusion._extra_state"]["kept"]
    assert len(kept) == metrics["method/modules_kept"].count("level") < 6


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": [1.0, 1.0]}, "each scale once"),
        ({"scales": []}, "scales="),
        ({"scales": [0.0]}, "scales="),
        ({"shares": [1.0, 0.0]}, "shares="),
        ({"shares": [1.0]}, "shares="),
        ({"keep": 1.0}, "keep=1"),
        ({"defects": 0.0}, "defects=0"),
        ({"depth": 0}, "depth=0"),
        ({"smoothing": -1.0}, "smoothing=-1"),
    ],
)
def test_impossible_values_are_refused(
    small_method: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_method("multiscale_imitation", **changes)


def test_a_teacher_of_one_stage_is_refused(small_method: Build) -> None:
    backbone = Backbone("resnet18.tv_in1k", [1], weights="random")
    with pytest.raises(UserError, match="at least two stages"):
        small_method("multiscale_imitation", backbone=backbone)
