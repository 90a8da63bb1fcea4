"""Join the maps of several stages to one map, and bring a map to the image's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.types import UserError, check_range


def aggregate(features: Sequence[Tensor], grid: Sequence[int], average: bool = False) -> Tensor:
    """Bring all stages to one grid and join their channels.

    Args:
        features: Maps (B, C_i, h_i, w_i), finest first.
        grid: Height and width of the result.
        average: Take the mean over 3 x 3 neighbours after resizing; the zero padding counts, so
            that values at the borders are lower, as in PatchCore and its successors.

    Returns:
        (B, sum of C_i, *grid), resized bilinearly with aligned corners.
    """
    size = (grid[0], grid[1])
    maps = [
        F.interpolate(feature, size, mode="bilinear", align_corners=True) for feature in features
    ]
    if average:
        maps = [F.avg_pool2d(map_, 3, stride=1, padding=1) for map_ in maps]
    return torch.cat(maps, dim=1)


def resize(anomaly_map: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Resize a (B, C, h, w) map to `size`, bilinearly.

    Args:
        anomaly_map: (B, C, h, w) float.
        size: Height and width of the result.
        align_corners: Corner values keep their places, as most published methods have it; false:
            values are squares of pixels, as when an image is resized.
    """
    wanted = (size[0], size[1])
    return F.interpolate(anomaly_map, wanted, mode="bilinear", align_corners=align_corners)


def shrink(feature: Tensor, size: Sequence[int]) -> Tensor:
    """Shrink a (B, C, h, w) map bilinearly, with anti-aliasing.

    Equals `F.interpolate(..., antialias=True)`, but as two matrix products: OpenVINO 2026.4 reads
    that flag and ignores it. Keeps the map's precision, even under autocast.
    """
    rows, columns = (
        F.interpolate(
            torch.eye(n, device=feature.device, dtype=feature.dtype).view(1, 1, n, n),
            (wanted, n),
            mode="bilinear",
            antialias=True,
        ).view(wanted, n)
        for n, wanted in zip(feature.shape[-2:], size, strict=True)
    )
    with torch.autocast(feature.device.type, enabled=False):
        return rows @ feature @ columns.T


def smooth(anomaly_map: Tensor, sigma: float, radius: int | None = None) -> Tensor:
    """Apply the Gaussian filter of `scipy.ndimage.gaussian_filter` (reflected at the edges).

    Args:
        anomaly_map: (B, C, H, W) float.
        sigma: Standard deviation in pixels; 0 returns the map as it is.
        radius: Pixels on each side after which the filter is cut; None: 4 sigma.
    """
    radius = int(4 * sigma + 0.5) if radius is None else radius
    if radius == 0 or sigma == 0:
        return anomaly_map
    offsets = torch.arange(-radius, radius + 1, device=anomaly_map.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(anomaly_map.dtype)
    batch, channels, height, width = anomaly_map.shape
    flat = anomaly_map.reshape(batch * channels, 1, height, width)
    with torch.autocast(flat.device.type, enabled=False):  # with 8 bits many values would tie
        flat = F.conv2d(
            flat[..., _reflected(height, radius, flat.device), :], kernel.view(1, 1, -1, 1)
        )
        flat = F.conv2d(flat[..., _reflected(width, radius, flat.device)], kernel.view(1, 1, 1, -1))
    return flat.view(batch, channels, height, width)


def grid_pair(grid: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a map from one number or two.

    Raises:
        UserError: There are more or fewer.
    """
    sides = [grid, grid] if isinstance(grid, int) else list(grid)
    if len(sides) != 2:
        raise UserError(f"method.grid={sides}: give one whole number, or [height, width]")
    return sides[0], sides[1]


def grid_of(image_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    """Return rows and columns of a map with one position every `stride` pixels.

    Raises:
        UserError: The stride does not divide the image.
    """
    check_range("method", "[1, inf)", stride=stride)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % stride or width % stride:
        raise UserError(
            f"image_size={image_size} is no multiple of method.stride={stride}, the stride of the "
            "feature map: change either"
        )
    return height // stride, width // stride


def check_multiple(size: Sequence[int], stride: int, what: str) -> None:
    """Check that both sides of an image are multiples of a stride.

    Args:
        size: Height and width.
        stride: Pixels.
        what: What has this stride, for the message.

    Raises:
        UserError: A side is no multiple; the message gives the two nearest that are.
    """
    for side in size:
        if side % stride:
            below, above = side // stride * stride, (side // stride + 1) * stride
            near = f"{below} or {above}" if below else str(above)
            raise UserError(
                f"images of {size[0]} x {size[1]}: {side} is no multiple of {stride}, {what}; "
                f"set image_size to {near}"
            )


def top_mean(anomaly_map: Tensor, share: float = 0.01) -> Tensor:
    """Return the mean of the largest values of each (B, 1, H, W) map, as (B,).

    Args:
        anomaly_map: Maps of any values.
        share: Share of the pixels that counts, in (0, 1], rounded down; at least one pixel does.
    """
    flat = anomaly_map.flatten(1)
    return flat.topk(max(1, int(share * flat.shape[1])), dim=1).values.mean(dim=1)


def pooled_maximum(anomaly_map: Tensor, window: int) -> Tensor:
    """Return the largest mean, (B,), over a square window within the (B, 1, H, W) map."""
    height, width = anomaly_map.shape[-2:]
    size = (min(window, height), min(window, width))
    return F.avg_pool2d(anomaly_map, size, stride=1).amax(dim=(1, 2, 3))


def _reflected(length: int, radius: int, device: torch.device) -> Tensor:
    """Return indices -radius .. length + radius, mirrored at the edges (an edge is repeated)."""
    index = torch.arange(-radius, length + radius, device=device) % (2 * length)
    return torch.where(index < length, index, 2 * length - 1 - index)
