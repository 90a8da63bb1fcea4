"""The root folder of a data set and the categories that are taken from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.data.layouts.base import Layout
from anomaly_lit.files import printable
from anomaly_lit.types import UserError


def existing_root(root: Path | None) -> Path:
    """Return the root folder of a data set.

    Raises:
        UserError: It is not set, or there is no such folder.
    """
    if root is None:
        raise UserError(
            "dataset.root is not set; name the folder of the data set with dataset.root=DIR"
        )
    if not root.is_dir():
        raise UserError(f"dataset.root={root} is not a folder; set dataset.root=DIR")
    return root


def choose_categories(layout: Layout, root: Path, requested: str | Sequence[str]) -> list[str]:
    """Return the names of the categories to use, each once.

    Args:
        layout: Finds the categories that are there.
        root: Folder of the data set.
        requested: Names, or `all`.

    Raises:
        UserError: There is no category, none of that name, or one model cannot learn several.
    """
    found = layout.find_categories(root)
    if requested == "all" and not (found and layout.excludes_others):
        if not found:
            raise UserError(
                f"no category below dataset.root={root}: no folder {layout.train_hint}{_tip(root)}"
            )
        return _encoded(found, root)
    if layout.excludes_others and (requested == "all" or len(requested) > 1):
        raise UserError(
            f"dataset.categories={requested}: what is normal in one class is anomalous in another, "
            f"so name one, such as dataset.categories=[{found[0]}]; a sweep trains a model for "
            f"each, -m dataset.categories=[{'],['.join(found[:2])}]"
        )
    wanted = [requested] if isinstance(requested, str) else list(requested)
    unknown = [
        name
        for name in wanted
        if name not in found and (layout.excludes_others or not (root / name).is_dir())
    ]
    if unknown or not wanted:
        raise UserError(
            f"dataset.categories: no {', '.join(unknown) or 'name'} in {root}; it holds "
            f"{', '.join(found) or 'no category' + _tip(root)}"
        )
    return _encoded(list(dict.fromkeys(wanted)), root)


def no_training_images(layout: Layout, root: Path | None, categories: Sequence[str]) -> list[str]:
    """Say where training images of some categories are missing.

    Args:
        layout: Says where they should be.
        root: Folder of the data set.
        categories: Those without training images.
    """
    if not categories:
        return []
    places = [
        str((root or Path()) / layout.train_hint.replace("<category>", category))
        for category in categories
    ]
    other = "" if layout.train_key is None else f" or change {layout.train_key}"
    return [f"no normal training images in {', '.join(places)}; put images there{other}"]


def _encoded(names: list[str], root: Path) -> list[str]:
    """Return names of categories, which results are filed under, if all of them are UTF-8."""
    for name in names:
        if name != printable(name):
            raise UserError(f"{printable(root / name)}: the name is not UTF-8; rename the folder")
    return names


def _tip(root: Path) -> str:
    """Help where a category's own folder was given as the root."""
    if not (root / "train").is_dir():
        return ""
    return (
        f"; for this category alone set dataset.root={root.parent} dataset.categories=[{root.name}]"
    )
