"""Write files completely or not at all, record what produced them, and keep a command's log."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

ROOM = 255 - len(".12345678.png") - 8  # bytes of a name that also leave room for that of a draft
PACKAGES = ("anomaly-lit", "torch", "timm", "pytorch-lightning", "hydra-core", "numpy")


def lock(file: IO[Any], shared: bool = False) -> bool:
    """Try to lock an open file, without waiting.

    The lock lasts until every process that holds the file has closed it.

    Args:
        file: Any open file.
        shared: Whether other processes may hold the lock at the same time.

    Returns:
        Whether the lock was free; always true on systems without such locks (`HAS_LOCKS`).
    """
    if not HAS_LOCKS:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def cores() -> int:
    """Return how many CPU cores this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


@contextmanager
def replace_file(path: str | Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file next to `path` that replaces `path` once it is completely written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
        os.chmod(draft, 0o666 & ~_umask())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def printable(text: str | Path) -> str:
    """Return text for terminals and UTF-8 files; bytes that are not UTF-8 are spelt out."""
    return os.fsencode(str(text)).decode("utf-8", "backslashreplace")


def name_bytes(name: str) -> bytes:
    """Return a name as bytes to be hashed, also one that is not UTF-8; the same everywhere."""
    return name.encode("utf-8", "surrogateescape")


def short_name(name: str) -> str:
    """Return a file's name without its suffix; cut if no file system would take it."""
    return name if len(os.fsencode(name)) <= ROOM else marked_name(name)


def marked_name(name: str) -> str:
    """Return a name with a hash of itself, which sets it apart, cut to what fits."""
    own = os.fsencode(name)
    mark = hashlib.sha256(own).hexdigest()[:12]
    return own[: ROOM - 13].decode("utf-8", "ignore") + f"-{mark}"


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write strict JSON: NaN and infinite numbers become null, and text becomes printable."""
    with replace_file(path, "w", encoding="utf-8") as file:
        json.dump(_strict(content), file, indent=2)
        file.write("\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {_strict(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return printable(value) if isinstance(value, str) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def runs_below(folder: Path, file: str = "config.yaml") -> list[Path]:
    """Return the folders of all runs in and below a folder, except those in hidden folders.

    Args:
        folder: Such as the output folder of a sweep.
        file: What each of them holds; `job.json` gives the jobs of a sweep, begun or not.
    """
    runs = [found.parent for found in sorted(folder.rglob(file))]
    hidden = [any(part[0] == "." for part in run.relative_to(folder).parts) for run in runs]
    return [run for run, is_hidden in zip(runs, hidden, strict=True) if not is_hidden]


def environment() -> dict[str, Any]:
    """Return what results depend on besides the configuration.

    It consists of versions, commit, machine and command.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    return {
        **{f"versions/{name}": _version(name) for name in PACKAGES},
        "versions/python": platform.python_version(),
        "commit": code_commit(),
        "hardware": gpu
        or f"CPU, {cores()} core{'s'[: cores() > 1]} ({platform.machine()}), "
        f"{threads} thread{'s'[: threads > 1]}",
        "command": without_secrets(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def without_secrets(value: Any) -> Any:
    """Return text or plain data with `***` for the user and password of every address in it.

    >>> without_secrets({"uri": "https://me:word@host/path"})
    {'uri': 'https://***@host/path'}
    """
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return re.sub(r"://[^/\s@]+@", "://***@", value) if isinstance(value, str) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None outside a checkout.

    `+changes` is added if tracked files differ from the commit.
    """
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.parent:
            return None  # installed within somebody else's repository
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "anomaly_lit", "conf")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def tell(text: str, warning: bool = False) -> None:
    """Print a line, and note it in the command's log.

    Args:
        text: What to print.
        warning: Print it to the standard error, as a warning.
    """
    text = printable(text)
    if warning:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    else:
        print(text, flush=True)
    note(text, logging.WARNING if warning else logging.INFO)


def note(text: str, level: int = logging.INFO) -> None:
    """Write to the log file that Hydra opened for this command, and nowhere else.

    It tells afterwards what the terminal showed, without progress bars. Outside a command this does
    nothing.

    Args:
        text: One or more lines.
        level: One of those of `logging`.
    """
    names = {"name": "anomaly_lit", "levelno": level, "levelname": logging.getLevelName(level)}
    record = logging.makeLogRecord({**names, "msg": printable(text)})
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def note_origin() -> None:
    """Note in the command's log the command and what it runs on: commit, versions, machine."""
    facts = environment()
    versions = ", ".join(
        f"{key.removeprefix('versions/')} {value}"
        for key, value in facts.items()
        if key.startswith("versions/")
    )
    note(f"{facts['command']}\ncommit {facts['commit']}, {versions}\n{facts['hardware']}")


def peak_memory_mb() -> dict[str, float]:
    """Return this process's peak memory in MB, on the GPU too if there is one."""
    import torch

    peak = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_available():
        peak["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peak
