"""`hydra/launcher=process`: every job of a sweep in a process of its own.

A job is the same command as by hand, in its folder, so several devices, a crash or a crash of the
CUDA driver concern that job alone. What a job prints goes to `job.log` in its folder, and
`job.json` beside it says how it went. A folder with the results of the same configuration is not
run again; an interrupted job goes on from its last checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from hydra.core.utils import JobReturn

from anomaly_lit.files import HAS_LOCKS, lock, without_secrets
from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.base import CommandLauncher
from hydra_plugins.anomaly_lit_launcher.jobs import (
    PAUSE,
    Job,
    end,
    last_words,
    note,
    tell,
    who_trains,
    write_plan,
)
from hydra_plugins.anomaly_lit_launcher.surroundings import (
    check_alone,
    die_with_parent,
    environment,
    visible_gpus,
)


class ProcessLauncher(CommandLauncher):
    """Runs jobs as processes, several at a time, each with GPUs of its own.

    Args:
        jobs: Jobs at a time.
        gpus: GPUs to share out, by number or by UUID; null takes those in CUDA_VISIBLE_DEVICES, or
            all; an empty list gives jobs none.
        gpus_per_job: GPUs of each job, where there are any.
        timeout_minutes: A job that takes longer is ended and failed; null waits forever.
        retries: How often a failed job is tried again; it goes on from its last checkpoint.
    """

    def __init__(
        self,
        jobs: int = 1,
        gpus: Sequence[int | str] | None = None,
        gpus_per_job: int = 1,
        timeout_minutes: float | None = None,
        retries: int = 0,
    ) -> None:
        super().__init__()
        self.jobs = jobs
        self.gpus = gpus
        self.gpus_per_job = gpus_per_job
        self.timeout_minutes = timeout_minutes
        self.retries = retries

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs and return what they returned; a failed one does not stop the others."""
        check_alone()
        if not HAS_LOCKS:
            raise UserError(
                "hydra/launcher=process needs the file locks of Linux or macOS; here use "
                "hydra/launcher=joblib"
            )
        slots = self.slots()
        jobs = self.plan(job_overrides, initial_job_idx)
        write_plan(self.sweep, jobs, len(slots))
        print(f"{len(jobs)} jobs, {len(slots)} at a time", flush=True)
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            self.run(jobs, slots)
        finally:
            signal.signal(signal.SIGTERM, before)
            end([job for job in jobs if job.state == "running"])
        return self.results(jobs)

    # ------------------------------------------------------------------------------ planning

    def slots(self) -> list[list[str]]:
        """Return the GPUs of each place for a job; empty lists where there are none to share out.

        Raises:
            UserError: More jobs at a time than GPUs for them.
        """
        gpus = [str(gpu) for gpu in (visible_gpus() if self.gpus is None else self.gpus)]
        if self.jobs < 1 or self.gpus_per_job < 1 or self.retries < 0:
            raise UserError(
                f"hydra.launcher: jobs={self.jobs} and gpus_per_job={self.gpus_per_job} must be at "
                f"least 1, retries={self.retries} at least 0"
            )
        if not gpus:
            return [[] for _ in range(self.jobs)]
        if self.jobs * self.gpus_per_job > len(gpus):
            raise UserError(
                f"hydra.launcher: {self.jobs} jobs at a time with {self.gpus_per_job} GPUs each, "
                f"and {len(gpus)} GPUs ({', '.join(gpus)}): lower hydra.launcher.jobs, or share "
                "none out with hydra.launcher.gpus=[]"
            )
        each = self.gpus_per_job
        return [gpus[start * each : (start + 1) * each] for start in range(self.jobs)]

    # ------------------------------------------------------------------------------- running

    def run(self, jobs: list[Job], slots: list[list[str]]) -> None:
        """Fill the places with jobs until none is left."""
        waiting, running = list(jobs), list[Job]()
        free = list(range(len(slots)))
        while waiting or running:
            for job in [job for job in running if self.has_ended(job)]:
                running.remove(job)
                free.append(job.slot)
                if job.state == "failed" and job.attempt <= self.retries:
                    waiting.insert(0, job)
                else:
                    tell(job, jobs)
            while waiting and free:
                job = waiting.pop(0)
                if self.is_done(job):
                    tell(job, jobs)
                    continue
                job.slot = free.pop(0)
                if not self.start(job, slots[job.slot], len(slots)):
                    free.append(job.slot)  # an older process still runs it
                    waiting.append(job)
                    break
                running.append(job)
            time.sleep(PAUSE)

    def start(self, job: Job, gpus: list[str], places: int) -> bool:
        """Start a job's process; return false while an earlier one still writes into the folder."""
        job.folder.mkdir(parents=True, exist_ok=True)
        if who_trains(job):
            return False
        log = (job.folder / "job.log").open("ab")
        if not lock(log):  # kept by the job, for as long as it lives
            log.close()
            return False
        job.attempt += 1
        job.started, job.state, job.error, job.log = time.time(), "running", "", log
        now, command = datetime.now().isoformat(" ", "seconds"), " ".join(job.command)
        log.write(f"--- {now}: {without_secrets(command)}\n".encode())
        log.flush()
        job.process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(gpus, places),
            preexec_fn=die_with_parent,
        )
        note(job)
        return True

    def has_ended(self, job: Job) -> bool:
        """Note how a job ended; end one that takes too long."""
        assert job.process is not None
        code = job.process.poll()
        late = self.timeout_minutes is not None and (
            time.time() - job.started > 60 * self.timeout_minutes
        )
        if code is None and late:
            end([job])
            code = job.process.poll()
            job.error = f"took longer than hydra.launcher.timeout_minutes={self.timeout_minutes:g}"
        if code is None:
            return False
        if job.log is not None:
            job.log.close()
        job.state = "done" if code == 0 and not job.error else "failed"
        if job.state == "failed":
            job.error = job.error or last_words(job.folder / "job.log") or f"exit code {code}"
        note(job, code)
        return True


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
