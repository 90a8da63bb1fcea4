"""CUHK Avenue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.data.layouts.clips import ClipsLayout, one_each
from anomaly_lit.types import UserError


class AvenueLayout(ClipsLayout):
    """CUHK Avenue (Lu et al., 2013): videos turned into frames, masks as published.

    `training_videos/01/0001.png`, `testing_videos/01/0001.png` and
    `ground_truth_demo/testing_label_mask/1_label.mat`, whose `volLabel` has a mask for each frame.
    A frame is anomalous where its mask is not all 0; no pixel metric is computed.

    Args:
        frames: See `ClipsLayout`.
    """

    licence = "CUHK Avenue is for academic research only"
    train_key = None  # there is one place only

    def __init__(self, frames: int = 4) -> None:
        labels = "ground_truth_demo/testing_label_mask"
        super().__init__(frames, "training_videos", "testing_videos", labels, category="avenue")

    def labels(self, root: Path, clip: Path, frames: Sequence[Path]) -> list[bool]:
        """Read the labels of a clip from its file of masks.

        Raises:
            UserError: The clip's name is no number, or its file is missing or has other masks.
        """
        from scipy.io import loadmat

        number = clip.name.lstrip("0")
        file = root / self.labels_dir / f"{number}_label.mat"
        if not number.isdigit() or not file.is_file():
            raise UserError(f"{clip} has no labels: {file} does not exist; unpack Avenue whole")
        masks = loadmat(file).get("volLabel")
        if masks is None:
            raise UserError(f"{file} has no volLabel; it is no label file of Avenue")
        return one_each([mask.any() for mask in masks.ravel()], file, clip, frames)
