"""What a person types: parse, call, print.

Python imports this before the module of a command, whose imports then take seconds. The signals of
a scheduler are therefore handled from here on: a process that one of them killed would not be run
again.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from anomaly_lit.types import RUN_AGAIN, STOPPING


def take_signals() -> None:
    """Exit with `RUN_AGAIN` at a scheduler's signal, as long as there is nothing to save.

    A run takes the signals over when it starts, and gives them back at its end. A signal that has
    another handler keeps it. Outside the main thread, where Python handles no signals, nothing is
    done.
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
    """Return whether this process is a command, and not a program that imports one.

    While `python -m anomaly_lit.commands.train` looks for its module, the first word is `-m`.
    """
    first = sys.argv[0] if sys.argv else ""
    return first == "-m" or os.path.basename(first).startswith("anomaly-")


if is_command():
    take_signals()
