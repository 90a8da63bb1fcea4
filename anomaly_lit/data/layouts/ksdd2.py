"""KolektorSDD2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.data.layouts.base import Layout, Listing
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.data.truth import read_mask
from anomaly_lit.folders import list_images
from anomaly_lit.types import Sample, UserError


class KolektorSDD2Layout(Layout):
    """`{train,test}/10000.png` with `10000_GT.png`, which is all black where the image is good.

    Attributes:
        left_out: Defective training images that the last listing left out.
    """

    licence = "KolektorSDD2 is CC BY-NC-SA 4.0 (non-commercial)"
    mask_hint = "ROOT/test/<stem>_GT.png"
    train_hint = "train"
    train_key = None  # there is one place only
    names_defects = False

    def __init__(self) -> None:
        self.left_out = 0

    def find_categories(self, root: Path) -> list[str]:
        """Name its one category, where there is a `train` or `test` folder."""
        return ["ksdd2"] if (root / "train").is_dir() or (root / "test").is_dir() else []

    def list_category(self, root: Path, category: str) -> Listing:
        """List its images without the defective ones of `train`.

        Raises:
            UserError: Masks do not exist or cannot be read.
        """
        listing, absent = Listing([], []), list[Path]()
        self.left_out = 0
        for split, samples in (("train", listing.train), ("test", listing.test)):
            for path in list_images(root / split):
                if path.stem.endswith("_GT"):
                    continue
                mask = path.with_name(f"{path.stem}_GT.png")
                if not mask.is_file():
                    absent.append(mask)
                elif not read_mask(mask, MAX_PIXELS).any():
                    samples.append(Sample(str(path), category, "good", False))
                elif split == "test":
                    samples.append(Sample(str(path), category, "defect", True, str(mask)))
                else:
                    self.left_out += 1
        if absent:
            raise UserError(
                f"{absent[0]}: the mask that tells whether its image is good does not exist "
                f"({len(absent)} such images); unpack KolektorSDD2 whole"
            )
        return listing

    def folders(self, root: Path, categories: Sequence[str]) -> list[Path]:
        """Name none: defective training images lie beside those that are trained on."""
        return []

    def notes(self, test: Sequence[Sample], seed: int) -> list[str]:
        """Say how many training images were left out."""
        return [f"{self.left_out} defective images of train are left out"] * bool(self.left_out)


class KolektorSDD2(AnomalyDataModule):
    """KolektorSDD2 (Božič et al., 2021) as published; its training defects are left out."""

    layout_class = KolektorSDD2Layout
