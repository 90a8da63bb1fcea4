"""MNIST, Fashion-MNIST and every set of the same four files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from anomaly_lit.data.arrays import list_in
from anomaly_lit.data.layouts.classes import ClassesLayout, with_labels
from anomaly_lit.types import UserError


class MNISTLayout(ClassesLayout):
    """Pictures and labels of `train` and `t10k` in idx files, gzipped or not.

    The files have no names of classes: the class of label 3 is `class_3`.
    """

    licence = "MNIST is listed as CC BY-SA 3.0, Fashion-MNIST is MIT; other sets have their own"
    train_hint = "train-images-idx3-ubyte[.gz]"

    def names(self, root: Path) -> list[str]:
        """Name a class for each label of the training images."""
        if not any(root.glob("train-labels[-.]idx1-ubyte*")):
            return []
        labels = list_in(find(root, "train-labels[-.]idx1-ubyte"), "labels")
        return [f"class_{label}" for label in range(max(labels) + 1)]

    def pictures(self, root: Path, split: Literal["train", "test"]) -> list[tuple[str, int]]:
        """Return path and label of each image of a split."""
        part = "train" if split == "train" else "t10k"
        labels = list_in(find(root, f"{part}-labels[-.]idx1-ubyte"), "labels")
        return with_labels(find(root, f"{part}-images[-.]idx3-ubyte"), labels)


def find(root: Path, name: str) -> Path:
    """Return the file of a name, which may contain wildcards, without or with `.gz`.

    Raises:
        UserError: There is none.
    """
    for pattern in (name, f"{name}.gz"):
        for path in sorted(root.glob(pattern)):
            return path
    plain = name.replace("[-.]", "-")
    raise UserError(f"no file {plain} or {plain}.gz in {root}; put all four files of the set there")
