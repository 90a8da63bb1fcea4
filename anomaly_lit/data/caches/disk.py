"""A cache of decoded images on disk: each is decoded once for all runs and sweep jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL
import scipy
import torch
from PIL import features
from torch import Tensor

from anomaly_lit.data.caches.locks import need_locks
from anomaly_lit.data.caches.memory import ImageCache, Place, checked_gb
from anomaly_lit.data.caches.segments import Column, Draft
from anomaly_lit.data.caches.store import Store, cache_folder, file_key
from anomaly_lit.data.images import READING, Resize, check_sizes, read_header, read_image
from anomaly_lit.data.progress import in_threads
from anomaly_lit.data.truth import read_mask
from anomaly_lit.types import Sample, UserError

DECODERS = ("jpg", "jpg_2000", "zlib", "libtiff")


class DiskCache(ImageCache):
    """Decoded and resized images and masks in files, shared by all processes of a machine.

    Batches are read from memory-mapped files: the system holds them in memory once for all
    processes, and drops them when memory is short. An image is identified by its path, size and
    times of change, the geometry, and the versions of the libraries that decode it. Every row is
    checked when a run opens it. Images that do not fit are decoded each time.

    Args:
        folder: Folder of the files; None: that in ANOMALY_LIT_CACHE, else ~/.cache/anomaly_lit.
        max_gb: Largest size of all images in the folder, those of other data sets included, in GB
            (1e9 bytes). The least recently used ones that no process uses are removed first.
    """

    def __init__(self, folder: str | None = None, max_gb: float = 50.0) -> None:
        super().__init__()
        need_locks()
        self.folder = cache_folder(folder)
        self.max_gb = checked_gb(max_gb, "dataset.cache")
        self._stores: list[Store] = []  # of images and of masks

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped blocks: a worker process maps the files again."""
        return {**vars(self), "images": [], "masks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._use_blocks()

    def fill(self, samples: Sequence[Sample], resize: Resize) -> list[str]:
        """Decode what no run has decoded yet, as far as the disk space allows.

        Returns:
            One line for each sample that could not be read.
        """
        fresh = [sample for sample in samples if sample.path not in self.image_at]
        if not fresh:
            return []
        if not self._stores:
            self._stores = [self._store("image", resize), self._store("mask", resize)]
        images, masks = self._stores
        masked = [sample for sample in fresh if sample.mask_path is not None]

        def read_one(sample: Sample) -> Tensor:
            return torch.from_numpy(resize.image(read_image(sample.path, None)))

        def read_its_mask(sample: Sample) -> Tensor:
            mask = read_mask(str(sample.mask_path))
            check_sizes(sample, read_header(sample.path).size, mask.shape)
            return torch.from_numpy(resize.mask(mask))

        try:
            image_keys = {sample.path: file_key(sample.path) for sample in fresh}
            mask_keys = {str(s.mask_path): file_key(str(s.mask_path)) for s in masked}
        except UserError as error:
            return [str(error)]
        problems = images.fill(list(image_keys.values()), _writer(fresh, read_one))
        problems += masks.fill(list(mask_keys.values()), _writer(masked, read_its_mask))
        if not problems:
            self._use_blocks()
            self._find(fresh, image_keys, mask_keys)
        return sorted(problems)

    def _find(
        self, samples: list[Sample], images: dict[str, bytes], masks: dict[str, bytes]
    ) -> None:
        """Note the places of samples whose image and mask are both in the cache."""
        for sample in samples:
            mask: Place | None = None
            if sample.mask_path is not None:
                mask = self._stores[1].places.get(masks[sample.mask_path])
            image = self._stores[0].places.get(images[sample.path])
            if image is None or (mask is None and sample.mask_path is not None):
                continue
            self.image_at[sample.path] = image
            if mask is not None:
                self.mask_at[str(sample.mask_path)] = mask

    def _use_blocks(self) -> None:
        if self._stores:
            self.images, self.masks = (store.column(0) for store in self._stores)

    def _store(self, what: str, resize: Resize) -> Store:
        shape = (*resize.size, 3) if what == "image" else resize.size
        dtype = torch.uint8 if what == "image" else torch.bool
        subject = {"what": what, **reading(resize)}
        columns = [Column(shape, dtype)]
        return Store(self.folder / "images", subject, columns, self.max_gb, "dataset.cache")


def reading(resize: Resize) -> dict[str, Any]:
    """Return what pixels depend on besides their file: geometry and versions of libraries."""
    return {
        "reading": READING,
        "size": [*resize.full, *resize.size],
        "policy": [resize.policy, resize.interpolation],
        "versions": [PIL.__version__, scipy.__version__],
        "decoders": [features.version(name) for name in DECODERS],
    }


def _writer(samples: list[Sample], read: Any) -> Any:
    """Return a function that writes rows of a draft in threads and names unreadable files."""

    def write(draft: Draft, chosen: list[int]) -> list[str]:
        def one(item: tuple[int, int]) -> str | None:
            row, position = item
            try:
                draft.put(row, [read(samples[position]).unsqueeze(0)])
            except UserError as error:
                return str(error)
            return None

        outcomes = in_threads(one, list(enumerate(chosen)), "Decoding images")
        return [outcome for outcome in outcomes if outcome is not None]

    return write
