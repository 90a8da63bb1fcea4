"""Pruning: a trial of a study that does worse than earlier trials ends early."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from anomaly_lit.types import UserError


class Pruning(pl.Callback):
    """Report each validation to a study of Optuna, and end training if its pruner says so.

    The state of training is saved first, so that a later trial with the same values resumes there.
    The callback must come after those that log the metric. `StudySweeper` adds it. Only the first
    rank talks to the study; it broadcasts the decision to the others.

    Args:
        metric: Metric that the study optimises, as logged by a validation.
        storage: Where the study is kept, as a URL for SQLAlchemy.
        study: Name of the study.
        trial: Number of this run's trial.
        pruner: One of `optuna.pruners`.

    Attributes:
        step: Step at which the trial was pruned; 0 if it was not.
        value: The metric at that step.
    """

    def __init__(self, metric: str, storage: str, study: str, trial: int, pruner: Any) -> None:
        self.metric = metric
        self.storage = storage
        self.study = study
        self.trial = trial
        self.pruner = pruner
        self.step = 0
        self.value = math.nan

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the value and, except at the last step, ask the pruner.

        Raises:
            UserError: The validation does not log the metric.
        """
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            known = ", ".join(name for name in trainer.callback_metrics if name[:4] == "val/")
            raise UserError(
                f"hydra/sweeper/pruner: validations log no {self.metric}, they log {known}"
            )
        value = float(trainer.callback_metrics[self.metric])
        hopeless = trainer.is_global_zero and self.report(value, trainer.global_step)
        at_the_end = trainer.global_step >= trainer.estimated_stepping_batches
        if trainer.strategy.broadcast(hopeless) and not at_the_end:
            self.step, self.value = trainer.global_step, value
            trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", "last.ckpt"))
            trainer.should_stop = True

    def report(self, value: float, step: int) -> bool:
        """Report a value to the study; return whether to prune the trial. NaN is not reported."""
        import optuna

        if math.isnan(value):
            return False
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(
            study_name=self.study,
            storage=self.storage,
            sampler=optuna.samplers.RandomSampler(),  # nothing is drawn here
            pruner=self.pruner,
        )
        own = study.get_trials(deepcopy=False)[self.trial]
        trial = optuna.trial.Trial(study, own._trial_id)  # as Optuna's own callbacks do
        trial.report(value, step)
        return trial.should_prune()
