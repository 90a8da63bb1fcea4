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

PATIENCE = 10.0  # seconds for a failed rank to say why, and for the others to hear of it
LOST = re.compile(r"connection (was )?(closed|reset|refused)|gloo|nccl|broken pipe", re.IGNORECASE)


class StopSignals(pl.Callback):
    """Ends a run where a scheduler's signal asks for it, and during training at a saved step.

    Schedulers send `STOPPING` ahead of a time limit or to make room, often to every process of a
    run: those that it has forked leave them to the run. While `waiting` a signal is only
    noted, for `ResumeCheckpoint` to act upon after the step; at other times nothing is to be
    saved, and it ends the run at once. Lightning's own handlers are replaced: they write
    checkpoints in the middle of a step, and talk to the other ranks while these may be elsewhere.

    Attributes:
        received: Number of the last signal; 0 without one.
        waiting: Whether a signal waits for `leave` or for a checkpoint.
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
            return  # where Python lets nobody handle signals
        for name in STOPPING:
            number = getattr(signal, name, None)
            if number is not None:
                before = signal.signal(number, self._note)
                self.before.setdefault(number, before)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            self.before.setdefault(signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to lose."""
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
        """Repeats a Ctrl-C that was lost: what runs in a destructor swallows every exception.

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
        """Tells the watch over other ranks that this one does not hang."""
        _ending.set()

    def leave(self) -> None:
        """Says that everything is saved.

        Raises:
            Stopped: A signal came while it was not.
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
    """Agree after a step: rank 0 says whether a checkpoint is due, and any rank may be stopped.

    Args:
        trainer: The trainer; all ranks call this at the same step.
        due: Whether it is time for a checkpoint by this rank's clock.
        asked: Number of the signal that this rank got, or 0.
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
    """End this process where another rank died and this one hangs, waiting for it.

    In place of Lightning's observer, which kills this process without a word.
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
    stopped = any(child.poll() == RUN_AGAIN for child in children)  # before it was a rank
    what = "another rank was stopped by a signal; run the same command again"
    print(what if stopped else f"error: {failed_rank(children)}", file=sys.stderr, flush=True)
    kill(children)
    os._exit(RUN_AGAIN if stopped else 1)


_ending = threading.Event()  # the main thread has heard of it


def replace_observer() -> None:
    """Have Lightning call `watch_ranks`; it offers no other way."""
    subprocess_script._launch_process_observer = watch_ranks  # type: ignore[assignment]


def end_ranks(trainer: pl.Trainer, error: BaseException) -> str | None:
    """End the ranks that this one started, after its own error.

    Returns:
        What to tell where the error is only that another rank is gone; None where it is real.
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
    """Whether an error tells that another rank is gone."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or bool(LOST.search(str(error)))


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def failed_rank(children: Sequence[subprocess.Popen[bytes]]) -> str:
    """Which rank failed, and how."""
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
    """Have the kernel end this rank with the process that started it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def signal_name(number: int) -> str:
    """Such as SIGTERM."""
    return signal.Signals(number).name
