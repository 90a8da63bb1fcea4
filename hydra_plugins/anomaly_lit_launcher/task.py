"""What a job of SLURM runs: its command by srun, between two notes in `job.json`.

The batch script calls this file by its path: `python -P task.py BATCH.json`. Nothing but Python's
own modules is imported, so that it takes next to no time and handles signals at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

# The run has saved its step and says so, or a signal (USR1, USR2, TERM) came before it could.
RUN_AGAIN = (75, 138, 140, 143)


def main(batch_file: str) -> int:
    """Run the job that SLURM_ARRAY_TASK_ID counts; queue it again if it was stopped.

    Args:
        batch_file: JSON with the `jobs` (folder, command, and how it is shown), the words of
            `srun`, and how often at most a job is queued `again`.

    Returns:
        The exit code of the command.
    """
    for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(sent, _wait_on)
    batch = json.loads(Path(batch_file).read_text(encoding="utf-8"))
    job = batch["jobs"][int(os.environ["SLURM_ARRAY_TASK_ID"])]
    folder = Path(job["folder"])
    number = "_".join(os.environ[f"SLURM_ARRAY_{name}_ID"] for name in ("JOB", "TASK"))
    facts = read(folder)
    facts |= {"slurm": number, "attempt": int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1}
    facts |= {"started": time.time(), "ended": None, "exit_code": None, "error": ""}
    write(folder, facts)
    code = run([*batch["srun"], *job["command"]], folder / "job.log", job["shown"])
    facts |= {"ended": time.time(), "exit_code": code}
    times = facts.get("again", 0)
    if code in RUN_AGAIN and times < batch["again"] and is_running(number):
        write(folder, {**facts, "again": times + 1})
        if subprocess.call(["scontrol", "requeue", number]) == 0:
            return code
    write(folder, facts)
    return code


def run(command: list[str], log: Path, shown: str) -> int:
    """Run a command and add what it prints to a log; return its exit code as a shell would."""
    with log.open("ab") as file:
        now = datetime.now().isoformat(" ", "seconds")
        file.write(f"--- {now}: {shown}\n".encode())
        file.flush()
        code = subprocess.call(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1"), **os.environ},
        )
    return code if code >= 0 else 128 - code


def is_running(number: str) -> bool:
    """Return whether SLURM lets the job run: it may have cancelled it, or queue it again itself."""
    line = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
    answer = subprocess.run(line, capture_output=True, text=True)
    return answer.returncode != 0 or answer.stdout.strip() == "RUNNING"


def read(folder: Path) -> dict[str, Any]:
    """Return what the launcher noted of the job; empty where nothing can be read."""
    try:
        facts = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write `job.json` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".job.json.{os.getpid()}"
    fresh.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    fresh.replace(folder / "job.json")


def _wait_on(number: int, frame: object) -> None:
    """Do nothing: SLURM signals the run itself, and its exit code is to be noted."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
