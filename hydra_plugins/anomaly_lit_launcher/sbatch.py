"""SLURM's commands: jobs are sent, looked for in the queue, and asked how they ended."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from anomaly_lit.types import UserError

# What SLURM says, and the setting of ours to change.
REMEDIES = (
    ("generic resource|gres", "hydra.launcher.gpus_per_node=0 on CPUs, or another gres"),
    ("partition", "hydra.launcher.partition; `sinfo` lists them"),
    ("qos", "hydra.launcher.qos"),
    ("account", "hydra.launcher.account"),
    ("feature|constraint", "hydra.launcher.constraint"),
    ("time limit", "hydra.launcher.timeout_min"),
    ("node name", "hydra.launcher.exclude"),
    ("memory", "hydra.launcher.mem_gb"),
    ("node count", "hydra.launcher.nodes"),
    (
        "node configuration|cpu count|more processors",
        "hydra.launcher.nodes, tasks_per_node, cpus_per_task, gpus_per_node or mem_gb",
    ),
    ("unrecognized option|unknown option", "hydra.launcher.additional_parameters"),
    ("job array", "fewer jobs in a sweep, or your administrator's MaxArraySize"),
)
SILENT = 124  # exit code that stands for no answer in time, as that of `timeout`


class Queued(NamedTuple):
    """A job in the queue."""

    state: str  # RUNNING, PENDING, COMPLETING ...
    reason: str  # why it waits


def submit(script: Path, options: Sequence[str], count: int, at_a_time: int) -> str:
    """Send an array of jobs; return its number.

    Raises:
        UserError: There is no SLURM here, or it refuses the jobs.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=slurm needs SLURM's commands, and there is no sbatch here: start the "
            "sweep on a login node of the cluster, or use hydra/launcher=process"
        )
    line = ["sbatch", "--parsable", f"--array=0-{count - 1}%{at_a_time}", *options, str(script)]
    done = _run(line, environment(), seconds=300)
    if done.returncode == SILENT:
        raise UserError(f"{done.stderr}: see with squeue whether it took the jobs, and try again")
    if done.returncode:
        raise UserError(refusal(done.stderr))
    return done.stdout.split(";")[0].strip()


def refusal(text: str) -> str:
    """Return sbatch's words in one sentence, with the setting to change.

    >>> refusal("sbatch: error: invalid partition specified: gpus")
    'SLURM refuses the jobs: invalid partition specified: gpus. Change hydra.launcher.partition; \
`sinfo` lists them'
    """
    lines = [re.sub(r"^sbatch: (error: |fatal: )?", "", line) for line in text.splitlines()]
    said = "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "without a word"
    found = (to for words, to in REMEDIES if re.search(words, said, re.IGNORECASE))
    return f"SLURM refuses the jobs: {said}. Change {next(found, 'the settings of hydra.launcher')}"


def queue() -> dict[str, Queued] | None:
    """Return this user's jobs by number; None where SLURM does not answer."""
    options = ["--noheader", "--array", "--format=%i|%T|%r"]
    done = _run(["squeue", "--me", *options])
    if done.returncode:
        return None
    rows = [row.strip().split("|", 2) for row in done.stdout.splitlines() if row.count("|") >= 2]
    return {number: Queued(state, reason) for number, state, reason in rows}


def end_of(number: str) -> str:
    """Return a job's last state, such as CANCELLED; empty where SLURM has forgotten it."""
    done = _run(["scontrol", "show", "job", "--oneliner", number])
    found = re.search(r"\bJobState=(\w+)", done.stdout)
    return found[1] if found and done.returncode == 0 else ""


def cancel(numbers: Iterable[str]) -> None:
    """Take waiting jobs out of the queue; have running ones save their step and end."""
    _run(["scancel", *numbers])


def limit(array: str, at_a_time: int) -> None:
    """Change how many jobs of an array run at a time."""
    _run(["scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={at_a_time}"])


def environment() -> dict[str, str]:
    """Return what jobs inherit: nothing of the job or the sweep that this process belongs to."""
    own = (
        "HYDRA_FULL_ERROR",
        "MASTER_ADDR",
        "MASTER_PORT",
    )  # the port follows from the job's number
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in own and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }
    return {**kept, "PYTHONUNBUFFERED": "1"}


def _run(
    line: Sequence[str], variables: dict[str, str] | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        said = f"{line[0]} has not answered for {seconds:g} s"
        return subprocess.CompletedProcess(line, SILENT, "", said)
    except OSError as error:
        return subprocess.CompletedProcess(line, 1, "", str(error))
