"""Connected regions of ground truth masks, and the weight of each anomalous pixel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

NEIGHBOURS = np.ones((3, 3), dtype=bool)  # 8-connected, as in the official MVTec evaluation


class Regions(NamedTuple):
    """The regions of a batch of masks, described by its P anomalous pixels."""

    position: Tensor  # (P,) int64, positions in the flattened batch, ascending
    area: Tensor  # (P,) int64, size of each pixel's region
    image_area: Tensor  # (P,) int64, anomalous pixels in each pixel's image
    defective: Tensor  # (B,) bool, images with a region
    number: int  # number of regions

    def to(self, device: torch.device) -> Regions:
        """Move the pixels' tensors; `defective` stays on the CPU."""
        position, area, image_area = (send(tensor, device) for tensor in self[:3])
        return self._replace(
            position=position, area=area, image_area=image_area, defective=self.defective.cpu()
        )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor; from the CPU to a GPU this does not wait for the GPU's pending work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def label_regions(gt_mask: Tensor) -> Tensor:
    """Assign a number to each 8-connected region; regions of two images never share one.

    This is exact for regions of any shape. On a CPU it uses scipy; on other devices kornia's
    union-find, whose numbers are not consecutive.

    Args:
        gt_mask: (B, 1, H, W) bool.

    Returns:
        (B, 1, H, W) int64, 0 outside regions.
    """
    if gt_mask.device.type != "cpu":
        return _label_on_device(gt_mask)
    labels = torch.zeros(gt_mask.shape, dtype=torch.int64)
    count = 0
    for mask, out in zip(gt_mask[:, 0].numpy(), labels[:, 0].numpy(), strict=True):
        box = _bounding_box(mask)
        if box is None:
            continue
        found, regions = ndimage.label(mask[box], NEIGHBOURS)
        out[box] = np.where(found > 0, found + count, 0)
        count += regions
    return labels


def _label_on_device(gt_mask: Tensor) -> Tensor:
    from kornia.contrib import connected_components_union_find  # slow to import, and for GPUs only

    return connected_components_union_find(gt_mask)


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice] | None:
    """Return the rows and columns that hold the whole mask; None for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def find_regions(gt_mask: Tensor) -> Regions:
    """Find the regions of masks (B, 1, H, W) bool, on the masks' device.

    On a CPU only images with a defect cost time. A mask on a GPU makes the CPU wait: to avoid that,
    leave masks on the CPU, where the data loader put them.
    """
    if gt_mask.device.type != "cpu":
        return _find_on_device(gt_mask)
    positions, areas, image_areas, count = [], [], [], 0
    pixels = gt_mask[0].numel() if len(gt_mask) else 0
    defective = torch.zeros(len(gt_mask), dtype=torch.bool)
    for index, mask in enumerate(gt_mask[:, 0].numpy()):
        box = _bounding_box(mask)
        if box is None:
            continue
        labels, regions = ndimage.label(mask[box], NEIGHBOURS)
        row, column = np.nonzero(labels)
        labels = labels[row, column]
        positions.append(
            index * pixels + (row + box[0].start) * mask.shape[1] + column + box[1].start
        )
        areas.append(np.bincount(labels)[labels])
        image_areas.append(np.full(len(labels), len(labels)))
        defective[index] = True
        count += regions

    def join(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))

    return Regions(join(positions), join(areas), join(image_areas), defective, count)


def _find_on_device(gt_mask: Tensor) -> Regions:
    """Find regions with kornia's union-find, for masks that are already on a GPU."""
    mask = gt_mask.flatten(1)
    position = mask.flatten().nonzero().squeeze(1)
    labels = _label_on_device(gt_mask).flatten()[position]
    _, inverse, size = labels.unique(return_inverse=True, return_counts=True)
    image_area = mask.sum(1)[position // mask.shape[1]]
    return Regions(position, size[inverse], image_area, mask.any(1), len(size))
