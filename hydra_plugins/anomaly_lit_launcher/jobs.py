"""A job of a sweep: its process, and what lies in its folder about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from anomaly_lit.files import without_secrets
from anomaly_lit.runs.claim import holder, in_words
from anomaly_lit.types import UserError

PAUSE = 0.05  # seconds between two looks at the running jobs
GRACE = 30.0  # seconds that a job is given to end by itself
OF_SLURM = ("srun: ", "slurmstepd: ")  # log lines that say that a job ended, not why


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
    more: dict[str, Any] = field(default_factory=dict)  # facts of a launcher's own, for job.json
    waited_for: bool = False  # whether we said that another process trains there


def check_folders(jobs: list[Job]) -> None:
    """Raise `UserError` where two jobs would write into one folder."""
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
    """Name several jobs by the overrides that they do not share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        own = [override for override in job.overrides if override not in shared]
        job.name = " ".join(own) or job.name


def end(jobs: Sequence[Job]) -> None:
    """Ask running jobs to end, as Ctrl-C does, and kill those left after a while."""
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


def who_trains(job: Job) -> str:
    """Return who else trains in a job's folder, empty if nobody does; print it once."""
    facts = holder(job.folder)
    if facts is None:
        return ""
    if not job.waited_for:
        job.waited_for = True
        print(f"{job.name}: waiting for {in_words(facts)}, which trains it", flush=True)
    return in_words(facts)


def last_words(log: Path, lines: int = 1) -> str:
    """Return the last lines of a log that say something, or the whole of a UserError."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("\n--- ")[2]
    said = [line.rstrip() for line in text.splitlines()[1:] if line.strip()]
    said = [line for line in said if not line.startswith(OF_SLURM)] or said
    for place, line in enumerate(said):
        if line.startswith("error: "):
            return "\n".join([line.removeprefix("error: "), *said[place + 1 :]])
    return "\n".join(said[-lines:])


def tell(job: Job, jobs: Sequence[Job]) -> None:
    """Print a line for a job that ended."""
    ended = sum(other.state in ("done", "skipped", "failed") for other in jobs)
    took = f" in {time.time() - job.started:.0f} s" if job.state == "done" else ""
    what = {"skipped": "already finished", "failed": f"FAILED: {job.error}"}.get(job.state, "done")
    print(f"[{ended}/{len(jobs)}] {job.name}: {what}{took}", flush=True)


def note(job: Job, code: int | None = None) -> None:
    """Write `job.json`: what the job is, and how it went so far."""
    facts: dict[str, Any] = {
        "overrides": without_secrets(job.overrides),
        "attempt": job.attempt,
        "started": job.started,
        "ended": time.time() if code is not None else None,
        "exit_code": code,
        "error": job.error,
        **job.more,
    }
    replace_text(job.folder / "job.json", json.dumps(facts, indent=2))


def write_plan(folder: Path, jobs: Sequence[Job], places: int) -> None:
    """Add the jobs to `sweep.json` in the sweep's folder: their folders and overrides."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = read_plan(folder)
    told = {os.path.relpath(job.folder, folder): without_secrets(job.overrides) for job in jobs}
    write = {**plan, "at_a_time": places, "jobs": plan.get("jobs", {}) | told}
    replace_text(folder / "sweep.json", json.dumps(write, indent=2))


def write_ids(folder: Path, ids: Mapping[str, Job]) -> None:
    """Add SLURM's id of each job to `sweep.json`."""
    plan = read_plan(folder)
    told = {os.path.relpath(job.folder, folder): number for number, job in ids.items()}
    plan["slurm"] = plan.get("slurm", {}) | told
    replace_text(folder / "sweep.json", json.dumps(plan, indent=2))


def read_plan(folder: Path) -> dict[str, Any]:
    """Return what `sweep.json` holds; empty where there is none."""
    file = folder / "sweep.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(file)


def value_of(job: Job) -> float | None:
    """Return the metric that `optimized_metric` names, from the job's results."""
    from anomaly_lit.runs.objective import PRUNED, objective

    if OmegaConf.select(job.config, "optimized_metric") is None:
        return None
    files = [job.folder / "metrics.json", job.folder / PRUNED]
    return objective(job.config, json.loads(next(filter(Path.is_file, files)).read_text("utf-8")))
