"""Processes that read images: how they start, how they end, and what memory they need."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

from anomaly_lit.types import UserError

SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches (Linux)
PREFETCHED = 2  # batches that torch has each worker prepare ahead
PATIENCE = 600  # seconds to wait for a batch before the workers count as stuck
LEFT_TO_THE_RUN = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def start_worker(worker: int) -> None:
    """Have a worker leave signals to the run, and end with the process that started it.

    A scheduler or a terminal sends its signals to all processes of a group. A worker that died of
    one would end the run before it could save itself.
    """
    for name in LEFT_TO_THE_RUN:
        if hasattr(signal, name):  # Windows lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() == 1:  # the parent was gone before
            os._exit(1)


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Refuse workers whose batches do not fit into shared memory: they would wait for ever.

    Args:
        batch_bytes: Size of one batch.
        workers: Processes that make batches.

    Raises:
        UserError: There is less shared memory than batches under way.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    needed, free = batch_bytes * (PREFETCHED * workers + 1), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"dataset.num_workers={workers} needs {needed / 2**20:.0f} MB of shared memory for its "
            f"batches, and {SHARED_MEMORY} has {free / 2**20:.0f} MB: set dataset.num_workers=0, "
            "which is fastest with a cache, lower dataset.batch_size, or give the container more: "
            "docker run --shm-size=1g"
        )
