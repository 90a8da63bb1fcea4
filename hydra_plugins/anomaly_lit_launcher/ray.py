"""`hydra/launcher=ray`: every job of a sweep as a task of Ray, which runs the job's command.

Ray chooses the machine and the GPUs of a job. The task starts the same command as by hand, so that
a crash concerns one job alone, and nothing but the command is sent. All machines see the sweep's
folder, and have this package in the environment of their Ray.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from anomaly_lit.files import lock, without_secrets
from anomaly_lit.runs.claim import holder
from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.base import CommandLauncher
from hydra_plugins.anomaly_lit_launcher.jobs import (
    GRACE,
    PAUSE,
    Job,
    last_words,
    note,
    tell,
    write_plan,
)
from hydra_plugins.anomaly_lit_launcher.surroundings import (
    check_alone,
    die_with_parent,
    environment,
)


class RayLauncher(CommandLauncher):
    """Send the jobs of a sweep to Ray.

    Args:
        address: Address of a Ray cluster, such as `auto`; null starts Ray on this machine.
        num_cpus: Cores that Ray keeps for each job.
        num_gpus: GPUs of each job.
        retries: How often a failed job is tried again; it goes on from its last checkpoint.
    """

    def __init__(
        self,
        address: str | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        retries: int = 0,
    ) -> None:
        super().__init__()
        if retries < 0:
            raise UserError(f"hydra.launcher.retries={retries} must be at least 0")
        self.address, self.retries = address, retries
        self.each = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs and return what they returned; a failed one does not stop the others.

        Raises:
            UserError: Ray is not installed, has no room for a job, or a job wants several nodes.
        """
        check_alone()
        try:
            import ray
        except ImportError as error:
            raise UserError(
                f"hydra/launcher=ray needs a package that is not installed ({error}): "
                'pip install "anomaly-lit[ray]", or use hydra/launcher=process'
            ) from error
        jobs = self.plan(job_overrides, initial_job_idx)
        check_nodes(jobs)
        before = signal.getsignal(signal.SIGTERM)
        ray.init(self.address, include_dashboard=None if self.address else False,
                 log_to_driver=False, logging_level="warning")  # fmt: skip
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own kills the jobs
        try:
            places = places_in(ray.cluster_resources(), self.each)
            write_plan(self.sweep, jobs, places)
            print(f"{len(jobs)} jobs, {places} at a time", flush=True)
            self.send(ray, jobs)
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, before)
        return self.results(jobs)

    def send(self, ray: Any, jobs: list[Job]) -> None:
        """Hand the jobs to Ray and wait for all of them; end what is left after an interruption."""
        task = ray.remote(**self.each, max_retries=0)(run_job)
        waiting, sent = list(jobs), dict[Any, Job]()
        try:
            while waiting or sent:
                for job in waiting:
                    if self.is_done(job):
                        tell(job, jobs)
                        continue
                    job.attempt, job.state = job.attempt + 1, "running"
                    sent[task.remote(job.command, str(job.folder))] = job
                ready, _ = ray.wait(list(sent), timeout=1.0) if sent else ([], [])
                ended = [(sent.pop(one), one) for one in ready]
                for job, one in ended:
                    take(job, ray, one)
                again = [j for j, _ in ended if j.state == "failed" and j.attempt <= self.retries]
                for job in (job for job, _ in ended if job not in again):
                    tell(job, jobs)
                for job in again:
                    job.state = "waiting"
                waiting = again
        finally:
            for one in sent:
                ray.cancel(one)
            if sent:  # what their tasks need to end the jobs, which save first
                ray.wait(list(sent), num_returns=len(sent), timeout=GRACE + 5)


def run_job(command: list[str], folder: str) -> tuple[int, float]:
    """Run a job's command where Ray has put it, with the Python of that place.

    Returns:
        Its exit code and when it started, in seconds since the epoch.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / "job.log").open("ab") as log:
        while not lock(log) or holder(Path(folder)):  # an older run still trains in the folder
            time.sleep(1.0)
        started, line = time.time(), without_secrets(" ".join(command))
        log.write(f"--- {datetime.now().isoformat(' ', 'seconds')}: {line}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment([], 1),
            preexec_fn=die_with_parent,
        )
        try:
            while process.poll() is None:
                time.sleep(PAUSE)  # Ray cannot interrupt a process that waits for another one
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            process.kill()
            process.wait()
    return process.returncode, started


def take(job: Job, ray: Any, task: Any) -> None:
    """Note how a job's task ended."""
    try:
        code, job.started = ray.get(task)
        job.error = "" if code == 0 else last_words(job.folder / "job.log") or f"exit code {code}"
    except ray.exceptions.RayError as error:  # such as a machine that is gone
        code, job.error = 1, f"Ray lost the job: {str(error).strip().splitlines()[0]}"
    job.state = "done" if code == 0 else "failed"
    note(job, code)


def check_nodes(jobs: Sequence[Job]) -> None:
    """Refuse jobs over several machines: Ray starts one process for each job.

    Raises:
        UserError: A job wants several nodes.
    """
    for job in jobs:
        nodes = OmegaConf.select(job.config, "trainer.num_nodes") or 1
        if nodes > 1:
            raise UserError(
                f"trainer.num_nodes={nodes} with hydra/launcher=ray: a job has one machine; use "
                "hydra/launcher=slurm, or trainer.num_nodes=1"
            )


def places_in(there: dict[str, float], each: dict[str, float]) -> int:
    """Return how many jobs fit into a cluster at once, going by all of its CPUs and GPUs.

    >>> places_in({"CPU": 8.0, "GPU": 2.0}, {"num_cpus": 1, "num_gpus": 1})
    2

    Raises:
        UserError: Not one fits.
    """
    has = {"num_cpus": there.get("CPU", 0), "num_gpus": there.get("GPU", 0)}
    places = min(int(has[key] / wanted) for key, wanted in {"num_cpus": 0.01, **each}.items()
                 if wanted)  # fmt: skip
    if places < 1:
        raise UserError(
            f"hydra/launcher=ray: Ray has {has['num_cpus']:g} CPUs and {has['num_gpus']:g} GPUs, "
            f"and a job wants {each['num_cpus']:g} and {each['num_gpus']:g}: lower "
            "hydra.launcher.num_cpus or hydra.launcher.num_gpus"
        )
    return places
