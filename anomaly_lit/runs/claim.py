"""One run per folder: the first process of a run holds `.lock` in it for as long as it lives."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from anomaly_lit.files import lock
from anomaly_lit.runs.ranks import uses_slurm
from anomaly_lit.types import UserError

NAME = ".lock"
BEAT = 30.0  # seconds between two signs of life, each a new modification time of the file
SILENCE = 3 * BEAT  # seconds without one after which a run on another machine counts as dead
PATIENCE = 2.0  # seconds to wait for a run that is ending to let go

_held: list[IO[str]] = []


def _let_go() -> None:
    """Replace a forked worker's copies of the lock by `/dev/null`: it must not hold the folder."""
    for file in _held:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, file.fileno())
        os.close(nothing)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder in the first of the run's processes; do nothing in the others.

    The lock of the file ends with its process, however that ends. A file system may have no locks
    between machines; there the file's modification time shows whether its writer is alive.

    Raises:
        UserError: Another run is being trained there.
    """
    if not is_first_of_all():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _take(folder) as file:
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(folder / NAME, ended), daemon=True)
        beat.start()
        _held.append(file)
        try:
            yield
        finally:
            ended.set()
            _held.remove(file)
            file.truncate(0)
            with suppress(OSError):  # Windows removes no open files
                (folder / NAME).unlink()


def _take(folder: Path) -> IO[str]:
    until = time.monotonic() + PATIENCE
    while True:
        file = (folder / NAME).open("a+", encoding="utf-8")
        if _is_free(file) and _is_there(file):
            break
        facts = _read(file)
        file.close()
        if time.monotonic() > until:
            raise UserError(
                f"output_dir={folder} is being trained by {in_words(facts)}: wait for it, or "
                "choose another output_dir"
            )
        time.sleep(0.1)
    file.truncate(0)
    file.write(json.dumps(_this_process()) + "\n")
    file.flush()
    return file


def _is_there(file: IO[str]) -> bool:
    """Return whether the file still exists: a run that ended just now may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def _is_free(file: IO[str]) -> bool:
    try:
        alone = lock(file)
    except OSError:  # a network drive without locks
        alone = True
    return alone and not _lives_elsewhere(_read(file), file)


def holder(folder: Path) -> dict[str, Any] | None:
    """Return what the run that is training in a folder wrote about itself, or None."""
    try:
        file = (folder / NAME).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            free = lock(file, shared=True)
        except OSError:
            free = True
        facts = _read(file)
        return facts if not free or _lives_elsewhere(facts, file) else None


def _lives_elsewhere(facts: dict[str, Any], file: IO[str]) -> bool:
    """Return whether a run on another machine has shown a sign of life recently."""
    own = _this_process()
    if not facts or facts.get("host") == own["host"]:
        return False
    if facts.get("job") and facts["job"] == own["job"] and facts.get("restart") != own["restart"]:
        return False  # SLURM has restarted this same job on another machine
    return time.time() - os.fstat(file.fileno()).st_mtime < SILENCE


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": slurm_job(),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": datetime.now().isoformat(" ", "seconds"),
    }


def slurm_job() -> str | None:
    """Return the job of SLURM that this process is in, as squeue names it; None outside one."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def in_words(facts: dict[str, Any]) -> str:
    """Return a holder in words.

    >>> in_words({"pid": 5, "host": "n1", "job": "7_2", "since": "2025-01-01 10:00:00"})
    'process 5 on n1 (SLURM job 7_2, since 2025-01-01 10:00:00)'
    """
    if not facts:
        return "another process"
    job = f"SLURM job {facts['job']}, " if facts.get("job") else ""
    return f"process {facts.get('pid')} on {facts.get('host')} ({job}since {facts.get('since')})"


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        facts = json.loads(file.read() or "{}")
    except ValueError:  # it is being written
        return {}
    return facts if isinstance(facts, dict) else {}


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)


def is_first_of_all() -> bool:
    """Return whether this is the first process of all nodes of a run."""
    if uses_slurm():
        return os.environ.get("SLURM_PROCID", "0") == "0"
    if "RANK" in os.environ:  # torchrun
        return os.environ["RANK"] == "0"
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return os.environ.get("LOCAL_RANK", "0") == node == "0"
