"""`hydra/sweeper=optuna`: a study of Optuna whose trials are the jobs of any launcher.

Built on Optuna's `ask` and `tell`, so that any Optuna from version 4 on works and a study can be
interrupted. Finished trials stay; trials that were interrupted or failed are tried again in their
folders. The sampler's seed follows from the number of trials, not from earlier draws of this call.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_sweeper.space import Space, first_of, overrides_of, split, written
from hydra_plugins.anomaly_lit_sweeper.trials import (
    alone,
    complete,
    finished,
    line_of,
    tell,
    try_again,
)

if TYPE_CHECKING:
    import optuna


class StudySweeper(Sweeper):
    """Searches for the values with the best `optimized_metric`.

    Args:
        sampler: Node that describes Optuna's sampler.
        pruner: Node that describes Optuna's pruner; null lets every trial run to its end.
        n_trials: Trials that the study is to have, with a result or pruned; earlier ones count.
        n_jobs: Trials of a batch; null takes what the launcher runs at a time.
        direction: `minimize` or `maximize`; null tells by the metric's name.
        storage: Where the study is kept, as SQLAlchemy names it; null keeps it in memory.
        study_name: Its name there.
        max_failures: Number of failures one after another that ends the call.
        params: Values and what they are drawn from, as on the command line.
    """

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(
        self,
        sampler: DictConfig,
        pruner: DictConfig | None = None,
        n_trials: int = 20,
        n_jobs: int | None = None,
        direction: str | None = None,
        storage: str | None = None,
        study_name: str = "study",
        max_failures: int = 3,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampler = sampler
        self.pruner = pruner
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.direction = direction
        self.storage = storage
        self.study_name = study_name
        self.max_failures = max_failures
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher."""
        self.hydra_context = hydra_context
        self.config = config
        self.folder = Path(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run what is left of the study.

        Raises:
            UserError: There is nothing to search, the objective is unknown or from the test set,
                the study is another one or in use, or trials fail one after another.
        """
        import_optuna()
        given = [f"{name}={value}" for name, value in self.params.items()]
        fixed, space = split([*given, *arguments], self.hydra_context.config_loader)
        metric = self.checked_metric(fixed, space)
        with alone(self.folder):
            study = self.open_study(metric, fixed, space)
            try_again(study, str(self.folder))
            self.run(study, metric, fixed, space)
            self.conclude(study, metric)

    def checked_metric(self, fixed: list[str], space: Space) -> str:
        """Return the objective, once a first configuration has been composed and found sound."""
        from anomaly_lit.runs.objective import check_objective

        if not space:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search: give values such as "
                "'method.sigma=interval(0,1)' or 'method.patch=1,2,4'"
            )
        values = {name: first_of(distribution) for name, distribution in space.items()}
        loader = self.hydra_context.config_loader
        config = loader.load_sweep_config(self.config, [*fixed, *overrides_of(values)])
        if config.get("optimized_metric") is None:
            raise UserError(
                "hydra/sweeper=optuna needs an objective: optimized_metric=val/loss, or "
                "optimized_metric=val/synthetic_pixel_ap dataset.validate_on_synthesis=true"
            )
        check_objective(config)
        if self.pruner:
            self.check_pruning(config)
        return config.optimized_metric

    def check_pruning(self, config: DictConfig) -> None:
        """Refuse a pruner that could never act.

        Raises:
            UserError: Validations do not measure the objective, there is one at the end alone, or
                jobs cannot see the study.
        """
        metric, trainer = config.optimized_metric, config.trainer
        interval = trainer.get("val_check_interval")
        none = "or hydra/sweeper/pruner=none"
        if not metric.startswith("val/"):
            raise UserError(
                f"hydra/sweeper/pruner: no validation measures {metric}; val/..., {none}"
            )
        steps = trainer.max_steps
        if isinstance(interval, int) and steps is not None and 0 <= steps <= interval:
            raise UserError(
                f"hydra/sweeper/pruner needs validations before the end: trainer.val_check_interval"
                f"={interval} below trainer.max_steps={steps}, {none}"
            )
        if self.storage is None:
            raise UserError(f"hydra/sweeper/pruner: jobs need hydra.sweeper.storage, {none}")

    def open_study(self, metric: str, fixed: list[str], space: Space) -> optuna.Study:
        """Create the study, or open the existing one if it is of the same search."""
        import optuna

        from anomaly_lit.config.build import differences
        from anomaly_lit.runs.objective import direction_of

        direction: Any = self.direction or direction_of(metric)  # Optuna checks the word
        facts = {
            "optimized_metric": metric,
            "direction": direction,
            "settings": sorted(line for line in fixed if not line.startswith("output_dir=")),
            "space": {name: str(distribution) for name, distribution in space.items()},
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=self.study_name,
            storage=self.storage,
            direction=direction,
            load_if_exists=True,
        )
        before = study.user_attrs.get("search", {} if study.trials else facts)
        changes = differences(before, facts)
        if changes:
            lines = "\n".join(f"  {line}" for line in changes)
            raise UserError(
                f"the study in {self.storage} is of another search:\n{lines}\n"
                "choose another output_dir, or repeat the old command to go on"
            )
        study.set_user_attr("search", facts)
        return study

    def run(self, study: optuna.Study, metric: str, fixed: list[str], space: Space) -> None:
        """Run batches until the study has its trials, or this call has tried as many."""
        at_a_time = self.n_jobs or OmegaConf.select(self.config, "hydra.launcher.jobs") or 1
        in_a_row = 0
        left = self.n_trials - len(finished(study))  # of this call, whatever becomes of them
        while left > 0 and (to_go := self.n_trials - len(finished(study))) > 0:
            trials = [self.ask(study, space) for _ in range(min(at_a_time, left, to_go))]
            lines = [(*fixed, *overrides_of(trial.params)) for trial in trials]
            jobs: dict[tuple[str, ...], tuple[str, ...]] = {}
            for trial, line in zip(trials, lines, strict=True):  # the same values twice are one job
                jobs.setdefault(line, (*line, *self.told(trial, metric)))
            returned = self.launcher.launch(list(jobs.values()), initial_job_idx=trials[0].number)
            results = dict(zip(jobs, returned, strict=True))
            for trial, line in zip(trials, lines, strict=True):
                failed = tell(study, trial, results[line])
                in_a_row = in_a_row + 1 if failed else 0
                print(line_of(study, trial.number, metric, self.n_trials), flush=True)
            self.write(study, metric)
            if in_a_row >= self.max_failures:
                raise UserError(
                    f"{in_a_row} trials failed one after another, and the study stops "
                    f"(hydra.sweeper.max_failures={self.max_failures}); the last one: "
                    f"{study.trials[trials[-1].number].user_attrs['error']}"
                )
            left -= len(trials)

    def ask(self, study: optuna.Study, space: Space) -> optuna.Trial:
        """Return a new trial; the same whether or not the study was interrupted before it."""
        from optuna.trial import TrialState

        from anomaly_lit.config.build import instantiate
        from anomaly_lit.config.hydra import plain

        node = plain(self.sampler)
        if node.get("seed") is not None:
            node["seed"] += sum(t.state != TrialState.WAITING for t in study.get_trials(False))
        study.sampler = instantiate(node)
        trial = study.ask(space)
        trial.set_user_attr("sweep", str(self.folder))
        return trial

    def told(self, trial: optuna.Trial, metric: str) -> list[str]:
        """Return what a job must know to report to the pruner."""
        from anomaly_lit.config.hydra import plain

        if not self.pruner:
            return []
        node = {
            "_target_": "anomaly_lit.callbacks.pruning.Pruning",
            "metric": metric,
            "storage": self.storage,
            "study": self.study_name,
            "trial": trial.number,
            "pruner": plain(self.pruner),
        }
        return [f"pruning={written(node)}"]

    def conclude(self, study: optuna.Study, metric: str) -> None:
        """Print the best trial, and how many have a result."""
        self.write(study, metric)
        count = len(complete(study))
        pruned = len(finished(study)) - count
        if not count:
            raise UserError(f"no trial has a value of {metric}; see the jobs in {self.folder}")
        best = study.best_trial
        note = f", {pruned} were pruned" if pruned else ""
        print(
            f"{count} of {self.n_trials} trials have a result{note}; {self.folder / 'study.json'}"
        )
        if count + pruned < self.n_trials:
            print("the same command tries again what failed")
        print(f"best: {metric}={best.value:.6g} with {' '.join(overrides_of(best.params))}")
        print(f"      {best.user_attrs.get('folder', '')}", flush=True)

    def write(self, study: optuna.Study, metric: str) -> None:
        """Write `study.json`: the best trial and all of them."""
        from anomaly_lit.files import write_json

        trials = [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value,
                "parameters": trial.params,
                **trial.user_attrs,
            }
            for trial in study.get_trials(False)
        ]
        best = study.best_trial.number if complete(study) else None
        facts = {"optimized_metric": metric, "direction": study.direction.name.lower()}
        write_json(self.folder / "study.json", {**facts, "best": best, "trials": trials})


def import_optuna() -> None:
    """Raise `UserError` where there is no Optuna, or one that is too old."""
    try:
        from optuna.distributions import FloatDistribution  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"hydra/sweeper=optuna needs Optuna 4 or later ({error}): pip install "
            '"anomaly-lit[sweep]"; hydra-optuna-sweeper, which asks for an older one, is not needed'
        ) from error
    import warnings

    from optuna.exceptions import ExperimentalWarning

    warnings.filterwarnings("ignore", category=ExperimentalWarning)
