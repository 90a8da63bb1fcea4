"""RSTPM's pairs, gates and fusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anomaly_lit.losses import total
from anomaly_lit.methods.rstpm import ReconstructionStudent, distance
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def test_distance_is_half_the_square_between_unit_vectors() -> None:
    teacher, student = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    gap = F.normalize(teacher, dim=1) - F.normalize(student, dim=1)
    torch.testing.assert_close(
        distance(teacher, student), 0.5 * gap.square().sum(dim=1, keepdim=True)
    )


def test_loss_sums_the_mean_distance_of_six_stages(small_method: Build, make_batch: Build) -> None:
    method, batch = small_method("rstpm").eval(), make_batch()
    first = method.teacher(batch["image"])
    second = method.second_teacher(batch["image"])
    expected = 0.0
    for teacher, student in zip(first[:3], method.student(batch["image"]), strict=True):
        expected += distance(teacher, student).mean()
    for teacher, student in zip(second, method.second_student(first[3], second), strict=True):
        expected += distance(teacher, student).mean()
    torch.testing.assert_close(total(method.losses(batch)), 2 * expected)  # STPM's official scale


def test_maps_are_added_by_scale_and_multiplied_over_scales(
    small_method: Build, make_batch: Build
) -> None:
    method, image = small_method("rstpm", smoothing=0.0).eval(), make_batch()["image"]
    with torch.no_grad():
        first, second = method.teacher(image), method.second_teacher(image)
        students = method.student(image), method.second_student(first[-1], second)
        expected = torch.ones(())
        for level in range(3):
            pairs = (first[level], students[0][level]), (second[level], students[1][level])
            expected = expected * sum(
                F.interpolate(distance(*pair), (64, 64), mode="bilinear") for pair in pairs
            )
        found = method(image)
    torch.testing.assert_close(found.anomaly_map, expected)
    torch.testing.assert_close(found.score, expected.amax(dim=(1, 2, 3)))


def test_students_that_equal_their_teachers_find_nothing(
    small_method: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, image = small_method("rstpm").eval(), make_batch()["image"]
    monkeypatch.setattr(method.student, "forward", lambda x: method.teacher(x)[:-1])
    monkeypatch.setattr(method.second_student, "forward", lambda x, teacher: list(teacher))
    with torch.no_grad():
        assert method(image).anomaly_map.abs().max() < 1e-9


@pytest.mark.parametrize("attention", ["residual", "mul", "none"])
def test_matched_maps_are_taken_before_their_gate(attention: str) -> None:
    """The coarsest map does not depend on the second teacher; finer ones do, through gates."""
    torch.manual_seed(0)
    student = ReconstructionStudent(12, [4, 6, 8], 1.0, attention).eval()
    bottleneck = torch.randn(2, 12, 2, 3)
    teacher = [torch.randn(2, c, s * 2, s * 3) for c, s in ((4, 8), (6, 4), (8, 2))]
    other = [torch.randn_like(t) for t in teacher]
    with torch.no_grad():
        one, two = student(bottleneck, teacher), student(bottleneck, other)
    assert [m.shape for m in one] == [t.shape for t in teacher]
    assert torch.equal(one[2], two[2])
    assert torch.equal(one[1], two[1]) == (attention == "none")
    assert len(student.gates) == (0 if attention == "none" else 2)


def test_width_keeps_the_teacher_s_channels() -> None:
    student = ReconstructionStudent(12, [4, 6, 8], 0.5, "residual").eval()
    teacher = [torch.randn(1, c, s, s) for c, s in ((4, 16), (6, 8), (8, 4))]
    assert [m.shape for m in student(torch.randn(1, 12, 2, 2), teacher)] == [
        t.shape for t in teacher
    ]


def test_parameters_are_as_many_as_published(published_method: Build) -> None:
    with torch.device("meta"):
        student = ReconstructionStudent(512, [256, 512, 1024], 1.0, "residual")
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(101, rel=0.02)
    method = published_method("rstpm", 64)
    assert method.teacher.channels == [64, 128, 256, 512]
    assert sum(p.numel() for p in method.student.parameters()) / 1e6 == pytest.approx(2.8, abs=0.05)


def test_student_has_the_teacher_s_architecture_and_other_weights(small_method: Build) -> None:
    method = small_method("rstpm")
    own = dict(method.student.network.named_parameters())
    teacher = dict(method.teacher.network.named_parameters())
    assert set(own) < set(teacher)
    assert not any("layer4" in name for name in own)
    assert not torch.equal(own["conv1.weight"], teacher["conv1.weight"])
    assert all(parameter.requires_grad for parameter in own.values())


def test_the_second_student_starts_slowly_and_its_gradient_is_clipped(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("rstpm", second_warmup=0.5, second_clip=1e-6)
    fit(method, make_batch(), 8)
    rates = [group["lr"] for group in method.trainer.optimizers[0].param_groups]
    assert rates == [0.4, 0.4]
    norms = torch.stack(
        [p.grad.norm() for p in method.second_student.parameters() if p.grad is not None]
    )
    assert norms.norm() < 2e-6
    norms = torch.stack([p.grad.norm() for p in method.student.parameters()])
    assert norms.norm() > 1e-4


def test_rate_of_the_second_student_rises_over_the_warm_up(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("rstpm", second_warmup=0.5)
    seen: list[list[float]] = []
    method.on_train_batch_end = lambda *_: seen.append(
        [group["lr"] for group in method.trainer.optimizers[0].param_groups]
    )
    fit(method, make_batch(), 8)
    assert [rates[0] for rates in seen] == [0.4] * 8
    assert [rates[1] / 0.4 for rates in seen] == pytest.approx([0.5, 0.75, 1, 1, 1, 1, 1, 1])


def test_teachers_whose_strides_differ_are_named(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"strides \[4, 8, 16\]"):
        small_method(
            "rstpm",
            teacher=Backbone("resnet18.tv_in1k", [1, 2, 3], "random"),
            second_teacher=Backbone("resnet18.tv_in1k", [1, 2, 3], "random"),
        )


def test_an_image_size_that_does_not_halve_is_named(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"80 is no multiple of 32.*set image_size to 64 or 96"):
        small_method("rstpm").eval()(torch.rand(1, 3, 80, 80))


def test_without_a_second_teacher_it_is_stpm(small_method: Build, make_batch: Build) -> None:
    method, batch = small_method("rstpm", second_teacher=None, smoothing=0.0).eval(), make_batch()
    with torch.no_grad():
        teacher, student = method.teacher(batch["image"])[:3], method.student(batch["image"])
        gaps = [distance(t, s) for t, s in zip(teacher, student, strict=True)]
        found = method(batch["image"])
        terms = method.losses(batch)
    assert list(terms) == ["first"]
    torch.testing.assert_close(terms["first"], 2 * torch.stack([g.mean() for g in gaps]).sum())
    sizes = [F.interpolate(gap, (64, 64), mode="bilinear") for gap in gaps]
    torch.testing.assert_close(found.anomaly_map, sizes[0] * sizes[1] * sizes[2])


def test_stpm_trains(small_method: Build, fit: Build, make_batch: Build) -> None:
    method = small_method("rstpm", second_teacher=None)
    before = [value.clone() for value in method.student.parameters()]
    fit(method, make_batch(), 2)
    moved = [
        not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True)
    ]
    assert any(moved)


def test_first_student_starts_with_batch_norms_at_one(small_method: Build) -> None:
    norms = [m for m in small_method("rstpm").student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)
