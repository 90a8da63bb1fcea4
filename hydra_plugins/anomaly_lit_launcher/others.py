"""Launchers of other packages (joblib, submitit, Ray), each after checks that it does not make.

Their jobs are calls within worker processes, not commands: a job on several devices would repeat
the whole sweep's command in its other ranks. Only submitit starts a process for each device itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from anomaly_lit.types import UserError


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
        """Imports and sets up the other launcher.

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
                f'pip install "anomaly-lit[{self.extra}]", or take hydra/launcher=process'
            ) from error
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = make(**self.settings)
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Checks all jobs, then has them run."""
        for overrides in job_overrides:
            loader = self.hydra_context.config_loader
            self.check(loader.load_sweep_config(self.config, list(overrides)))
        return told_together(self.launcher.launch(job_overrides, initial_job_idx))

    def check(self, config: DictConfig) -> None:
        """Refuses devices that the launcher does not start processes for.

        Raises:
            UserError: With the launcher, or the settings, that train on as many devices.
        """
        devices = count(OmegaConf.select(config, "trainer.devices"))
        nodes = OmegaConf.select(config, "trainer.num_nodes") or 1
        choice = self.config.hydra.runtime.choices["hydra/launcher"]
        if "tasks_per_node" not in self.settings:
            if devices * nodes > 1:
                raise UserError(
                    f"trainer.devices={devices} with hydra/launcher={choice}: its jobs are one "
                    "process each, and Lightning would repeat the whole sweep in the others. Take "
                    "hydra/launcher=process, or submitit_slurm with one task for each device"
                )
            return
        tasks, own_nodes = self.settings["tasks_per_node"], self.settings.get("nodes", 1)
        if (tasks, own_nodes) != (devices, nodes):
            raise UserError(
                f"hydra/launcher={choice} starts {tasks} tasks on each of {own_nodes} nodes, and "
                f"trainer.devices={devices} trainer.num_nodes={nodes} needs one for each device: "
                f"hydra.launcher.tasks_per_node={devices} hydra.launcher.nodes={nodes}"
            )


def told_together(jobs: Sequence[JobReturn]) -> Sequence[JobReturn]:
    """The jobs; a failed one's value is an error that tells of all that failed."""
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


def count(devices: Any) -> int:
    """Devices that ``trainer.devices`` asks for; ``auto`` counts as one, the run itself knows.

    >>> count(2), count("3"), count([0, 1]), count("auto")
    (2, 3, 2, 1)
    """
    if OmegaConf.is_list(devices) or isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return max(1, int(text)) if text.lstrip("-").isdigit() else 1
