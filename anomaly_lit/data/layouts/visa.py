"""VisA."""

from __future__ import annotations

import csv
from pathlib import Path

from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.data.layouts.base import Layout, Listing
from anomaly_lit.types import Sample, UserError

COLUMNS = ("image", "label", "mask", "object", "split")


class VisALayout(Layout):
    """The published archive, split by its one-class split file."""

    licence = "VisA is CC BY 4.0"
    split_file = "split_csv/1cls.csv"
    mask_hint = "the column mask of split_csv/1cls.csv"
    train_hint = "<category>/Data/Images/Normal"
    names_defects = False

    def find_categories(self, root: Path) -> list[str]:
        """Name the categories of the split file, in its order."""
        return list(read_split(root / self.split_file))

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images in the rows of one category; their paths are relative to the root."""
        listing = Listing([], [])
        for row in read_split(root / self.split_file).get(category, []):
            path = str(root / row["image"])
            if row["label"] == "normal":
                sample = Sample(path, category, "good", False)
            else:
                mask = str(root / row["mask"]) if row["mask"] else None
                sample = Sample(path, category, "anomaly", True, mask)
            (listing.train if row["split"] == "train" else listing.test).append(sample)
        return listing

    def sources(self, root: Path, category: str) -> list[Path]:
        """Name none: the split file says what is read."""
        return []


class VisA(AnomalyDataModule):
    """VisA (Zou et al., 2022) as published, by its one-class split file."""

    layout_class = VisALayout


def read_split(path: Path) -> dict[str, list[dict[str, str]]]:
    """Read the official one-class split file: rows by category, in the file's order.

    Raises:
        UserError: The file does not exist or has other columns.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: the official split file does not exist; unpack VisA with its split_csv "
            "folder and set dataset.root to the folder that holds it"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(
                f"{path}: columns {', '.join(missing)} are missing; "
                "use the official split_csv/1cls.csv"
            )
        rows: dict[str, list[dict[str, str]]] = {}
        for row in reader:
            rows.setdefault(row["object"], []).append(row)
    return rows
