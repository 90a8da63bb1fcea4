"""Files of rows that the disk caches write once, check, and map into memory.

A file has a header of one page (a magic line, a checksum, JSON), an index (key and checksum of each
row), and a block for each column, whose rows have one shape and type. In a cache of images a row is
one image; in a cache of features it has a column for each stage of the backbone.
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
PAGE = 4096  # bytes; every column begins at a multiple of it
INDEX = np.dtype([("key", "u1", (16,)), ("checksum", "<u4")])


class DamagedError(Exception):
    """A file is damaged; the text says how."""


class Column(NamedTuple):
    """Shape and type of one value of each row."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Size of one value in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def offsets_of(rows: int, columns: Sequence[Column]) -> list[int]:
    """Return the offset of each column, in bytes, followed by the size of the file."""
    offsets = [PAGE + rows * INDEX.itemsize]
    for column in columns:
        offsets[-1] = -(-offsets[-1] // PAGE) * PAGE
        offsets.append(offsets[-1] + rows * column.row_bytes)
    return offsets


def rows_within(size: int, columns: Sequence[Column]) -> int:
    """Return how many rows fit into a file of `size` bytes."""
    row = INDEX.itemsize + sum(column.row_bytes for column in columns)
    return max(0, (size - PAGE * (1 + len(columns))) // row)


def as_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU without copying contiguous values."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class Draft:
    """A file that is being written; locked until then, and removed unless it is published.

    Args:
        path: Path of the draft, which is created at its full size.
        subject: What the rows depend on besides their keys.
        keys: The key of each row, 16 bytes.
        columns: The columns of a row.
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
            first: Position of the first row.
            values: For each column a tensor (n, *shape) on the CPU.
        """
        for column, offset, value in zip(self.columns, self.offsets, values, strict=False):
            assert value.dtype == column.dtype
            assert tuple(value.shape[1:]) == column.shape
            _write_all(self.handle, as_bytes(value), offset + first * column.row_bytes)
        for row in range(len(values[0])):
            parts = [value[row] for value in values]
            self.index["checksum"][first + row] = checksum(parts)

    def publish(self, path: Path) -> None:
        """Write index and header, and move the file to its final path in one step."""
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
        """Release the lock, and remove the file if it was not published."""
        os.close(self.handle)
        with suppress(FileNotFoundError):
            self.path.unlink()


class Segment:
    """A published file, mapped into memory, and marked as in use while its values are in use.

    Args:
        path: The file.
        subject: What its rows must depend on.
        columns: The columns that a row must have.

    Raises:
        DamagedError: The file is truncated, altered, or holds other rows.
        FileNotFoundError: The file does not exist any more.
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
        """Return whether a row still has the values that were written."""
        values = [tensor[row] for tensor in self.tensors]
        return checksum(values) == self.index["checksum"][row]

    def touch(self) -> None:
        """Set the time of last use, which decides what is removed first."""
        with suppress(OSError):  # a folder that belongs to another user
            os.utime(self.path)

    def close(self) -> None:
        """Stop marking the file as in use."""
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
    """Return the CRC-32 of a row over all its columns."""
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
