"""Work on many files in threads, progress bars for what takes long, and warnings."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import Progress

from anomaly_lit.files import printable

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 2.0  # seconds before a progress bar appears


@rank_zero_only
def warn_once(text: str) -> None:
    """Log a warning, once for all processes."""
    log.warning(printable(text))


def in_threads(work: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """Apply `work` to all items in threads; a progress bar appears if it takes long.

    Returns:
        The results in the order of the items.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(watched(pool.map(work, items), len(items), title))


def watched(
    results: Iterable[R], total: int, title: str, step: Callable[[R], int] = lambda result: 1
) -> Iterator[R]:
    """Yield the results unchanged; a progress bar appears if it takes long.

    Args:
        results: What to yield.
        total: Number of steps in all.
        title: Text beside the bar.
        step: Number of steps that a result stands for.
    """
    start, done, bar = time.monotonic(), 0, None
    hidden = getattr(rank_zero_only, "rank", 0) != 0
    try:
        for result in results:
            yield result
            done += step(result)
            if bar is None and not hidden and time.monotonic() - start > PATIENCE:
                bar = Progress(transient=True, console=Console(stderr=True))
                bar.start()
                task = bar.add_task(title, total=total)
            if bar is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
