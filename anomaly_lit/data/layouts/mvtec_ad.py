"""MVTec AD, MPDD, and every set laid out like them."""

from __future__ import annotations

from pathlib import Path

from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.data.layouts.base import Layout, Listing
from anomaly_lit.data.layouts.files import (
    anomalous_samples,
    by_stem,
    folders_with,
    normal_samples,
    seems_normal,
)
from anomaly_lit.folders import list_folders, list_images
from anomaly_lit.types import UserError


class MVTecADLayout(Layout):
    """`train/good`, `test/<type>` and `ground_truth/<type>` in a folder for each category.

    The mask of `test/<type>/000.png` is `ground_truth/<type>/000_mask` or `.../000`, with any
    picture suffix.
    """

    licence = "MVTec AD and MPDD are CC BY-NC-SA 4.0 (non-commercial); other sets have their own"

    def find_categories(self, root: Path) -> list[str]:
        """Name the folders that hold a `train` or `test` folder."""
        return folders_with(root, "train", "test")

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images of one category.

        Raises:
            UserError: A kind of defect has a name that says that its pictures are normal.
        """
        base = root / category
        listing = Listing(normal_samples(list_images(base / "train" / "good"), category), [])
        for folder in list_folders(base / "test"):
            images = list_images(folder)
            if folder.name == "good":
                listing.test.extend(normal_samples(images, category))
            elif seems_normal(folder.name):
                raise UserError(
                    f"{folder}: its name says that its pictures are normal, but normal test images "
                    "are read from test/good; rename it"
                )
            else:
                masks = by_stem(base / "ground_truth" / folder.name)
                listing.test.extend(anomalous_samples(images, category, folder.name, masks))
        return listing

    def sources(self, root: Path, category: str) -> list[Path]:
        """Name `train/good`, `test` and `ground_truth`."""
        return [root / category / place for place in ("train/good", "test", "ground_truth")]


class MVTecAD(AnomalyDataModule):
    """MVTec AD (Bergmann et al., 2019), MPDD and every set laid out like them."""

    layout_class = MVTecADLayout
