"""Regions of a mask."""

from __future__ import annotations

from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F


def opened(mask: Tensor, least_region: int) -> Tensor:
    """Open masks by 3 x 3, and drop what is left of regions that are small.

    Args:
        mask: (B, 1, H, W) bool.
        least_region: Pixels of the smallest region that is kept; regions touch along a side.

    Returns:
        (B, 1, H, W) bool, on the same device.
    """
    high = mask.float()
    kept = (F.max_pool2d(1 - F.max_pool2d(1 - high, 3, 1, 1), 3, 1, 1) > 0).cpu()
    for own in kept[:, 0].numpy() if least_region > 1 else []:  # views
        regions, _ = ndimage.label(own)
        own &= ndimage.sum_labels(own, regions, regions) >= least_region
    return kept.to(mask.device)
