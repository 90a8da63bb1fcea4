"""``hydra/launcher=process``: every job of a sweep in a process of its own.

Hydra looks for plugins in packages below ``hydra_plugins``; this one imports nothing heavy.

A job is the same command as by hand, in its folder, so several devices, a crash or a crash of the
CUDA driver concern that job alone. What a job prints goes to ``job.log`` in its folder, and
``job.json`` beside it says how it went. A folder with the results of the same configuration is not
run again; an interrupted job goes on from its last checkpoint.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from anomaly_lit.types import UserError

# what the jobs of a sweep must not be told again
OF_THE_SWEEP = (
    "hydra.mode",
    "hydra.sweep",
    "hydra.run",
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweeper",
)
# which of SLURM's processes this is; a job starts its own
TASKS_OF_SLURM = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
                  "SLURM_STEP", "SLURM_TASKS_PER_NODE")  # fmt: skip
NOT_OF_A_RUN = ("hydra", "pruning", "when_changed")  # of this sweep
PAUSE = 0.05  # seconds between two looks at the running jobs
GRACE = 30.0  # seconds that a job is given to end by itself


@dataclass
class Job:
    """One job of a sweep."""

    number: int
    overrides: list[str]
    name: str
    folder: Path
    command: list[str]
    config: DictConfig
    state: str = "waiting"  # waiting | running | done | skipped | failed
    error: str = ""
    attempt: int = 0
    started: float = 0.0
    slot: int = -1
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = field(default=None, repr=False)


class ProcessLauncher(Launcher):
    """Runs jobs as processes, several at a time, each with GPUs of its own.

    Args:
        jobs: Jobs at a time.
        gpus: GPUs to share out, by number or by UUID; null takes those in CUDA_VISIBLE_DEVICES, or
            all; an empty list gives jobs none.
        gpus_per_job: GPUs of each job, where there are any.
        timeout_minutes: A job that takes longer is ended and failed; null waits for ever.
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

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keeps what ``launch`` needs."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs the jobs and gives what they returned; a failed one does not stop the others."""
        check_alone()
        slots = self.slots()
        jobs = [
            self.prepare(initial_job_idx + place, list(overrides))
            for place, overrides in enumerate(job_overrides)
        ]
        check_folders(jobs)
        name_by_difference(jobs)
        write_plan(Path(self.config.hydra.sweep.dir), jobs, len(slots))
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
        """The GPUs of each place for a job; empty lists where there are none to share out.

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

    def prepare(self, number: int, overrides: list[str]) -> Job:
        """Composes a job, which finds mistakes before anything runs, and its command."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        with read_write(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder)
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

    # ------------------------------------------------------------------------------- running

    def run(self, jobs: list[Job], slots: list[list[str]]) -> None:
        """Fills the places with jobs until none is left."""
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
                    free.append(job.slot)  # an older process is still at it
                    waiting.append(job)
                    break
                running.append(job)
            time.sleep(PAUSE)

    def is_done(self, job: Job) -> bool:
        """Whether the folder holds the results of this very configuration, or of another one."""
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

    def start(self, job: Job, gpus: list[str], places: int) -> bool:
        """Starts a job's process; false while one from before still writes into the folder."""
        job.folder.mkdir(parents=True, exist_ok=True)
        log = (job.folder / "job.log").open("ab")
        try:
            fcntl.flock(
                log, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # kept by the job, for as long as it lives
        except BlockingIOError:
            log.close()
            return False
        job.attempt += 1
        job.started, job.state, job.error, job.log = time.time(), "running", "", log
        log.write(
            f"--- {datetime.now().isoformat(' ', 'seconds')}: {' '.join(job.command)}\n".encode()
        )
        log.flush()
        job.process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(gpus, places),
            preexec_fn=_die_with_parent,
        )
        note(job)
        return True

    def has_ended(self, job: Job) -> bool:
        """Notes how a job ended; ends one that takes too long."""
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

    def results(self, jobs: list[Job]) -> list[JobReturn]:
        """What Hydra hands to the sweeper; a failed job's value is an error that tells of all."""
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


def value_of(job: Job) -> float | None:
    """The metric that ``optimized_metric`` names, from the job's results."""
    from anomaly_lit.runs.objective import PRUNED, objective

    if OmegaConf.select(job.config, "optimized_metric") is None:
        return None
    files = [job.folder / "metrics.json", job.folder / PRUNED]
    return objective(job.config, json.loads(next(filter(Path.is_file, files)).read_text("utf-8")))


def check_alone() -> None:
    """Raises ``UserError`` in all but the first of several tasks of SLURM."""
    rank = os.environ.get("SLURM_PROCID", "0")
    if rank != "0":
        raise UserError(
            f"the sweep runs already: this is its copy in task {rank} of SLURM. Start it once, "
            "in the script of sbatch without srun"
        )


def check_folders(jobs: list[Job]) -> None:
    """Raises ``UserError`` where two jobs would write into one folder."""
    seen: dict[Path, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.folder, job)
        if other is not job:
            raise UserError(
                f"two jobs share the folder {job.folder}: {' '.join(other.overrides)} and "
                f"{' '.join(job.overrides)}; they are the same, or hydra.sweep.subdir does not "
                "tell them apart"
            )


def name_by_difference(jobs: Sequence[Job]) -> None:
    """Names several jobs by the overrides that they do not share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        own = [override for override in job.overrides if override not in shared]
        job.name = " ".join(own) or job.name


def visible_gpus() -> list[str]:
    """GPUs by the environment, else by the driver's listing; no library is asked, it is slow."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    places = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(places.iterdir())] if places.is_dir() else []


def environment(gpus: list[str], places: int) -> dict[str, str]:
    """Variables of a job: its GPUs, a port of its own, and its share of the CPU's cores."""
    variables = dict(os.environ)
    variables.pop("HYDRA_FULL_ERROR", None)  # set while the launcher's own command runs
    for name in [name for name in variables if name.startswith(TASKS_OF_SLURM)]:
        del variables[name]  # a job is no task of the allocation that the sweep runs in
    variables["PYTHONUNBUFFERED"] = "1"
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["MASTER_PORT"] = str(free.getsockname()[1])
    if places > 1 and "OMP_NUM_THREADS" not in variables:
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(max(1, cores // places))
    return variables


def escaped(path: Path) -> str:
    """A path within single quotes of Hydra's grammar."""
    return str(path).replace("\\", "\\\\").replace("'", "\\'")


def end(jobs: Sequence[Job]) -> None:
    """Asks running jobs to end, as Ctrl-C does, and kills what is left after a while."""
    processes = [job.process for job in jobs if job.process and job.process.poll() is None]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(PAUSE)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    for job in jobs:
        note(job, job.process.poll() if job.process else None)


def last_words(log: Path, lines: int = 1) -> str:
    """The last lines of a log that say something; of an error in words, all of it."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("\n--- ")[2]
    said = [line.rstrip() for line in text.splitlines()[1:] if line.strip()]
    for place, line in enumerate(said):
        if line.startswith("error: "):
            return "\n".join([line.removeprefix("error: "), *said[place + 1 :]])
    return "\n".join(said[-lines:])


def tell(job: Job, jobs: Sequence[Job]) -> None:
    """A line for a job that ended."""
    ended = sum(other.state in ("done", "skipped", "failed") for other in jobs)
    took = f" in {time.time() - job.started:.0f} s" if job.state == "done" else ""
    what = {"skipped": "already finished", "failed": f"FAILED: {job.error}"}.get(job.state, "done")
    print(f"[{ended}/{len(jobs)}] {job.name}: {what}{took}", flush=True)


def note(job: Job, code: int | None = None) -> None:
    """Writes ``job.json``: what the job is, and how it went or goes."""
    facts: dict[str, Any] = {
        "overrides": job.overrides,
        "attempt": job.attempt,
        "started": job.started,
        "ended": time.time() if code is not None else None,
        "exit_code": code,
        "error": job.error,
    }
    replace_text(job.folder / "job.json", json.dumps(facts, indent=2))


def write_plan(folder: Path, jobs: Sequence[Job], places: int) -> None:
    """Adds the jobs to ``sweep.json`` in the sweep's folder: their folders and overrides."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.json"
    known = json.loads(file.read_text(encoding="utf-8"))["jobs"] if file.is_file() else {}
    known |= {os.path.relpath(job.folder, folder): job.overrides for job in jobs}
    replace_text(file, json.dumps({"at_a_time": places, "jobs": known}, indent=2))


def replace_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(file)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _die_with_parent() -> None:
    """Has the kernel end the job should the launcher be killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


__all__: list[str] = ["ProcessLauncher"]
