"""Colours of anomaly maps, on a scale that the caller fixes (`low`, `high`).

The fixed scale makes the figures of one run comparable. Nothing here normalises a map by its own
extremes, and nothing computed here goes back into a metric.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from anomaly_lit.drawing.outline import PREDICTION_COLOUR, Colour, check_sizes, draw_outline

UNDEFINED_COLOUR: Colour = (128, 128, 128)  # anomaly values that are NaN
OPACITY = 0.85  # of the heat at the upper end of the scale


def colour_map(anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colour an anomaly map on a scale whose lightness grows with the anomaly.

    The scale is matplotlib's inferno: even steps to the eye, and safe for colour-blind readers.

    Args:
        anomaly_map: (H, W) float, any range. NaN is drawn grey.
        low: Value drawn in the darkest colour; smaller values are clipped to it.
        high: Value drawn in the brightest colour; larger values are clipped to it. Where `high`
            does not exceed `low`, every value above `low` is drawn in the brightest colour.

    Returns:
        (H, W, 3) uint8.
    """
    return np.take(_heat_scale(), _levels(anomaly_map, low, high), axis=0)


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    low: float,
    high: float,
    outline: np.ndarray | None = None,
) -> np.ndarray:
    """Lay heat over an image: the more anomalous a pixel, the more opaque the heat.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W) float, any range. The image shows unchanged where this is NaN.
        low: As in `colour_map`; here the heat is invisible.
        high: As in `colour_map`; here the heat is strongest.
        outline: (H, W) bool, region to outline, usually the predicted one.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: The arrays differ in size.
    """
    check_sizes(image, anomaly_map, outline)
    levels = _levels(anomaly_map, low, high)
    heat = Image.fromarray(np.take(_heat_scale(), levels, axis=0))
    opacity = Image.fromarray(np.take(_opacity_scale(), levels))
    blended = np.array(Image.composite(heat, Image.fromarray(image), opacity))
    return blended if outline is None else draw_outline(blended, outline, PREDICTION_COLOUR)


def _levels(anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return steps of the scale, (H, W) uint8: 0 at low, 254 at high, 255 where NaN."""
    precision = np.promote_types(anomaly_map.dtype, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        levels = np.subtract(anomaly_map, low, dtype=precision)
        levels *= 254 / max(high - low, 1e-30)  # almost a step where high does not exceed low
    np.clip(levels, 0, 254, out=levels)
    levels[np.isnan(levels)] = 255
    return np.rint(levels, out=levels).astype(np.uint8)


@lru_cache(maxsize=1)
def _heat_scale() -> np.ndarray:
    """Return a colour for each level, (256, 3) uint8."""
    import matplotlib

    colours = matplotlib.colormaps["inferno"](np.linspace(0, 1, 255), bytes=True)[:, :3]
    return np.concatenate((colours, [UNDEFINED_COLOUR])).astype(np.uint8)


@lru_cache(maxsize=1)
def _opacity_scale() -> np.ndarray:
    """Return an opacity for each level, (256,) uint8.

    A power above 1 keeps the heat of normal areas from tinting the image.
    """
    opacity = 255 * OPACITY * np.linspace(0, 1, 255) ** 1.5
    return np.append(opacity.round(), 0).astype(np.uint8)
