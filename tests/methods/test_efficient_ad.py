"""EfficientAD against its formulas written out, and the facts its description states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.methods.efficient_ad import hard_mean, quantiles
from anomaly_lit.methods.efficient_ad.network import Autoencoder
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def trained(small_method: Build, fit: Build, make_batch: Build) -> Build:
    """Builds ``trained(**changes)``: a tiny one after a step."""

    def build(**changes: Any) -> Any:
        method = small_method("efficient_ad", **changes)
        fit(method, make_batch(), 1)
        return method.eval()

    return build


@pytest.mark.parametrize(
    ("changes", "count"), [({}, 5_363_712), ({"pdn": "medium", "width": 256}, 12_711_808)]
)
def test_sizes_are_those_of_the_paper(
    changes: dict[str, Any], count: int, small_method: Build
) -> None:
    paper = {"image_size": 256, "width": 128, "channels": 384, "latent": 64}
    method = small_method("efficient_ad", **paper | changes)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in method.autoencoder.parameters()) == 1_096_320


@pytest.mark.parametrize("size", [256, 128, 64, (128, 192)])
def test_the_autoencoder_has_one_position_in_the_middle(size: Any) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    network = Autoencoder(size, 4, 8, 0.2)
    image = torch.rand(2, 3, height, width)
    assert network.encoder(image).shape == (2, 4, 1, 1)
    assert network(image).shape == (2, 8, height // 4 - 8, width // 4 - 8)


def test_the_autoencoder_s_maps_grow_as_in_the_code() -> None:
    network, sizes = Autoencoder(256, 2, 3, 0.0), []
    for stage in network.decoder:
        stage.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-1]))
    network(torch.rand(1, 3, 256, 256))
    assert sizes == [3, 8, 15, 32, 63, 127]


def test_values_are_dropped_in_training_alone() -> None:
    network, image = Autoencoder(64, 4, 8, 0.5), torch.rand(1, 3, 64, 64)
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize(("size", "words"), [(48, "of at least 64"), (100, "multiples of 32")])
def test_an_image_that_the_autoencoder_cannot_take_is_refused(size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Autoencoder(size, 4, 8, 0.2)


# ------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize(("count", "hard"), [(1000, 1), (55_296, 56), (1_204_224, 1205)])
def test_the_largest_thousandth_counts(count: int, hard: int) -> None:
    values = torch.arange(count).double()[torch.randperm(count)]
    expected = sum(range(count - hard, count)) / hard
    assert float(hard_mean(values.view(2, -1), 0.999)) == pytest.approx(expected, rel=1e-12)


def test_equal_values_all_count() -> None:
    assert float(hard_mean(torch.full((2, 3), 4.0), 0.999)) == 4
    values = torch.tensor([0.0, 1.0, 1.0, 1.0], requires_grad=True)
    hard_mean(values, 0.99).backward()
    torch.testing.assert_close(values.grad, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))


def test_losses_equal_their_formulas(trained: Build, make_batch: Build) -> None:
    method, batch = trained(), make_batch()
    image, n = batch["image"], 8
    taught = (method.teacher(image) - method.mean) / method.std
    answer, rebuilt = method.student(image), method.autoencoder(image)
    local, whole = answer[:, :n], answer[:, n:]
    away = (taught - local).square().flatten()
    terms = method.losses(batch)
    assert terms.keys() == {"hard", "autoencoder", "student"}
    torch.testing.assert_close(terms["hard"], away[away >= away.quantile(0.9)].mean())
    torch.testing.assert_close(terms["autoencoder"], (taught - rebuilt).square().mean())
    torch.testing.assert_close(terms["student"], (rebuilt - whole).square().mean())


def test_the_student_answers_0_on_images_of_other_things(trained: Build, make_batch: Build) -> None:
    other = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    batch = make_batch() | {"outlier": other}
    assert "penalty" not in trained().losses(batch)
    method = trained(penalty=True, penalty_grey=0.0)
    assert method.needs == {"outlier"}
    expected = method.student(other)[:, :8].square().mean()
    torch.testing.assert_close(method.losses(batch)["penalty"], expected)
    assert "penalty" not in method.losses(make_batch())
    grey = trained(penalty=True, penalty_grey=1.0).some_grey(other)
    assert torch.equal(grey[:, :1].expand_as(grey), grey)


@pytest.mark.parametrize("detached", [False, True])
def test_the_autoencoder_is_drawn_to_the_student_unless_detached(
    detached: bool, trained: Build, make_batch: Build
) -> None:
    method = trained(stae_detach=detached)
    method.zero_grad()
    method.losses(make_batch())["student"].backward()
    grown = [p.grad is not None for p in method.autoencoder.parameters()]
    assert grown == [not detached] * len(grown)


def test_training_leaves_the_teacher_as_it_is(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("efficient_ad")
    fit(method, make_batch(), 1)
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    kept = method.mean.clone(), method.std.clone()
    fit(method, make_batch(), 3)
    assert all(torch.equal(method.teacher.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(method.mean, kept[0])
    assert torch.equal(method.std, kept[1])


# -------------------------------------------------------------------------------- the maps


def test_quantiles_equal_torch_s() -> None:
    values = torch.randn(2, 1001, generator=torch.Generator().manual_seed(0))
    expected = values.quantile(torch.tensor([0.9, 0.995, 0.5]), dim=1).T
    torch.testing.assert_close(quantiles(values, [0.9, 0.995, 0.5]), expected)


def test_held_out_maps_have_their_quantiles_at_0_and_a_tenth(
    trained: Build, make_batch: Build
) -> None:
    method, image = trained(), make_batch()["image"]
    scaled = 0.1 * (method.distances(image) - method.low) / (method.high - method.low)
    for number in range(2):
        ends = scaled[:, number].flatten().quantile(torch.tensor([0.9, 0.995]))
        torch.testing.assert_close(ends, torch.tensor([0.0, 0.1]), atol=1e-5, rtol=1e-4)


def test_scale_and_shift_of_a_raw_map_change_nothing(
    trained: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = trained(), make_batch()
    expected, raw = method(batch["image"]), method.distances
    factors = torch.tensor([3.0, 0.2]).view(1, 2, 1, 1)
    monkeypatch.setattr(method, "distances", lambda image: factors * raw(image) + 5)
    monkeypatch.setattr(method, "normal_batches", lambda *arguments: [batch])
    method.calibrate()
    found = method(batch["image"])
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, atol=1e-3, rtol=1e-3)


def test_answers_without_error_give_a_constant_map(
    trained: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = trained(), make_batch()

    def perfect(image: Tensor) -> tuple[Tensor, Tensor]:
        return method.describe(image), method.autoencoder(image)

    monkeypatch.setattr(method, "follow", perfect)
    monkeypatch.setattr(method, "normal_batches", lambda *arguments: [batch])
    method.calibrate()
    assert torch.equal(method(batch["image"]).anomaly_map, torch.zeros(2, 1, 64, 64))


def test_the_border_is_filled_with_the_nearest_value(
    trained: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = trained()
    maps = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(method, "distances", lambda image: maps)
    scaled = (0.1 * (maps - method.low) / (method.high - method.low)).mean(dim=1, keepdim=True)
    rows = (torch.arange(16) - 4).clamp(0, 7)
    whole = scaled[:, :, rows][..., rows]
    expected = F.interpolate(whole, (64, 64), mode="bilinear")
    found = method(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(found.anomaly_map, expected)
    assert float(found.score) == float(expected.max())


# ----------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teacher_weights": None},
            "not set, and a random teacher teaches nothing: distil one .*anomaly-train "
            "experiment=pdn_teacher dataset.root=IMAGES method.pdn=small method.width=4 "
            r"method.channels=8 .*TEACHER/teacher\.safetensors$",
        ),
        ({"teacher_weights": "absent.safetensors"}, "method.teacher_weights=absent.* no such file"),
        ({"width": 8}, "a teacher with width=4"),
        ({"map_quantiles": [0.995, 0.9]}, "give two, rising"),
        ({"hard_quantile": 1.0}, r"method.hard_quantile=1.0: it must be in \[0, 1\)"),
        ({"latent": 3}, "method.latent=3 must be even"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], words: str, small_method: Build, fit: Build, make_batch: Build
) -> None:
    with pytest.raises(UserError, match=words):
        fit(small_method("efficient_ad", **changes), make_batch(), 1)


def test_a_teacher_with_a_constant_channel_is_refused(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    batch = make_batch()
    grey = {**batch, "image": torch.full_like(batch["image"], 0.5)}
    with pytest.raises(UserError, match="8 of 8 channels of the teacher are constant"):
        fit(small_method("efficient_ad"), grey, 1)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("method.teacher_weights=null", "method.teacher_weights is not set"),
        ("method.teacher_weights=gone.safetensors", "gone.safetensors: no such file"),
        ("dataset.holdout=0", "EfficientAD needs held-out images: set dataset.holdout above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_image_is_read(
    argument: str,
    words: str,
    run_here: Build,
    mvtec_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*arguments: Any) -> None:
        raise AssertionError("images are read")

    monkeypatch.setattr(AnomalyDataModule, "setup", read)
    outcome = run_here(
        "train", "method=efficient_ad_small", "dataset=mvtec_ad", f"dataset.root={mvtec_folder}",
        "image_size=64", argument, f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert outcome.code == 1
    assert words in outcome.err
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_needed(
    small_method: Build, fit: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = small_method("efficient_ad")
    monkeypatch.setattr(method, "normal_batches", lambda *arguments: iter(()))
    with pytest.raises(UserError, match=r"dataset\.holdout above 0"):
        fit(method, make_batch(), 1)


def test_a_run_says_what_its_teacher_is_and_that_there_is_no_penalty(
    trained: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    told = capsys.readouterr().out
    assert "teacher: distilled from none in 0 steps on 0 images; error on held-out" in told
    assert "set method.penalty=true dataset.outlier_dir=DIR" in told


def test_a_penalty_needs_a_folder_of_images(
    run_here: Build, mvtec_folder: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    line = (
        "method=efficient_ad_small", "method.width=4", "method.channels=8", "method.latent=4",
        f"method.teacher_weights={tiny_teacher}", "method.penalty=true", "dataset=mvtec_ad",
        f"dataset.root={mvtec_folder}", "dataset.categories=[bolt]", "image_size=64", "trainer=cpu",
        "trainer.max_steps=2", "trainer.val_check_interval=2", "dataset.batch_size=2",
        "trainer.precision=32-true", "logger=none", f"output_dir={tmp_path}",
    )  # fmt: skip
    outcome = run_here("train", *line)
    assert outcome.code == 1
    assert "set dataset.outlier_dir to a folder" in outcome.err
    others = f"dataset.outlier_dir={mvtec_folder / 'cloth' / 'train'}"
    outcome = run_here("train", *line, others, "method.penalty=false")
    assert outcome.code == 1
    assert "dataset.outlier_dir=null, or method.penalty=true to read them" in outcome.err
    outcome = run_here("train", *line, others)
    assert outcome.code == 0, outcome.err
