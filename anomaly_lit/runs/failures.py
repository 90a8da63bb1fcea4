"""How a run that fails says so, and what is kept quiet."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_lit.config.hydra import message_of
from anomaly_lit.files import write_json
from anomaly_lit.runs.ranks import is_first_process
from anomaly_lit.types import RUN_AGAIN, Stopped, UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl


def worker_failure(error: RuntimeError) -> str | None:
    """Return what happened to a process that reads images, and what to do; None if nothing did."""
    from anomaly_lit.data.workers import PATIENCE

    if str(error).startswith("DataLoader timed out"):
        return (
            f"no image came for {PATIENCE} s from the processes that read them: see whether the "
            "drive of dataset.root answers, or set dataset.num_workers=0; the same command goes on"
        )
    if str(error).startswith("DataLoader worker (pid"):
        return (
            f"a process that reads images has died, perhaps for want of memory ({error}): lower "
            "dataset.num_workers, or set it to 0; the same command goes on"
        )
    return None


@contextmanager
def report_failures() -> Iterator[None]:
    """Have one of several ranks say what failed and end at once.

    Python's normal exit waits for connections to ranks that are gone, sometimes forever.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank:
        from anomaly_lit.callbacks.stopping import die_with_parent

        die_with_parent()
    try:
        yield
    except Stopped:
        if rank:
            sys.exit(RUN_AGAIN)  # the first rank tells
        raise
    except Exception as error:
        if "LOCAL_RANK" not in os.environ:  # which Lightning sets for the first rank, too
            raise
        who = f"rank {rank}: " if rank else ""
        print(f"error: {who}{message_of(error)}", file=sys.stderr)
        if not isinstance(error, UserError):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Have a job of a sweep that fails write why to `job.json`, for status and report.

    What an earlier try noted is removed first. A launcher that writes this file itself has the last
    word.

    Args:
        folder: Of the job.
    """
    file, begun = folder / "job.json", time.time()
    with suppress(OSError, ValueError, AttributeError):
        if is_first_process() and json.loads(file.read_text(encoding="utf-8")).get("exit_code"):
            file.unlink()
    try:
        yield
    except Exception as error:
        facts = {"started": begun, "ended": time.time(), "exit_code": 1, "error": message_of(error)}
        if is_first_process():
            with suppress(OSError):  # the error itself is what counts
                write_json(file, facts)
        raise


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether the device or the machine had no memory left."""
    import torch

    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in texts)


def finish_loggers(trainer: pl.Trainer, error: BaseException | None) -> None:
    """Close the runs in logging services, and tell these how the run ended."""
    from anomaly_lit.loggers import finish

    for logger in trainer.loggers:
        finish(logger, int(error is not None), isinstance(error, Stopped))


def quiet() -> None:
    """Keep Lightning's hints and known harmless warnings out of the way."""
    import logging
    import warnings

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*treespec.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*dataloader is not resumable.*",
        ".*`training_step` returned `None`.*",  # a batch that a method skips
        ".*`configure_optimizers` returned `None`.*",  # a method with nothing to train
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*sync_dist=True.*",  # all ranks compute the metrics of all images
        ".*across ranks is zero. Please make sure.*",  # no held-out or test images, told in words
        ".*`srun` command is available.*",  # check_tasks refuses what would be wrong without it
    ):
        warnings.filterwarnings("ignore", text)
