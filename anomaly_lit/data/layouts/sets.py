"""The data sets: which categories a folder holds, and which images a category holds."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Literal

from torch import nn

from anomaly_lit.data.caches.features import FeatureCache
from anomaly_lit.data.caches.memory import ImageCache
from anomaly_lit.data.datamodule import AnomalyDataModule, raise_all
from anomaly_lit.data.layouts.folders import (
    Listing,
    list_btad,
    list_folders,
    list_ksdd2,
    list_mvtec,
    list_plain,
    list_visa,
    read_visa_split,
)
from anomaly_lit.types import UserError


class MVTecAD(AnomalyDataModule):
    """MVTec AD (Bergmann et al., 2019), MPDD and every set laid out like them."""

    licence = "MVTec AD and MPDD are CC BY-NC-SA 4.0 (non-commercial); other sets have their own"

    def find_categories(self, root: Path) -> list[str]:
        """Folders that hold a `train` or `test` folder."""
        return [
            folder.name
            for folder in list_folders(root)
            if (folder / "train").is_dir() or (folder / "test").is_dir()
        ]

    def list_category(self, root: Path, category: str) -> Listing:
        """Images of one category, see `list_mvtec`."""
        return list_mvtec(root, category)


class BTAD(AnomalyDataModule):
    """BTAD (Mishra et al., 2021): three products, `ok` and `ko` images."""

    licence = "BTAD is listed as CC BY-NC-SA 4.0 (non-commercial)"
    mask_hint = "ROOT/<category>/ground_truth/ko/<stem>.png"
    train_hint = "<category>/train/ok"

    def find_categories(self, root: Path) -> list[str]:
        """Folders that hold `train/ok` or `test/ko`."""
        return [
            folder.name
            for folder in list_folders(root)
            if (folder / "train" / "ok").is_dir() or (folder / "test" / "ko").is_dir()
        ]

    def list_category(self, root: Path, category: str) -> Listing:
        """Images of one category, see `list_btad`."""
        return list_btad(root, category)


class VisA(AnomalyDataModule):
    """VisA (Zou et al., 2022) as published, by its one-class split file."""

    licence = "VisA is CC BY 4.0"
    split_file = "split_csv/1cls.csv"
    mask_hint = "the column mask of split_csv/1cls.csv"
    train_hint = "<category>/Data/Images/Normal"

    def find_categories(self, root: Path) -> list[str]:
        """Categories named in the split file, in its order."""
        return list(read_visa_split(root / self.split_file))

    def list_category(self, root: Path, category: str) -> Listing:
        """Images of one category, see `list_visa`."""
        rows = read_visa_split(root / self.split_file)
        return list_visa(root, category, rows.get(category, []))


class KolektorSDD2(AnomalyDataModule):
    """KolektorSDD2 (Božič et al., 2021) as published; its training defects are left out."""

    licence = "KolektorSDD2 is CC BY-NC-SA 4.0 (non-commercial)"
    mask_hint = "ROOT/test/<stem>_GT.png"
    train_hint = "train"
    left_out = 0

    def find_categories(self, root: Path) -> list[str]:
        """One, where there is a `train` or `test` folder."""
        return ["ksdd2"] if (root / "train").is_dir() or (root / "test").is_dir() else []

    def list_category(self, root: Path, category: str) -> Listing:
        """Its images, see `list_ksdd2`."""
        listing, self.left_out = list_ksdd2(root, category)
        return listing

    def folders(self) -> list[Path]:
        """None: training defects lie beside what is trained on."""
        return []

    def notes(self) -> list[str]:
        """Say also how many training images were left out."""
        left_out = f"{self.left_out} defective images of train are left out"
        return [*super().notes(), *([left_out] if self.left_out else [])]


class Folder(AnomalyDataModule):
    """Any folders of normal and abnormal pictures, as one category.

    Args:
        root: Folder that the others are relative to.
        normal_dir: Normal images; searched to any depth, as are the others.
        abnormal_dir: Anomalous images; a first sub-folder names the defect type. Without it
            training works and the metrics are undefined.
        normal_test_dir: Normal images to test on. Without it `test_share` of `normal_dir` is
            kept for testing.
        mask_dir: Masks, at the same relative place as their images or all in one folder, named
            `<stem>_mask` or `<stem>`.
        test_share: Share of `normal_dir` kept for testing without `normal_test_dir`.
        category: Name of the one category in tables and checkpoints.
        image_size: See `AnomalyDataModule`, as for all that follow.
        resize: See there.
        interpolation: See there.
        center_crop: See there.
        batch_size: See there.
        eval_batch_size: See there.
        num_workers: See there.
        holdout: See there; taken after `test_share`.
        shots: See there.
        seed: See there; it also chooses the images of `test_share`.
        masks: See there.
        cache: See there.
        feature_cache: See there.
        synthesis: See there.
        validate_on_synthesis: See there.
    """

    train_hint = "dataset.normal_dir"
    mask_hint = "dataset.mask_dir/<place of the image>/<stem>_mask.png"

    def __init__(
        self,
        root: str | None,
        normal_dir: str = "good",
        abnormal_dir: str | None = None,
        normal_test_dir: str | None = None,
        mask_dir: str | None = None,
        test_share: float = 0.2,
        category: str = "product",
        image_size: int | list[int] = 256,
        resize: Literal["stretch", "pad"] = "stretch",
        interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear",
        center_crop: int | list[int] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        holdout: float = 0.1,
        shots: int | None = None,
        seed: int = 0,
        masks: Literal["required", "optional", "none"] = "optional",
        cache: ImageCache | None = None,
        feature_cache: FeatureCache | None = None,
        synthesis: nn.Module | None = None,
        validate_on_synthesis: bool = False,
    ) -> None:
        super().__init__(
            root=root,
            categories=[category],
            image_size=image_size,
            resize=resize,
            interpolation=interpolation,
            center_crop=center_crop,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            holdout=holdout,
            shots=shots,
            seed=seed,
            masks=masks,
            cache=cache,
            feature_cache=feature_cache,
            synthesis=synthesis,
            validate_on_synthesis=validate_on_synthesis,
        )
        if not 0 <= test_share < 1:
            raise UserError(f"dataset.test_share={test_share}: give a share from 0 up to 1")
        self.normal_dir = normal_dir
        self.abnormal_dir = abnormal_dir
        self.normal_test_dir = normal_test_dir
        self.mask_dir = mask_dir
        self.test_share = test_share
        self.category = category

    def find_categories(self, root: Path) -> list[str]:
        """Give the one category, after checking that the named folders exist side by side."""
        named = {
            "normal_dir": self.normal_dir,
            "abnormal_dir": self.abnormal_dir,
            "normal_test_dir": self.normal_test_dir,
            "mask_dir": self.mask_dir,
        }
        raise_all(
            [
                f"dataset.{key}={name}: {root / name} is not a folder"
                for key, name in named.items()
                if name is not None and not (root / name).is_dir()
            ]
        )
        places = {key: (root / name).resolve() for key, name in named.items() if name is not None}
        raise_all(
            [
                f"dataset.{inner} lies in dataset.{outer} ({places[outer]}), where every picture "
                "would be read twice; put them side by side"
                for inner, outer in permutations(places, 2)
                if places[inner].is_relative_to(places[outer])
            ]
        )
        return [self.category]

    def list_category(self, root: Path, category: str) -> Listing:
        """Images of the folders, see `list_plain`; part of the normal ones may go to the test."""
        train, test = list_plain(
            category,
            root / self.normal_dir,
            None if self.normal_test_dir is None else root / self.normal_test_dir,
            None if self.abnormal_dir is None else root / self.abnormal_dir,
            None if self.mask_dir is None else root / self.mask_dir,
        )
        if self.normal_test_dir is None:
            kept = self._draw(train, round(self.test_share * len(train)), "test")
            test = [sample for sample in train if sample in kept] + test
            train = [sample for sample in train if sample not in kept]
        return Listing(train, test)

    def folders(self) -> list[Path]:
        """None: the root may hold anything besides the folders that are named."""
        return []

    def notes(self) -> list[str]:
        """Say also which images were kept for testing."""
        notes = super().notes()
        if self.normal_test_dir is None:
            kept = sum(not sample.label for sample in self.test_samples)
            notes.append(
                f"{kept} images of {self.normal_dir} are kept for testing (dataset.test_share="
                f"{self.test_share:g}, dataset.seed={self.seed}); name a folder with "
                "dataset.normal_test_dir to choose them yourself"
            )
        return notes
