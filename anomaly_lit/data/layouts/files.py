"""Make samples from folders of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.folders import list_folders, list_images
from anomaly_lit.types import Sample, UserError

NORMAL = ("good", "normal", "ok")


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
    """Return the paths of the pictures directly in a folder by stem.

    Raises:
        UserError: Two have the same stem.
    """
    found: dict[str, str] = {}
    for path in list_images(folder):
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path} are masks with the same name; keep one of them"
            )
        found[path.stem] = str(path)
    return found


def seems_normal(folder: str) -> bool:
    """Whether a folder's name says that its pictures are normal, such as `good`."""
    return folder.lower() in NORMAL
