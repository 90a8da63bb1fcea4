"""Files that hold many pictures as one array: CIFAR's python files and idx files (MNIST).

CIFAR's files are pickles, and a pickle may name any function for the reader to call. Here no
function is called: the few names that an array of bytes needs stand for plain objects, and every
other name is refused.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anomaly_lit.types import UserError

Bytes = npt.NDArray[np.uint8]
GZIP, PICKLE = b"\x1f\x8b", b"\x80"  # the first bytes of such files
PICTURES, LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"  # those of idx: bytes, 3 dimensions or 1
SIDE = 32  # of CIFAR's pictures, in pixels
KEPT = 8  # files in memory at once; CIFAR-10 has six, of 31 MB each


class Arrays(NamedTuple):
    """What a file holds."""

    pictures: Bytes | None  # (n, H, W) or (n, H, W, 3)
    lists: dict[str, list[Any]]  # CIFAR's labels or names of classes; of idx, `labels`


def read_arrays(path: str | Path) -> Arrays:
    """Read a whole file; the files read last are kept in memory.

    Args:
        path: Of a CIFAR file in its python version, or an idx file of bytes, gzipped or not.

    Raises:
        UserError: The file does not exist, is damaged, or is none of these.
    """
    try:
        status = os.stat(path)
        return _read(str(path), status.st_size, status.st_mtime_ns)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file does not exist") from error
    except Exception as error:  # of any kind, since the bytes may be anything
        raise UserError(
            f"{path}: not a file of pictures in the format of CIFAR (python version) or MNIST "
            f"(idx), or damaged ({error}); download it again"
        ) from error


def list_in(path: str | Path, name: str) -> list[Any]:
    """Return a list of a file.

    Raises:
        UserError: As for `read_arrays`, or there is no such list.
    """
    lists = read_arrays(path).lists
    if name not in lists:
        raise UserError(f"{path}: it has no {name}, only {', '.join(lists) or 'pictures'}")
    return lists[name]


@lru_cache(maxsize=KEPT)
def _read(path: str, size: int, changed: int) -> Arrays:
    """Read a file; its size and time of change only serve as keys of the cache."""
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(0)
        if start == GZIP:
            with gzip.open(file) as content:
                return _read_idx(content)
        return _read_cifar(file.read()) if start[:1] == PICKLE else _read_idx(file)


def _read_idx(file: Any) -> Arrays:
    """Read the kind of file, the length of each dimension as 32 bits, and the values."""
    kind = file.read(4)
    if kind not in (PICTURES, LABELS):
        raise ValueError("it does not begin like an idx file of pictures or labels")
    shape = np.frombuffer(file.read(4 * kind[3]), ">u4").tolist()
    values = np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)
    if file.read(1):
        raise ValueError("it has bytes after its last value")
    return Arrays(values, {}) if kind == PICTURES else Arrays(None, {"labels": values.tolist()})


def _read_cifar(content: bytes) -> Arrays:
    """Read a dictionary: rows of 1024 red, green and blue values each, and lists."""
    found = PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
    named = {_text(key): value for key, value in found.items()}
    lists = {key: [_text(v) for v in value] for key, value in named.items() if type(value) is list}
    if "data" not in named:
        return Arrays(None, lists)
    rows = _array(named["data"]).reshape(-1, 3, SIDE, SIDE)
    return Arrays(rows.transpose(0, 2, 3, 1), lists)


def _text(value: Any) -> Any:
    """Decode the bytes that Python 2 wrote for text."""
    return value.decode() if isinstance(value, bytes) else value


class PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, tuples, numbers, text, bytes and arrays of bytes, nothing else.

    Where numpy's pickles name the parts of an array, the file gets new objects of ours, which only
    record what it says. `_array` checks that.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name.

        Raises:
            pickle.UnpicklingError: It is not a part of an array.
        """
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only passed on to _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda kind, *rest: _Said(kind)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *rest: _Said("array")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")


class _Said:
    """What a pickle says of an array or of its type of value."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _array(said: Any) -> Bytes:
    """Make the array; its state is version, shape, type, whether Fortran's order, and bytes."""
    if not isinstance(said, _Said) or said.kind != "array" or len(said.state) != 5:
        raise ValueError("its entry 'data' is not an array")
    _, shape, kind, fortran, raw = said.state
    if not isinstance(kind, _Said) or kind.kind not in ("u1", b"u1") or type(raw) is not bytes:
        raise ValueError("its array does not hold bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran is True else "C")
