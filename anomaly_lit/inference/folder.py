"""A folder of images: find them, judge them, write verdicts, overlays and maps."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from anomaly_lit.calibration import colour_range, limits_of, outline_of
from anomaly_lit.data.images import Header, Pixels, read_header, read_image
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.drawing.heat import overlay
from anomaly_lit.drawing.png import save_image
from anomaly_lit.files import marked_name, printable, short_name
from anomaly_lit.folders import VERDICTS, told, walk
from anomaly_lit.inference.detector import Detector, Finding
from anomaly_lit.inference.film import Film, is_film
from anomaly_lit.types import UserError

OVERLAYS, MAPS = "overlays", "maps"
COLUMNS = ("path", "category", "score", "threshold", "verdict", "error")
MOST_PIXELS = 64_000_000  # of the images held in memory at once
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what starts a formula in a spreadsheet


class Found(NamedTuple):
    """The images of a source, and the folder that their names are relative to."""

    paths: list[Path]
    root: Path
    results: list[Path]  # folders of earlier results, which were skipped
    others: str = ""  # how many other files were skipped, in words
    film: Film | None = None  # the video whose frames the images are


def find_pictures(source: Path, output: Path, max_pixels: int | None = MAX_PIXELS) -> Found:
    """Find an image, the frames of a video, or all images below a folder.

    Earlier results of this program are skipped.

    Args:
        source: An image, a video or a folder.
        output: Where results will go; it may be inside the folder, or be the folder.
        max_pixels: Pixels of the largest frame of a video; None sets no limit.

    Raises:
        UserError: There is no such file, no image in the folder, or the video cannot be read; or
            results would replace files that are none.
    """
    check_replaces_nothing(output)
    if is_film(source):
        film = Film(source, max_pixels)
        return Found(film.paths, source.parent, [], film=film)
    if source.is_file():
        return Found([source], source.parent, [])
    if not source.is_dir():
        raise UserError(
            f"input={printable(source)} does not exist; give an image, a video or a folder of "
            "images"
        )
    found, counts, results = walk([source])
    others = printable(told(counts))
    if not found:
        raise UserError(
            f"input={printable(source)} holds no picture ({others or 'no file at all'}); "
            "docs/datasets.md says what is read"
        )
    return Found(found, source, results, others)


def check_replaces_nothing(output: Path) -> None:
    """Refuse a folder whose overlays or maps are not known to be results.

    Raises:
        UserError: There are such files, and no verdicts beside them.
    """
    for place in (output / OVERLAYS, output / MAPS):
        if not (output / VERDICTS).is_file() and any(path.is_file() for path in place.rglob("*")):
            raise UserError(
                f"output_dir={printable(output)}: {printable(place)} holds files, and no "
                f"{VERDICTS} beside it says that they are results; choose another output_dir"
            )


def headers_of(paths: Iterable[Path]) -> dict[Path, Header]:
    """Read the headers of pictures; one that cannot be read is left out, and told when judged."""
    headers = {}
    for path in paths:
        with suppress(UserError):
            headers[path] = read_header(path)
    return headers


def batches_of(
    paths: list[Path],
    most: int,
    film: Film | None = None,
    headers: Mapping[Path, Header] | None = None,
) -> Iterator[list[Path]]:
    """Yield at most `most` paths at a time, fewer if images are large, but at least one.

    Args:
        paths: Paths of the images.
        most: Most images in a batch.
        film: The video whose frames the images are; None takes the headers.
        headers: Of the pictures; None reads them.
    """
    if headers is None:
        headers = headers_of(paths) if film is None else {}
    batch: list[Path] = []
    pixels = 0
    for path in paths:
        own = film.pixels if film else 0
        if path in headers:
            own = math.prod(headers[path].size)
        if batch and (len(batch) >= most or pixels + own > MOST_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(path)
        pixels += own
    if batch:
        yield batch


class Judge:
    """Judge images and write results along the way, so that a later error loses none.

    Args:
        detector: Scores the images.
        names: Where the results of each image go; see `names_of`.
        directory: Where `predictions.csv`, `overlays` and `maps` are written.
        category: The one whose threshold to use; None takes the only one, else that of all
            together.
        save_maps: Also write the maps, (H, W) float16, as `maps/<name>.npy`.
        max_pixels: Pixels of the largest picture that is read; None sets no limit.
        before: Earlier frames of the images, in order of time, for a method that reads clips.
        film: The video whose frames the images are; None reads pictures.
        headers: Of the pictures; they tell of which files only the first page is judged.

    Attributes:
        scores: Scores of the judged images by path, in the order in which they were judged.
        in_part: How many of the judged files have further pages.
    """

    def __init__(
        self,
        detector: Detector,
        names: Mapping[Path, Path],
        directory: Path,
        category: str | None = None,
        save_maps: bool = False,
        max_pixels: int | None = MAX_PIXELS,
        before: Mapping[Path, Sequence[Path]] | None = None,
        film: Film | None = None,
        headers: Mapping[Path, Header] | None = None,
    ) -> None:
        self.detector = detector
        self.names = names
        self.directory = directory
        only = detector.categories[0] if len(detector.categories) == 1 else None
        self.category = category or only
        self.limits = limits_of(detector.calibration, self.category)
        self.save_maps = save_maps
        self.before = before
        self.scores: dict[Path, float] = {}
        longest = max(map(len, (before or {}).values()), default=0)
        read = (lambda path: read_image(path, max_pixels)) if film is None else film.read
        self._read = lru_cache(1 + longest)(read)
        self.counts: dict[str, int] = {}
        self.errors: list[str] = []
        self.headers = headers or {}
        self.in_part = 0

    def __enter__(self) -> Judge:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = (self.directory / VERDICTS).open("x", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def judge(self, paths: list[Path]) -> None:
        """Judge a batch; an image that cannot be read is noted and does not stop the others."""
        read: dict[Path, Pixels] = {}
        frames: list[list[Pixels]] = []
        errors: dict[Path, str] = {}
        for path in paths:
            try:
                earlier = [self._read(p) for p in self.before[path]] if self.before else []
                read[path] = self._read(path)
                frames.append(earlier)
            except UserError as error:
                errors[path] = printable(str(error))
        findings = self.detector.predict(
            [*read.values()],
            self.category,
            len(read) or 1,
            frames=frames if self.before else None,
        )
        found = dict(zip(read, findings, strict=True))
        self.scores |= {path: finding.score for path, finding in found.items()}
        with ThreadPoolExecutor() as pool:  # images take longer to write than to judge
            list(pool.map(self._save, found, found.values()))
        for path in paths:
            self._note(path, found.get(path), errors.get(path, ""))
        self._file.flush()

    @property
    def all_judged(self) -> bool:
        """Return whether every image got a verdict of good or defect, and has one page only."""
        return not (self.counts.get("unknown") or self.counts.get("unreadable") or self.in_part)

    def _save(self, path: Path, finding: Finding) -> None:
        name = self.names[path]
        target = self.directory / OVERLAYS / f"{name}.png"
        if finding.anomaly_map is None:
            save_image(finding.image, target)
            return
        low, high = colour_range(self.limits, finding.anomaly_map)
        outline = outline_of(finding.verdict, finding.anomaly_map, self.limits)
        save_image(overlay(finding.image, finding.anomaly_map, low, high, outline), target)
        if self.save_maps:
            target = self.directory / MAPS / f"{name}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, finding.anomaly_map.astype(np.float16))

    def _note(self, path: Path, finding: Finding | None, error: str) -> None:
        verdict = "unreadable" if finding is None else finding.verdict
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        if finding is not None and not math.isfinite(finding.score):
            error = f"the score is {finding.score}"
        elif finding is not None and path in self.headers and self.headers[path].pages > 1:
            error = f"1 of {self.headers[path].pages} pages judged"
            self.in_part += 1
        if error:
            self.errors.append(f"{verdict}: {printable(path)}: {error}" if finding else error)
        threshold = None if finding is None or math.isnan(finding.threshold) else finding.threshold
        self._writer.writerow(
            {
                "path": cell(printable(path)),
                "category": cell(self.category or ""),
                "score": None if finding is None else finding.score,
                "threshold": threshold,
                "verdict": verdict,
                "error": cell(error),
            }
        )


def names_of(paths: Sequence[Path], root: Path) -> dict[Path, Path]:
    """Return where the results of each image go, below a folder for results and without a suffix.

    They have the image's name: those of `a/b.jpg` are `a/b.png` and `a/b.npy`. Where images differ
    in their suffix only, all but PNG files keep it, as in `a/b.jpg.png`. A name that is too long,
    or that another image has taken, gets a hash of the image's own.

    Args:
        paths: All images that are judged.
        root: Names are relative to this folder.
    """
    stems = Counter(_key(path.with_suffix("")) for path in paths)
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in sorted(paths, key=lambda path: path.suffix != ".png"):  # PNG files choose first
        bare = path.with_suffix("")
        alone = path.suffix == ".png" or stems[_key(bare)] == 1
        choices = [own for own in ([bare] if alone else []) + [path] if _fits(own)]
        marked = path.with_name(marked_name(path.name))
        name = next((own for own in choices if _key(own) not in taken), marked)
        taken.add(_key(name))
        names[path] = name.relative_to(root)
    return names


def _key(path: Path) -> str:
    """Return what is equal for paths that some file systems do not tell apart."""
    return str(path).casefold()


def _fits(path: Path) -> bool:
    return path.name == short_name(path.name)


def cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula: an apostrophe is added if needed."""
    return f"'{text}" if text.startswith(FORMULA) else text
