from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl

from anomaly_lit.runs import length
from anomaly_lit.runs.checks import check_validates
from anomaly_lit.runs.fit import falling_words
from anomaly_lit.runs.length import given_length, steps_follow_data, steps_for
from anomaly_lit.types import UserError


@pytest.mark.parametrize(
    ("images", "processes", "batches", "steps"),
    [(20, 1, 1, 500), (200, 1, 1, 1000), (201, 1, 1, 1005), (999, 2, 2, 1249), (10**6, 1, 1, 5000)],
)
def test_steps_are_forty_passes_within_bounds(
    images: int, processes: int, batches: int, steps: int
) -> None:
    trainer: Any = SimpleNamespace(world_size=processes, accumulate_grad_batches=batches)
    data: Any = SimpleNamespace(batch_size=8, train_samples=range(images))
    assert steps_for(trainer, data) == steps


def test_a_stated_end_is_kept() -> None:
    assert steps_follow_data({"max_steps": None, "max_epochs": -1})
    assert not steps_follow_data({"max_steps": None, "max_epochs": 3})
    assert not steps_follow_data({"max_steps": None, "max_time": "00:00:10:00"})
    assert not steps_follow_data({"max_steps": 7})
    assert not steps_follow_data({})
    assert given_length({"max_steps": None}) == {"max_steps": -1}
    assert given_length({"max_steps": 7}) == given_length({}) == {}


def test_validations_are_counted_against_the_steps_that_the_data_gives() -> None:
    trainer = {"max_steps": None, "val_check_interval": 600, "check_val_every_n_epoch": None}
    config = {"selection": "best", "trainer": trainer}
    check_validates(config, 1000)
    check_validates(config, -1)  # another end: trainer.max_epochs
    with pytest.raises(UserError, match=r"interval=600 is more than trainer\.max_steps=500"):
        check_validates(config, 500)


def test_a_run_without_a_number_of_steps_says_how_long_it_is(
    run_here: Callable[..., Any], mvtec_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(length, "LEAST_STEPS", 1)
    monkeypatch.setattr(length, "PASSES", 2)
    arguments = (
        f"output_dir={tmp_path / 'run'} dataset=mvtec_ad dataset.root={mvtec_folder} "
        "dataset.categories=[bolt] method=ami_net_small method.backbone.weights=random "
        "method.grid=8 method.dim=32 method.heads=2 method.depth=1 image_size=64 trainer=cpu "
        "dataset.batch_size=4 dataset.holdout=0 logger=none"
    )
    outcome = run_here("train", *arguments.split())
    assert outcome.code == 0, outcome.err
    images = len(list((mvtec_folder / "bolt" / "train" / "good").iterdir()))
    assert f"{-(-2 * images // 4)} steps of 4 images" in outcome.out


def test_a_loss_that_still_falls_is_said_with_twice_the_length() -> None:
    trainer = pl.Trainer(max_steps=300, logger=False, enable_checkpointing=False)
    words = falling_words(trainer, 0.07)
    assert words is not None
    assert words.startswith("The training loss was still falling: 7% of its fall came in the last")
    assert words.endswith("trainer.max_steps=600 in another output_dir")
    assert falling_words(trainer, 0.049) is None
    assert falling_words(trainer, None) is None
    epochs = pl.Trainer(max_epochs=40, logger=False, enable_checkpointing=False)
    assert str(falling_words(epochs, 0.5)).endswith("trainer.max_epochs=80 in another output_dir")
