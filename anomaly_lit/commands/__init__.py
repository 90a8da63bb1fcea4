"""What a person types: parse, call, print.

Python imports this before any command's module, and a command then imports for seconds: a
scheduler's signals are taken here, since a process that dies of one would not be run again.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from anomaly_lit.types import RUN_AGAIN, STOPPING


def take_signals() -> None:
    """Have this process end with `RUN_AGAIN` at a scheduler's signal, while nothing is to be saved.

    A run takes the signals over when it starts, and gives them back at its end. A signal that has
    another handler keeps it, and so does a thread, where Python lets nobody handle signals.
    """
    owner = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that was forked from this one
            os._exit(RUN_AGAIN)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # the signal may have come within a write
                stream.flush()
        said = f"stopped by {signal.Signals(number).name} with nothing to save; run it again\n"
        os.write(2, said.encode())
        os._exit(RUN_AGAIN)

    with suppress(ValueError):
        for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, leave)


def is_command() -> bool:
    """Whether this process is a command, and not a program that imports one.

    While `python -m anomaly_lit.commands.train` looks for its module, the first word is `-m`.
    """
    first = sys.argv[0] if sys.argv else ""
    return first == "-m" or os.path.basename(first).startswith("anomaly-")


if is_command():
    take_signals()
