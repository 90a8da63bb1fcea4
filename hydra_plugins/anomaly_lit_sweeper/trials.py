"""Trials of a study: what is tried again, how one ended, and who works on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from anomaly_lit.files import lock
from anomaly_lit.runs.objective import PRUNED
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    import optuna


def try_again(study: optuna.Study, sweep: str) -> None:
    """Put the values of a sweep's trials that failed or were interrupted before all new ones."""
    from optuna.trial import TrialState

    trials = study.get_trials()
    unsettled = (TrialState.RUNNING, TrialState.FAIL)
    settled = [t.params for t in trials if t.state not in unsettled]
    for trial in trials:
        if trial.user_attrs.get("sweep", sweep) != sweep:
            continue  # of another command, which may still run it
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL:
            continue
        if trial.params and trial.params not in settled:
            settled.append(trial.params)
            study.enqueue_trial(trial.params)


def tell(study: optuna.Study, trial: optuna.Trial, returned: JobReturn) -> bool:
    """Tell the study how a trial ended; return true if it failed or gave no number."""
    from optuna.trial import TrialState

    folder = OmegaConf.select(returned.hydra_cfg or OmegaConf.create(), "hydra.runtime.output_dir")
    trial.set_user_attr("folder", folder)
    if folder and Path(folder, PRUNED).is_file():
        study.tell(trial, state=TrialState.PRUNED)
        return False
    try:
        value = float(returned.return_value)
        error = "" if math.isfinite(value) else f"its value is {value}"
    except Exception as failure:
        error = str(failure) or type(failure).__name__
    if error:
        trial.set_user_attr("error", error[:2000])
        study.tell(trial, state=TrialState.FAIL)
        return True
    study.tell(trial, value)
    return False


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that need not be tried again: with a result, or pruned."""
    from optuna.trial import TrialState

    return study.get_trials(False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials with a result."""
    from optuna.trial import TrialState

    return study.get_trials(False, states=(TrialState.COMPLETE,))


def line_of(study: optuna.Study, number: int, metric: str, wanted: int) -> str:
    """Return how a trial ended, and the best so far."""
    trial, done = study.trials[number], finished(study)
    text = f"trial {number}: "
    pruned = "pruned at " if trial.state.name == "PRUNED" else ""
    text += f"{pruned}{metric}={trial.value:.6g}" if trial.value is not None else "failed"
    best = f", best {study.best_value:.6g}" if complete(study) else ""
    return f"{text} ({len(done)} of {wanted}{best})"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the study for one command; the system releases it however the command ends.

    Raises:
        UserError: Another command holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "study.lock").open("a") as file:
        if not lock(file):
            raise UserError(f"another command works on the study in {folder}: wait for it")
        yield
