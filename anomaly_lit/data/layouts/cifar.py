"""CIFAR-10 and CIFAR-100, in their python version."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from anomaly_lit.data.arrays import list_in
from anomaly_lit.data.layouts.classes import ClassesLayout, with_labels
from anomaly_lit.types import check_choice


class CIFAR10Layout(ClassesLayout):
    """The unpacked archive: `data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`."""

    licence = "CIFAR has no explicit licence; cite Krizhevsky, 2009"
    train_hint = "cifar-10-batches-py"
    meta = "batches.meta"
    labels, class_names = "labels", "label_names"
    files: ClassVar[dict[str, list[str]]] = {
        "train": [f"data_batch_{number}" for number in range(1, 6)],
        "test": ["test_batch"],
    }

    def names(self, root: Path) -> list[str]:
        """Name the classes as the archive does."""
        meta = root / self.train_hint / self.meta
        return list_in(meta, self.class_names) if meta.is_file() else []

    def pictures(self, root: Path, split: Literal["train", "test"]) -> list[tuple[str, int]]:
        """Return path and label of each image of a split."""
        found: list[tuple[str, int]] = []
        for file in (root / self.train_hint / name for name in self.files[split]):
            found += with_labels(file, list_in(file, self.labels))
        return found


class CIFAR100Layout(CIFAR10Layout):
    """The unpacked archive: `train`, `test` and `meta`.

    Args:
        normal: See the base class.
        labels: `coarse`: 20 super-classes; `fine`: 100 classes.

    Raises:
        UserError: A value is unknown.
    """

    train_hint = "cifar-100-python"
    meta = "meta"
    files: ClassVar[dict[str, list[str]]] = {"train": ["train"], "test": ["test"]}

    def __init__(
        self,
        normal: Literal["one", "others"] = "one",
        labels: Literal["coarse", "fine"] = "coarse",
    ) -> None:
        super().__init__(normal)
        check_choice("dataset.layout", ("coarse", "fine"), labels=labels)
        self.labels, self.class_names = f"{labels}_labels", f"{labels}_label_names"
