"""Caches of decoded images in memory: decoding costs more than training a small method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_lit.data.images import Resize, read_sample
from anomaly_lit.data.progress import in_threads, warn_once
from anomaly_lit.types import Sample, UserError

Place = tuple[int, int]  # number of a block, row in it
NOWHERE = (-1, -1)


class ImageCache:
    """Base of the image caches: blocks of images and masks, and where each file's row is.

    Attributes:
        images: Blocks (n, h, w, 3) uint8.
        masks: Blocks (n, h, w) bool.
        image_at: Block and row of an image, by the file's path.
        mask_at: Likewise of masks.
        device: The device that holds the blocks.
    """

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.image_at: dict[str, Place] = {}
        self.mask_at: dict[str, Place] = {}
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        """Return the number of images and masks in the cache."""
        return len(self.image_at) + len(self.mask_at)

    def fill(self, samples: Sequence[Sample], resize: Resize) -> list[str]:
        """Decode what the cache does not hold yet, as far as the space allows.

        Returns:
            One line for each sample that could not be read.
        """
        raise NotImplementedError

    def places(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return block and row of each image, (n, 2), and of each mask; -1 where there is none."""
        images = [self.image_at.get(sample.path, NOWHERE) for sample in samples]
        masks = [self.mask_at.get(sample.mask_path or "", NOWHERE) for sample in samples]
        return torch.tensor(images).view(-1, 2), torch.tensor(masks).view(-1, 2)

    def prepare(self, device: torch.device | None, workers: int) -> None:
        """Prepare for a data loader.

        Args:
            device: The trainer's device; None where there is no trainer.
            workers: Number of worker processes that will read from the cache.
        """


class HostCache(ImageCache):
    """Decoded and resized images and masks in main memory, as 8-bit values.

    Images that do not fit are decoded each time they are needed. With several training processes
    each has its own cache; data loader workers share the cache of their process.

    Args:
        max_gb: Largest memory to use, in GB (1e9 bytes). A 256 x 256 image takes 0.0002 GB.
    """

    def __init__(self, max_gb: float = 4.0) -> None:
        super().__init__()
        self.max_gb = checked_gb(max_gb, "dataset.cache")
        self._bytes = 0

    def fill(self, samples: Sequence[Sample], resize: Resize) -> list[str]:
        """Decode what the cache does not hold yet, as far as the memory allows.

        Returns:
            One line for each sample that could not be read.
        """
        fresh = [sample for sample in samples if sample.path not in self.image_at]
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
        if not problems and kept:
            self._keep(kept, masked, images, masks)
        if len(kept) < len(fresh):
            warn_once(
                f"{len(kept)} of {len(fresh)} images fit into dataset.cache.max_gb={self.max_gb:g}"
                "; the others are decoded each time"
            )
        return problems

    def prepare(self, device: torch.device | None, workers: int) -> None:
        """Move the blocks to shared memory, so that spawned workers copy nothing."""
        for block in [*self.images, *self.masks] if workers else ():
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
        block = len(self.images)
        self.images.append(images.to(self.device))
        self.masks.append(masks.to(self.device))
        self.image_at |= {sample.path: (block, row) for row, sample in enumerate(samples)}
        self.mask_at |= {str(sample.mask_path): (block, row) for row, sample in enumerate(masked)}


class DeviceCache(HostCache):
    """All decoded images and masks on the trainer's device, where batches are assembled.

    A step copies no images to the device. On a machine without a GPU the device is the CPU, and
    this equals `HostCache`, except that it holds all images or raises. Each process has its own
    copy.

    Args:
        max_gb: Largest memory to use, in GB (1e9 bytes), first on the host, then on the device.

    Raises:
        UserError: From `fill`, if not all images fit.
    """

    def prepare(self, device: torch.device | None, workers: int) -> None:
        """Move the blocks to the device.

        Raises:
            UserError: The images do not fit, or worker processes would have to use the GPU.
        """
        if device is None or device == self.device:
            return
        if workers and device.type != "cpu":
            raise UserError(
                f"dataset.num_workers={workers} with cache=device: batches are put together on "
                f"{device}, by one process; set dataset.num_workers=0, or cache=host"
            )
        blocks = [*self.images, *self.masks]
        needed = sum(block.nbytes for block in blocks)
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0]:
            free = torch.cuda.mem_get_info(device)[0] / 1e9
            raise UserError(
                f"the images take {needed / 1e9:.1f} GB and {device} has {free:.1f} GB free: "
                "choose cache=host or cache=disk"
            )
        self.images = [block.to(device) for block in self.images]
        self.masks = [block.to(device) for block in self.masks]
        self.device = device

    def _fitting(self, samples: list[Sample], resize: Resize) -> list[Sample]:
        kept = super()._fitting(samples, resize)
        if len(kept) < len(samples):
            raise UserError(
                f"cache=device keeps all images, and {len(kept)} of {len(samples)} fit into "
                f"dataset.cache.max_gb={self.max_gb:g}: raise it, or choose cache=host or "
                "cache=disk"
            )
        return kept


def gather(blocks: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return rows of several blocks, (B, *shape of a row), given block and row of each, (B, 2)."""
    numbers = places[:, 0].unique().tolist()
    device = blocks[numbers[0]].device
    if len(numbers) == 1:
        return blocks[numbers[0]].index_select(0, places[:, 1].to(device))
    first = blocks[numbers[0]]
    rows = first.new_empty((len(places), *first.shape[1:]))
    for number in numbers:
        chosen = (places[:, 0] == number).nonzero()[:, 0]
        rows[chosen.to(device)] = blocks[number].index_select(0, places[chosen, 1].to(device))
    return rows


def checked_gb(max_gb: float, setting: str) -> float:
    """Return `max_gb`; raise UserError if it is negative or not a number."""
    if not max_gb >= 0:
        raise UserError(f"{setting}.max_gb={max_gb}: give a number of GB, at least 0")
    return max_gb
