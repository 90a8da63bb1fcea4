"""Maps of real images, with real masks: lines of the picture that a blur takes away."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from anomaly_lit.metrics import PixelMetrics

FOLDER = Path(os.environ.get("ANOMALY_LIT_DATA", "missing")) / "industrial" / "toothbrush"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is absent; set ANOMALY_LIT_DATA"),
]


def real_maps() -> tuple[torch.Tensor, torch.Tensor]:
    maps, masks = [], []
    for path in sorted(FOLDER.glob("test/*/*.jpg")):
        grey = np.asarray(Image.open(path).convert("L"), np.float32)
        maps.append(np.abs(grey - ndimage.gaussian_filter(grey, 6)))
        drawn = FOLDER / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        masks.append(np.asarray(Image.open(drawn)) > 0 if drawn.exists() else grey < -1)
    return torch.from_numpy(np.stack(maps))[:, None], torch.from_numpy(np.stack(masks))[:, None]


def direct_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Mean over regions of each region's own area under its curve: another order of the sums."""
    background = np.concatenate([m[~k] for m, k in zip(maps, masks, strict=True)])
    thresholds = np.unique(maps)
    rate = 1 - np.searchsorted(np.sort(background), thresholds) / len(background)
    x = np.concatenate([rate, [0.0]])[::-1]
    areas = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        for region in range(1, count + 1):
            inside = np.sort(scores[labels == region])
            found = 1 - np.searchsorted(inside, thresholds) / len(inside)
            y = np.concatenate([found, [0.0]])[::-1]
            within = x < limit
            end = within.sum()
            last = y[end - 1] + (y[end] - y[end - 1]) * (limit - x[end - 1]) / (x[end] - x[end - 1])
            areas.append(np.trapezoid(np.append(y[within], last), np.append(x[within], limit)))
    return float(np.mean(areas)) / limit


def test_real_maps_agree_with_scikit_learn_and_a_direct_overlap() -> None:
    maps, masks = real_maps()
    values = {}
    for engine in ("exact", "streaming"):
        metric = PixelMetrics(engine=engine, center=2.0)
        for part, mask in zip(maps.split(8), masks.split(8), strict=True):
            metric.update(part, mask)
        values[engine] = metric.compute()
    exact, streaming = values["exact"], values["streaming"]
    labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
    assert abs(exact["pixel_auroc"] - sklearn_metrics.roc_auc_score(labels, scores)) < 1e-9
    assert abs(exact["pixel_ap"] - sklearn_metrics.average_precision_score(labels, scores)) < 1e-9
    for limit, key in ((0.3, "pixel_aupro"), (0.05, "pixel_aupro_0.05")):
        assert abs(exact[key] - direct_aupro(maps[:, 0].numpy(), masks[:, 0].numpy(), limit)) < 1e-9
    for key, value in exact.items():
        if f"{key}_bound" in streaming:
            assert (streaming[key] - value).abs() <= streaming[f"{key}_bound"] <= 1e-3, key
