from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anomaly_lit.callbacks import TrainingPictures


class Trainer:
    is_global_zero = True


def batch(*keys: str) -> dict[str, Any]:
    image = torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    corruption = torch.zeros(3, 1, 40, 48, dtype=torch.bool)
    corruption[:2, :, 10:20, 10:30] = True
    whole = {
        "image": image,
        "corrupted": torch.where(corruption, 1 - image, image),
        "corruption": corruption,
        "prompt": image.flip(0),
        "category": ["bolt"] * 3,
        "path": ["a/000.png"] * 3,
    }
    return {key: whole[key] for key in ("image", "category", "path", *keys)}


@pytest.mark.parametrize(
    ("keys", "tiles"),
    [((), 1), (("corrupted", "corruption"), 3), (("corrupted", "corruption", "prompt"), 4)],
)
def test_first_batch_is_shown_with_what_it_holds(
    tmp_path: Path, keys: tuple[str, ...], tiles: int
) -> None:
    callback: Any = TrainingPictures(str(tmp_path))
    callback.on_train_batch_start(Trainer(), None, batch(*keys), 0)
    width = Image.open(tmp_path / "training.png").width
    assert 2 * tiles * 192 < width < 2 * (tiles + 1) * 230


def test_it_is_written_once_also_by_a_resumed_run(tmp_path: Path) -> None:
    callback: Any = TrainingPictures(str(tmp_path))
    callback.on_train_batch_start(Trainer(), None, batch(), 0)
    before = (tmp_path / "training.png").stat().st_mtime_ns
    for later in (callback, TrainingPictures(str(tmp_path))):
        later.on_train_batch_start(Trainer(), None, batch("prompt"), 1)  # type: ignore[arg-type]
    assert (tmp_path / "training.png").stat().st_mtime_ns == before


def test_other_ranks_and_none_write_nothing(tmp_path: Path) -> None:
    class Other:
        is_global_zero = False

    callback: Any = TrainingPictures(str(tmp_path))
    callback.on_train_batch_start(Other(), None, batch(), 0)
    callback = TrainingPictures(str(tmp_path), max_images=0)
    callback.on_train_batch_start(Trainer(), None, batch(), 0)
    assert not list(tmp_path.iterdir())
