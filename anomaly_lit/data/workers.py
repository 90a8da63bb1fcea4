"""Processes that read images: how they start, how they end, and what memory they need."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from anomaly_lit.data.batches import Images, as_it_is
from anomaly_lit.types import Batch, UserError

SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches (Linux)
PREFETCHED = 2  # batches that torch has each worker prepare ahead
PATIENCE = 600  # seconds to wait for a batch before the workers count as stuck
LEFT_TO_THE_RUN = {  # signals that schedulers and terminals send to a whole group of processes
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name) and hasattr(signal, "pthread_sigmask")  # Windows lacks both
}


class WorkerLoader(DataLoader[Batch]):
    """A data loader whose workers leave signals to the run, from their first moment on."""

    def __iter__(self) -> Any:
        """Start the workers while signals are blocked, which they inherit."""
        if not self.num_workers or not LEFT_TO_THE_RUN:
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_RUN)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader_of(
    images: Images,
    batch_sampler: Sampler[Any],
    workers: int,
    pin_memory: bool,
    persistent: bool,
    most: int,
) -> DataLoader[Batch]:
    """Return a loader of whole batches.

    Args:
        images: What is loaded.
        batch_sampler: Gives the rows of each batch.
        workers: Processes that read; 0 reads in this one.
        pin_memory: Whether batches come in page-locked memory.
        persistent: Whether workers outlive an epoch.
        most: Images of the largest batch.

    Raises:
        UserError: There is too little shared memory for the workers' batches.
    """
    height, width = images.resize.size
    each = 3 * 4 + 1 + 3 * 4 * len(images.companions)  # bytes of a pixel and its mask
    check_shared_memory(most * height * width * each, workers)
    return WorkerLoader(
        images,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=start_worker,
        timeout=PATIENCE if workers else 0,
    )


def start_worker(worker: int) -> None:
    """Have a worker leave signals to the run, and end with the process that started it.

    A worker that died of a scheduler's signal would end the run before it could save itself. The
    run itself ends its workers by SIGTERM, and waits for them: that one is obeyed. The parent is
    the process that asked for the worker, even where a fork server started it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if LEFT_TO_THE_RUN:
        signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_RUN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if sys.platform == "linux" and os.getppid() == parent.pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # at once, whatever this process is doing
        if os.getppid() != parent.pid:  # the parent was gone before
            os._exit(1)


def _end_with(parent: Any) -> None:
    """Wait for the parent's end, and end too."""
    parent.join()
    os._exit(1)


def _obey(parent: int | None) -> None:
    """Wait for signals; end at the parent's SIGTERM, ignore all others."""
    while True:
        heard = signal.sigwaitinfo(LEFT_TO_THE_RUN)
        if heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
            os._exit(0)


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Refuse workers whose batches do not fit into shared memory: they would wait forever.

    Args:
        batch_bytes: Size of one batch.
        workers: Processes that make batches.

    Raises:
        UserError: Shared memory is smaller than the batches that are prepared ahead.
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
