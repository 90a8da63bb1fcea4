"""Which files of a folder are pictures: one rule for training, checks of data and prediction.

A picture is a file with a suffix in `suffixes()`. These are passed over: hidden files and folders
(macOS writes `._000.png` beside `000.png`, Jupyter writes `.ipynb_checkpoints`), files with other
suffixes, and special files such as pipes. A folder called `x.png` is a folder. Links to files and
folders are followed, and each folder is read once, so that a loop of links ends. A link that leads
nowhere counts as a picture: reading it then gives an error, and no picture is lost silently. What
the commands have written is passed over as well, in the folders that `RESULTS` recognises.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from anomaly_lit.types import UserError

VERDICTS, CONFIG = "predictions.csv", "config.yaml"
OF_RUNS = frozenset(
    {
        "checkpoints", "clips.csv", CONFIG, "curves.png", "frames.csv", "images", "logs",
        "loss.png", "metrics.json", "mlflow", "mlruns", "overview.png", VERDICTS, "profile.png",
        "profile.txt", "run_ids.json", "timeline.png", "training.png", "wandb",
    }
)  # fmt: skip
RESULTS = (  # entries by which a folder with results is known, and all entries that are results
    (frozenset({VERDICTS, "overlays"}), frozenset({VERDICTS, "overlays", "maps", "timeline.png"})),
    (frozenset({CONFIG, "checkpoints"}), OF_RUNS),
    (frozenset({VERDICTS, "metrics.json"}), OF_RUNS),
    (frozenset({"report.json", "sample_grid.png"}), frozenset({"report.json", "sample_grid.png"})),
)

OUR_WORDS = {VERDICTS: ",score,threshold,verdict", CONFIG: "_target_: anomaly_lit."}

NOUNS = (
    "earlier result",
    "hidden folder",
    "repeated link",
    "special file",
    "unused picture",
)  # the other kinds, such as `.txt`, take no plural s

NOT_READ = {  # formats that Pillow names, and why they are left out
    "BLP": "a texture of games",
    "BUFR": "Pillow cannot decode it by itself",
    "CUR": "several icons in one file",
    "DCX": "several pages in one file",
    "EPS": "needs an external program",
    "FLI": "a film",
    "FPX": "several sizes in one file",
    "GRIB": "Pillow cannot decode it by itself",
    "HDF5": "Pillow cannot decode it by itself",
    "ICNS": "several icons in one file",
    "ICO": "several icons in one file",
    "IPTC": "a wrapper around another format",
    "MIC": "several pictures in one file",
    "MPEG": "a film",
    "WMF": "a drawing, not pixels",
}


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read, in the order in which they are tried."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ and name in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of pictures, in lower case: what Pillow opens, without `NOT_READ`."""
    known = {*formats(), "MPO"}  # MPO is opened by the reader of JPEG
    registered = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in registered if name in known)


def list_images(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder, sorted by name; empty if there is no folder.

    Raises:
        UserError: The folder may not be read.
    """
    if not folder.is_dir():
        return []
    return sorted(Path(entry.path) for entry in _entries(folder)[0] if _kind(entry) == "picture")


def list_folders(folder: Path) -> list[Path]:
    """Return the sub-folders that are not hidden, sorted by name; empty if there is no folder.

    Raises:
        UserError: The folder may not be read.
    """
    if not folder.is_dir():
        return []
    return sorted(Path(entry.path) for entry in _entries(folder)[0] if _kind(entry) == "folder")


def in_time(paths: Iterable[Path]) -> list[Path]:
    """Sort frames by the numbers in their names, so that `10.png` comes after `9.png`."""

    def key(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"([0-9]+)", path.stem)
        return [(n % 2 == 1, int(p) if n % 2 else 0, p) for n, p in enumerate(parts)]

    return sorted(paths, key=key)


def walk_images(folder: Path) -> list[Path]:
    """Return the pictures at any depth below a folder, sorted by path; empty without a folder.

    Raises:
        UserError: A folder may not be read.
    """
    return walk([folder]).pictures


def passed_over(folders: Iterable[Path], used: Collection[str] = ()) -> dict[str, int]:
    """Count what is not read below some folders, by kind; the most frequent kind comes first.

    Args:
        folders: Walked to any depth.
        used: Paths of the pictures that are read; if given, other pictures count as well.

    Raises:
        UserError: A folder may not be read.
    """
    pictures, counts, _ = walk(folders)
    unused = sum(str(path) not in used for path in pictures) if used else 0
    return _in_order({**counts, "unused picture": unused})


def told(counts: dict[str, int]) -> str:
    """Return what was passed over in words, such as `3 files were passed over: 2 .txt, 1 hidden`.

    Empty if nothing was passed over.
    """
    total = sum(counts.values())
    if not total:
        return ""
    parts = ", ".join(
        f"{count} {kind}{'s' if kind in NOUNS and count > 1 else ''}"
        for kind, count in counts.items()
    )
    return f"{total} {'file was' if total == 1 else 'files were'} passed over: {parts}"


class Walk(NamedTuple):
    """What was found below some folders."""

    pictures: list[Path]  # sorted
    others: dict[str, int]  # what was passed over by kind, the most frequent first
    results: list[Path]  # folders with earlier results, which were passed over


def walk(folders: Iterable[Path]) -> Walk:
    """Find pictures at any depth; folders are read before links to them.

    A picture therefore keeps its real path.

    Raises:
        UserError: A folder may not be read.
    """
    pictures: list[Path] = []
    results: list[Path] = []
    counts: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    real = deque(folder for folder in folders if folder.is_dir())
    linked: deque[Path] = deque()
    while real or linked:
        is_link = not real
        folder = (real or linked).popleft()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            counts["repeated link"] += is_link  # else one of `folders` lies in another
            continue
        seen.add((status.st_dev, status.st_ino))
        entries, has_results = _entries(folder)
        if has_results:
            results.append(folder)
            counts["earlier result"] += 1
        for entry in sorted(entries, key=lambda entry: entry.name):
            kind = _kind(entry)
            if kind == "picture":
                pictures.append(Path(entry.path))
            elif kind == "folder":
                (linked if entry.is_symlink() else real).append(Path(entry.path))
            else:
                counts[kind] += 1
    return Walk(sorted(pictures), _in_order(counts), sorted(results))


def _in_order(counts: dict[str, int]) -> dict[str, int]:
    found = [(kind, count) for kind, count in counts.items() if count]
    return dict(sorted(found, key=lambda item: (-item[1], item[0])))


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], bool]:
    """Return what a folder holds besides earlier results, and whether it holds any."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); mend or remove it") from error
    names = {entry.name for entry in entries}
    written = [own for marks, own in RESULTS if marks <= names and _is_ours(folder, marks)]
    ours = frozenset[str]().union(*written)
    return [entry for entry in entries if entry.name not in ours], bool(ours)


def _is_ours(folder: Path, marks: Collection[str]) -> bool:
    """Return whether the files among some marks say that we wrote them, where they can."""
    for name in OUR_WORDS.keys() & marks:
        try:
            with open(folder / name, encoding="utf-8", errors="replace") as file:
                if OUR_WORDS[name] not in file.read(50_000):
                    return False
        except OSError:
            return False
    return True


def _kind(entry: os.DirEntry[str]) -> str:
    """Return `picture`, `folder`, or why an entry is passed over."""
    linked = entry.is_symlink()
    is_folder = os.path.isdir(entry.path) if linked else entry.is_dir()  # false for a loop
    if entry.name.startswith("."):
        return "hidden folder" if is_folder else "hidden"
    if is_folder:
        return "folder"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in suffixes():
        return suffix or "without a suffix"
    special = os.path.exists(entry.path) and not os.path.isfile(entry.path)
    return "special file" if special else "picture"
