"""The distillation of a teacher: what is imitated, written, and read by EfficientAD."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.nn.aggregate import shrink
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def slowly_described(maps: list[Tensor], grid: tuple[int, int], most: int, count: int) -> Tensor:
    """One image: patches are resized before their channels are averaged, one position a time."""
    stages = []
    for stage in maps:
        _, height, width = stage.shape
        padded = F.pad(stage, (1, 1, 1, 1))
        patches = torch.stack(
            [
                torch.stack([padded[:, y : y + 3, x : x + 3].flatten() for x in range(width)])
                for y in range(height)
            ]
        )  # (h, w, 9 C)
        stages.append(F.interpolate(patches.permute(2, 0, 1)[None], grid, mode="bilinear")[0])
    found = torch.zeros(count, *grid)
    for y in range(grid[0]):
        for x in range(grid[1]):
            parts = [stage[:, y, x] for stage in stages]
            means = [F.adaptive_avg_pool1d(p[None], min(most, len(p)))[0] for p in parts]
            found[:, y, x] = F.adaptive_avg_pool1d(torch.cat(means)[None], count)[0]
    return found


def test_a_position_is_described_by_means_of_its_neighbours(small_method: Build) -> None:
    """Of 128 and 256 channels, 9 neighbours each."""
    method = small_method("pdn_teacher", pooled=40, channels=12)
    maps = [torch.randn(2, 128, 6, 4), torch.randn(2, 256, 3, 2)]
    found = method.describe(maps, torch.rand(2, 3, 48, 32))
    for number in range(2):
        own = [stage[number] for stage in maps]
        torch.testing.assert_close(found[number], slowly_described(own, (6, 4), 40, 12))
    whole = small_method("pdn_teacher", pooled=2000, channels=12)  # 128 * 9 are not averaged
    found = whole.describe(maps, torch.rand(2, 3, 48, 32))
    torch.testing.assert_close(
        found[0], slowly_described([stage[0] for stage in maps], (6, 4), 2000, 12)
    )


def test_values_to_imitate_have_mean_0_and_deviation_1(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("pdn_teacher"), make_batch(4)
    fit(method, batch, 1)
    target = method.describe(method.backbone(batch["image"]), batch["image"])
    target = (target - method.mean) / method.std
    torch.testing.assert_close(target.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        target.std((0, 2, 3), unbiased=False), torch.ones(8), atol=1e-3, rtol=0
    )


def test_the_small_network_sees_half_the_image(small_method: Build, make_batch: Build) -> None:
    method, image = small_method("pdn_teacher").eval(), make_batch()["image"]
    maps = method.backbone(image)
    target = method.describe(maps, image)
    expected = (method.teacher(shrink(image, (32, 32))) - target).square()
    torch.testing.assert_close(method.errors(image, maps), expected)
    assert expected.shape == (2, 8, 8, 8)


def test_a_share_of_a_batch_turns_grey_for_both_networks(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("pdn_teacher", grey=0.3), make_batch(4)
    image = batch["image"].clone()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    image[:2] = (image[:2] * weights).sum(dim=1, keepdim=True)  # 0.3 * 4, rounded up
    expected = method.errors(image, method.backbone(image)).mean()
    cached = {**batch, "features": {"backbone": method.backbone(batch["image"])}}
    for given in (batch, cached):
        torch.testing.assert_close(method.train().losses(given)["imitation"], expected)
    plain = method.errors(batch["image"], method.backbone(batch["image"])).mean()
    torch.testing.assert_close(method.eval().losses(batch)["imitation"], plain)


def test_more_values_than_the_backbone_gives_are_refused(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"method\.channels=64 is more than the 32 values"):
        small_method("pdn_teacher", channels=64)


def test_a_teacher_needs_held_out_images(
    small_method: Build, fit: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = small_method("pdn_teacher")
    monkeypatch.setattr(method, "normal_batches", lambda *arguments: iter(()))
    with pytest.raises(UserError, match=r"dataset\.holdout above 0"):
        fit(method, make_batch(), 1)


def test_a_run_writes_a_teacher_that_efficient_ad_reads(
    run_here: Build, mvtec_folder: Path, tmp_path: Path
) -> None:
    """From all pictures in a folder; none is tested on."""
    small = ("method.width=4", "method.channels=8", "image_size=64", "trainer=cpu", "logger=none")
    small += ("trainer.precision=32-true", "trainer.val_check_interval=10", "dataset.batch_size=2")
    root, run = mvtec_folder / "bolt" / "train", tmp_path / "teacher"
    outcome = run_here(
        "train", "experiment=pdn_teacher", "method=pdn_teacher_small", f"dataset.root={root}",
        "method.backbone.weights=random", "trainer.max_steps=40", *small, f"output_dir={run}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "this is a weak teacher" in outcome.out
    with safe_open(run / "teacher.safetensors", framework="pt") as opened:
        facts = opened.metadata()
    metrics = json.loads((run / "metrics.json").read_text())
    assert facts["backbone"] == "resnet18.tv_in1k [2, 3]"
    assert len(facts["backbone_weights"]) == 64
    assert facts["images_digest"] == metrics["data_digest"]
    assert [facts[key] for key in ("images", "held_out_images", "steps")] == ["5", "1", "40"]
    assert facts["commit"] == str(metrics["commit"])
    assert float(facts["held_out_error"]) == pytest.approx(metrics["val/loss"], rel=1e-4)
    assert f"error {float(facts['held_out_error']):.4f} on 1 held-out" in outcome.out

    line = ("method=efficient_ad_small", "method.latent=4", "dataset=mvtec_ad", *small)
    line += (
        f"dataset.root={mvtec_folder}",
        "trainer.max_steps=10",
        f"output_dir={tmp_path / 'ad'}",
    )
    teacher = f"method.teacher_weights={run / 'teacher.safetensors'}"
    outcome = run_here("train", *line, teacher)
    assert outcome.code == 0, outcome.err
    assert "teacher: distilled from resnet18.tv_in1k [2, 3] in 40 steps on 5 images" in outcome.out


def test_the_file_holds_the_weights_that_the_selection_chose(
    run_here: Build, mvtec_folder: Path, tmp_path: Path
) -> None:
    """A rate that is far too high, so that an early step is the best one."""
    root = mvtec_folder / "bolt" / "train"
    outcome = run_here(
        "train", "experiment=pdn_teacher", "method=pdn_teacher_small", f"dataset.root={root}",
        "method.backbone.weights=random", "method.width=4", "method.channels=8", "image_size=64",
        "trainer=cpu", "logger=none", "trainer.precision=32-true", "dataset.batch_size=2",
        "trainer.max_steps=12", "trainer.val_check_interval=2", "selection=best",
        "method.optimizer.lr=3.0", "method.gradient_clip=null", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    chosen = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=False)["state_dict"]
    with safe_open(tmp_path / "teacher.safetensors", framework="pt") as opened:
        assert int(opened.metadata()["steps"]) < 12
        for key in opened.keys():  # noqa: SIM118 (not a dictionary)
            torch.testing.assert_close(opened.get_tensor(key), chosen[f"teacher.{key}"])
