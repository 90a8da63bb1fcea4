"""`anomaly-status`: how far a sweep is, and why jobs failed."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_lit.files import lock, runs_below
from anomaly_lit.runs.claim import holder
from anomaly_lit.runs.objective import PRUNED
from anomaly_lit.types import UserError

ENTRY = re.compile(r"\[\d{4}-\d\d-\d\d ")  # how an entry of Hydra's logs begins
STATES = ("done", "pruned", "running", "failed", "waiting")


class JobStatus(NamedTuple):
    """The state of a job, as read from its folder."""

    name: str  # the overrides that tell it from the other jobs, or its path
    state: str  # one of STATES
    seconds: float | None  # that it took, or has run for so far; None if unknown
    line: str  # its error, or the last line of its log


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with 2 if jobs are left, else with 1 if any failed, else with 0."""
    parser = argparse.ArgumentParser(
        prog="anomaly-status", description="How far a sweep is, and why jobs failed."
    )
    parser.add_argument("folder", type=Path, help="output_dir of the sweep")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="print again and again")
    options = parser.parse_args(arguments)
    if options.every is not None and not (math.isfinite(options.every) and options.every > 0):
        parser.error(f"--every {options.every:g}: give a number of seconds above 0")
    while True:
        try:
            jobs, at_a_time = read_sweep(options.folder)
        except UserError as error:
            sys.exit(f"error: {error}")
        print(report(jobs, at_a_time), flush=True)
        states = {job.state for job in jobs}
        if options.every is None or not states & {"running", "waiting"}:
            break
        time.sleep(options.every)
    sys.exit(2 if states & {"running", "waiting"} else int("failed" in states))


def read_sweep(folder: Path) -> tuple[list[JobStatus], int]:
    """Return the jobs of a sweep and how many run at a time.

    Launchers write a plan (`sweep.json`). A sweep without a launcher shows only the folders that
    its jobs have made so far.

    Raises:
        UserError: There is no such folder or no run in it, or the plan cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the output_dir of a sweep")
    plan = folder / "sweep.json"
    if plan.is_file():
        content = _read(plan)
        places, at_a_time = content.get("jobs"), content.get("at_a_time")
        is_plan = isinstance(places, dict) and all(isinstance(o, list) for o in places.values())
        if not is_plan or not isinstance(at_a_time, int) or at_a_time < 1:
            raise UserError(f"{plan} has no list of jobs; start the sweep again to write it anew")
    else:
        begun = {*runs_below(folder), *runs_below(folder, "job.json")}
        places = {str(place.relative_to(folder)): [] for place in sorted(begun)}
        at_a_time = 1
    if not places:
        raise UserError(f"{folder} holds no run; give the output_dir of a sweep")
    shared = set.intersection(*map(set, places.values())) if len(places) > 1 else set()
    jobs = []
    for place, overrides in places.items():
        own = " ".join(o for o in overrides if o not in shared)
        jobs.append(job_status(own or place, folder / place))
    return jobs, at_a_time


def job_status(name: str, folder: Path) -> JobStatus:
    """Read a job's state from what lies in its folder; a file that cannot be read is a failure."""
    try:
        return _job_status(name, folder)
    except UserError as error:
        return JobStatus(name, "failed", None, str(error))


def _job_status(name: str, folder: Path) -> JobStatus:
    file = folder / "job.json"
    facts = _read(file) if file.is_file() else {}
    log = next((folder / n for n in ("job.log", "train.log") if (folder / n).is_file()), None)
    started, ended = facts.get("started"), facts.get("ended")
    seconds = (ended or time.time()) - started if started else None
    metrics = folder / "metrics.json"
    if metrics.is_file():
        taken = _read(metrics).get("training_seconds")
        return JobStatus(name, "done", seconds if ended else taken, "")
    if is_running(folder, log, facts):
        return JobStatus(name, "running", seconds, last_line(log))
    if (folder / PRUNED).is_file():
        return JobStatus(name, "pruned", seconds, "")
    if facts.get("error") or (facts and facts.get("exit_code") is not None):
        return JobStatus(name, "failed", seconds, facts.get("error") or last_line(log))
    if not facts and log is not None and ends_in_error(log):  # it ran without a launcher
        return JobStatus(name, "failed", seconds, last_line(log))
    if facts:  # its launcher was killed
        return JobStatus(name, "waiting", None, "interrupted; the same command goes on with it")
    return JobStatus(name, "waiting", None, "")


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON file of keys and values.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {file}: expected keys with values")
    return content


def is_running(folder: Path, log: Path | None, facts: dict[str, Any]) -> bool:
    """Return whether a run holds the folder, or is just starting.

    The log shows that a job is starting: a launcher's process holds the lock of the log, and a job
    of SLURM or without a launcher has written to it within the last minute, other than its end.
    """
    if holder(folder) is not None:
        return True
    if log is None:
        return False
    of_slurm = "slurm" in facts and facts.get("ended") is None
    begins = (of_slurm or not facts) and time.time() - log.stat().st_mtime < 60
    return (begins and not ends_in_error(log)) or is_held(log)


def is_held(file: Path) -> bool:
    """Return whether a running job holds the lock of its log; false on systems without locks."""
    with file.open("rb") as log:
        return not lock(log, shared=True)


def last_line(log: Path | None) -> str:
    """Return the last line with text in the last 4 kB of a log."""
    if log is None:
        return ""
    return next((line for line in reversed(tail(log)) if not line.startswith("srun: ")), "")


def ends_in_error(log: Path) -> bool:
    """Return whether a run's last entry in `train.log` says why it ended."""
    entries = [line for line in tail(log) if ENTRY.match(line)]
    return bool(entries) and "[ERROR]" in entries[-1]


def tail(log: Path) -> list[str]:
    """Return the lines with text in the last 4 kB of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def report(jobs: list[JobStatus], at_a_time: int) -> str:
    """Return the text that the command prints."""
    return "\n".join(_lines(jobs, at_a_time))


def _lines(jobs: list[JobStatus], at_a_time: int) -> Iterator[str]:
    count = Counter(job.state for job in jobs)
    left = count["running"] + count["waiting"]
    yield f"{len(jobs)} jobs: " + ", ".join(f"{count[s]} {s}" for s in STATES if count[s])
    taken = [job.seconds for job in jobs if job.state == "done" and job.seconds is not None]
    if left and taken:
        mean = sum(taken) / len(taken)
        yield f"about {duration(mean * left / min(at_a_time, left))} left, {duration(mean)} a job"
    for state in ("running", "failed"):
        for job in jobs:
            if job.state == state:
                since = (
                    f" for {duration(job.seconds)}" if job.seconds and state == "running" else ""
                )
                yield f"{state}{since}: {job.name}"
                yield from (f"    {line}" for line in job.line.splitlines())


def duration(seconds: float) -> str:
    """Return seconds in words.

    >>> duration(7380)
    '2 h 03 min'
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


if __name__ == "__main__":
    main()
