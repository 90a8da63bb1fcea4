"""Clips: folders of frames, with a label for each frame that is tested."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_lit.data.layouts.base import Layout, Listing, checked_category
from anomaly_lit.data.layouts.files import by_stem
from anomaly_lit.folders import in_time, list_folders, list_images
from anomaly_lit.types import Sample, UserError, check_range

VIDEOS = (".avi", ".mp4", ".mov", ".mkv")


class ClipsLayout(Layout):
    """One folder of frames for each clip, and a file of labels for each tested clip.

    Frames are ordered by the numbers in their names. Labels are `<clip>.csv` with the columns
    `frame` (a file's stem) and `label` (1: anomalous), or `<clip>.npy` with one number a frame, in
    order. Masks, where there are any, are `<clip>/<stem>.png` or `<clip>/<stem>_mask.png`.

    Args:
        frames: How many earlier frames stand beside each frame, for methods that read clips. That
            many frames at the start of each clip are then neither trained on nor scored.
        train_dir: Folder of the normal clips, relative to the root, as are the others.
        test_dir: Folder of the tested clips.
        labels_dir: Folder of their labels.
        mask_dir: Folder of their masks; None: there are none.
        category: Name of the data set in tables.

    Raises:
        UserError: `frames` is below 1, or `category` is no name.
    """

    names_defects = False
    train_key: str | None = "dataset.layout.train_dir"

    def __init__(
        self,
        frames: int = 4,
        train_dir: str = "training/frames",
        test_dir: str = "testing/frames",
        labels_dir: str = "testing/frame_labels",
        mask_dir: str | None = None,
        category: str = "clips",
    ) -> None:
        check_range("dataset.layout", "[1, inf)", frames=frames)
        self.frames = frames
        self.train_dir = self.train_hint = train_dir
        self.test_dir = test_dir
        self.labels_dir = labels_dir
        self.mask_dir = mask_dir
        self.expects_masks = mask_dir is not None
        self.category = checked_category("dataset.layout.category", category)
        self.mask_hint = f"ROOT/{mask_dir or 'dataset.layout.mask_dir'}/<clip>/<stem>.png"

    def find_categories(self, root: Path) -> list[str]:
        """Name the one category where there are folders of clips."""
        found = (root / self.train_dir).is_dir() or (root / self.test_dir).is_dir()
        return [self.category] if found else []

    def list_category(self, root: Path, category: str) -> Listing:
        """List the frames of all clips, in order of time.

        Raises:
            UserError: There are videos in place of frames, or labels do not fit the frames.
        """
        listing = Listing([], [])
        for clip in clips_in(root / self.train_dir):
            group = f"{self.train_dir}/{clip.name}"
            frames = in_time(list_images(clip))
            listing.train.extend(
                Sample(str(f), category, "good", False, None, group) for f in frames
            )
        for clip in clips_in(root / self.test_dir):
            frames = in_time(list_images(clip))
            listing.test.extend(self.tested(root, clip, frames, category))
        return listing

    def tested(self, root: Path, clip: Path, frames: Sequence[Path], category: str) -> list[Sample]:
        """Return the labelled frames of one tested clip."""
        labels = self.labels(root, clip, frames)
        masks = {} if self.mask_dir is None else by_stem(root / self.mask_dir / clip.name)
        group = f"{self.test_dir}/{clip.name}"
        return [
            Sample(
                str(frame),
                category,
                "anomaly" if label else "good",
                label,
                (masks.get(f"{frame.stem}_mask") or masks.get(frame.stem)) if label else None,
                group,
            )
            for frame, label in zip(frames, labels, strict=True)
        ]

    def labels(self, root: Path, clip: Path, frames: Sequence[Path]) -> list[bool]:
        """Return whether each frame of a tested clip is anomalous.

        Raises:
            UserError: The labels are absent, or not one for each frame.
        """
        table = root / self.labels_dir / f"{clip.name}.csv"
        if table.is_file():
            return from_csv(table, clip, frames)
        array = table.with_suffix(".npy")
        if array.is_file():
            return one_each(np.load(array, allow_pickle=False).ravel() > 0, array, clip, frames)
        raise UserError(
            f"{clip} has no labels: neither {table} nor {array.name} exists; set "
            "dataset.layout.labels_dir to the folder of labels"
        )

    def folders(self, root: Path, categories: Sequence[str]) -> list[Path]:
        """Name the folders of clips."""
        return [root / self.train_dir, root / self.test_dir]


def clips_in(folder: Path) -> list[Path]:
    """Return the folders of clips by name.

    Raises:
        UserError: The folder holds videos, but no folder of frames.
    """
    clips = list_folders(folder)
    videos = [p for p in folder.glob("*") if p.suffix.lower() in VIDEOS] if not clips else []
    if videos:
        raise UserError(
            f"{folder} holds {len(videos)} videos and no folder of frames; extract them once, such "
            f"as {videos[0].name} to {videos[0].stem}/: mkdir {videos[0].stem}; ffmpeg -i "
            f"{videos[0].name} {videos[0].stem}/%04d.png"
        )
    return clips


def from_csv(file: Path, clip: Path, frames: Sequence[Path]) -> list[bool]:
    """Read the labels of a clip from `frame,label`.

    Raises:
        UserError: A column or a frame is missing, or a label is neither 0 nor 1.
    """
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if rows and not {"frame", "label"} <= set(rows[0]):
        raise UserError(f"{file} has the columns {', '.join(rows[0])}; it needs frame and label")
    wrong = [row["label"] for row in rows if row["label"] not in ("0", "1")]
    if wrong:
        raise UserError(f"{file} has the label {wrong[0]!r}; give 1 (anomalous) or 0")
    known = {row["frame"]: row["label"] == "1" for row in rows}
    missing = [frame.stem for frame in frames if frame.stem not in known]
    if missing:
        raise UserError(
            f"{file} has no label for {len(missing)} of {len(frames)} frames of {clip}, such as "
            f"{missing[0]}"
        )
    return [known[frame.stem] for frame in frames]


def one_each(labels: Any, file: Path, clip: Path, frames: Sequence[Path]) -> list[bool]:
    """Return labels in order of the frames.

    Raises:
        UserError: There are more or fewer labels than frames.
    """
    if len(labels) != len(frames):
        raise UserError(f"{file} labels {len(labels)} frames, and {clip} holds {len(frames)}")
    return [bool(label) for label in labels]
