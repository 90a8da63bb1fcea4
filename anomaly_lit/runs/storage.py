"""Checkpoints that are never half written, whether a process is killed or the disk is full."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from anomaly_lit.inference.checkpoint import read_checkpoint
from anomaly_lit.types import UserError

LAST, EARLIER = "last.ckpt", "last.earlier.ckpt"


@dataclass
class Start:
    """The checkpoint that a run resumes from, with its content, since reading it takes time.

    Args:
        path: The file.
        content: What it holds; None once it was taken.
        remark: A sentence about a newer one that is damaged; empty if there is none.
    """

    path: Path
    content: dict[str, Any] | None
    remark: str = ""

    def take(self) -> dict[str, Any]:
        """Return the content and let go of it, so that it does not fill memory during training."""
        content, self.content = self.content, None
        return read_checkpoint(self.path) if content is None else content


class WholeFiles(TorchCheckpointIO):
    """Write a checkpoint beside its target, sync it, and only then replace the old one.

    Lightning's own writer uses the system's folder for temporary files. If that is on another file
    system, a kill in the middle leaves half a file. The previous `last.ckpt` is kept as
    `last.earlier.ckpt`, so a run needs room for three checkpoints while it writes.

    Args:
        start: The checkpoint to resume from, which is not read again.
    """

    def __init__(self, start: Start | None = None) -> None:
        super().__init__()
        self.start = start

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            UserError: The disk is full; earlier files are unchanged.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        spare = path.with_name(f".{EARLIER}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.is_file():
                _keep(path, spare)
            os.replace(draft, path)
            _sync_folder(path.parent)
        except BaseException as error:
            for unfinished in (draft, spare):
                unfinished.unlink(missing_ok=True)
            if _is_full(error):
                raise UserError(
                    f"no space left on the disk for the checkpoint {path}; earlier ones are whole. "
                    "Free some space, then resume with the same command"
                ) from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of plain data; one that holds anything else is refused."""
        if self.start is not None and Path(path) == self.start.path:
            return self.start.take()
        return read_checkpoint(path)


def checkpoint_to_go_on_from(directory: Path) -> Start | None:
    """Return a run's newest undamaged checkpoint; None if there is no checkpoint at all.

    Drafts left by a killed process are removed.

    Args:
        directory: The run's folder.

    Raises:
        UserError: There are checkpoints, and none of them can be read.
    """
    folder = directory / "checkpoints"
    for draft in folder.glob(".*.ckpt.*"):
        draft.unlink(missing_ok=True)
    problem = ""
    for path in (folder / LAST, folder / EARLIER):
        if not path.is_file():
            continue
        try:
            content = read_checkpoint(path)
        except UserError as error:
            problem = problem or str(error)
        else:
            return Start(path, content, f"{problem}: going on from {path}" if problem else "")
    if problem:
        raise UserError(f"{problem}. Choose another output_dir to start anew")
    return None


def _keep(path: Path, spare: Path) -> None:
    """Give a checkpoint its second name, `EARLIER`, so that at no moment the first is missing.

    Args:
        path: The file.
        spare: A name of this process alone, for a moment.
    """
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links: the first name is missing for a moment
        os.replace(path, path.with_name(EARLIER))
    else:
        os.replace(spare, path.with_name(EARLIER))


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error or its cause reports a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that the disk keeps the names in it."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
