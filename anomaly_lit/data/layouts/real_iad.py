"""Real-IAD."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomaly_lit.data.layouts.base import Layout, Listing
from anomaly_lit.types import Sample, UserError


class RealIADLayout(Layout):
    """`realiad_1024/<category>/...`, split by `realiad_jsons/realiad_jsons/<category>.json`.

    An image is normal if its split file says so, also where the item has a defect that this view
    does not show. The views of an item are one group.

    Args:
        image_dir: Folder of the categories, such as `realiad_256`, relative to the root.
        split_dir: Folder of the split files; `realiad_jsons/realiad_jsons_sv` has one view of each
            item.
    """

    licence = "Real-IAD is CC BY-NC-SA 4.0 (non-commercial)"
    mask_hint = "mask_path in realiad_jsons/realiad_jsons/<category>.json"
    train_hint = "realiad_1024/<category>/OK"

    def __init__(
        self, image_dir: str = "realiad_1024", split_dir: str = "realiad_jsons/realiad_jsons"
    ) -> None:
        self.image_dir = image_dir
        self.split_dir = split_dir

    def find_categories(self, root: Path) -> list[str]:
        """Name the categories that have a split file."""
        return sorted(file.stem for file in (root / self.split_dir).glob("*.json"))

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images of a category's split file.

        Raises:
            UserError: The file cannot be read, or it trains on anomalous images.
        """
        file, base = root / self.split_dir / f"{category}.json", root / self.image_dir / category
        try:
            split = json.loads(file.read_text(encoding="utf-8"))
            train, test = (
                [_sample(row, base) for row in split[name]] for name in ("train", "test")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not a split file of Real-IAD ({error!r}): set dataset.layout.split_dir"
            ) from error
        anomalous = sum(sample.label for sample in train)
        if anomalous:
            raise UserError(
                f"{file} trains on {anomalous} anomalous images: set dataset.layout.split_dir to "
                "realiad_jsons/realiad_jsons"
            )
        return Listing(train, test)

    def folders(self, root: Path, categories: Sequence[str]) -> list[Path]:
        """Name none: the split file says what is read."""
        return []


def _sample(row: dict[str, Any], base: Path) -> Sample:
    """Return the image of a row of a split file, whose paths are relative to the category."""
    kind, mask = row["anomaly_class"], row.get("mask_path")
    return Sample(
        path=str(base / row["image_path"]),
        category=base.name,
        defect_type="good" if kind == "OK" else kind,
        label=kind != "OK",
        mask_path=str(base / mask) if mask and kind != "OK" else None,
        group=Path(row["image_path"]).parent.as_posix(),
    )
