"""Your own folders of pictures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import permutations
from pathlib import Path
from typing import Literal

from torch import nn

from anomaly_lit.data.caches.features import FeatureCache
from anomaly_lit.data.caches.memory import ImageCache
from anomaly_lit.data.checks import raise_all
from anomaly_lit.data.datamodule import AnomalyDataModule
from anomaly_lit.data.layouts.base import Layout, Listing, checked_category
from anomaly_lit.data.layouts.files import (
    anomalous_samples,
    by_stem,
    normal_samples,
    seems_normal,
)
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.folders import walk_images
from anomaly_lit.types import Sample, UserError

MAY_LIE_IN = ("normal_test_dir", "abnormal_dir")  # the first in the second, which has the rest


class FolderLayout(Layout):
    """Any folders of normal and abnormal pictures, searched to any depth, as one category.

    The first sub-folder below `abnormal_dir` names the defect type. A mask lies below `mask_dir` at
    the same relative place as its image, or directly in `mask_dir`; it is named `<stem>_mask` or
    `<stem>`.

    Args:
        normal_dir: Normal images, relative to the root, as are the others.
        abnormal_dir: Anomalous images.
        normal_test_dir: Normal images to test on; may lie in `abnormal_dir`.
        mask_dir: Masks.
        test_share: Share of `normal_dir` to keep for testing without `normal_test_dir`.
        category: Name of the category.

    Raises:
        UserError: `test_share` is out of range, or `category` is no name.
    """

    train_key = "dataset.normal_dir"

    def __init__(
        self,
        normal_dir: str = "good",
        abnormal_dir: str | None = None,
        normal_test_dir: str | None = None,
        mask_dir: str | None = None,
        test_share: float = 0.2,
        category: str = "product",
    ) -> None:
        if not 0 <= test_share < 1:
            raise UserError(
                f"dataset.test_share={test_share}: it must be at least 0 and less than 1"
            )
        self.normal_dir = self.train_hint = normal_dir
        self.abnormal_dir = abnormal_dir
        self.normal_test_dir = normal_test_dir
        self.mask_dir = mask_dir
        self.expects_masks = mask_dir is not None
        place = "<place of the image>/<stem>_mask.png or <stem>.png"
        self.mask_hint = f"ROOT/{mask_dir or 'dataset.mask_dir'}/{place}"
        self.test_share = test_share if normal_test_dir is None else 0.0
        self.category = checked_category("dataset.category", category)

    def find_categories(self, root: Path) -> list[str]:
        """Name the one category.

        Raises:
            UserError: A named folder does not exist, or lies within another one.
        """
        named, folders = self._named(), self._folders(root)
        raise_all(
            [
                f"dataset.{key}={named[key]}: {folder} is not a folder"
                for key, folder in folders.items()
                if not folder.is_dir()
            ]
        )
        places = {key: folder.resolve() for key, folder in folders.items()}
        raise_all(
            [
                f"dataset.{inner} lies in dataset.{outer} ({places[outer]}), where every picture "
                "would be read twice; put them side by side"
                for inner, outer in permutations(places, 2)
                if places[inner].is_relative_to(places[outer])
                and ((inner, outer) != MAY_LIE_IN or places[inner] == places[outer])
            ]
        )
        return [self.category]

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images of all folders.

        Raises:
            UserError: A folder within `abnormal_dir` has a name that says that its pictures are
                normal.
        """
        listing = Listing(normal_samples(walk_images(root / self.normal_dir), category), [])
        if self.normal_test_dir is not None:
            images = walk_images(root / self.normal_test_dir)
            listing.test.extend(normal_samples(images, category))
        if self.abnormal_dir is not None:
            listing.test.extend(self._anomalous(root, root / self.abnormal_dir, category))
        return listing

    def folders(self, root: Path, categories: Sequence[str]) -> list[Path]:
        """Name none: the root may hold anything besides the named folders."""
        return []

    def sources(self, root: Path, category: str) -> list[Path]:
        """Name the folders that settings name."""
        return [*self._folders(root).values()]

    def notes(self, test: Sequence[Sample], seed: int) -> list[str]:
        """Say how many images were kept for testing."""
        if self.normal_test_dir is not None:
            return []
        kept = sum(not sample.label for sample in test)
        return [
            f"{kept} images of {self.normal_dir} are kept for testing (dataset.test_share="
            f"{self.test_share:g}, dataset.seed={seed}); name a folder with "
            "dataset.normal_test_dir to choose them yourself"
        ]

    def _named(self) -> dict[str, str | None]:
        return {
            "normal_dir": self.normal_dir,
            "abnormal_dir": self.abnormal_dir,
            "normal_test_dir": self.normal_test_dir,
            "mask_dir": self.mask_dir,
        }

    def _folders(self, root: Path) -> dict[str, Path]:
        return {key: root / name for key, name in self._named().items() if name is not None}

    def _anomalous(self, root: Path, folder: Path, category: str) -> list[Sample]:
        groups: dict[Path, list[Path]] = {}
        normal = None if self.normal_test_dir is None else (root / self.normal_test_dir).resolve()
        for path in walk_images(folder):
            if normal is None or not path.parent.resolve().is_relative_to(normal):
                groups.setdefault(path.parent.relative_to(folder), []).append(path)
        raise_all(
            [
                self._labelled_as_defects(inner)
                for inner in groups
                if any(map(seems_normal, inner.parts))
            ]
        )
        masks = None if self.mask_dir is None else root / self.mask_dir
        samples = []
        for inner, paths in groups.items():
            defect_type = inner.parts[0] if inner.parts else folder.name
            stems = {} if masks is None else by_stem(masks) | by_stem(masks / inner)
            samples += anomalous_samples(paths, category, defect_type, stems)
        return samples

    def _labelled_as_defects(self, inner: Path) -> str:
        place = f"{self.abnormal_dir}/{inner.as_posix()}"
        return (
            f"dataset.abnormal_dir={self.abnormal_dir} holds {place}, whose name says that its "
            f"pictures are normal: set dataset.normal_test_dir={place} to test on them as normal "
            "images, or rename that folder"
        )


class Folder(AnomalyDataModule):
    """Any folders of normal and abnormal pictures, as one category.

    The arguments that are not described here are those of `AnomalyDataModule`.

    Args:
        root: Folder that the others are relative to.
        normal_dir: Normal images; searched to any depth, as are the others.
        abnormal_dir: Anomalous images; a first sub-folder names the defect type. Without it
            training works and the metrics are undefined.
        normal_test_dir: Normal images to test on; may lie in `abnormal_dir`. Without it
            `test_share` of `normal_dir` is kept for testing.
        mask_dir: Masks, at the same relative place as their images or all in one folder, named
            `<stem>_mask` or `<stem>`.
        test_share: Share of `normal_dir` kept for testing without `normal_test_dir`, in [0, 1);
            `seed` chooses the images, and `holdout` is taken of the others.
        category: Name of the one category in tables and checkpoints.
    """

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
        mask_resize: Literal["keep", "nearest", "area", "any"] = "keep",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        drop_last: bool = True,
        num_workers: int = 0,
        holdout: float = 0.1,
        shots: int | None = None,
        seed: int = 0,
        masks: Literal["required", "optional", "none"] = "optional",
        outlier_dir: str | None = None,
        seen: int = 0,
        max_pixels: int | None = MAX_PIXELS,
        cache: ImageCache | None = None,
        feature_cache: FeatureCache | None = None,
        synthesis: nn.Module | None = None,
        validate_on_synthesis: bool = False,
        needs: Collection[str] = (),
        validate_on_test: bool = False,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
    ) -> None:
        super().__init__(
            root=root,
            categories=[category],
            image_size=image_size,
            resize=resize,
            interpolation=interpolation,
            center_crop=center_crop,
            mask_resize=mask_resize,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            holdout=holdout,
            shots=shots,
            seed=seed,
            masks=masks,
            outlier_dir=outlier_dir,
            seen=seen,
            max_pixels=max_pixels,
            cache=cache,
            feature_cache=feature_cache,
            synthesis=synthesis,
            validate_on_synthesis=validate_on_synthesis,
            needs=needs,
            validate_on_test=validate_on_test,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            layout=FolderLayout(
                normal_dir, abnormal_dir, normal_test_dir, mask_dir, test_share, category
            ),
        )
