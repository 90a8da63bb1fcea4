"""Files of rows that the disk caches write once, check, and map into memory.

A file is a page of header (a magic line, a checksum, JSON), an index (for each row its key and
its checksum), and a block for each column, with rows of one shape and type. A row of images is
one image; a row of features has a column for each stage of the backbone.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomaly_lit.data.caches import locks

MAGIC = b"anomaly_lit rows, format 1\n"
PAGE = 4096  # bytes; columns begin at multiples
INDEX = np.dtype([("key", "u1", (16,)), ("checksum", "<u4")])


class DamagedError(Exception):
    """A file is not what it should be; the text says in what."""


class Column(NamedTuple):
    """Rows of one shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


def offsets_of(rows: int, columns: Sequence[Column]) -> list[int]:
    """Where each column begins, in bytes, and last where the file ends."""
    offsets = [PAGE + rows * INDEX.itemsize]
    for column in columns:
        offsets[-1] = -(-offsets[-1] // PAGE) * PAGE
        offsets.append(offsets[-1] + rows * column.row_bytes)
    return offsets


def rows_within(size: int, columns: Sequence[Column]) -> int:
    """How many rows a file of at most `size` bytes can have."""
    row = INDEX.itemsize + sum(column.row_bytes for column in columns)
    return max(0, (size - PAGE * (1 + len(columns))) // row)


def as_bytes(tensor: Tensor) -> Any:
    """The values of a tensor on the CPU as they lie in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class Draft:
    """A file that is being written; it is locked meanwhile, and goes away unless published.

    Args:
        path: Of the draft; made at its full size.
        subject: What the rows follow from, besides their keys.
        keys: 16 bytes for each row.
        columns: What a row has.
    """

    def __init__(
        self, path: Path, subject: str, keys: Sequence[bytes], columns: Sequence[Column]
    ) -> None:
        self.path, self.subject, self.columns = path, subject, columns
        self.offsets = offsets_of(len(keys), columns)
        self.index = np.zeros(len(keys), INDEX)
        self.index["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        locks.claim(self.handle)
        os.ftruncate(self.handle, self.offsets[-1])

    def __len__(self) -> int:
        return len(self.index)

    def put(self, first: int, values: Sequence[Tensor]) -> None:
        """Write consecutive rows; may be called from several threads.

        Args:
            first: The first of them.
            values: For each column (n, *shape) on the CPU.
        """
        for column, offset, value in zip(self.columns, self.offsets, values, strict=False):
            assert value.dtype == column.dtype
            assert tuple(value.shape[1:]) == column.shape
            _write_all(self.handle, as_bytes(value), offset + first * column.row_bytes)
        for row in range(len(values[0])):
            parts = [value[row] for value in values]
            self.index["checksum"][first + row] = checksum(parts)

    def publish(self, path: Path) -> None:
        """Write the header and give the file its name, at once."""
        index = self.index.tobytes()
        content = {
            "subject": self.subject,
            "rows": len(self.index),
            "columns": [[list(c.shape), str(c.dtype).removeprefix("torch.")] for c in self.columns],
            "index": zlib.crc32(index),
        }
        text = json.dumps(content).encode()
        header = MAGIC + b"%08x " % zlib.crc32(text) + text
        assert len(header) < PAGE, "the subject is too long"
        _write_all(self.handle, memoryview(header.ljust(PAGE)), 0)
        _write_all(self.handle, memoryview(index), PAGE)
        os.replace(self.path, path)

    def close(self) -> None:
        """Give the lock back, and remove what was not published."""
        os.close(self.handle)
        with suppress(FileNotFoundError):
            self.path.unlink()


class Segment:
    """A published file, mapped into memory and marked as in use as long as its values are.

    Args:
        path: The file.
        subject: What its rows have to follow from.
        columns: What a row has to have.

    Raises:
        DamagedError: It is truncated, altered, or not of this kind.
        FileNotFoundError: It is gone.
    """

    def __init__(self, path: Path, subject: str, columns: Sequence[Column]) -> None:
        self.path, self.subject, self.columns = path, subject, list(columns)
        self.handle = os.open(path, os.O_RDONLY)
        try:
            locks.share(self.handle)
            if os.fstat(self.handle).st_nlink == 0:  # removed between opening and locking
                raise FileNotFoundError(path)
            self._map()
        except BaseException:
            self.close()
            raise
        self.rows = {key.tobytes(): row for row, key in enumerate(self.index["key"])}

    def __getstate__(self) -> tuple[Path, str, list[Column]]:
        return self.path, self.subject, self.columns

    def __setstate__(self, state: tuple[Path, str, list[Column]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def intact(self, row: int) -> bool:
        """Whether a row has the values that were written."""
        values = [tensor[row] for tensor in self.tensors]
        return checksum(values) == self.index["checksum"][row]

    def touch(self) -> None:
        """Note the use, for the choice of what to remove."""
        with suppress(OSError):  # a folder of somebody else
            os.utime(self.path)

    def close(self) -> None:
        """Give the mark back at once."""
        locks.release(self.handle)
        os.close(self.handle)
        self.handle = -1

    def __del__(self) -> None:
        if getattr(self, "handle", -1) >= 0:
            os.close(self.handle)  # the mapping holds the lock as long as its values are used

    def _map(self) -> None:
        size = os.fstat(self.handle).st_size
        content = _header(os.pread(self.handle, PAGE, 0))
        if content["subject"] != self.subject:
            raise DamagedError("it holds rows of another kind")
        columns = [[list(c.shape), str(c.dtype).removeprefix("torch.")] for c in self.columns]
        if content["columns"] != columns:
            raise DamagedError("its rows have another shape")
        offsets = offsets_of(content["rows"], self.columns)
        if size != offsets[-1]:
            raise DamagedError(f"it has {size} bytes where {offsets[-1]} are due")
        index = os.pread(self.handle, content["rows"] * INDEX.itemsize, PAGE)
        if zlib.crc32(index) != content["index"]:
            raise DamagedError("its index was altered")
        self.index = np.frombuffer(index, INDEX)
        pages = mmap.mmap(self.handle, size, access=mmap.ACCESS_COPY)  # no write reaches the file
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        self.tensors = [
            whole[start : start + content["rows"] * column.row_bytes]
            .view(column.dtype)
            .view(content["rows"], *column.shape)
            for column, start in zip(self.columns, offsets, strict=False)
        ]


def checksum(values: Sequence[Tensor]) -> int:
    """CRC-32 of a row: its values in all columns."""
    total = 0
    for value in values:
        total = zlib.crc32(as_bytes(value), total)
    return total


def _header(page: bytes) -> dict[str, Any]:
    if not page.startswith(MAGIC):
        raise DamagedError("it does not begin like a file of this cache")
    text = page[len(MAGIC) :].rstrip()
    try:
        if int(text[:8], 16) == zlib.crc32(text[9:]):
            return json.loads(text[9:])
    except ValueError:
        pass
    raise DamagedError("its header was altered")


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
