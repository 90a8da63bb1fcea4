"""A split as a data set that returns whole batches: rows of a cache are read together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomaly_lit.data.caches.memory import ImageCache, gather
from anomaly_lit.data.companions import Companion
from anomaly_lit.data.images import Resize, read_sample
from anomaly_lit.types import Batch, Sample

Indices = Sequence[int] | Sequence[tuple[int, int]]


class Images(Dataset[Batch]):
    """The images of one split, taken from the cache, or read where the cache does not hold them.

    Args:
        samples: The split, in order.
        resize: Geometry of what is read.
        cache: Holds decoded images; None reads each time.
        companions: Further images to give with each image; indices then come with their step.
    """

    def __init__(
        self,
        samples: list[Sample],
        resize: Resize,
        cache: ImageCache | None,
        companions: Sequence[Companion] = (),
    ) -> None:
        self.samples = samples
        self.resize = resize
        self.cache = cache
        found = (cache or ImageCache()).places(samples)
        self.image_places, self.mask_places = found  # each (n, 2), -1 where it has to be read
        self.companions = [
            (companion, self if companion.samples is samples else
             Images(companion.samples, resize, cache))
            for companion in companions
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        """Return a batch of one."""
        return self.batch([index])

    def __getitems__(self, indices: Indices) -> Batch:
        """Return a batch; data loaders call this."""
        return self.batch(indices)

    def batch(self, indices: Indices) -> Batch:
        """Return the samples of these indices.

        Args:
            indices: Positions in the split, or pairs of a position and the number of the batch,
                for a batch with companions.
        """
        rows = [index[0] if isinstance(index, tuple) else index for index in indices]
        samples = [self.samples[row] for row in rows]
        image, gt_mask = self._read(rows)
        batch: Batch = {
            "image": image,
            "index": torch.tensor(rows),
            "label": torch.tensor([sample.label for sample in samples]),
            "gt_mask": gt_mask,
            "category": [sample.category for sample in samples],
            "defect_type": [sample.defect_type for sample in samples],
            "path": [sample.path for sample in samples],
        }
        steps = [index[1] if isinstance(index, tuple) else None for index in indices]
        for companion, images in self.companions:
            if None not in steps or companion.steady:
                drawn = [companion.draw(step or 0, r) for step, r in zip(steps, rows, strict=True)]
                batch |= images.beside(companion, torch.tensor(drawn))
        return batch

    def beside(self, companion: Companion, drawn: Tensor) -> Batch:
        """Return a companion's part of a batch.

        Args:
            companion: Whose images these are.
            drawn: (B,) or (B, n) positions in this split.
        """
        rows = drawn.flatten().tolist()
        image, mask = self._read(rows)
        part: dict[str, Any] = {
            companion.name: image.reshape(*drawn.shape, *image.shape[1:]),
            f"{companion.name}_path": [self.samples[row].path for row in rows],
        }
        if companion.masks:
            part[f"{companion.name}_mask"] = mask.reshape(*drawn.shape, *mask.shape[1:])
        return cast(Batch, part)

    def _read(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, h, w) float32 in [0, 1] and masks (B, 1, h, w) bool."""
        image_places, mask_places = self.image_places[rows], self.mask_places[rows]
        size, device = self.resize.size, self._device()
        kept, masked = image_places[:, 0] >= 0, mask_places[:, 0] >= 0
        masks = torch.zeros((len(rows), *size), dtype=torch.bool, device=device)
        if self.cache is not None and masked.any():
            masks[masked.to(device)] = gather(self.cache.masks, mask_places[masked])
        if self.cache is not None and kept.all():
            images = gather(self.cache.images, image_places)
        else:
            images = torch.empty((len(rows), *size, 3), dtype=torch.uint8, device=device)
            if self.cache is not None and kept.any():
                images[kept.to(device)] = gather(self.cache.images, image_places[kept])
            self._decode(rows, (~kept).nonzero()[:, 0].tolist(), images, masks)
        return as_float(images), masks.unsqueeze(1)

    def _decode(self, rows: list[int], missing: list[int], images: Tensor, masks: Tensor) -> None:
        for place in missing:
            image, mask = read_sample(self.samples[rows[place]], self.resize)
            images[place] = torch.from_numpy(np.ascontiguousarray(image))
            if mask is not None:
                masks[place] = torch.from_numpy(np.ascontiguousarray(mask))

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.cache is None else self.cache.device


def as_float(images: Tensor) -> Tensor:
    """Convert (B, h, w, 3) uint8 to (B, 3, h, w) float32 in [0, 1], identically on every device."""
    pixels = images.permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # CUDA multiplies by the rounded inverse of a Python number
    return pixels.div_(torch.tensor(255.0, device=images.device))


def as_it_is(batch: Any) -> Any:
    """Return the batch unchanged: the data set has already assembled it."""
    return batch
