"""Metrics of a segmentation: the pixels that a map marks at a threshold chosen beforehand."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from anomaly_lit.metrics.functional import check_shapes
from anomaly_lit.metrics.ranking import NAN
from anomaly_lit.metrics.regions import send


def segmentation(anomaly_map: Tensor, gt_mask: Tensor, threshold: float) -> dict[str, Tensor]:
    """Return precision, recall, F1 and IoU of the pixels above a threshold.

    With T marked pixels that are anomalous, F marked pixels that are not, and P anomalous pixels,
    counted over all images: T / (T + F), T / P, 2 T / (T + F + P) and T / (F + P).

    Args:
        anomaly_map: (B, 1, H, W), unbounded, read as float32.
        gt_mask: (B, 1, H, W) bool.
        threshold: pixels greater than it are marked.

    Returns:
        segmentation_precision, segmentation_recall, segmentation_f1 and segmentation_iou: 0-d
        float64 tensors in [0, 1]. NaN without anomalous pixels; if there are some but none is
        marked, the precision is 0.

    Raises:
        UserError: shapes or types do not fit.
    """
    check_shapes(anomaly_map, gt_mask)
    return _values(_counts(anomaly_map, gt_mask, threshold).cpu())


class SegmentationMetrics(Metric):
    """Precision, recall, F1 and IoU of the pixels above a threshold; see `segmentation`.

    Three counts are kept and summed over processes, so values are exact for any number of pixels.

    Args:
        threshold: pixels above it are marked. Take it from images that are not scored here, such as
            held-out normal ones; the best threshold on the scored images is that of `pixel_f1max`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    counts: Tensor  # (3,) int64: marked anomalous, marked, anomalous pixels

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = float(threshold)
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, anomaly_map: Tensor, gt_mask: Tensor) -> None:
        """Add a batch: (B, 1, H, W) unbounded and bool. Nothing here waits for a GPU.

        Raises:
            UserError: shapes or types do not fit.
        """
        check_shapes(anomaly_map, gt_mask)
        self.counts += _counts(anomaly_map, gt_mask, self.threshold)

    def compute(self) -> dict[str, Tensor]:
        """Return all values: see `segmentation`."""
        return _values(self.counts.cpu())


def _counts(anomaly_map: Tensor, gt_mask: Tensor, threshold: float) -> Tensor:
    """Count the pixels that are marked and anomalous, marked, and anomalous: (3,) int64."""
    marked = anomaly_map.detach().float() > threshold
    anomalous = send(gt_mask, marked.device)
    return torch.stack([(marked & anomalous).sum(), marked.sum(), anomalous.sum()])


def _values(counts: Tensor) -> dict[str, Tensor]:
    found, marked, anomalous = counts.double()
    names = [f"segmentation_{name}" for name in ("precision", "recall", "f1", "iou")]
    if not anomalous:
        return dict.fromkeys(names, NAN)
    shares = (
        found / marked.clamp(min=1),
        found / anomalous,
        2 * found / (marked + anomalous),
        found / (marked + anomalous - found),
    )
    return dict(zip(names, shares, strict=True))
