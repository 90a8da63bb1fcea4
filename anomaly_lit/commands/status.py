"""``anomaly-status``: how far a sweep is, and why jobs failed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from anomaly_lit.files import lock, runs_below
from anomaly_lit.runs.objective import PRUNED

STATES = ("done", "pruned", "running", "failed", "waiting")


class JobStatus(NamedTuple):
    """What is known of a job from its folder."""

    name: str  # the overrides that tell it from the others
    state: str  # of STATES
    seconds: float | None  # it took, or has run for
    line: str  # last line of its log, or of its error


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command; exits with 0 where all is done, 1 where jobs failed, else 2."""
    parser = argparse.ArgumentParser(
        prog="anomaly-status", description="How far a sweep is, and why jobs failed."
    )
    parser.add_argument("folder", type=Path, help="output_dir of the sweep")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="print again and again")
    options = parser.parse_args(arguments)
    while True:
        try:
            jobs, at_a_time = read_sweep(options.folder)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(report(jobs, at_a_time), flush=True)
        states = {job.state for job in jobs}
        if options.every is None or not states & {"running", "waiting"}:
            break
        time.sleep(options.every)
    sys.exit(2 if states & {"running", "waiting"} else int("failed" in states))


def read_sweep(folder: Path) -> tuple[list[JobStatus], int]:
    """The jobs of a sweep and how many run at a time.

    A sweep of the process launcher has a plan (``sweep.json``); of others the folders that jobs
    made are all there is to know.

    Raises:
        ValueError: There is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the output_dir of a sweep")
    plan = folder / "sweep.json"
    if plan.is_file():
        content = json.loads(plan.read_text(encoding="utf-8"))
        places, at_a_time = content["jobs"], content["at_a_time"]
    else:
        places = {str(run.relative_to(folder)): [] for run in runs_below(folder)}
        at_a_time = 1
    if not places:
        raise ValueError(f"{folder} holds no run; give the output_dir of a sweep")
    shared = set.intersection(*map(set, places.values())) if len(places) > 1 else set()
    jobs = []
    for place, overrides in places.items():
        own = " ".join(o for o in overrides if o not in shared)
        jobs.append(job_status(own or place, folder / place))
    return jobs, at_a_time


def job_status(name: str, folder: Path) -> JobStatus:
    """Reads a job's state from what lies in its folder."""
    file = folder / "job.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    log = next((folder / n for n in ("job.log", "train.log") if (folder / n).is_file()), None)
    started, ended = facts.get("started"), facts.get("ended")
    seconds = (ended or time.time()) - started if started else None
    metrics = folder / "metrics.json"
    if metrics.is_file():
        taken = json.loads(metrics.read_text(encoding="utf-8")).get("training_seconds")
        return JobStatus(name, "done", seconds if ended else taken, "")
    if log is not None and (is_held(log) or (not facts and time.time() - log.stat().st_mtime < 60)):
        return JobStatus(name, "running", seconds, last_line(log))
    if (folder / PRUNED).is_file():
        return JobStatus(name, "pruned", seconds, "")
    if facts.get("error") or (facts and facts.get("exit_code") is not None):
        return JobStatus(name, "failed", seconds, facts.get("error") or last_line(log))
    if facts:  # its launcher was killed
        return JobStatus(name, "waiting", None, "interrupted; the same command goes on with it")
    return JobStatus(name, "waiting", None, "")


def is_held(file: Path) -> bool:
    """Whether a living job writes into this log."""
    with file.open("rb") as log:
        return not lock(log, shared=True)


def last_line(log: Path | None) -> str:
    """The last line of a log that says something, as far as 4 kB from its end."""
    if log is None:
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def report(jobs: list[JobStatus], at_a_time: int) -> str:
    """The text that the command prints."""
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
    """Seconds in words.

    >>> duration(7380)
    '2 h 03 min'
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


if __name__ == "__main__":
    main()
