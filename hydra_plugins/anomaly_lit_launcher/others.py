"""Launchers of other packages (joblib, Ray), each after checks that it does not make.

Their jobs are calls within worker processes, not commands: a job on several devices would repeat
the whole sweep's command in its other ranks.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from anomaly_lit.config.hydra import message_of, output_folder
from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.base import compose
from hydra_plugins.anomaly_lit_launcher.jobs import Job, check_folders, note, who_trains, write_plan
from hydra_plugins.anomaly_lit_launcher.surroundings import count

WAIT = 2.0  # seconds between two looks at a folder in which another run trains


class OtherLauncher(Launcher):
    """Hands jobs to a launcher of another package.

    Args:
        plugin: Full name of its class.
        extra: The extra of anomaly-lit that installs it.
        settings: Its own settings.
    """

    def __init__(self, plugin: str, extra: str, **settings: Any) -> None:
        super().__init__()
        self.plugin = plugin
        self.extra = extra
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Import and set up the other launcher.

        Raises:
            UserError: Its package is not installed.
        """
        module, _, name = self.plugin.rpartition(".")
        try:
            make = getattr(importlib.import_module(module), name)
        except ImportError as error:
            choice = config.hydra.runtime.choices["hydra/launcher"]
            raise UserError(
                f"hydra/launcher={choice} needs a package that is not installed ({error}): "
                f'pip install "anomaly-lit[{self.extra}]", or use hydra/launcher=process'
            ) from error
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = make(**self.settings)
        self.launcher.setup(
            hydra_context=hydra_context, task_function=Noted(task_function), config=config
        )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all jobs, then have them run."""
        jobs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config, folder = compose(self.hydra_context, self.config, number, list(overrides))
            self.check(config)
            told = filter_overrides(list(overrides))
            jobs.append(Job(number, list(told), " ".join(told) or "job", folder, [], config))
        check_folders(jobs)
        write_plan(Path(self.config.hydra.sweep.dir), jobs, max(1, self.settings.get("n_jobs", 1)))
        return told_together(self.launcher.launch(job_overrides, initial_job_idx))

    def check(self, config: DictConfig) -> None:
        """Refuse devices that the launcher does not start processes for.

        Raises:
            UserError: With the launcher, or the settings, that train on as many devices.
        """
        devices = count(OmegaConf.select(config, "trainer.devices"))
        nodes = OmegaConf.select(config, "trainer.num_nodes") or 1
        choice = self.config.hydra.runtime.choices["hydra/launcher"]
        if devices * nodes > 1:
            raise UserError(
                f"trainer.devices={devices} with hydra/launcher={choice}: its jobs are one process "
                "each, and Lightning would repeat the whole sweep in the others. Use "
                "hydra/launcher=process, or slurm with one task for each device"
            )


class Noted:
    """A task that writes `job.json` into its folder, and waits while another run trains there.

    Args:
        task: Takes the configuration of a job.
    """

    def __init__(self, task: TaskFunction) -> None:
        self.task = task

    def __call__(self, config: DictConfig) -> Any:
        """Run the task."""
        hydra = HydraConfig.get()
        told = list(hydra.overrides.task)
        job = Job(hydra.job.num, told, hydra.job.override_dirname, output_folder(), [], config)
        job.folder.mkdir(parents=True, exist_ok=True)
        while who_trains(job):
            time.sleep(WAIT)
        job.attempt, job.started = 1, time.time()
        note(job)
        code = 0
        try:
            return self.task(config)
        except BaseException as error:
            code, job.error = 1, message_of(error)
            raise
        finally:
            note(job, code)


def told_together(jobs: Sequence[JobReturn]) -> Sequence[JobReturn]:
    """Return the jobs; a failed one's value is an error that tells of all that failed."""
    failed = [job for job in jobs if job.status == JobStatus.FAILED]
    lines = [
        f"  {' '.join(job.overrides or [])}: {type(job._return_value).__name__}: "
        f"{job._return_value}"
        for job in failed
    ]
    text = f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(lines)
    for job in failed:
        job.return_value = UserError(text)
    return jobs
