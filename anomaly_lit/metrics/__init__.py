"""Metrics of anomaly detection, on raw scores: usable alone, with any code that makes scores."""

from anomaly_lit.metrics.functional import (
    aupimo,
    aupro,
    auroc,
    average_precision,
    bootstrap_interval,
    curves,
    f1_max,
    item_curves,
)
from anomaly_lit.metrics.image import ImageMetrics
from anomaly_lit.metrics.pixel import PixelMetrics
from anomaly_lit.metrics.regions import label_regions

__all__ = [
    "ImageMetrics",
    "PixelMetrics",
    "aupimo",
    "aupro",
    "auroc",
    "average_precision",
    "bootstrap_interval",
    "curves",
    "f1_max",
    "item_curves",
    "label_regions",
]
