"""The images of a data set: listed, split, counted and checked; only masks are decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.data.categories import choose_categories, existing_root, no_training_images
from anomaly_lit.data.checks import (
    check_headers,
    mask_notes,
    missing_kinds,
    missing_masks,
    raise_all,
    shared_masks,
    too_small,
)
from anomaly_lit.data.companions import list_pool, with_history
from anomaly_lit.data.digest import digest
from anomaly_lit.data.images import Resize
from anomaly_lit.data.layouts.base import Layout
from anomaly_lit.data.opening import checked_pixels
from anomaly_lit.data.progress import warn_once
from anomaly_lit.data.splits import Draw, draw_seen, name_below, split_category
from anomaly_lit.folders import passed_over, told
from anomaly_lit.types import Sample, UserError


class Catalogue:
    """Which images a data set has, and which of them are trained on, held out and tested.

    The arguments are those of `AnomalyDataModule`; `resize` is how its images are resized. All
    lists are empty until `list_samples`.

    Attributes:
        categories: Names of the categories in use.
        train_samples: What is trained on.
        holdout_samples: Normal images that are never trained on.
        test_samples: Normal and anomalous images.
        used: Paths of all images and masks that the layout lists, also of those left out later.
        outlier_samples: The pictures of `outlier_dir`.
        seen_samples: Anomalous images drawn from the test set, see `seen`; they are not tested on.
        needs: What the method reads besides the image; with `frames`, the first frames of each clip
            are in none of the lists.
        clip_samples: All frames of all clips, if a method reads frames beside an image.
        has_masks: Whether any test image has a mask; if not, there is no truth for pixel metrics.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        layout: Layout,
        root: str | None,
        categories: str | Sequence[str],
        holdout: float,
        shots: int | None,
        seed: int,
        masks: str,
        outlier_dir: str | None,
        seen: int,
        resize: Resize,
        max_pixels: int | None,
    ) -> None:
        self.layout = layout
        self.root = None if root is None else Path(root).expanduser()
        self.requested = categories
        self.holdout = holdout
        self.shots = shots
        self.seed = seed
        self.masks = masks
        self.outlier_dir = outlier_dir
        self.seen = seen
        self.resize = resize
        self.max_pixels = checked_pixels(max_pixels, "dataset.max_pixels")
        self.categories: list[str] = []
        self.train_samples: list[Sample] = []
        self.holdout_samples: list[Sample] = []
        self.test_samples: list[Sample] = []
        self.outlier_samples: list[Sample] = []
        self.seen_samples: list[Sample] = []
        self.clip_samples: list[Sample] = []
        self.has_masks = False
        self.used: set[str] = set()

    def wrong_settings(self) -> list[str]:
        """Say which arguments are out of range."""
        wrong = []
        if not 0 <= self.holdout < 1:
            wrong.append(f"dataset.holdout={self.holdout}: it must be at least 0 and less than 1")
        if self.masks not in ("required", "optional", "none"):
            wrong.append(f"dataset.masks={self.masks}: choose required, optional or none")
        if self.shots is not None:
            wrong += too_small({"shots": (self.shots, 1)})
        wrong += too_small({"seen": (self.seen, 0)})
        if self.seen > 0 and self.masks == "none":
            wrong.append(
                f"dataset.seen={self.seen} draws defects with their masks, and dataset.masks=none "
                "reads none: set dataset.masks=required, or dataset.seen=0"
            )
        if self.seen > 0 and not self.layout.names_defects:
            wrong.append(
                f"dataset.seen={self.seen} draws as many defects of each type, and "
                f"{self.layout.name} names no types: set dataset.seen=0"
            )
        if not 0 <= self.seed < 2**32:
            wrong.append(f"dataset.seed={self.seed}: it must lie in 0 to {2**32 - 1}")
        if not isinstance(self.requested, str) and len(set(self.requested)) < len(self.requested):
            wrong.append(f"dataset.categories={[*self.requested]}: name each category once")
        return wrong

    def list_samples(self) -> None:
        """Fill `categories` and the sample lists without judging what is there.

        Raises:
            UserError: The root, a named category or the folder of outliers does not exist, or there
                are fewer defects than `seen`.
        """
        root = existing_root(self.root)
        self.categories = choose_categories(self.layout, root, self.requested)
        draw, test_share = Draw(self.seed, root), self.layout.test_share
        self.train_samples, self.holdout_samples, self.test_samples = [], [], []
        self.seen_samples = []
        self.used = set()
        for category in self.categories:
            listing = self.layout.list_category(root, category)
            samples = [*listing.train, *listing.test]
            self.used |= {path for s in samples for path in (s.path, s.mask_path) if path}
            splits = split_category(listing, draw, self.holdout, self.shots, test_share)
            self.train_samples += splits.train
            self.holdout_samples += splits.holdout
            seen, tested = draw_seen(splits.test, draw, self.seen)
            self.seen_samples += seen
            self.test_samples += tested
        if self.masks == "none":
            self.test_samples = [sample._replace(mask_path=None) for sample in self.test_samples]
        self.has_masks = any(sample.mask_path is not None for sample in self.test_samples)
        if self.outlier_dir is not None:
            self.outlier_samples = list_pool("outlier", self.outlier_dir)
        if "frames" in self.needs:
            self.use_clips()

    def use_clips(self) -> None:
        """Keep all frames for reading, and list only those that have enough before them."""
        self.clip_samples, frames = self.samples(), self.layout.frames
        self.train_samples = with_history(self.train_samples, frames)
        self.holdout_samples = with_history(self.holdout_samples, frames)
        self.test_samples = with_history(self.test_samples, frames)

    def list_and_check(self, stage: str | None) -> None:
        """List the images, refuse what would spoil results, and warn of what a user should know.

        Args:
            stage: As for `setup`.

        Raises:
            UserError: Everything that was found wrong; no pixel of an image is decoded.
        """
        self.list_samples()
        raise_all(self.find_gaps(stage))
        for note in [*self.notes(), *(self.without_holdout() if stage in (None, "fit") else ())]:
            warn_once(note)
        problems, remarks = check_headers(self.listed(), self.max_pixels)
        raise_all(problems)
        for note in remarks:
            warn_once(note)
        for note in mask_notes([*self.test_samples, *self.seen_samples]):
            warn_once(note)

    def present_digest(self) -> str:
        """Return the digest of the files as they are now, without judging them.

        Raises:
            UserError: The root or a named category does not exist.
        """
        self.list_samples()
        return self.files_digest()

    def samples(self) -> list[Sample]:
        """Return all images of all splits."""
        return [*self.train_samples, *self.holdout_samples, *self.test_samples]

    def listed(self) -> list[Sample]:
        """Return all images that may be read, each once."""
        every = [*self.samples(), *self.clip_samples, *self.outlier_samples, *self.seen_samples]
        return list({sample.path: sample for sample in every}.values())

    def samples_of(self, stage: str | None, tests: bool) -> list[Sample]:
        """Return the images to decode for a stage.

        For `fit` these are all splits, so that a broken test image is found at once.

        Args:
            stage: As for `setup`.
            tests: Whether a validation scores the test images, too.
        """
        if stage == "test":
            return [*self.test_samples, *self.clip_samples]
        if stage == "validate" and not tests:
            return [*self.holdout_samples, *self.clip_samples]
        pools = {"outlier": self.outlier_samples, "seen": self.seen_samples}
        needed = [sample for name in pools if name in self.needs for sample in pools[name]]
        return [*self.samples(), *self.clip_samples, *needed]

    def counts(self) -> dict[str, dict[str, int]]:
        """Count images per category: `train`, `holdout`, `test good`, `test <defect type>`.

        With `seen`, also `seen <defect type>`.
        """
        table: dict[str, Counter[str]] = {category: Counter() for category in self.categories}
        for name, samples in (("train", self.train_samples), ("holdout", self.holdout_samples)):
            for sample in samples:
                table[sample.category][name] += 1
        for name, samples in (("test", self.test_samples), ("seen", self.seen_samples)):
            for sample in samples:
                table[sample.category][f"{name} {sample.defect_type}"] += 1
        return {category: dict(counts) for category, counts in table.items()}

    def summary(self) -> str:
        """Say what was found: a line per category, and the licence of a public data set."""
        lines = [f"{self.layout.name} in {self.root}, {self.resize}"]
        for category, counts in self.counts().items():
            numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(f"  {category}: {numbers or 'nothing'}")
        if self.layout.licence is not None:
            lines.append(f"  licence: {self.layout.licence}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def find_gaps(self, stage: str | None = None) -> list[str]:
        """Say what the lists lack so that training or evaluation would be wrong.

        Args:
            stage: As for `setup`; only for `fit` and None are training images needed.
        """
        needed = self.train_samples if stage in (None, "fit") else self.samples()
        present = {sample.category for sample in needed}
        empty = [category for category in self.categories if category not in present]
        gaps = no_training_images(self.layout, self.root, empty)
        gaps += shared_masks([*self.test_samples, *self.seen_samples])
        tested = [sample for sample in self.test_samples if sample.label]
        anomalous = [*tested, *self.seen_samples]
        without = [sample for sample in anomalous if sample.mask_path is None]
        expected = self.layout.expects_masks or len(without) < len(anomalous)
        if self.masks == "required" or (self.masks == "optional" and expected):
            place = self.layout.mask_hint.replace("ROOT", str(self.root))
            gaps += missing_masks(without, len(anomalous), place)
        elif self.seen_samples and without:
            gaps.append(
                f"dataset.seen={self.seen} draws defects with their masks, and there are no masks: "
                "add them, or set dataset.seen=0"
            )
        return gaps

    def notes(self) -> list[str]:
        """Say what is allowed but should be known before training."""
        notes = []
        for category in self.categories:
            labels = {sample.label for sample in self.test_samples if sample.category == category}
            notes += missing_kinds(category, labels, self.root)
        if not self.has_masks and any(sample.label for sample in self.test_samples):
            notes.append("no masks: pixel metrics are left out")
        return notes + self.layout.notes(self.test_samples, self.seed) + self.passed_over()

    def without_holdout(self) -> list[str]:
        """Say which categories have no held-out image, and what a model will lack."""
        held = {sample.category for sample in self.holdout_samples}
        train = Counter(sample.category for sample in self.train_samples)
        return [
            f"{category}: none of its {train[category]} normal training images is held out "
            f"(dataset.holdout={self.holdout}), so there will be no threshold, and every verdict "
            "will be unknown"
            for category in self.categories
            if category not in held and train[category]
        ]

    def check_apart(self, output_dir: str | Path) -> None:
        """Refuse a folder for results within those that are searched for images.

        Raises:
            UserError: Pictures of results would be read as images, or there is no data set.
        """
        categories = choose_categories(self.layout, existing_root(self.root), self.requested)
        pool = [] if self.outlier_dir is None else [Path(self.outlier_dir).expanduser()]
        for folder in self._sources(categories) + pool:
            if Path(output_dir).resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"output_dir={output_dir} lies in {folder}, where the data set's images are "
                    "read from, and results would be taken for images: choose another output_dir"
                )

    def passed_over(self) -> list[str]:
        """Say how many files beside the images were not read, and of which kinds."""
        text = told(passed_over(self._sources(self.categories), self.used))
        return [f"{text}; docs/datasets.md says what is read"] if text else []

    def _sources(self, categories: Sequence[str]) -> list[Path]:
        root = self.root or Path()
        return [path for name in categories for path in self.layout.sources(root, name)]

    def name_of(self, path: str) -> str:
        """Return a file's path below the root, the same on every machine."""
        return name_below(path, self.root)

    def files_digest(self) -> str:
        """Return a digest of the listed files: names, sizes, first and last bytes, splits."""
        splits = {
            "train": self.train_samples,
            "holdout": self.holdout_samples,
            "test": self.test_samples,
            "outlier": self.outlier_samples,
            "seen": self.seen_samples,
            "clip": self.clip_samples,
        }
        return digest(splits, self.root)
