"""Locks on files, which end with the process that holds them, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anomaly_lit.types import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 3.0  # seconds before a wait is told


def need_locks() -> None:
    """Raise UserError where the system has none of these locks."""
    if fcntl is None:
        raise UserError("cache=disk needs the file locks of Linux or macOS: choose cache=host")


def claim(handle: int) -> bool:
    """Lock an open file for this process alone; false where another one holds it."""
    return _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def share(handle: int) -> None:
    """Mark an open file as in use, beside others that do."""
    _lock(handle, fcntl.LOCK_SH)


def release(handle: int) -> None:
    """Give the lock of an open file back."""
    _lock(handle, fcntl.LOCK_UN)


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    except OSError as error:  # a network drive without locks
        raise UserError(
            f"the folder of the disk cache has no file locks ({error.strerror}): set "
            "dataset.cache.folder and dataset.feature_cache.folder to a local disk, or cache=host"
        ) from error
    return True


@contextmanager
def alone(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`; while another process does, wait, and after seconds say so.

    Args:
        path: Made where it is absent, and left.
        tell: Shows a text.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        start, told = time.monotonic(), False
        while not claim(handle):
            if not told and time.monotonic() - start > PATIENCE:
                holder = os.pread(handle, 20, 0).decode(errors="replace") or "unknown"
                tell(f"process {holder} is filling the cache in {path.parent}: waiting for it")
                told = True
            time.sleep(0.05)
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
