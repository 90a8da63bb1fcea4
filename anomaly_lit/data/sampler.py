"""Which images a batch holds: a function of seed, step and rank, so that runs resume exactly."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from anomaly_lit.files import name_bytes
from anomaly_lit.types import Sample


class TrainBatches(Sampler[list[int]]):
    """Batches of shuffled indices, which a resumed run continues where it stopped.

    Training reads one endless sequence of batches. Each pass over the images has its own order. An
    iteration begins at `position()`, the number of batches that training has consumed.

    Args:
        count: Images to draw from.
        batch_size: Images per batch and rank, at most `count / world_size`.
        seed: Decides every order.
        position: Returns the number of batches consumed so far.
        weights: (count,) float. With weights, each pass draws `count` images with replacement in
            proportion to them; without, it draws every image once.
        rank: Which share of each batch this process gets.
        world_size: Number of shares.
        drop_last: Whether the images that do not fill a batch wait for another pass; otherwise
            they are a smaller batch (if every rank gets one).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        weights: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.weights = weights
        self.rank = rank
        self.world_size = world_size
        size = batch_size * world_size
        self.used = count - count % (size if drop_last else world_size)  # images of a pass

    def __len__(self) -> int:
        """Return the number of batches in one pass over the images."""
        return -(-self.used // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield as many batches as a pass has, starting at the present position."""
        start = self.position()
        order, drawn = self._order(start // len(self)), start // len(self)
        for step in range(start, start + len(self)):
            if step // len(self) != drawn:
                order, drawn = self._order(step // len(self)), step // len(self)
            size = self.batch_size * self.world_size
            first = step % len(self) * size
            last = min(first + size, self.used)
            yield order[first + self.rank : last : self.world_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.count, generator=generator)
        return torch.multinomial(self.weights, self.count, replacement=True, generator=generator)


def fitting_batch(batch_size: int, count: int, world_size: int) -> int:
    """Return the batch size of each rank, smaller than asked where there are too few images."""
    return max(1, min(batch_size, count // world_size))


def equal_weights(samples: Sequence[Sample]) -> Tensor:
    """Return a weight for each image, (n,), with which every category is drawn equally often."""
    counts = Counter(sample.category for sample in samples)
    return torch.tensor([1 / counts[sample.category] for sample in samples])


class WithSteps(Sampler[list[tuple[int, int]]]):
    """Adds to every index the number of its batch, from which companions are drawn.

    Args:
        batches: Batches of indices.
    """

    def __init__(self, batches: TrainBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, batch in enumerate(self.batches, self.batches.position()):
            yield [(index, step) for index in batch]


class ShardSampler(Sampler[int]):
    """Gives each image to one rank, in order; PyTorch's sampler may repeat some."""

    def __init__(self, count: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, count, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def batch_seed(seed: int, step: int, names: Sequence[str]) -> int:
    """Return a seed for one batch, from names, since reading tensors may wait for a GPU."""
    return mixed_seed(seed, step, zlib.crc32(name_bytes("\n".join(names))))


def mixed_seed(*numbers: int) -> int:
    """Mix several numbers, such as seed, step and rank, into a 63-bit seed; order matters."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:  # the finaliser of splitmix64, once for each number
        mixed = (mixed ^ number) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
