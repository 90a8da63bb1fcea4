"""`hydra/launcher=slurm`: every job of a sweep as a job of SLURM.

A job is the same command as by hand, in its folder, by srun. SLURM gets one array of jobs, each of
which looks up its command (`task.py`). The launcher only watches the queue and the folders: jobs go
on when it is killed, and the same command finds them and waits for them.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from anomaly_lit.files import without_secrets
from anomaly_lit.types import Stopped, UserError
from hydra_plugins.anomaly_lit_launcher import sbatch, task
from hydra_plugins.anomaly_lit_launcher.base import CommandLauncher
from hydra_plugins.anomaly_lit_launcher.jobs import (
    Job,
    last_words,
    note,
    read_plan,
    tell,
    who_trains,
    write_ids,
    write_plan,
)
from hydra_plugins.anomaly_lit_launcher.surroundings import check_alone, count

POLL = 3.0  # seconds between two looks at the queue
LATE = 15.0  # seconds after which a file that another machine has written is seen here
LARGEST = 1000  # jobs of an array; SLURM's MaxArraySize is 1001 where nobody has changed it
USUAL = {
    "None", "Resources", "Priority", "JobArrayTaskLimit", "BeginTime", "Dependency", "Cleaning",
    "Licenses", "Prolog",
}  # fmt: skip
LIVES = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")
ENDS = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "its time was up before it had saved its step: raise hydra.launcher.timeout_min, or "
    "signal_delay_s",
    "OUT_OF_MEMORY": "it needed too much main memory: raise hydra.launcher.mem_gb, or lower "
    "dataset.batch_size or dataset.num_workers",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "PREEMPTED": "other jobs took its place, and it was not queued again",
    "DEADLINE": "its deadline has passed",
}


class SlurmLauncher(CommandLauncher):
    """Sends the jobs to SLURM and waits for them.

    Args:
        name: Name of the jobs.
        timeout_min: Minutes that SLURM gives a job.
        nodes: Nodes of each job, `trainer.num_nodes`.
        tasks_per_node: Processes on each node, `trainer.devices`.
        gpus_per_node: null asks for none with `trainer.accelerator=cpu`, else for one per task.
        cpus_per_task: Cores of each process.
        mem_gb: Main memory of each node; null leaves it to SLURM.
        partition: `--partition`; null leaves this one and the next six to SLURM.
        qos: `--qos`.
        account: `--account`.
        constraint: `--constraint`.
        exclude: `--exclude`.
        gres: `--gres`.
        comment: `--comment`.
        array_parallelism: Jobs at a time.
        signal_delay_s: Seconds between the warning to save and the end of the time.
        max_num_timeout: How often a job that was stopped is queued again; it goes on where it was.
        setup: Lines of the script before the job.
        additional_parameters: More options of sbatch, by their long names.
    """

    def __init__(
        self,
        name: str = "train",
        timeout_min: int = 1440,
        nodes: int = 1,
        tasks_per_node: int = 1,
        gpus_per_node: int | None = None,
        cpus_per_task: int | None = 4,
        mem_gb: float | None = None,
        partition: str | None = None,
        qos: str | None = None,
        account: str | None = None,
        constraint: str | None = None,
        exclude: str | None = None,
        gres: str | None = None,
        comment: str | None = None,
        array_parallelism: int = 256,
        signal_delay_s: int = 120,
        max_num_timeout: int = 3,
        setup: Sequence[str] | None = None,
        additional_parameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if array_parallelism < 1 or max_num_timeout < 0:
            raise UserError(
                f"hydra.launcher: array_parallelism={array_parallelism} must be at least 1, "
                f"max_num_timeout={max_num_timeout} at least 0"
            )
        self.nodes, self.tasks_per_node = nodes, tasks_per_node
        self.gpus_per_node, self.cpus_per_task = gpus_per_node, cpus_per_task
        self.array_parallelism, self.max_num_timeout = array_parallelism, max_num_timeout
        self.lines = list(setup or [])
        memory = None if mem_gb is None else f"{round(1024 * mem_gb)}M"
        self.options = options_of(
            {
                "job-name": name, "time": timeout_min, "nodes": nodes,
                "ntasks-per-node": tasks_per_node, "cpus-per-task": cpus_per_task, "mem": memory,
                "partition": partition, "qos": qos, "account": account, "constraint": constraint,
                "exclude": exclude, "gres": gres, "comment": comment,
                "signal": f"USR1@{signal_delay_s}", "requeue": True, "open-mode": "append",
                **(additional_parameters or {}),
            }
        )  # fmt: skip
        self.sent: dict[str, Job] = {}  # by number, until they end
        self.limits: dict[str, int] = {}  # jobs at a time, by array
        self.missing: dict[str, float] = {}  # when a job was first missing from the queue
        self.reasons: set[str] = set()  # printed so far

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs and return what they returned; a failed one does not stop the others."""
        check_alone()
        jobs = self.plan(job_overrides, initial_job_idx)
        for job in jobs:
            self.check(job.config)
        options = [*self.options, *options_of({"gpus-per-node": self.gpus(jobs) or None})]
        write_plan(self.sweep, jobs, self.array_parallelism)
        print(f"{len(jobs)} jobs, {self.array_parallelism} at a time", flush=True)
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            self.run(jobs, options)
        except KeyboardInterrupt:
            if self.sent:
                sbatch.cancel(self.sent)
                print(
                    f"cancelled {len(self.sent)} jobs in SLURM; those that run save their step if "
                    "SLURM's KillWait is long enough for it",
                    flush=True,
                )
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        return self.results(jobs)

    # ------------------------------------------------------------------------------ planning

    def check(self, config: DictConfig) -> None:
        """Compare the tasks with the devices.

        Raises:
            UserError: They are not one for each, with the settings that would do.
        """
        devices = count(OmegaConf.select(config, "trainer.devices"))
        nodes = OmegaConf.select(config, "trainer.num_nodes") or 1
        if (self.tasks_per_node, self.nodes) != (devices, nodes):
            raise UserError(
                f"hydra.launcher starts {self.tasks_per_node} tasks on each of {self.nodes} nodes, "
                f"and trainer.devices={devices} trainer.num_nodes={nodes} needs one for each "
                f"device: hydra.launcher.tasks_per_node={devices} hydra.launcher.nodes={nodes}"
            )

    def gpus(self, jobs: Sequence[Job]) -> int:
        """Return the GPUs of each node that the jobs need.

        Raises:
            UserError: Some of the jobs run on CPUs.
        """
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        kinds = {OmegaConf.select(job.config, "trainer.accelerator") == "cpu" for job in jobs}
        if len(kinds) > 1:
            raise UserError(
                "some jobs run with trainer.accelerator=cpu and others do not: say with "
                "hydra.launcher.gpus_per_node what each is to get, or make two sweeps of them"
            )
        return 0 if True in kinds else self.tasks_per_node

    # ------------------------------------------------------------------------------- running

    def run(self, jobs: list[Job], options: Sequence[str]) -> None:
        """Send what is not done, and look after the jobs until none is left."""
        for job in jobs:
            if self.is_done(job):
                tell(job, jobs)
        waiting = [job for job in jobs if job.state == "waiting"]
        self.find_sent(waiting)
        while waiting or self.sent:
            self.send(waiting, options)
            time.sleep(POLL)
            queue = sbatch.queue()
            if queue is None:  # it is busy, or restarts
                continue
            self.tell_reasons(queue)
            for number in [number for number in self.sent if number not in queue]:
                if self.has_ended(number, self.sent[number]):
                    tell(self.sent.pop(number), jobs)

    def find_sent(self, waiting: list[Job]) -> None:
        """Take over the jobs that an earlier command has sent and that SLURM still has.

        Raises:
            UserError: SLURM does not answer.
        """
        numbers = read_plan(self.sweep).get("slurm", {})
        before = [numbers.get(os.path.relpath(job.folder, self.sweep)) for job in waiting]
        if not any(before):
            return
        queue = sbatch.queue()
        if queue is None:
            raise UserError(
                "squeue does not answer, and jobs that an earlier command has sent may still run: "
                "try again when SLURM is back"
            )
        found = {n: job for n, job in zip(before, waiting, strict=True) if n in queue}
        self.sent |= found
        waiting[:] = [job for job in waiting if job not in found.values()]
        if found:
            print(f"waiting for {len(found)} jobs that an earlier command has sent", flush=True)

    def send(self, waiting: list[Job], options: Sequence[str]) -> None:
        """Send waiting jobs while there are places; skip those whose folder another run uses."""
        arrays = {number.partition("_")[0] for number in self.sent}
        for array in arrays:
            if len(arrays) == 1 and self.limits.get(array, LARGEST) < self.array_parallelism:
                self.limits[array] = self.array_parallelism
                sbatch.limit(array, self.array_parallelism)
        places = self.array_parallelism - len(self.sent)
        ready = [job for job in waiting if not who_trains(job)][:LARGEST] if places > 0 else []
        if not ready:
            return
        for job in ready:
            job.folder.mkdir(parents=True, exist_ok=True)
            job.more = {"again": 0}
            note(job)
        array = sbatch.submit(*self.script(ready, options), len(ready), places)
        fresh = {f"{array}_{place}": job for place, job in enumerate(ready)}
        write_ids(self.sweep, fresh)
        self.sent |= fresh
        self.limits[array] = places
        waiting[:] = [job for job in waiting if job not in ready]
        print(f"sent {len(ready)} jobs to SLURM: {array}", flush=True)

    def script(self, jobs: Sequence[Job], options: Sequence[str]) -> tuple[Path, list[str]]:
        """Write the jobs' list and script into `.slurm`; return the script and all options."""
        folder = self.sweep / ".slurm"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}-{jobs[0].number}"
        listed, script = folder / f"{name}.json", folder / f"{name}.sh"
        cores = options_of({"cpus-per-task": self.cpus_per_task})
        batch = {
            "srun": ["srun", "--kill-on-bad-exit=1", *cores],
            "again": self.max_num_timeout,
            "jobs": [
                {
                    "folder": str(job.folder),
                    "command": job.command,
                    "shown": without_secrets(" ".join(job.command)),
                }
                for job in jobs
            ],
        }
        listed.touch(mode=0o600)  # commands may hold passwords
        listed.write_text(json.dumps(batch, indent=1), encoding="utf-8")
        command = shlex.join([sys.executable, "-P", task.__file__, str(listed)])
        script.write_text("\n".join(["#!/bin/bash", *self.lines, f"exec {command}", ""]))
        log = str(folder).replace("%", "%%") + "/%A_%a.log"
        return script, [*options, f"--output={log}"]

    def tell_reasons(self, queue: Mapping[str, sbatch.Queued]) -> None:
        """Print once why jobs wait, where it is not that others come first."""
        held = [queue[n] for n in self.sent if n in queue and queue[n].state == "PENDING"]
        for reason in sorted({job.reason for job in held} - USUAL - self.reasons):
            self.reasons.add(reason)
            number = sum(job.reason == reason for job in held)
            print(f"{number} jobs wait in SLURM's queue for this reason: {reason}", flush=True)

    def has_ended(self, number: str, job: Job) -> bool:
        """Note how a job that left the queue ended; false while its files may be on their way."""
        facts = task.read(job.folder)
        own = facts if facts.get("slurm") == number else {}
        code, state = own.get("exit_code"), sbatch.end_of(number)
        if state in LIVES:  # it was queued again just now
            return False
        since = self.missing.setdefault(number, time.monotonic())
        if code is None and state not in ENDS and time.monotonic() - since < LATE:
            return False
        job.started, job.attempt = own.get("started") or 0.0, own.get("attempt", 0)
        job.more = {"slurm": number, "again": own.get("again", 0)}
        job.state = "done" if code == 0 else "failed"
        if code != 0:
            job.error = self.why(number, job, code, state)
        note(job, code)
        return True

    def why(self, number: str, job: Job, code: int | None, state: str) -> str:
        """Return in words why a job failed."""
        goes_on = "; the same command goes on with it"
        if state in ENDS:
            return f"{ENDS[state]} (SLURM job {number}: {state}){goes_on}"
        if code in task.RUN_AGAIN:
            times = f"hydra.launcher.max_num_timeout={self.max_num_timeout}"
            return f"stopped once more than {times} allows (exit code {code}){goes_on}"
        if code == 137:
            return f"killed (exit code 137), perhaps since main memory ran short{goes_on}"
        if code is not None:
            return last_words(job.folder / "job.log") or f"exit code {code}"
        log = self.sweep / ".slurm" / f"{number}.log"
        said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        told = f"; {log} ends with: {said[0]}" if said else ""
        return f"SLURM job {number} ended without an exit code ({state or 'forgotten'}){told}"


def options_of(settings: Mapping[str, Any]) -> list[str]:
    """Return options of a command of SLURM; null and false leave one out.

    >>> options_of({"requeue": True, "mem": None, "time": 5})
    ['--requeue', '--time=5']
    """
    given = {
        name.replace("_", "-"): value
        for name, value in settings.items()
        if value is not None and value is not False
    }
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def _leave(number: int, frame: Any) -> None:
    raise Stopped("stopped by SIGTERM; jobs that were sent go on in SLURM")
