"""What the base class promises every method: hooks, sums, several optimisers, none at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from anomaly_lit.callbacks.run import ResumeCheckpoint, StepSeeds, StopAtNaN
from anomaly_lit.callbacks.training import LossCurves
from anomaly_lit.losses import total
from anomaly_lit.methods.base import Method
from anomaly_lit.nn.bank import Bank
from anomaly_lit.schedules import Cosine, Step
from anomaly_lit.types import Batch, Prediction, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*no `test_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True.*"),
]
ADAM = partial(torch.optim.Adam, lr=0.1)
SGD = partial(torch.optim.SGD, lr=1.0)


class Data(pl.LightningDataModule):
    """Small batches of noise; the same ones are held out and tested."""

    def __init__(self, batches: int, holdout: bool = True) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.batches = [batch_of(torch.rand(2, 3, 8, 8, generator=draw)) for _ in range(batches)]
        self.holdout = holdout
        self.categories = ["bolt"]

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None, sampler=Rest(self))

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches[:1], batch_size=None) if self.holdout else []

    def test_dataloader(self) -> Any:
        return DataLoader(self.batches[:1], batch_size=None)

    def normal_batches(self, split: str, most: int | None) -> Iterator[Any]:
        yield from self.batches

    def with_features(self, batch: Any) -> Any:
        return batch


class Rest(Sampler[int]):
    """What of the epoch is left, as our own data modules give it."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.batches)

    def __iter__(self) -> Iterator[int]:
        seen = self.data.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore
        yield from range(seen % len(self), len(self))


def batch_of(image: Tensor) -> Any:
    count = len(image)
    return {
        "image": image, "index": torch.arange(count), "label": torch.zeros(count, dtype=torch.bool),
        "gt_mask": torch.zeros(count, 1, 8, 8, dtype=torch.bool), "category": ["bolt"] * count,
        "defect_type": ["good"] * count, "path": [f"{n}.png" for n in range(count)],
    }  # fmt: skip


def trainer_of(steps: int, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    kept = any(isinstance(callback, ResumeCheckpoint) for callback in callbacks)
    standard = {
        "accelerator": "cpu", "max_steps": steps, "logger": False, "enable_checkpointing": kept,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **(standard | settings))


class Toy(Method):
    """Rebuilds an image by one convolution; dropout makes it depend on each step's seed."""

    def __init__(self, optimizer: Any = ADAM, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        rebuilt = self.network(batch["image"])
        return {"near": (rebuilt - batch["image"]).square().mean(), "small": 0.1 * rebuilt.mean()}

    def forward(self, image: Tensor) -> Prediction:
        away = (self.network(image) - image).square().mean(dim=1, keepdim=True)
        return Prediction(away, away.amax(dim=(1, 2, 3)))


class Duel(Toy):
    """Two networks with opposed aims, each with an optimiser of its own."""

    def __init__(self, skipped: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False
        self.rival = nn.Conv2d(3, 1, 3)
        self.skipped = skipped

    def configure_optimizers(self) -> Any:
        return [
            self.scheduled(self.optimizer(self.network.parameters())),
            self.scheduled(SGD(self.rival.parameters(), lr=0.01), Step(at=0.5)),
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if batch_idx == self.skipped:
            return None
        first, second = self.optimizers()
        terms = {**super().losses(batch), "fooled": self.rival(self.network(batch["image"])).mean()}
        loss = self.log_terms(terms, batch)
        assert loss is not None
        self.descend(first, loss)
        seen = self.rival(torch.cat([batch["image"], self.network(batch["image"]).detach()]))
        real, rebuilt = seen.chunk(2)
        self.descend(second, (real - 1).square().mean() + rebuilt.square().mean())
        return loss


class Still(Method):
    """Nothing to train: the nearest of all normal images, seen as one colour each."""

    localises = False

    def __init__(self) -> None:
        super().__init__(ADAM)
        self.bank = Bank(3)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def calibrate(self) -> None:
        images = [batch["image"].mean(dim=(2, 3)) for batch in self.normal_batches("train", None)]
        self.bank.fill(torch.cat(images))

    def forward(self, image: Tensor) -> Prediction:
        return Prediction(None, self.bank.nearest(image.mean(dim=(2, 3)))[0][:, 0])


class Diary(Toy):
    """Notes when its hooks run, and under which circumstances."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.notes: list[str] = []
        self.states: list[tuple[bool, ...]] = []
        self.network[0].eval()  # a part that is in evaluation mode stays so

    def learn(self) -> None:
        self.note("learn")

    def calibrate(self) -> None:
        self.note("calibrate")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.notes.append("step")
        assert self.training
        assert [part.training for part in self.network] == [False, True]
        return super().training_step(batch, batch_idx)

    def score_batch(self, batch: Batch) -> Prediction:
        self.notes.append("score")
        return super().score_batch(batch)

    def note(self, hook: str) -> None:
        self.notes.append(hook)
        self.states.append(
            (torch.is_grad_enabled(), self.training, self.network[1].training,
             torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        )  # fmt: skip


class Break(pl.Callback):
    """Ends training at a batch, as a failing machine would."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, method: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise ConnectionError


# ---------------------------------------------------------------------------------------- sums


def test_terms_are_added_and_logged() -> None:
    method, trainer = Toy(), trainer_of(1)
    trainer.fit(method, datamodule=Data(1))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert set(logged) == {"train/near", "train/small", "train/loss", "val/loss"}
    assert logged["train/loss"] == pytest.approx(logged["train/near"] + logged["train/small"])


def test_figures_are_logged_and_not_added() -> None:
    class Telling(Toy):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            terms = super().losses(batch)
            self.report({"weight": self.network[0].weight.sum()})
            return terms

    method, trainer = Telling(SGD), trainer_of(1)
    before = method.network[0].weight.sum().item()
    trainer.fit(method, datamodule=Data(1))
    logged = trainer.callback_metrics
    assert float(logged["train/weight"]) == pytest.approx(before)
    assert float(logged["train/loss"]) == pytest.approx(
        float(logged["train/near"] + logged["train/small"])
    )
    method.losses(Data(1).batches[0])  # without a trainer at work it is silent


def test_a_sum_among_the_terms_is_refused() -> None:
    with pytest.raises(UserError, match=r"'loss' beside near.*added up"):
        total({"near": torch.zeros(()), "loss": torch.zeros(())})


# --------------------------------------------------------------------------------------- hooks


def test_learn_runs_once_and_calibrate_before_every_validation(tmp_path: Path) -> None:
    method, data = Diary(), Data(4)
    trainer = trainer_of(4, val_check_interval=2)
    trainer.fit(method, datamodule=data)
    halves = ["step", "step", "calibrate", "score"]
    assert method.notes == ["learn", *halves, *halves]
    assert method.states == [(False, False, False, False, False)] * 3
    method.notes.clear()
    trainer.validate(method, datamodule=data, verbose=False)  # the weights are calibrated
    trainer.test(method, datamodule=data, verbose=False)
    assert method.notes == ["score", "score"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = Diary()
    later = trainer_of(6, val_check_interval=2)
    later.fit(other, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert other.notes == halves  # nothing is learned again
    tested = Diary()
    tested.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    trainer_of(1).test(tested, datamodule=data, verbose=False)
    assert tested.notes == ["score"]


def test_without_held_out_images_the_last_weights_are_calibrated() -> None:
    method, data = Diary(), Data(2, holdout=False)
    trainer = trainer_of(2)
    trainer.fit(method, datamodule=data)
    assert method.notes == ["learn", "step", "step", "calibrate"]
    trainer.test(method, datamodule=data, verbose=False)
    assert method.notes[4:] == ["score"]


def test_weights_that_moved_since_are_calibrated_before_a_test() -> None:
    method, data = Diary(), Data(3)
    trainer = trainer_of(3, val_check_interval=2)
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    assert method.notes[-2:] == ["calibrate", "score"]


def test_learn_has_the_precision_of_training_and_calibrate_that_of_scoring() -> None:
    method = Diary()
    trainer_of(1, precision="bf16-mixed").fit(method, datamodule=Data(1))
    assert method.notes == ["learn", "step", "calibrate", "score"]
    assert [state[-1] for state in method.states] == [True, False]


def test_what_a_validation_of_its_own_keeps_can_be_loaded_over_and_trained_on() -> None:
    """Lightning validates in inference mode, whose tensors could be neither."""
    method, data = Still(), Data(2)
    trainer_of(1).validate(method, datamodule=data, verbose=False)
    assert not method.bank.items.is_inference()
    method.load_state_dict(Still().state_dict())
    assert len(method.bank) == 0


def test_share_of_training() -> None:
    seen: list[float] = []

    class Watching(Toy):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            seen.append(self.done)
            return super().losses(batch)

    method = Watching()
    assert method.done == 1.0
    trainer_of(4).fit(method, datamodule=Data(4, holdout=False))
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert method.done == 1.0
    seen.clear()
    trainer = trainer_of(-1, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Watching(), datamodule=Data(4, holdout=False))
    assert seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


# --------------------------------------------------------------------------- several optimisers


def test_a_step_of_several_optimisers_is_one_step() -> None:
    rates, done, steps = [], [], []

    class Watching(Duel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            rates.append([o.param_groups[0]["lr"] for o in self.trainer.optimizers])
            done.append(self.done)
            steps.append(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    trainer = trainer_of(4)
    trainer.fit(Watching(schedule=Cosine()), datamodule=Data(4, holdout=False))
    assert trainer.global_step == 4
    assert steps == [0, 1, 2, 3]
    assert done == [0.0, 0.25, 0.5, 0.75]
    assert [rate[0] for rate in rates] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-4)
    assert [rate[1] for rate in rates] == pytest.approx([0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("make", [Toy, Duel])
def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(
    make: Callable[..., Method], tmp_path: Path
) -> None:
    def run(folder: Path, *more: pl.Callback, resume: bool = False) -> dict[str, Any]:
        callbacks = [StepSeeds(0), ResumeCheckpoint(str(folder), every_steps=3)]
        trainer = trainer_of(8, *callbacks, *more, val_check_interval=4)
        method, path = make(schedule=Cosine(0.1)), folder / "last.ckpt"
        trainer.fit(method, datamodule=Data(8), ckpt_path=path if resume else None)
        trainer.save_checkpoint(folder / "end.ckpt")
        return torch.load(folder / "end.ckpt", weights_only=True)

    whole = run(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        run(tmp_path / "cut", Break(5))
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    again = run(tmp_path / "cut", resume=True)
    assert again["global_step"] == whole["global_step"] == 8
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][key]) if isinstance(value, Tensor) else True
    for one, other in zip(whole["optimizer_states"], again["optimizer_states"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        for number, state in one["state"].items():
            for name, value in state.items():
                if value is not None:
                    assert torch.equal(value, other["state"][number][name]), name
    assert whole["lr_schedulers"] == again["lr_schedulers"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_clip_val": 1.0}, r"trainer\.gradient_clip_val=1\.0 cannot act.*null"),
        ({"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches=2 cannot act.*to 1"),
    ],
)
def test_settings_that_cannot_act_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        trainer_of(1, **settings).fit(Duel(), datamodule=Data(1))
    trainer_of(1, **settings).fit(Toy(), datamodule=Data(2))


def test_a_clip_of_its_own_that_cannot_act_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.gradient_clip=0\.5 cannot act.*null"):
        Duel(gradient_clip=0.5).setup("fit")


# ----------------------------------------------------------------------------- skipped batches


def test_a_batch_without_terms_is_skipped(tmp_path: Path) -> None:
    class Choosy(Toy):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            weights.append(self.network[0].weight.detach().clone())
            return {} if len(weights) == 2 else super().losses(batch)

    weights: list[Tensor] = []
    callbacks = [StopAtNaN(1), LossCurves(str(tmp_path)), ResumeCheckpoint(str(tmp_path))]
    trainer = trainer_of(3, *callbacks)
    method = Choosy(schedule=Cosine())
    trainer.fit(method, datamodule=Data(3, holdout=False))
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], method.network[0].weight)
    assert trainer.global_step == 3


def test_a_batch_is_skipped_by_a_method_that_steps_itself(tmp_path: Path) -> None:
    trainer = trainer_of(3, StopAtNaN(1), ResumeCheckpoint(str(tmp_path), every_steps=1))
    trainer.fit(Duel(skipped=1), datamodule=Data(4, holdout=False))
    assert trainer.global_step == 3


# ------------------------------------------------------------------------- nothing to train


@pytest.mark.filterwarnings("ignore:.*returned `None`.*no optimizer.*")
@pytest.mark.parametrize("holdout", [False, True])
def test_a_method_without_parameters_takes_no_step_and_says_so(
    holdout: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data(3, holdout)
    callbacks = [StepSeeds(0), StopAtNaN(), ResumeCheckpoint(str(tmp_path))]
    trainer = trainer_of(5, *callbacks)
    method = Still()
    trainer.fit(method, datamodule=data)
    assert "Still has no trainable parameters: no step is taken" in capsys.readouterr().out
    assert trainer.global_step == 0
    assert method.calibrated
    assert len(method.bank) == 6
    trainer.validate(method, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.test(method, datamodule=data, verbose=False)
    found = method.score_batch(data.batches[0])
    assert found.anomaly_map is None
    assert found.score.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    other = Still()
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other.bank.items, method.bank.items)
    assert other.calibrated


def test_state_of_the_hooks_is_plain_data() -> None:
    assert json.loads(json.dumps(Toy().get_extra_state())) == {
        "learned": False,
        "calibrated": False,
    }
