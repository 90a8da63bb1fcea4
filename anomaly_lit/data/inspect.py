"""Checks of a data set: every file is decoded and compared with the others."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from anomaly_lit.data.checks import SEVERAL_PAGES, check_headers_agree, several_pages
from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.data.images import Header, Pixels, read_header, read_image, read_sample
from anomaly_lit.data.progress import in_threads
from anomaly_lit.data.truth import Region, look_at_mask
from anomaly_lit.folders import walk_images
from anomaly_lit.types import Sample, UserError

GREY_BITS = 4096  # a 16-bit picture with no larger value uses less than 12 of its bits


class Picture(NamedTuple):
    """What decoding one file showed."""

    sample: Sample
    split: str  # train, holdout or test
    size: tuple[int, int] | None = None  # (H, W); None: unreadable
    mode: str = ""  # Pillow's name
    fingerprint: str = ""  # hash of the decoded pixels
    problem: str = ""
    remarks: tuple[tuple[str, str], ...] = ()  # (kind of finding, text)


@dataclass
class Finding:
    """One kind of problem, with the files it concerns."""

    level: str  # error: training or evaluation would be wrong; warning: worth knowing
    kind: str
    text: str
    paths: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that a check found."""

    dataset: str
    root: str
    licence: str | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)  # "WxH" by category
    modes: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether training and evaluation on this data set would be right."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: str, kind: str, text: str, paths: list[str] | None = None) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, kind, text, paths or []))


def inspect_data(datamodule: AnomalyDataModule, pictures: list[Picture] | None = None) -> Report:
    """Check a data set.

    Args:
        datamodule: The data set; `setup` is not needed.
        pictures: What `decode_all` returned for it; None decodes all files now.

    Raises:
        UserError: The data set does not exist.
    """
    if pictures is None:
        pictures = decode_all(datamodule)
    layout = datamodule.layout
    report = Report(layout.name, str(datamodule.root), layout.licence, datamodule.counts())
    for gap in datamodule.find_gaps():
        report.add("error", "incomplete", gap)
    for note in [*datamodule.notes(), *datamodule.without_holdout()]:
        report.add("warning", "note", note)
    _describe(report, pictures)
    _gather_problems(report, pictures)
    _find_duplicates(report, pictures)
    _find_divided_groups(report, pictures)
    _find_unused(report, datamodule)
    return report


def decode_all(datamodule: AnomalyDataModule) -> list[Picture]:
    """List a data set and decode all its images and masks.

    Raises:
        UserError: The data set does not exist.
    """
    datamodule.list_samples()
    splits = {
        "train": datamodule.train_samples,
        "holdout": datamodule.holdout_samples,
        "test": datamodule.test_samples,
    }
    files = [(sample, split) for split, samples in splits.items() for sample in samples]
    most = datamodule.max_pixels
    return in_threads(lambda file: _inspect(*file, most), files, "Decoding every file")


def _inspect(sample: Sample, split: str, max_pixels: int | None) -> Picture:
    try:
        header = read_header(sample.path, max_pixels)
        pixels = read_image(sample.path, max_pixels)
    except UserError as error:
        return Picture(sample, split, problem=str(error))
    remarks = [*_mode_remarks(sample.path, header.mode)]
    remarks += [("pages", line) for line in several_pages(sample.path, header)]
    size = (pixels.shape[0], pixels.shape[1])
    if sample.mask_path is not None:
        remarks += _mask_remarks(sample, header, max_pixels)
    mark = hashlib.sha256(f"{size}".encode() + pixels.tobytes()).hexdigest()
    return Picture(sample, split, size, header.mode, mark, remarks=tuple(remarks))


def _mode_remarks(path: str, mode: str) -> list[tuple[str, str]]:
    if mode == "F":
        return [("float", f"{path}: floating-point values, taken as [0, 1] if none is above 1")]
    if mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        return [("alpha", f"{path}: the alpha channel is dropped")]
    if mode.startswith("I"):
        with Image.open(path) as file:
            highest = int(np.asarray(file).max())
        if highest < GREY_BITS:
            return [("dark", f"{path}: 16 bits, but no value above {highest}")]
    return []


def _mask_remarks(sample: Sample, image: Header, max_pixels: int | None) -> list[tuple[str, str]]:
    path = str(sample.mask_path)
    try:
        mask, header = look_at_mask(path, max_pixels), read_header(path)
        check_headers_agree(sample, image, header)
    except UserError as error:
        return [("mask", str(error))]
    doubts = [(kind, f"{path}: {text}") for kind, text in mask.doubts().items()]
    return doubts + [("pages", line) for line in several_pages(path, header)]


def _describe(report: Report, pictures: list[Picture]) -> None:
    """Count sizes and modes per category; warn where a category mixes them."""
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    modes: dict[str, Counter[str]] = defaultdict(Counter)
    shapes: dict[str, list[float]] = defaultdict(list)
    for picture in pictures:
        if picture.size is not None:
            height, width = picture.size
            sizes[picture.sample.category][f"{width}x{height}"] += 1
            modes[picture.sample.category][picture.mode] += 1
            shapes[picture.sample.category].append(width / height)
    report.sizes = {category: dict(counts.most_common()) for category, counts in sizes.items()}
    report.modes = {category: dict(counts.most_common()) for category, counts in modes.items()}
    for category, ratios in shapes.items():
        if max(ratios) > 1.2 * min(ratios):
            report.add(
                "warning",
                "shapes",
                f"{category}: width / height runs from {min(ratios):.2f} to {max(ratios):.2f}; "
                "dataset.resize=stretch distorts them unequally, dataset.resize=pad does not",
            )
        if len(modes[category]) > 1:
            kinds = ", ".join(f"{mode} {count}" for mode, count in modes[category].most_common())
            report.add("warning", "modes", f"{category}: pictures of several modes ({kinds})")


def _gather_problems(report: Report, pictures: list[Picture]) -> None:
    broken = [picture.problem for picture in pictures if picture.problem]
    if broken:
        report.add("error", "unreadable", f"{len(broken)} images cannot be read", broken)
    kinds = {
        "mask": ("error", "masks are unreadable or do not lie on their image"),
        "empty": ("error", "masks of anomalous images are empty"),
        "soft": ("error", "masks are not binary: faint values count as defects, so threshold them"),
        "most": (
            "warning",
            "masks mark more than half of their image; is the defect the bright part?",
        ),
        "lossy": (
            "warning",
            "masks are in a lossy format: what is above half of the largest value counts",
        ),
        "values": ("warning", "masks hold several values; all above 0 count as defects"),
        "dark": ("warning", "16-bit images use less than 12 bits and will be nearly black"),
        "float": ("warning", "images hold floating-point values"),
        "alpha": ("warning", "images have an alpha channel, which is dropped"),
        "pages": ("warning", f"files {SEVERAL_PAGES}"),
    }
    for kind, (level, text) in kinds.items():
        lines = [line for picture in pictures for name, line in picture.remarks if name == kind]
        if lines:
            report.add(level, kind, f"{len(lines)} {text}", lines)


def _find_duplicates(report: Report, pictures: list[Picture]) -> None:
    """Compare decoded pixels, which finds copies in another format as well."""
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.fingerprint:
            groups[picture.fingerprint].append(picture)
    across: list[str] = []
    contrary: list[str] = []
    train: list[str] = []
    test: list[str] = []
    for group in groups.values():
        if len(group) < 2:
            continue
        line = " = ".join(picture.sample.path for picture in group)
        tested = {picture.split == "test" for picture in group}
        if len(tested) == 2:
            across.append(line)
        elif len({picture.sample.label for picture in group}) == 2:
            contrary.append(line)
        else:
            (test if tested == {True} else train).append(line)
    for level, kind, text, lines in (
        ("error", "leak", "images are both in train and in test", across),
        ("error", "contradiction", "images are both normal and anomalous in test", contrary),
        ("warning", "duplicates in train", "images occur several times in train", train),
        ("warning", "duplicates in test", "images occur several times in test", test),
    ):
        if lines:
            report.add(level, kind, f"{len(lines)} {text}, by content", lines)


def _find_divided_groups(report: Report, pictures: list[Picture]) -> None:
    """Warn of groups, such as clips, of which training and test both hold images."""
    sides: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for picture in pictures:
        if picture.sample.group:
            sides[picture.sample.category, picture.sample.group].add(picture.split == "test")
    divided = [
        f"{category}: {group}" for (category, group), tested in sides.items() if len(tested) == 2
    ]
    if divided:
        text = f"{len(divided)} groups of images are both in train and in test"
        report.add("warning", "groups", text, sorted(divided))


def _find_unused(report: Report, datamodule: AnomalyDataModule) -> None:
    """Warn of pictures in the data set's folders that belong to no split."""
    layout, root = datamodule.layout, Path(str(datamodule.root))
    folders = layout.folders(root, datamodule.categories)
    found = {str(path) for top in folders for path in walk_images(top)}
    unused = sorted(found - datamodule.used)
    if unused:
        report.add(
            "warning", "unused", f"{len(unused)} pictures are neither image nor mask", unused
        )


def sample_rows(
    datamodule: AnomalyDataModule, pictures: list[Picture], columns: int
) -> list[tuple[str, list[Sample]]]:
    """Choose images to show: at most `columns` of each category and kind, with a caption."""
    rows: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for category in datamodule.categories:
        for picture in pictures:
            if picture.size and picture.sample.category == category and picture.split != "holdout":
                kind = picture.sample.defect_type
                name = "train" if picture.split == "train" else f"test {kind}"
                rows[category, name].append(picture.sample)
    return [
        (
            f"{category}: {name}",
            [samples[len(samples) * i // columns] for i in range(min(columns, len(samples)))],
        )
        for (category, name), samples in rows.items()
    ]


def read_resized(datamodule: AnomalyDataModule, sample: Sample) -> tuple[Pixels, Region | None]:
    """Read an image as a method would see it, without its mask if that cannot be used."""
    try:
        return read_sample(sample, datamodule.resize, datamodule.max_pixels)
    except UserError:  # it is in the report
        return datamodule.resize.image(read_image(sample.path, max_pixels=None)), None
