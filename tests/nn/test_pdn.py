"""The patch description network, and the file that holds a distilled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anomaly_lit.nn.pdn import PDN, channel_statistics, load_teacher, write_teacher
from anomaly_lit.types import UserError

FACTS = {"held_out_error": "0.6", "backbone": "resnet18", "steps": "3", "images": "5"}
KEY = "method.teacher_weights"


def size_of(part: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


@pytest.mark.parametrize(
    ("kind", "width", "channels", "count"),
    [
        ("small", 128, 384, 2_694_144),
        ("small", 128, 768, 4_267_392),
        ("medium", 256, 384, 8_026_624),
        ("medium", 256, 768, 11_615_488),
        ("small", 32, 96, 169_728),
        ("small", 32, 192, 268_128),
    ],
)
def test_sizes_are_those_of_the_paper(kind: Any, width: int, channels: int, count: int) -> None:
    assert size_of(PDN(kind, width, channels)) == count


@pytest.mark.parametrize("kind", ["small", "medium"])
@pytest.mark.parametrize("side", [64, 96, 256])
def test_maps_are_a_quarter_of_the_image_less_a_border(kind: Any, side: int) -> None:
    image = torch.rand(1, 3, side, side + 32)
    with torch.no_grad():
        bare = PDN(kind, 4, 8)(image)
        padded = PDN(kind, 4, 8, padding=True)(image)
    assert bare.shape == (1, 8, side // 4 - 8, side // 4)
    assert padded.shape == (1, 8, side // 4, side // 4 + 8)


@pytest.mark.parametrize("kind", ["small", "medium"])
def test_padding_changes_the_border_alone(kind: Any) -> None:
    bare, padded = PDN(kind, 4, 8), PDN(kind, 4, 8, padding=True)
    padded.load_state_dict(bare.state_dict())
    image = torch.rand(1, 3, 96, 64)
    torch.testing.assert_close(padded(image)[..., 4:-4, 4:-4], bare(image))


@pytest.mark.parametrize("kind", ["small", "medium"])
def test_a_value_depends_on_33_pixels_in_height_and_width(kind: Any) -> None:
    image = torch.rand(1, 3, 96, 96, requires_grad=True)
    PDN(kind, 4, 8)(image)[0, :, 5, 6].sum().backward()
    assert image.grad is not None
    rows, columns = image.grad[0].abs().sum(dim=0).nonzero(as_tuple=True)
    for place, seen in ((5, rows), (6, columns)):
        assert [int(seen.min()), int(seen.max())] == [4 * place, 4 * place + 32]


def test_statistics_are_those_of_all_positions_together() -> None:
    maps = [torch.randn(2, 3, 4, 5), 3 + torch.randn(1, 3, 4, 5)]
    every = torch.cat(maps).transpose(0, 1).flatten(1)
    mean, std = channel_statistics(iter(maps))
    assert mean.shape == std.shape == (1, 3, 1, 1)
    torch.testing.assert_close(mean.flatten().float(), every.mean(dim=1))
    torch.testing.assert_close(std.flatten().float(), every.std(dim=1, unbiased=False))


def test_a_file_holds_weights_and_where_they_come_from(tmp_path: Path) -> None:
    file, written = tmp_path / "new" / "teacher.safetensors", PDN("small", 4, 8, padding=True)
    write_teacher(file, written, FACTS)
    read = PDN("small", 4, 8)
    facts = load_teacher(file, read, KEY)
    assert facts.items() >= FACTS.items()
    for name, value in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        (
            {},
            ("small", 8, 8),
            "a teacher with width=4, other than method.pdn=small, method.width=8",
        ),
        ({}, ("medium", 4, 8), "a teacher with pdn=small"),
        ({"held_out_error": "1.02"}, ("small", 4, 8), "held-out images is 1.02, and a constant"),
        ({"held_out_error": "nan"}, ("small", 4, 8), "distil it from more images"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    changes: dict[str, str], sizes: Any, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "teacher.safetensors"
    write_teacher(file, PDN("small", 4, 8), FACTS | changes)
    with pytest.raises(UserError, match=words):
        load_teacher(file, PDN(*sizes), KEY)


def test_a_file_that_holds_no_teacher_is_refused(tmp_path: Path) -> None:
    file, teacher = tmp_path / "teacher.safetensors", PDN("small", 4, 8)
    with pytest.raises(UserError, match=f"{KEY}=.*no such file"):
        load_teacher(file, teacher, KEY)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_teacher(file, teacher, KEY)
    save_file(teacher.state_dict(), file)
    with pytest.raises(UserError, match="holds no teacher: give a file that a run of"):
        load_teacher(file, teacher, KEY)
