"""Folder layouts: from files on disk to lists of samples.

Nothing is decoded here but KolektorSDD2's masks, which alone tell good from defective.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from anomaly_lit.data.images import SUFFIXES
from anomaly_lit.types import Sample, UserError


class Listing(NamedTuple):
    """What one category holds, in the order of the file names."""

    train: list[Sample]  # normal images only
    test: list[Sample]


def list_images(folder: Path) -> list[Path]:
    """Pictures directly in a folder by name; empty where there is no such folder.

    Hidden files are left out (macOS writes `._000.png` beside `000.png`).
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image(path))


def is_image(path: Path) -> bool:
    """Say whether a file's name is that of a picture."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def list_folders(folder: Path) -> list[Path]:
    """Sub-folders by name, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def list_mvtec(root: Path, category: str) -> Listing:
    """MVTec AD, MPDD and converted sets: `train/good`, `test/<type>`, `ground_truth/<type>`.

    The mask of `test/<type>/000.png` is `ground_truth/<type>/000_mask.png` or `.../000.png`,
    with any picture suffix.
    """
    base = root / category
    train = [_normal(path, category) for path in list_images(base / "train" / "good")]
    test: list[Sample] = []
    for folder in list_folders(base / "test"):
        if folder.name == "good":
            test += [_normal(path, category) for path in list_images(folder)]
        else:
            masks = _by_stem(base / "ground_truth" / folder.name)
            test += _defects(list_images(folder), masks, category, folder.name)
    return Listing(train, test)


def list_btad(root: Path, category: str) -> Listing:
    """BTAD: `train/ok`, `test/ok`, `test/ko`, `ground_truth/ko`, matched by stem."""
    base = root / category
    train = [_normal(path, category) for path in list_images(base / "train" / "ok")]
    test = [_normal(path, category) for path in list_images(base / "test" / "ok")]
    masks = _by_stem(base / "ground_truth" / "ko")
    return Listing(train, test + _defects(list_images(base / "test" / "ko"), masks, category, "ko"))


def read_visa_split(path: Path) -> dict[str, list[dict[str, str]]]:
    """Read the official one-class split file: rows by category, in the file's order.

    Raises:
        UserError: where the file is absent or has other columns.
    """
    columns = {"object", "split", "label", "image", "mask"}
    if not path.is_file():
        raise UserError(
            f"{path}: the official split file does not exist; unpack VisA with its split_csv "
            "folder and set dataset.root to the folder that holds it"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = columns - set(reader.fieldnames or [])
        if missing:
            raise UserError(
                f"{path}: columns {', '.join(sorted(missing))} are missing; "
                "use the official split_csv/1cls.csv"
            )
        rows: dict[str, list[dict[str, str]]] = {}
        for row in reader:
            rows.setdefault(row["object"], []).append(row)
    return rows


def list_visa(root: Path, category: str, rows: list[dict[str, str]]) -> Listing:
    """VisA: the rows of one category of the split file, paths relative to the root."""
    listing = Listing([], [])
    for row in rows:
        path = str(root / row["image"])
        if row["label"] == "normal":
            sample = Sample(path, category, "good", False)
        else:
            mask = str(root / row["mask"]) if row["mask"] else None
            sample = Sample(path, category, "anomaly", True, mask)
        (listing.train if row["split"] == "train" else listing.test).append(sample)
    return listing


def list_ksdd2(root: Path, category: str) -> tuple[Listing, int]:
    """KolektorSDD2: `{train,test}/10000.png` with `10000_GT.png`, all black where it is good.

    Returns:
        The samples, and how many defective training images were left out.

    Raises:
        UserError: Masks are absent or cannot be read.
    """
    listing, left_out = Listing([], []), 0
    absent: list[Path] = []
    for split, samples in (("train", listing.train), ("test", listing.test)):
        for path in list_images(root / split):
            if path.stem.endswith("_GT"):
                continue
            mask = path.with_name(f"{path.stem}_GT.png")
            if not mask.is_file():
                absent.append(mask)
            elif not _any_white(mask):
                samples.append(_normal(path, category))
            elif split == "test":
                samples.append(Sample(str(path), category, "defect", True, str(mask)))
            else:
                left_out += 1
    if absent:
        raise UserError(
            f"{absent[0]}: the mask that tells whether its image is good does not exist "
            f"({len(absent)} such images); unpack KolektorSDD2 whole"
        )
    return listing, left_out


def _any_white(mask: Path) -> bool:
    try:
        with Image.open(mask) as image:
            return image.convert("L").getextrema()[1] != 0
    except OSError as error:
        raise UserError(f"{mask} cannot be read ({error}); unpack it again") from error


def list_plain(
    category: str, normal: Path, normal_test: Path | None, abnormal: Path | None, masks: Path | None
) -> Listing:
    """Any folders of normal and abnormal pictures, searched to any depth.

    The first sub-folder below `abnormal` names the defect type. A mask lies below `masks` at the
    same relative place, named `<stem>_mask` or `<stem>`, or directly in `masks`.
    """
    train = [_normal(path, category) for path in walk_images(normal)]
    test = [_normal(path, category) for path in walk_images(normal_test)] if normal_test else []
    if abnormal is None:
        return Listing(train, test)
    by_folder: dict[Path, list[Path]] = {}
    for path in walk_images(abnormal):
        by_folder.setdefault(path.parent.relative_to(abnormal), []).append(path)
    for folder, paths in by_folder.items():
        defect_type = folder.parts[0] if folder.parts else abnormal.name
        by_stem = _by_stem(masks) | _by_stem(masks / folder) if masks else {}
        test += _defects(paths, by_stem, category, defect_type)
    return Listing(train, test)


def _normal(path: Path, category: str) -> Sample:
    return Sample(str(path), category, "good", False)


def _defects(
    paths: list[Path], masks: dict[str, str], category: str, defect_type: str
) -> list[Sample]:
    def mask(stem: str) -> str | None:
        return masks.get(f"{stem}_mask") or masks.get(stem)

    return [Sample(str(path), category, defect_type, True, mask(path.stem)) for path in paths]


def _by_stem(folder: Path) -> dict[str, str]:
    return {path.stem: str(path) for path in list_images(folder)}


def walk_images(folder: Path) -> list[Path]:
    """Pictures at any depth below a folder, by path, without hidden files and folders."""
    paths = (path for path in folder.rglob("*") if is_image(path))
    hidden = (path for path in paths if not _is_hidden(path.relative_to(folder)))
    return sorted(hidden)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
