from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomaly_lit.callbacks import LossCurves, ResumeCheckpoint, StepSeeds, StopAtNaN
from anomaly_lit.callbacks.progress import LiveProgress, PlainProgress, duration
from anomaly_lit.callbacks.run import RanksAgree, WholeCheckpoint
from anomaly_lit.callbacks.training import still_falling
from anomaly_lit.inference.checkpoint import FORMAT_VERSION
from anomaly_lit.types import UserError


class Noisy(pl.LightningModule):
    """One weight that follows random numbers, and notes what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.drawn: list[float] = []
        self.bad_step = -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        loss = (self.weight * self.drawn[-1]).square().sum()
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.bad_step:
            loss = loss * torch.nan
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.drawn.append(float(torch.rand(())))
        self.log("val/loss", self.weight.sum(), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(count: int) -> DataLoader[Any]:
    items = [{"image": torch.zeros(2, 3, 4, 4), "path": [f"{n}.png"] * 2} for n in range(count)]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def fit(model: Noisy, *callbacks: pl.Callback, steps: int = 6, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ResumeCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
        }
        | arguments
    )
    trainer.fit(model, batches(4), batches(2))
    return trainer


# -------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        ([[1, 2], [1, 2]], None),
        ([[1, 2], [1, 3]], "rank 1 of 2 has different images from rank 0"),
        ([[1, 2], [4, 2]], "rank 1 of 2 has different configurations from rank 0"),
    ],
)
def test_ranks_that_differ_are_named(marks: list[list[int]], words: str | None) -> None:
    trainer = SimpleNamespace(world_size=2)
    method = SimpleNamespace(device="cpu", all_gather=lambda own: torch.tensor(marks))
    callback = RanksAgree({"seed": 0}, "digest")
    if words is None:
        callback.on_fit_start(trainer, method)  # type: ignore[arg-type]
    else:
        with pytest.raises(UserError, match=words):
            callback.on_fit_start(trainer, method)  # type: ignore[arg-type]


def test_what_a_step_draws_depends_on_seed_and_step_alone() -> None:
    one, other, third = Noisy(), Noisy(), Noisy()
    torch.manual_seed(1)
    fit(one, StepSeeds(5), limit_val_batches=0)
    torch.manual_seed(2)
    torch.rand(7)
    fit(other, StepSeeds(5), limit_val_batches=0)
    fit(third, StepSeeds(6), limit_val_batches=0)
    assert one.drawn == other.drawn
    assert len(set(one.drawn)) == 6  # also over the border of an epoch
    assert not set(one.drawn) & set(third.drawn)


def test_validation_draws_the_same_each_time_and_changes_no_training() -> None:
    rare, often = Noisy(), Noisy()
    fit(rare, StepSeeds(5), limit_val_batches=0, steps=8)
    fit(often, StepSeeds(5), val_check_interval=2, steps=8)
    of_training = [often.drawn[i] for i in range(len(often.drawn)) if i % 4 < 2]
    assert of_training == rare.drawn
    first, second = often.drawn[2:4], often.drawn[6:8]
    assert first == second
    assert first[0] != first[1]


# -------------------------------------------------------------------------------- checkpoints


def steps_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[int]:
    seen: list[int] = []
    saved = pl.Trainer.save_checkpoint

    def note(trainer: pl.Trainer, path: Any, *more: Any, **named: Any) -> None:
        seen.append(trainer.global_step)
        saved(trainer, path, *more, **named)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", note)
    every = arguments.pop("every")
    fit(Noisy(), ResumeCheckpoint(str(tmp_path), **every), **arguments)
    return seen


def test_checkpoints_are_written_every_so_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert steps_written(tmp_path, monkeypatch, every={"every_steps": 2}, steps=7) == [2, 4, 6]
    assert (tmp_path / "last.ckpt").is_file()


def test_checkpoints_follow_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_written(tmp_path, monkeypatch, every={"every_minutes": 60}) == []
    assert len(steps_written(tmp_path, monkeypatch, every={"every_minutes": 0})) >= 6


def test_no_checkpoint_while_gradients_accumulate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = steps_written(
        tmp_path,
        monkeypatch,
        every={"every_steps": 1},
        steps=4,
        accumulate_grad_batches=2,
    )
    assert found == [1, 2, 3, 4]


def test_checkpoint_waits_for_the_validation_that_follows(tmp_path: Path) -> None:
    curves = LossCurves(str(tmp_path))
    callbacks = [ResumeCheckpoint(str(tmp_path), every_steps=2), curves]
    fit(Noisy(), *callbacks, steps=4, val_check_interval=2)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    noted = state["callbacks"]["LossCurves"]["history"]["val/loss"]
    assert [step for step, _ in noted] == [2, 4]


def fallen(*losses: float, noise: float = 0.0) -> float | None:
    values = np.array(losses) + noise * np.random.default_rng(0).normal(size=len(losses))
    return still_falling(values)


def test_a_falling_loss_is_noticed_and_noise_is_not() -> None:
    steps = np.arange(100)
    assert fallen(*(1 - steps / 100)) == pytest.approx(0.25)  # a fifth of four fifths
    assert fallen(*np.exp(-steps / 5)) == pytest.approx(0, abs=1e-3)
    assert fallen(*np.ones(100), noise=0.1) == 0
    assert fallen(*(1 - steps / 100), noise=0.01) == pytest.approx(0.25, abs=0.02)
    assert fallen(*(steps / 100)) == 0  # it rises
    assert fallen(*range(19)) is None  # too few


def test_only_the_last_stage_of_a_loss_counts(tmp_path: Path) -> None:
    curves = LossCurves(str(tmp_path))
    first = [(step, 9.0 - step) for step in range(50)]
    second = [(step, 1.0 + step % 2) for step in range(50, 100)]
    curves.history = {"train/loss": first + second, "train/codes": first, "train/map": second}
    assert curves.falling == 0
    curves.history = {"train/loss": first, "train/codes": first}
    assert curves.falling == pytest.approx(0.25)


def test_checkpoint_does_not_wait_where_nothing_is_held_out(tmp_path: Path) -> None:
    fit(Noisy(), ResumeCheckpoint(str(tmp_path), every_steps=4), steps=4, limit_val_batches=0)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("every_steps", [0, -1])
def test_interval_of_checkpoints_is_positive(tmp_path: Path, every_steps: int) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.every_steps"):
        ResumeCheckpoint(str(tmp_path), every_steps=every_steps)


def test_whole_checkpoint_holds_plain_data(tmp_path: Path) -> None:
    config = {"method": {"_target_": "anomaly_lit.methods.AMINet"}, "seed": 1}
    trainer = fit(Noisy(), WholeCheckpoint(config, "abc"), steps=1)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    entry = torch.load(tmp_path / "whole.ckpt", weights_only=True)["anomaly_lit"]
    assert entry == {"format_version": FORMAT_VERSION, "config": config, "data_digest": "abc"}


# -------------------------------------------------------------------------------- NaN


def test_training_stops_at_a_loss_that_is_no_number() -> None:
    model = Noisy()
    model.bad_step = 2
    with pytest.raises(UserError, match=r"the loss is nan at step 3.*optimizer\.lr.*2\.png"):
        fit(model, StopAtNaN(every_steps=1))


@pytest.mark.parametrize("arguments", [{"limit_val_batches": 0}, {"val_check_interval": 4}])
def test_a_last_look_comes_before_validation_and_at_the_end(arguments: dict[str, Any]) -> None:
    model = Noisy()
    model.bad_step = 2
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        fit(model, StopAtNaN(every_steps=100), steps=4, **arguments)


def test_finite_losses_pass() -> None:
    assert fit(Noisy(), StopAtNaN(every_steps=1)).global_step == 6


# -------------------------------------------------------------------------------- for people


def test_loss_curves_are_kept_over_a_resume_and_drawn(tmp_path: Path) -> None:
    curves = LossCurves(str(tmp_path))
    fit(Noisy(), curves, steps=4, log_every_n_steps=2, val_check_interval=2)
    assert [step for step, _ in curves.history["train/loss"]] == [2, 4]
    assert [step for step, _ in curves.history["val/loss"]] == [2, 4]
    assert (tmp_path / "loss.png").is_file()
    other = LossCurves(str(tmp_path))
    other.load_state_dict(curves.state_dict())
    assert other.history == curves.history


def test_progress_is_a_line_with_loss_speed_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(Noisy(), PlainProgress(every_seconds=0), steps=3, enable_progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 1/3: train/loss ")
    assert "images/s" in lines[0]
    assert lines[0].endswith(" left")


def test_progress_speaks_while_gradients_accumulate(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress(every_seconds=0)
    fit(Noisy(), progress, steps=2, accumulate_grad_batches=2, enable_progress_bar=True)
    assert "step 0/2" in capsys.readouterr().out


def test_progress_of_other_ranks_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress(every_seconds=0)
    progress.disable()
    fit(Noisy(), progress, steps=2, enable_progress_bar=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45.2, "45 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (float("inf"), "an unknown time"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_live_bar_asks_for_the_loss_now_and_then() -> None:
    class Trainer:
        asked = 0
        progress_bar_metrics = {"val/loss": 2.0}  # noqa: RUF012

        @property
        def callback_metrics(self) -> dict[str, Any]:
            self.asked += 1
            return {"train/loss": torch.tensor(1.0), "train/term": torch.tensor(3.0)}

    bar, trainer = LiveProgress(leave=False), Trainer()
    for _ in range(3):
        metrics = bar.get_metrics(trainer, None)  # type: ignore[arg-type]
        assert metrics == {"train/loss": 1.0, "val/loss": 2.0}
    assert trainer.asked == 1
