"""Metrics of anomaly detection on raw scores; usable with any code that produces scores."""

from anomaly_lit.metrics.functional import (
    aupimo,
    aupro,
    auroc,
    average_precision,
    curves,
    f1_max,
    item_curves,
)
from anomaly_lit.metrics.image import ImageMetrics, image_metrics
from anomaly_lit.metrics.intervals import bootstrap_interval
from anomaly_lit.metrics.pixel import PixelMetrics
from anomaly_lit.metrics.regions import label_regions
from anomaly_lit.metrics.segmentation import SegmentationMetrics, segmentation

__all__ = [
    "ImageMetrics",
    "PixelMetrics",
    "SegmentationMetrics",
    "aupimo",
    "aupro",
    "auroc",
    "average_precision",
    "bootstrap_interval",
    "curves",
    "f1_max",
    "image_metrics",
    "item_curves",
    "label_regions",
    "segmentation",
]
