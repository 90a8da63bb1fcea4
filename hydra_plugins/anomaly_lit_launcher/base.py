"""What launchers whose jobs are commands share: plans, folders, results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.jobs import Job, check_folders, name_by_difference, value_of
from hydra_plugins.anomaly_lit_launcher.surroundings import escaped

# overrides of the sweep, which its jobs must not get again
OF_THE_SWEEP = (
    "hydra.mode",
    "hydra.sweep",
    "hydra.run",
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweeper",
)
NOT_OF_A_RUN = ("hydra", "pruning", "when_changed")  # of this sweep


class CommandLauncher(Launcher):
    """A launcher that runs each job as the command one would type, in a folder of its own."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what `launch` needs."""
        self.hydra_context = hydra_context
        self.config = config

    @property
    def sweep(self) -> Path:
        """The sweep's folder."""
        return Path(self.config.hydra.sweep.dir).absolute()

    def plan(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Compose all jobs, which finds mistakes before anything runs."""
        jobs = [self.prepare(first + n, list(given)) for n, given in enumerate(job_overrides)]
        check_folders(jobs)
        name_by_difference(jobs)
        return jobs

    def prepare(self, number: int, overrides: list[str]) -> Job:
        """Compose a job and its command."""
        config, folder = compose(self.hydra_context, self.config, number, overrides)
        given = [
            o for o in config.hydra.overrides.hydra if not o.lstrip("+~").startswith(OF_THE_SWEEP)
        ]
        sources = config.hydra.runtime.config_sources
        own = [source.path for source in sources if source.provider == "command-line"]
        command = [sys.executable, "-m", f"anomaly_lit.commands.{config.hydra.job.config_name}"]
        command += [f"--config-dir={path}" for path in own]
        command += [*given, *config.hydra.overrides.task, f"hydra.run.dir='{escaped(folder)}'"]
        told = [o for o in filter_overrides(overrides) if not o.startswith("pruning=")]
        return Job(number, told, " ".join(told) or "job", folder, command, config)

    def is_done(self, job: Job) -> bool:
        """Return whether there is nothing to run, since the job's folder holds results.

        Results of this configuration make the job `skipped`, those of another one `failed`.
        """
        if (
            not (job.folder / "metrics.json").is_file()
            or job.config.hydra.job.config_name != "train"
        ):
            return False
        from anomaly_lit.config.hydra import plain
        from anomaly_lit.runs.folder import is_current, state_of

        keys = [str(key) for key in job.config if key not in NOT_OF_A_RUN]
        own = OmegaConf.masked_copy(job.config, keys)
        own.output_dir = str(job.folder)
        HydraConfig.instance().set_config(job.config)
        try:
            config, changed = plain(own), job.config.when_changed
            finished = state_of(job.folder, config) == "finished"
            if finished and is_current(job.folder, config, changed):
                job.state = "skipped"
        except Exception as error:
            job.state, job.error = "failed", str(error)
        return job.state != "waiting"

    def results(self, jobs: list[Job]) -> list[JobReturn]:
        """Return what Hydra hands to the sweeper; a failed job's value is an error naming all."""
        failed = [job for job in jobs if job.state == "failed"]
        lines = [f"  {job.name}: {job.error} ({job.folder / 'job.log'})" for job in failed]
        text = f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(lines)
        found = []
        for job in jobs:
            result = JobReturn(
                overrides=job.overrides,
                cfg=job.config,
                hydra_cfg=job.config,
                working_dir=str(job.folder),
                task_name="train",
                status=JobStatus.FAILED if job in failed else JobStatus.COMPLETED,
            )
            result.return_value = UserError(text) if job in failed else value_of(job)
            found.append(result)
        return found


def compose(
    context: HydraContext, sweep: DictConfig, number: int, overrides: list[str]
) -> tuple[DictConfig, Path]:
    """Compose a job of a sweep; return its configuration and its folder."""
    config = context.config_loader.load_sweep_config(sweep, overrides)
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    HydraConfig.instance().set_config(config)
    folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
    with read_write(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(folder)
    return config, folder
