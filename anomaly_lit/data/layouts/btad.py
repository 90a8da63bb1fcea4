"""BTAD."""

from __future__ import annotations

from pathlib import Path

from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.data.layouts.base import Layout, Listing
from anomaly_lit.data.layouts.files import (
    anomalous_samples,
    by_stem,
    folders_with,
    normal_samples,
)
from anomaly_lit.folders import list_images


class BTADLayout(Layout):
    """`train/ok`, `test/ok`, `test/ko` and `ground_truth/ko`, matched by stem."""

    licence = "BTAD is listed as CC BY-NC-SA 4.0 (non-commercial)"
    mask_hint = "ROOT/<category>/ground_truth/ko/<stem>.png"
    train_hint = "<category>/train/ok"
    names_defects = False

    def find_categories(self, root: Path) -> list[str]:
        """Name the folders that hold `train/ok` or `test/ko`."""
        return folders_with(root, "train/ok", "test/ko")

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images of one product."""
        base = root / category
        train = normal_samples(list_images(base / "train" / "ok"), category)
        test = normal_samples(list_images(base / "test" / "ok"), category)
        masks = by_stem(base / "ground_truth" / "ko")
        defects = anomalous_samples(list_images(base / "test" / "ko"), category, "ko", masks)
        return Listing(train, test + defects)

    def sources(self, root: Path, category: str) -> list[Path]:
        """Name the folders of one product."""
        places = ("train/ok", "test/ok", "test/ko", "ground_truth/ko")
        return [root / category / place for place in places]


class BTAD(AnomalyDataModule):
    """BTAD (Mishra et al., 2021): three products, `ok` and `ko` images."""

    layout_class = BTADLayout
