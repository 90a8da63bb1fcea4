"""One run: train, calibrate the chosen weights, test them, write the results."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import yaml

from anomaly_lit.calibration import promise_sentence
from anomaly_lit.callbacks.step import compile_error
from anomaly_lit.callbacks.stopping import StopSignals, end_ranks
from anomaly_lit.callbacks.training import LossCurves
from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import message_of
from anomaly_lit.files import note, note_origin, replace_file, tell, without_secrets
from anomaly_lit.inference.checkpoint import read_checkpoint
from anomaly_lit.runs.build import build, build_trainer
from anomaly_lit.runs.failures import (
    finish_loggers,
    out_of_memory,
    quiet,
    report_failures,
    worker_failure,
)
from anomaly_lit.runs.folder import check_same_data
from anomaly_lit.runs.objective import PRUNED
from anomaly_lit.runs.plan import print_plan
from anomaly_lit.runs.ranks import check_launcher, check_shares, is_first_process, told_once
from anomaly_lit.runs.record import Timings, record, record_pruned
from anomaly_lit.runs.storage import LAST, Start, checkpoint_to_go_on_from
from anomaly_lit.types import Stopped, UserError

if TYPE_CHECKING:
    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.pruning import Pruning
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.methods.base import Method

FALLING = 0.05  # share of the loss's fall in the last fifth of training worth a hint


def run(
    config: dict[str, Any],
    directory: Path,
    goes_on: bool = False,
    pruning: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, calibrate, test and write the results.

    Args:
        config: The composed and validated configuration as plain data.
        directory: The run's folder.
        goes_on: Whether the folder holds a checkpoint to resume from.
        pruning: Configuration of a `Pruning`; None trains to the end.

    Returns:
        The metrics or, if a study pruned the run, the step and the value.

    Raises:
        UserError: The data cannot be used, a package is missing, or a device has too little memory.
    """
    quiet()
    with StopSignals() as signals, report_failures():
        pl.seed_everything(config["seed"], workers=True, verbose=False)
        datamodule, method = build(config, not goes_on)
        start = checkpoint_to_go_on_from(directory) if goes_on else None
        if start is not None:
            if start.remark:
                tell(start.remark, warning=True)
            check_same_data(datamodule, start)
        pruner = instantiate(pruning, "pruning") if pruning else None
        trainer, evaluation = build_trainer(config, directory, datamodule, signals, pruner, start)
        with told_once():
            check_launcher(trainer)
            check_shares(datamodule, trainer.world_size)
        if is_first_process():
            note_configuration(config, directory)
        whole = Run(
            config, directory, datamodule, method, trainer, evaluation, signals, pruner, start
        )
        try:
            if trainer.is_global_zero:
                note_origin()
                print_plan(trainer, method, datamodule)
                tell(f"{'Resuming in' if goes_on else 'Writing to'} {directory}")
            return whole.fit_and_test()
        except SystemExit as end:  # Lightning's response to Ctrl-C
            note("interrupted", logging.ERROR)
            raise KeyboardInterrupt from end
        except BaseException as error:
            words = in_words(error, trainer, config)
            note_failure(error, words)
            if words is None:
                raise
            raise UserError(words) from error
        finally:
            finish_loggers(trainer, sys.exception())


def note_configuration(config: dict[str, Any], directory: Path) -> None:
    """Write `config.yaml` without passwords; a run that starts again no longer counts as pruned."""
    with replace_file(directory / "config.yaml", encoding="utf-8") as file:
        yaml.safe_dump(without_secrets(config), file, sort_keys=False)
    (directory / PRUNED).unlink(missing_ok=True)


def falling_words(trainer: pl.Trainer, falling: float | None) -> str | None:
    """Return a hint on how to go on if the loss was still falling at the end, else None."""
    if falling is None or falling < FALLING:
        return None
    by_steps = trainer.max_steps is not None and trainer.max_steps > 0
    key = "max_steps" if by_steps else "max_epochs"
    return (
        f"The training loss was still falling: {falling:.0%} of its fall came in the last fifth. A "
        f"longer training may find more: trainer.{key}={2 * (getattr(trainer, key) or 1)} in "
        "another output_dir"
    )


def in_words(error: BaseException, trainer: pl.Trainer, config: dict[str, Any]) -> str | None:
    """Return what went wrong if the user can fix it; None if the error speaks for itself."""
    lost = end_ranks(trainer, error)
    if lost:
        return lost
    if isinstance(error, RuntimeError) and out_of_memory(error):
        batch = config["dataset"].get("batch_size")
        return (
            f"out of memory: lower dataset.batch_size (now {batch}) or image_size (now "
            f"{config['image_size']}); the same command with another output_dir starts anew"
        )
    if isinstance(error, RuntimeError) and (words := worker_failure(error)):
        return words
    return compile_error(error)


def note_failure(error: BaseException, words: str | None) -> None:
    """Note in the command's log what ended the run; with a traceback unless words suffice."""
    if words is None and isinstance(error, UserError | Stopped | KeyboardInterrupt):
        words = message_of(error)
    note(words or "".join(traceback.format_exception(error)), logging.ERROR)


@dataclass(frozen=True)
class Run:
    """The parts of a run, and its steps in order.

    Args:
        config: The composed configuration as plain data.
        directory: The run's folder.
        datamodule: The images, already checked.
        method: The method, with its backbones' weights.
        trainer: The trainer, with all callbacks.
        evaluation: The callback that scores.
        signals: Notes the scheduler's signals.
        pruner: Ends bad trials of a study early; None outside a study.
        start: The checkpoint to resume from; None starts anew.
    """

    config: dict[str, Any]
    directory: Path
    datamodule: AnomalyDataModule
    method: Method
    trainer: pl.Trainer
    evaluation: Evaluation
    signals: StopSignals
    pruner: Pruning | None = None
    start: Start | None = None

    @property
    def last(self) -> Path:
        """The checkpoint from which the run resumes if it is interrupted."""
        return self.directory / "checkpoints" / LAST

    @property
    def chosen(self) -> Path:
        """The checkpoint that is tested: the last one, or that of `selection`."""
        return self.directory / "checkpoints" / f"{self.config['selection']}.ckpt"

    @property
    def falling(self) -> float | None:
        """The part of the training loss's fall that came in its last fifth; None if unknown."""
        curves = next((c for c in self.trainer.callbacks if isinstance(c, LossCurves)), None)  # type: ignore[attr-defined]
        return None if curves is None else curves.falling

    def fit_and_test(self) -> dict[str, Any]:
        """Go through all steps.

        Returns:
            The metrics or, if a study pruned the run, the step and the value.
        """
        timings = self.fit()
        if self.pruner is not None and self.pruner.step:
            self.signals.leave()
            return record_pruned(self.directory, self.trainer, self.pruner)
        validation = self.calibrate()
        self.signals.leave()
        timings = timings._replace(test_seconds=self.test())
        return record(self, timings, validation)

    def fit(self) -> Timings:
        """Train, from the last checkpoint if there is one."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self.trainer.fit(
            self.method,
            datamodule=self.datamodule,
            ckpt_path=None if self.start is None else str(self.start.path),
        )
        words = falling_words(self.trainer, self.falling)
        if words and self.trainer.is_global_zero:
            tell(words)
        resumed = self.start is not None
        seconds = time.perf_counter() - start
        if self.trainer.is_global_zero:
            note(f"trained to step {self.trainer.global_step} in {seconds:.0f} s")
        return Timings(resumed, seconds, time.process_time() - cpu_start)

    def calibrate(self) -> dict[str, float]:
        """Take thresholds from held-out images with the chosen weights, and save both.

        Returns:
            What the validation logged, `val/...`; empty if nothing is held out.
        """
        if self.chosen != self.last:
            self.trainer.save_checkpoint(self.last)
            self.method.load_state_dict(read_checkpoint(self.chosen)["state_dict"])
        validation: dict[str, float] = {}
        if self.datamodule.holdout_samples:
            self.trainer.validate(self.method, datamodule=self.datamodule, verbose=False)
            logged = self.trainer.callback_metrics
            validation = {k: float(v) for k, v in logged.items() if k.startswith("val/")}
            if self.trainer.is_global_zero:
                note(", ".join(f"{name} {value:.4g}" for name, value in validation.items()))
        self.trainer.save_checkpoint(self.chosen)
        if self.trainer.is_global_zero:
            held = bool(self.evaluation.calibration)
            words = promise_sentence(self.evaluation.calibration)
            tell(words, warning=not held)
        return validation

    def test(self) -> float:
        """Score the test images; return the time in seconds."""
        start = time.perf_counter()
        self.trainer.test(self.method, datamodule=self.datamodule, verbose=False)
        return time.perf_counter() - start
