"""Keeping decoded images in memory, because decoding costs more than training a small method."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from anomaly_lit.data.images import Resize, read_sample
from anomaly_lit.types import Sample, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 2.0  # seconds before a progress bar appears


class HostCache:
    """Decoded and resized images and masks in main memory, as 8-bit values.

    Images that no longer fit are decoded each time they are asked for. Under several processes
    each keeps its own; data loader workers share that of their process.

    Args:
        max_gb: Largest memory to use, in GB (1e9 bytes). A 256 x 256 image takes 0.0002 GB.
    """

    def __init__(self, max_gb: float = 4.0) -> None:
        if max_gb < 0:
            raise UserError(f"dataset.cache.max_gb={max_gb}: give a number of GB, at least 0")
        self.max_gb = max_gb
        self._bytes = 0
        self._blocks: list[Tensor] = []  # each (n, h, w, 3) or, for masks, (n, h, w)
        self._places: dict[str, tuple[int, int]] = {}  # block and row, by the file's path

    def __len__(self) -> int:
        """Count the images and masks that are kept."""
        return len(self._places)

    def fill(self, samples: Sequence[Sample], resize: Resize) -> list[str]:
        """Decode what is not kept yet, as far as the memory allows.

        Returns:
            One line for each sample that could not be read.
        """
        fresh = [sample for sample in samples if sample.path not in self._places]
        kept = self._fitting(fresh, resize)
        height, width = resize.size
        images = torch.empty((len(kept), height, width, 3), dtype=torch.uint8)
        masked = [sample for sample in kept if sample.mask_path is not None]
        masks = torch.empty((len(masked), height, width), dtype=torch.bool)
        rows = {sample.path: row for row, sample in enumerate(masked)}

        def decode(item: tuple[int, Sample]) -> str | None:
            row, sample = item
            try:
                image, mask = read_sample(sample, resize)
            except UserError as error:
                return str(error)
            images[row] = torch.from_numpy(image)
            if mask is not None:
                masks[rows[sample.path]] = torch.from_numpy(mask)
            return None

        outcomes = in_threads(decode, list(enumerate(kept)), "Decoding images")
        problems = sorted(outcome for outcome in outcomes if outcome is not None)
        if not problems:
            self._keep(kept, masked, images, masks)
        if len(kept) < len(fresh):
            tell(
                f"{len(kept)} of {len(fresh)} images fit into dataset.cache.max_gb={self.max_gb:g}"
                "; the others are decoded each time"
            )
        return problems

    def get(self, path: str) -> Tensor | None:
        """Give the image (h, w, 3) uint8 or the mask (h, w) bool of a file, if it is kept."""
        place = self._places.get(path)
        return None if place is None else self._blocks[place[0]][place[1]]

    def share(self) -> None:
        """Move to shared memory, so that data loader workers started by spawn copy nothing."""
        for block in self._blocks:
            block.share_memory_()

    def _fitting(self, samples: list[Sample], resize: Resize) -> list[Sample]:
        kept, pixels = [], resize.size[0] * resize.size[1]
        for sample in samples:
            size = pixels * (3 if sample.mask_path is None else 4)
            if self._bytes + size > self.max_gb * 1e9:
                break
            self._bytes += size
            kept.append(sample)
        return kept

    def _keep(
        self, samples: list[Sample], masked: list[Sample], images: Tensor, masks: Tensor
    ) -> None:
        block = len(self._blocks)
        self._blocks += [images, masks]
        self._places |= {sample.path: (block, row) for row, sample in enumerate(samples)}
        self._places |= {
            str(sample.mask_path): (block + 1, row) for row, sample in enumerate(masked)
        }


@rank_zero_only
def tell(text: str) -> None:
    """Say something that should be known, once for all processes."""
    log.warning(text)


def in_threads(work: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """Do `work` on all items in threads, in order; a progress bar appears if it takes long."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(watched(pool.map(work, items), len(items), title))


def watched(
    results: Iterable[R], total: int, title: str, step: Callable[[R], int] = lambda result: 1
) -> Iterator[R]:
    """Pass results on; a progress bar appears if it takes long.

    Args:
        results: What is passed on.
        total: Steps in all.
        title: Shown beside the bar.
        step: Steps that a result stands for.
    """
    start, done, bar = time.monotonic(), 0, None
    hidden = getattr(rank_zero_only, "rank", 0) != 0
    try:
        for result in results:
            yield result
            done += step(result)
            if bar is None and not hidden and time.monotonic() - start > PATIENCE:
                bar = Progress(transient=True, console=Console(stderr=True))
                bar.start()
                task = bar.add_task(title, total=total)
            if bar is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
