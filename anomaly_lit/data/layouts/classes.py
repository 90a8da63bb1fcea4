"""Sets of labelled classes, of which one is normal, or all but one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from anomaly_lit.data.layouts.base import Layout, Listing
from anomaly_lit.data.packed import paths_in
from anomaly_lit.types import Sample, UserError, check_choice


class ClassesLayout(Layout):
    """Base of sets in which every image has a class; a category is a class.

    Training sees normal training images only; the test sees all test images. There are no masks. A
    layout defines `names` and `pictures`.

    Args:
        normal: `one`: the class of the category is normal, all others are anomalous; `others`:
            the class is anomalous, all others are normal (leave one class out).

    Raises:
        UserError: `normal` is neither of the two.
    """

    excludes_others = True
    mask_hint = "there are none"

    def __init__(self, normal: Literal["one", "others"] = "one") -> None:
        check_choice("dataset.layout", ("one", "others"), normal=normal)
        self.normal = normal

    @property
    def name(self) -> str:
        """Name of the data set and what is normal in it."""
        return f"{super().name} ({'one class' if self.normal == 'one' else 'all but one'} normal)"

    def names(self, root: Path) -> list[str]:
        """Name the classes, in the order of their labels; none where the files are absent."""
        raise NotImplementedError

    def pictures(self, root: Path, split: Literal["train", "test"]) -> list[tuple[str, int]]:
        """Return path and label of each image of a split."""
        raise NotImplementedError

    def find_categories(self, root: Path) -> list[str]:
        """Name the classes."""
        return self.names(root)

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images; the kind of an anomaly is its class."""
        names = self.names(root)
        chosen = names.index(category)

        def sample(path: str, label: int) -> Sample:
            anomalous = (label == chosen) != (self.normal == "one")
            return Sample(path, category, names[label] if anomalous else "good", anomalous)

        train = [sample(*picture) for picture in self.pictures(root, "train")]
        test = [sample(*picture) for picture in self.pictures(root, "test")]
        return Listing([picture for picture in train if not picture.label], test)

    def folders(self, root: Path, categories: Sequence[str]) -> list[Path]:
        """Name none: the pictures lie in files whose names are known."""
        return []


def with_labels(file: Path, labels: Sequence[Any]) -> list[tuple[str, int]]:
    """Pair the paths of a file's pictures with their labels.

    Raises:
        UserError: Pictures and labels differ in number, or a label is no whole number.
    """
    paths = paths_in(file)
    if len(paths) != len(labels) or any(type(label) is not int for label in labels):
        raise UserError(
            f"{file}: {len(paths)} pictures and {len(labels)} labels, expected a whole number for "
            "each; get the files again"
        )
    return list(zip(paths, labels, strict=True))
