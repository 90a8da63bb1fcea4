"""The folder of the disk caches: who builds rows, who reads them, and what is removed.

    FOLDER/CACHEDIR.TAG
    FOLDER/images/<subject>/<rows>.rows     images and masks, see segments.py
    FOLDER/features/<subject>/<rows>.rows   features of backbones

The subject is a hash of what a row depends on besides its file: geometry, versions, weights. The
key of a row is a hash of its file's path, size and times of change, so that a changed file has
another key. One process builds the missing rows, under a lock, into a draft that is renamed once it
is complete; other processes wait for it. Everything may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from anomaly_lit.data.caches import locks
from anomaly_lit.data.caches.memory import Place
from anomaly_lit.data.caches.segments import (
    Column,
    DamagedError,
    Draft,
    Segment,
    offsets_of,
    rows_within,
)
from anomaly_lit.data.packed import file_of
from anomaly_lit.data.progress import in_threads, warn_once
from anomaly_lit.types import UserError

FOLDER = "ANOMALY_LIT_CACHE"
KINDS = ("images", "features")
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by anomaly_lit; may be deleted.\n"


def cache_folder(folder: str | None) -> Path:
    """Return `folder`, else that in ANOMALY_LIT_CACHE, else anomaly_lit in the user's cache."""
    named = folder or os.environ.get(FOLDER)
    if named:
        return Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "anomaly_lit"


def file_key(path: str) -> bytes:
    """Return a hash of a file's path, size and times of change, 16 bytes.

    No content is read. Copying and unpacking may set a file's modification time (mtime) to any
    value; the time of its last change (ctime) is set by the system alone, so that a file that
    takes the place of another always has another key. A change of owner or mode changes ctime as
    well: the file is then decoded once more.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    try:
        status = os.stat(file_of(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    text = f"{os.path.abspath(path)}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ctime_ns}"
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def clear(folder: Path) -> float:
    """Remove all rows that the caches wrote into a folder, and nothing else.

    A process that is building rows is waited for. Runs that read rows keep what they have opened.

    Returns:
        Freed space in GB (1e9 bytes).

    Raises:
        UserError: A file cannot be removed.
    """
    freed = 0
    for subject in sorted({file.parent for kind in KINDS for file in _files(folder / kind)}):
        try:
            with locks.alone(subject / "build.lock", warn_once):
                for file in (*subject.glob("*.rows"), *subject.glob("*.draft")):
                    freed += _size(file)
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache in {subject} cannot be cleared ({error.strerror}): its owner can, or "
                "set ANOMALY_LIT_CACHE to a folder of yours"
            ) from error
    return freed / 1e9


class Store:
    """Rows of one subject, found by key.

    Args:
        folder: Folder of all rows that share `max_gb`.
        subject: What a row depends on besides its file, as plain data.
        columns: The columns of a row.
        max_gb: Largest size of `folder`, in GB (1e9 bytes).
        setting: Where `max_gb` is set, for messages, such as `dataset.cache`.
    """

    def __init__(
        self,
        folder: Path,
        subject: dict[str, Any],
        columns: Sequence[Column],
        max_gb: float,
        setting: str,
    ) -> None:
        shapes = [[list(column.shape), str(column.dtype)] for column in columns]
        self.subject = json.dumps({**subject, "columns": shapes}, sort_keys=True)
        digest = hashlib.blake2b(self.subject.encode(), digest_size=12).hexdigest()
        self.root, self.folder = folder, folder / digest
        self.columns, self.max_gb, self.setting = list(columns), max_gb, setting
        self.segments: list[Segment] = []
        self.places: dict[bytes, Place] = {}

    def column(self, number: int) -> list[Tensor]:
        """Return the blocks of one column; the first number of a place counts them."""
        return [segment.tensors[number] for segment in self.segments]

    def fill(
        self,
        keys: Sequence[bytes],
        write: Callable[[Draft, list[int]], list[str]],
        whole: bool = False,
    ) -> list[str]:
        """Find rows, and build the missing ones as far as the space allows.

        Args:
            keys: Keys of the rows.
            write: Puts rows into a draft. It gets their positions in `keys`, in order, and returns
                a line for each row that failed; if any did, nothing is kept.
            whole: Build either all missing rows or none.

        Returns:
            What `write` returned.

        Raises:
            UserError: The folder cannot be written, or its disk is full.
        """
        self._load(keys)
        if all(key in self.places for key in keys):
            return []
        with self._readable_errors():
            try:
                return self._fill_alone(keys, write, whole)
            except FileNotFoundError:
                warn_once(f"{self.folder} was deleted while it was being filled: rebuilt")
                return self._fill_alone(keys, write, whole)

    def _fill_alone(
        self, keys: Sequence[bytes], write: Callable[[Draft, list[int]], list[str]], whole: bool
    ) -> list[str]:
        self._make_folder()
        with locks.alone(self.folder / "build.lock", warn_once):
            self._load(keys)
            missing = list({k: n for n, k in enumerate(keys) if k not in self.places}.values())
            draft = self._begin([keys[n] for n in missing], whole) if missing else None
            return [] if draft is None else self._build(draft, keys, missing, write)

    def _build(
        self,
        draft: Draft,
        keys: Sequence[bytes],
        missing: list[int],
        write: Callable[[Draft, list[int]], list[str]],
    ) -> list[str]:
        chosen = missing[: len(draft)]
        name = hashlib.blake2b(b"".join(keys[n] for n in chosen), digest_size=12).hexdigest()
        path = self.folder / f"{name}.rows"
        try:
            problems = write(draft, chosen)
            if not problems:
                draft.publish(path)
        finally:
            draft.close()
        if not problems:
            segment = Segment(path, self.subject, self.columns)
            self._take(segment, set(segment.rows), checked=True)
        return problems

    def _load(self, keys: Iterable[bytes]) -> None:
        """Open the files that hold wanted rows which are not yet found; remove damaged files."""
        wanted = {key for key in keys if key not in self.places}
        known = {segment.path: segment for segment in self.segments}
        for path in sorted(self.folder.glob("*.rows")):
            if not wanted:
                return
            try:
                segment = known.get(path) or Segment(path, self.subject, self.columns)
                wanted -= self._take(segment, wanted & segment.rows.keys())
            except FileNotFoundError:
                continue
            except DamagedError as damage:
                warn_once(f"the cache's file {path} is damaged ({damage}): removed and rebuilt")
                with self._readable_errors():
                    path.unlink(missing_ok=True)

    def _take(self, segment: Segment, keys: set[bytes], checked: bool = False) -> set[bytes]:
        """Use some rows of a segment after checking their values."""
        rows = [segment.rows[key] for key in keys]
        if not keys:
            if segment not in self.segments:
                segment.close()
            return keys
        if not checked and not all(in_threads(segment.intact, rows, "Checking the cache")):
            if segment not in self.segments:
                segment.close()
            raise DamagedError("values were altered")
        if segment not in self.segments:
            self.segments.append(segment)
        segment.touch()
        number = self.segments.index(segment)
        self.places |= {key: (number, segment.rows[key]) for key in keys}
        return keys

    def _begin(self, keys: list[bytes], whole: bool) -> Draft | None:
        """Return a draft for as many rows as fit after making room; None if nothing can be kept."""
        limit, wished = round(self.max_gb * 1e9), offsets_of(len(keys), self.columns)[-1]
        count = 0
        with locks.alone(self.root / "space.lock", warn_once):
            if not whole or wished <= limit:
                free = limit - _make_room(self.root, limit - wished)
                count = min(len(keys), rows_within(free, self.columns))
            if count and not (whole and count < len(keys)):
                self._check_disk(offsets_of(count, self.columns)[-1])
                path = self.folder / f"{uuid.uuid4().hex}.draft"
                draft = Draft(path, self.subject, keys[:count], self.columns)
            else:
                draft = None
        kept = 0 if draft is None else count
        if kept < len(keys):
            warn_once(
                f"{kept} of {len(keys)} missing rows fit into {self.setting}.max_gb="
                f"{self.max_gb:g} in {self.root} ({wished / 1e9:.2g} GB are needed beside what "
                "is in use); the others are computed each time"
            )
        return draft

    def _check_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: {needed / 1e9:.2g} GB are needed and {free / 1e9:.2g} GB free; "
                f"set {self.setting}.folder to another disk, or cache=host"
            )

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tag = self.root.parent / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_text(TAG)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the cache in {self.folder} cannot be written ({error.strerror or error}): set "
                f"{self.setting}.folder to a folder of yours, or cache=host"
            ) from error


def _make_room(root: Path, limit: int) -> int:
    """Remove abandoned drafts and then unused files, least recently used first.

    Args:
        root: Folder with a folder for each subject.
        limit: Largest size that may remain, in bytes.

    Returns:
        The size that remains, in bytes.
    """
    files = sorted(_files(root), key=_age)
    used = sum(_size(file) for file in files)
    for file in files:
        if (file.suffix == ".draft" or used > limit) and (size := _remove_unused(file)):
            used -= size
    return used


def _files(root: Path) -> list[Path]:
    return [*root.glob("*/*.rows"), *root.glob("*/*.draft")]


def _remove_unused(file: Path) -> int:
    """Remove a file unless a process has locked it; return its size, or 0 if it stays."""
    try:
        handle = os.open(file, os.O_RDWR)
    except OSError:
        return 0
    try:
        if not locks.claim(handle):
            return 0
        size = os.fstat(handle).st_size
        with suppress(OSError):
            file.unlink()
            return size
        return 0
    finally:
        os.close(handle)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _age(file: Path) -> tuple[bool, int]:
    """Sort key: drafts first, then by last use."""
    try:
        return file.suffix != ".draft", file.stat().st_mtime_ns
    except OSError:
        return True, 0
