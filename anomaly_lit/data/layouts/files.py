"""Finding pictures and their masks in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.data.images import SUFFIXES
from anomaly_lit.types import Sample


def is_image(path: Path) -> bool:
    """Whether a path is a file with a picture's suffix that is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def list_images(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder by name; empty where there is no such folder.

    Hidden files are left out (macOS writes `._000.png` beside `000.png`).
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image(path))


def walk_images(folder: Path) -> list[Path]:
    """Return the pictures at any depth below a folder by path, without hidden files and folders."""
    paths = (path for path in folder.rglob("*") if is_image(path))
    return sorted(path for path in paths if not _is_hidden(path.relative_to(folder)))


def list_folders(folder: Path) -> list[Path]:
    """Return the sub-folders by name, without hidden ones; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def folders_with(root: Path, *inner: str) -> list[str]:
    """Return the names of the sub-folders that hold at least one of the `inner` folders."""
    return [
        folder.name
        for folder in list_folders(root)
        if any((folder / name).is_dir() for name in inner)
    ]


def normal_samples(paths: Sequence[Path], category: str) -> list[Sample]:
    """Make samples of normal images."""
    return [Sample(str(path), category, "good", False) for path in paths]


def anomalous_samples(
    paths: Sequence[Path], category: str, defect_type: str, masks: dict[str, str]
) -> list[Sample]:
    """Make samples of anomalous images.

    Args:
        paths: The images.
        category: Their category.
        defect_type: Their kind of defect.
        masks: Paths of masks by stem; that of `000.png` is `000_mask` or `000`.
    """

    def mask(stem: str) -> str | None:
        return masks.get(f"{stem}_mask") or masks.get(stem)

    return [Sample(str(path), category, defect_type, True, mask(path.stem)) for path in paths]


def by_stem(folder: Path) -> dict[str, str]:
    """Return the paths of the pictures directly in a folder by stem."""
    return {path.stem: str(path) for path in list_images(folder)}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
