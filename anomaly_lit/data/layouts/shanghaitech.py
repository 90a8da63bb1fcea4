"""ShanghaiTech Campus."""

from __future__ import annotations

from anomaly_lit.data.layouts.clips import ClipsLayout


class ShanghaiTechLayout(ClipsLayout):
    """ShanghaiTech Campus (Luo et al., 2017): training videos turned into frames.

    `training/frames/01_001/0001.png`, `testing/frames/01_0014/000.jpg` and
    `testing/test_frame_mask/01_0014.npy`. Its pixel masks are not read.

    Args:
        frames: See `ClipsLayout`.
    """

    licence = "ShanghaiTech Campus: see its page"
    train_key = None  # there is one place only

    def __init__(self, frames: int = 4) -> None:
        super().__init__(frames, labels_dir="testing/test_frame_mask", category="shanghaitech")
