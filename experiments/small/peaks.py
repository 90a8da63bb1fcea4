"""Where a run's maps are highest on its test images: on the defect, or where?

    python experiments/small/peaks.py RUN

Prints how many peaks lie on the defect or within `NEAR` pixels of it, for the smaller and the
larger half of the defects, and the places of the peaks of the normal images with the highest
scores, as shares of height and width. Nothing is chosen by it.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

import anomaly_lit

NEAR = 8
NORMAL = 20  # normal images, those with the highest scores


def main(run: Path) -> None:
    """Score the test images of a run and say where their maps are highest."""
    detector = anomaly_lit.load(run / "checkpoints" / "last.ckpt")
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    rows.sort(key=lambda row: float(row["score"]), reverse=True)
    found: list[tuple[int, bool]] = []
    places: Counter[str] = Counter()
    for row in rows:
        path, defect = Path(row["path"]), row["label"] == "1"
        if not defect and places.total() == NORMAL:
            continue
        anomaly_map = detector.predict(path)[0].anomaly_map
        peak = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        if defect:
            truth = mask_of(path)
            found.append((int(truth.sum()), bool(binary_dilation(truth, iterations=NEAR)[peak])))
        else:
            shares = [at / side for at, side in zip(peak, anomaly_map.shape, strict=True)]
            places[", ".join(f"{share:.1f}" for share in shares)] += 1
    found.sort()
    for name, half in (
        ("smaller", found[: len(found) // 2]),
        ("larger", found[len(found) // 2 :]),
    ):
        hits = sum(hit for _, hit in half)
        print(f"{name} defects, {half[0][0]} to {half[-1][0]} pixels: {hits} of {len(half)} peaks")
    print(f"normal images: {dict(places.most_common())}")


def mask_of(path: Path) -> np.ndarray:
    """Return the truth of a test image in MVTec AD's layout, (H, W) bool."""
    folder = path.parents[2] / "ground_truth" / path.parent.name
    return np.array(Image.open(next(folder.glob(f"{path.stem}*"))).convert("L")) > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
