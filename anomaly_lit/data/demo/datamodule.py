"""The demo's data set: five procedural products in MVTec AD's layout.

Nothing is downloaded: `generate_demo` draws and writes the pictures, and `Demo` reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from anomaly_lit.data.caches.features import FeatureCache
from anomaly_lit.data.caches.memory import ImageCache
from anomaly_lit.data.demo.products import GOOD, PRODUCTS, picture
from anomaly_lit.data.layouts.mvtec_ad import MVTecAD, MVTecADLayout
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.types import UserError, check_range

VERSION = 1  # of the drawings; raise it when any picture changes
MANIFEST = "demo.json"
CATEGORIES = tuple(PRODUCTS)


class DemoLayout(MVTecADLayout):
    """MVTec AD's layout."""

    licence = "the demo's pictures are drawn by this package and free to use"


class Demo(MVTecAD):
    """The demo's data set, which `prepare_data` draws if it does not exist yet.

    The arguments that are not described here are those of `AnomalyDataModule`.

    Args:
        root: Folder of the pictures; it must not exist, be empty, or hold this data set already.
        categories: Names, or `all`.
        image_size: Height and width that a method sees, or one number; the pictures have 128.
        drawing_seed: Decides the pictures; another seed needs another root.
    """

    layout_class = DemoLayout

    def __init__(
        self,
        root: str,
        categories: str | list[str] = "all",
        image_size: int | list[int] = 128,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        drop_last: bool = True,
        num_workers: int = 0,
        holdout: float = 0.1,
        shots: int | None = None,
        balanced: bool = False,
        seed: int = 0,
        drawing_seed: int = 0,
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
        check_range("dataset", "[0, inf)", drawing_seed=drawing_seed)
        super().__init__(
            root=root,
            categories=categories,
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            holdout=holdout,
            shots=shots,
            balanced=balanced,
            seed=seed,
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
        )
        self.drawing_seed = drawing_seed

    def prepare_data(self) -> None:
        """Draw the pictures, in one process."""
        if self.root is None:
            raise UserError("dataset.root is not set; name a folder for the demo's pictures")
        generate_demo(self.root, self.drawing_seed)


def generate_demo(
    root: str | Path,
    seed: int = 0,
    size: int = 128,
    train: int = 50,
    test_good: int = 20,
    test_defective: int = 20,
) -> Path:
    """Write the demo's data set unless the folder holds it already.

    The same arguments give the same bytes. Five categories of 50 + 40 pictures take about ten
    seconds on one core. The folder appears complete or not at all.

    Args:
        root: Folder to create; it must not exist, be empty, or hold the same data set.
        seed: Decides every picture.
        size: Side of the square pictures, in pixels.
        train: Normal training images per category.
        test_good: Normal test images per category.
        test_defective: Defective test images per category, of each kind of defect in turn.

    Returns:
        The folder: `<category>/train/good`, `<category>/test/<good or defect>`,
        `<category>/ground_truth/<defect>/<stem>_mask.png`.

    Raises:
        UserError: The folder has other content, or cannot be written.
    """
    root = Path(root).absolute()
    manifest = {
        "made_by": "anomaly_lit.data.demo",
        "version": VERSION,
        "seed": seed,
        "size": size,
        "train": train,
        "test_good": test_good,
        "test_defective": test_defective,
    }
    if is_there(root, manifest):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise UserError(
            f"the demo data set cannot be written to {root}: {error.strerror}; set dataset.root"
        ) from error
    try:
        for category in CATEGORIES:
            write_category(draft / category, category, seed, size, train, test_good, test_defective)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp makes private folders
        move(draft, root, manifest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def is_there(root: Path, manifest: dict[str, object]) -> bool:
    """Return whether the folder holds this data set; refuse a folder with other content."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{root} is not a demo data set (no readable {MANIFEST}) and is left alone; "
            "set dataset.root to another folder"
        ) from None
    if found != manifest:
        raise UserError(
            f"{root} holds another demo data set: {found}, wanted {manifest}; "
            "set dataset.root to another folder or remove this one"
        )
    return True


def move(draft: Path, root: Path, manifest: dict[str, object]) -> None:
    """Rename the finished folder; another process may have been faster."""
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()  # Windows does not replace an empty folder
    try:
        os.replace(draft, root)
    except OSError:
        if not is_there(root, manifest):
            raise


def write_category(
    folder: Path,
    category: str,
    seed: int,
    size: int,
    train: int,
    test_good: int,
    test_defective: int,
) -> None:
    """Write one category; no picture depends on how many others there are."""
    kinds = PRODUCTS[category].defects
    number = CATEGORIES.index(category)
    splits = [
        ("train", [GOOD] * train),
        ("test", [GOOD] * test_good),
        ("test", [kinds[index % len(kinds)] for index in range(test_defective)]),
    ]
    for part, (split, defects) in enumerate(splits):
        for index, defect in enumerate(defects):
            image, mask = picture(category, defect, [seed, number, part, index], size)
            stem = f"{index if defect == GOOD else index // len(kinds):03d}"
            save(folder / split / defect / f"{stem}.png", image)
            if defect != GOOD:
                drawn = mask.astype(np.uint8) * 255
                save(folder / "ground_truth" / defect / f"{stem}_mask.png", drawn)


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)
