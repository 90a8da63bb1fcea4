"""How a run is stopped from outside: the signals of a scheduler, and the death of a rank."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers import subprocess_script

from anomaly_lit.types import RUN_AGAIN, STOPPING, Stopped

PATIENCE = 10.0  # seconds that a failed rank gets to report why, and the others to notice
LOST = re.compile(r"connection (was )?(closed|reset|refused)|gloo|nccl|broken pipe", re.IGNORECASE)


class StopSignals(pl.Callback):
    """End a run when a scheduler sends a signal; during training, only after saving a step.

    Schedulers send the signals in `STOPPING` ahead of a time limit or to make room, often to every
    process of a run. Forked processes ignore them, since the run itself ends those. While
    `waiting`, a signal is only noted, and `ResumeCheckpoint` acts on it after the step. At other
    times there is nothing to save, and the signal ends the run at once. Lightning's own handlers
    are replaced: they write checkpoints in the middle of a step, and talk to the other ranks while
    these may be elsewhere.

    Attributes:
        received: Number of the last signal; 0 without one.
        waiting: Whether signals have to wait for a checkpoint or for `leave`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.waiting = False
        self.interrupted = False
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take over the signals; Lightning takes them back at the start of each of its stages."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python handles signals in the main thread only
        for name in STOPPING:
            number = getattr(signal, name, None)
            if number is not None:
                before = signal.signal(number, self._note)
                self.before.setdefault(number, before)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            self.before.setdefault(signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals; from now on they wait until the step is saved."""
        self.install()
        self.waiting = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Repeat a Ctrl-C that was lost: Python swallows every exception inside a destructor.

        Raises:
            KeyboardInterrupt: There was one.
        """
        if self.interrupted:
            raise KeyboardInterrupt

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals."""
        self.install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals."""
        self.install()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell the thread that watches other ranks that this one does not hang."""
        _ending.set()

    def leave(self) -> None:
        """Stop waiting, since everything is saved now.

        Raises:
            Stopped: A signal came before.
        """
        self.waiting = False
        if self.received:
            _ending.set()
            raise Stopped(f"stopped by {signal_name(self.received)} after training")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data loader's worker: the run itself ends it, once it has saved
        self.received = number
        if not self.waiting:
            _ending.set()
            raise Stopped(f"stopped by {signal_name(number)}")


def stop_asked(trainer: pl.Trainer, due: bool, asked: int) -> tuple[bool, int]:
    """Let all ranks agree after a step: rank 0 decides on checkpoints, any rank on stopping.

    Args:
        trainer: The trainer; all ranks call this at the same step.
        due: Whether it is time for a checkpoint by this rank's clock.
        asked: Number of the signal that this rank got, or 0.

    Returns:
        Whether a checkpoint is due, and the number of a signal or 0: the same on all ranks.
    """
    if trainer.world_size == 1:
        return due, asked
    own = [int(due and trainer.is_global_zero), asked]
    flags = torch.tensor(own, device=trainer.strategy.root_device)
    agreed = trainer.strategy.reduce(flags, reduce_op="max")
    assert isinstance(agreed, torch.Tensor)
    due_for_all, asked_of_all = agreed.tolist()
    return bool(due_for_all), asked_of_all


# ---------------------------------------------------------------------------------- ranks


def watch_ranks(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process if another rank died and this one hangs, waiting for it.

    This replaces Lightning's observer, which kills the process without a message.
    """
    threading.Thread(target=_watch, args=(children,), daemon=True).start()


def _watch(children: Sequence[subprocess.Popen[bytes]]) -> None:
    while not any(child.poll() for child in children):
        if all(child.poll() == 0 for child in children):
            return
        time.sleep(0.5)
    time.sleep(PATIENCE / 2)  # a rank that hears of it ends by itself, see end_ranks
    if _ending.is_set():
        return
    stopped = any(child.poll() == RUN_AGAIN for child in children)  # by a signal
    what = "another rank was stopped by a signal; run the same command again"
    print(what if stopped else f"error: {failed_rank(children)}", file=sys.stderr, flush=True)
    kill(children)
    os._exit(RUN_AGAIN if stopped else 1)


_ending = threading.Event()  # set once the main thread knows that the run ends


def replace_observer() -> None:
    """Have Lightning call `watch_ranks`; it offers no other way."""
    subprocess_script._launch_process_observer = watch_ranks  # type: ignore[assignment]


def end_ranks(trainer: pl.Trainer, error: BaseException) -> str | None:
    """End the ranks that this one started, after its own error.

    Returns:
        What to tell the user if the error only means that another rank is gone; None if the error
        is this rank's own.
    """
    lost = lost_connection(error)
    children = getattr(trainer.strategy.launcher, "procs", [])
    _ending.set()
    until = time.monotonic() + PATIENCE
    while lost and not any(c.poll() for c in children) and children and time.monotonic() < until:
        time.sleep(0.05)  # a rank that failed tells its error before it ends
    words = f"{failed_rank(children)} (here: {first_line(error)})" if lost else None
    kill(children)
    return words


def lost_connection(error: BaseException) -> bool:
    """Return whether an error means that another rank is gone."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or bool(LOST.search(str(error)))


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def failed_rank(children: Sequence[subprocess.Popen[bytes]]) -> str:
    """Return a sentence on which rank failed, and how."""
    again = "the same command with the same output_dir goes on from the last checkpoint"
    for rank, child in enumerate(children, start=1):
        code = child.poll()
        if code and code < 0:
            why = "; was there too little main memory?" if -code == signal.SIGKILL else ""
            return f"rank {rank} was ended by {signal_name(-code)}{why} {again}"
        if code:
            return f"rank {rank} failed, with the error above; {again}"
    return f"another rank is gone; its own output tells why; {again}"


def kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes without warning: they may hang, waiting for each other."""
    for child in children:
        if child.poll() is None:
            child.kill()


def die_with_parent() -> None:
    """Have the kernel kill this rank when the process that started it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGTERM."""
    return signal.Signals(number).name
