"""What two baselines reach on the clips of a data set that is laid out like `dataset=clips`.

    python experiments/video_ae/baselines.py DIR   # folder with training/ and testing/

A constant score for every frame, and the mean absolute difference to the frame before. The frames
are those that the video auto-encoder scores (all but the first four of each clip), and the metrics
are those of `anomaly-train`: of the scores as they are (`image_auroc`), and of scores that are
brought to [0, 1] within each clip (`frame_auroc`, `clip_auroc`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anomaly_lit.callbacks.clips import summary, timelines
from anomaly_lit.data.companions import with_history
from anomaly_lit.data.layouts.clips import ClipsLayout
from anomaly_lit.metrics import auroc
from anomaly_lit.types import Sample

FRAMES = 4


def main(root: str) -> None:
    every = ClipsLayout(FRAMES).list_category(Path(root), "clips").test
    samples = with_history(every, FRAMES)
    labels = torch.tensor([sample.label for sample in samples])
    before = dict(zip([s.path for s in every[1:]], every, strict=False))
    scores = {
        "constant": torch.zeros(len(samples)),
        "frame difference": torch.tensor([difference(s, before[s.path]) for s in samples]),
    }
    print(f"{len(samples)} frames, {int(labels.sum())} anomalous")
    for name, values in scores.items():
        lines = timelines(samples, values[:, None].double(), torch.ones(1, dtype=torch.float64))
        found = {"image_auroc": float(auroc(values, labels)), **summary(lines)}
        shown = ("image_auroc", "frame_auroc", "clip_auroc")
        print(f"{name}: " + ", ".join(f"{key} {100 * found[key]:.1f}" for key in shown))


def difference(sample: Sample, before: Sample) -> float:
    return float(np.abs(pixels(sample) - pixels(before)).mean())


def pixels(sample: Sample) -> np.ndarray:
    with Image.open(sample.path) as image:
        return np.asarray(image.convert("L"), dtype=np.float32) / 255


if __name__ == "__main__":
    main(sys.argv[1])
