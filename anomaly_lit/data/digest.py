"""A digest of the files of a data set, so that two results are known to be of the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomaly_lit.data.packed import packed_picture
from anomaly_lit.data.progress import in_threads
from anomaly_lit.data.splits import name_below
from anomaly_lit.files import name_bytes
from anomaly_lit.types import Sample


def digest(splits: Mapping[str, Sequence[Sample]], root: Path | None) -> str:
    """Return a SHA-256 over all images and masks: names, sizes, first and last bytes, splits.

    Args:
        splits: The images of each split.
        root: Names are relative to this folder.
    """
    lines = []
    for split, samples in splits.items():
        paths = [path for sample in samples for path in (sample.path, sample.mask_path) if path]
        prints = in_threads(_fingerprint, paths, "Reading the data set's digest")
        lines += [
            f"{split} {name_below(path, root)} {mark}\n"
            for path, mark in zip(paths, prints, strict=True)
        ]
    return hashlib.sha256(name_bytes("".join(sorted(lines)))).hexdigest()


def _fingerprint(path: str) -> str:
    """Size and a hash of the first and last 4 KiB of a file; of a packed picture, of all of it."""
    if picture := packed_picture(path):
        pixels = picture.tobytes()
        return f"{len(pixels)} {hashlib.sha256(pixels).hexdigest()}"
    size, block = Path(path).stat().st_size, 4096
    with open(path, "rb") as file:
        ends = file.read(block)
        if size > block:
            file.seek(max(block, size - block))
            ends += file.read(block)
    return f"{size} {hashlib.sha256(ends).hexdigest()}"
