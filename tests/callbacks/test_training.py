from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from anomaly_lit.callbacks import LossCurves, TrainingPictures


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


class TwoStages(pl.LightningModule):
    """Logs one term in its first steps and another later, as methods in stages do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("train/first" if batch_idx < 3 else "train/second", batch.sum() + batch_idx)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_loss_curves_end_with_the_stage_that_logs_them(tmp_path: Path) -> None:
    curves = LossCurves(str(tmp_path))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, log_every_n_steps=1, logger=False, callbacks=[curves],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(TwoStages(), torch.utils.data.DataLoader(torch.ones(6, 1)))
    steps = {key: [step for step, _ in line] for key, line in curves.history.items()}
    assert steps == {"train/first": [1, 2, 3], "train/second": [4, 5, 6]}
    assert (tmp_path / "loss.png").is_file()
