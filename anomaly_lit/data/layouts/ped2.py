"""UCSD Ped2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.data.layouts.clips import ClipsLayout
from anomaly_lit.data.layouts.files import by_stem
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.data.truth import read_mask
from anomaly_lit.types import Sample, UserError


class Ped2Layout(ClipsLayout):
    """UCSD Ped2 (Mahadevan et al., 2010) as published, with masks of all tested frames.

    `Train/Train001/001.tif`, `Test/Test001/001.tif`, `Test/Test001_gt/001.bmp`; a mask is all black
    where the frame is normal.

    Args:
        frames: See `ClipsLayout`.
    """

    licence = "UCSD Ped2 is for research; see its page"
    train_key = None  # there is one place only
    mask_hint = "ROOT/Test/<clip>_gt/<stem>.bmp"

    def __init__(self, frames: int = 4) -> None:
        super().__init__(frames, "Train", "Test", category="ped2")
        self.mask_hint = type(self).mask_hint

    def tested(self, root: Path, clip: Path, frames: Sequence[Path], category: str) -> list[Sample]:
        """Label a clip's frames by their masks; folders of masks are no clips.

        Raises:
            UserError: A mask is missing.
        """
        if clip.name.endswith("_gt"):
            return []
        masks = by_stem(clip.with_name(f"{clip.name}_gt"))
        missing = [frame for frame in frames if frame.stem not in masks]
        if missing:
            raise UserError(
                f"{missing[0]} has no mask in {clip.name}_gt ({len(missing)} such frames); unpack "
                "UCSD Ped2 whole, or take dataset=clips for frames with a table of labels"
            )
        found = [bool(read_mask(masks[frame.stem], MAX_PIXELS).any()) for frame in frames]
        return [
            Sample(
                str(frame),
                category,
                "anomaly" if label else "good",
                label,
                masks[frame.stem] if label else None,
                f"{self.test_dir}/{clip.name}",
            )
            for frame, label in zip(frames, found, strict=True)
        ]
