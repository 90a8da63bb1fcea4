"""What a layout says of a data set: its categories, and the images of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from anomaly_lit.types import Sample, UserError


class Listing(NamedTuple):
    """What one category holds, in the order of the file names."""

    train: list[Sample]  # normal images only
    test: list[Sample]


class Layout:
    """How a data set is laid out on disk.

    A new data set defines `find_categories` and `list_category`, and an option file names the
    layout as `dataset.layout`. Nothing is decoded here unless only the pixels tell normal from
    anomalous.

    Attributes:
        licence: One line, shown in summaries; None where there is none to show.
        mask_hint: Where masks are expected, for messages; may contain `ROOT` and `<category>`.
        train_hint: Where normal training images are expected, relative to the root, for messages;
            may contain `<category>`.
        train_key: The setting that chooses among places of training images, for messages; None if
            none does.
        frames: How many earlier frames of a clip stand beside each image; 0: there are no clips.
            Where there are, the samples of a clip have its name as `group`, in order of time.
        test_share: Share of the listed training images to keep for testing, in [0, 1); for sets
            without normal test images.
        names_defects: Whether `defect_type` of an anomalous sample names its kind of defect; false
            where all have the same word.
        expects_masks: Whether a folder of masks was named, so that none at all is a mistake.
        excludes_others: Whether what is normal in one category is anomalous in another, so that
            one model cannot learn several.
    """

    licence: str | None = None
    mask_hint = "ROOT/<category>/ground_truth/<type>/<stem>_mask.png"
    train_hint = "<category>/train/good"
    train_key: str | None = "dataset.categories"
    frames = 0
    test_share = 0.0
    names_defects = True
    expects_masks = False
    excludes_others = False

    @property
    def name(self) -> str:
        """Name of the data set in summaries."""
        return type(self).__name__.removesuffix("Layout")

    def find_categories(self, root: Path) -> list[str]:
        """Name the categories that a root folder holds."""
        raise NotImplementedError

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images of one category."""
        raise NotImplementedError

    def folders(self, root: Path, categories: Sequence[str]) -> list[Path]:
        """Name the folders in which every picture should be an image or a mask of the set."""
        return [root / category for category in categories]

    def sources(self, root: Path, category: str) -> list[Path]:
        """Name the folders of a category that are searched for pictures.

        Files in them that are not read are counted for the user. Name none if a list says which
        files to read.
        """
        return self.folders(root, [category])

    def notes(self, test: Sequence[Sample], seed: int) -> list[str]:
        """Say what a user should know of the chosen images, a line each.

        Args:
            test: The test images.
            seed: `dataset.seed`.
        """
        return []


def checked_category(key: str, name: str) -> str:
    """Return the name of a category, which stands in keys of results and in names of files.

    Args:
        key: The setting that names it, for the message.
        name: Its name.

    Raises:
        UserError: It is empty, or has a slash or a backslash.
    """
    if not name.strip() or "/" in name or "\\" in name:
        raise UserError(f"{key}={name}: give a name without / and \\, such as {key}=product")
    return name
