"""File locks, which end with the process that holds them, however it ends."""

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

PATIENCE = 3.0  # seconds of waiting before a message


def need_locks() -> None:
    """Raise UserError if the system does not have these locks."""
    if fcntl is None:
        raise UserError("cache=disk needs the file locks of Linux or macOS: choose cache=host")


def claim(handle: int) -> bool:
    """Lock an open file for this process only; return false if another one holds the lock."""
    return _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def share(handle: int) -> None:
    """Mark an open file as in use; several processes may do so."""
    _lock(handle, fcntl.LOCK_SH)


def release(handle: int) -> None:
    """Release the lock of an open file."""
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
def alone(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file; wait while another process holds it, with a message after a while.

    Args:
        path: The lock file; created if it does not exist, and never removed.
        warn: Called with the message.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        start, told = time.monotonic(), False
        while not claim(handle):
            if not told and time.monotonic() - start > PATIENCE:
                holder = os.pread(handle, 20, 0).decode(errors="replace") or "unknown"
                warn(f"process {holder} is filling the cache in {path.parent}: waiting for it")
                told = True
            time.sleep(0.05)
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
