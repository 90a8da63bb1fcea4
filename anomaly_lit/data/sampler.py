"""Which images come when: a pure function of seed, step and rank, so that runs resume exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from anomaly_lit.types import Sample


class TrainBatches(Sampler[list[int]]):
    """Batches of shuffled indices, the same at every step whenever a run is resumed.

    Training draws from one endless sequence of batches: each pass over the images has its own
    order, and what does not fill a batch is left to another pass. An iteration begins at
    ``position()``, the number of batches that training has consumed.

    Args:
        count: Images to draw from.
        batch_size: Images per batch and rank; at most ``count / world_size``.
        seed: Decides every order.
        position: Batches consumed so far.
        weights: (count,) float. With them each pass draws ``count`` images with replacement, in
            proportion to the weights; without, every image once.
        rank: Which share of each batch is drawn.
        world_size: Number of shares.
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
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.weights = weights
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches of one pass over the images."""
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """As many batches as a pass has, from the present position on."""
        start = self.position()
        order, drawn = self._order(start // len(self)), start // len(self)
        for step in range(start, start + len(self)):
            if step // len(self) != drawn:
                order, drawn = self._order(step // len(self)), step // len(self)
            size = self.batch_size * self.world_size
            first = step % len(self) * size
            yield order[first + self.rank : first + size : self.world_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.count, generator=generator)
        return torch.multinomial(self.weights, self.count, replacement=True, generator=generator)


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
    """Every image once over all ranks, in order; unlike PyTorch's, never an image twice."""

    def __init__(self, count: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, count, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as seed, step and rank; order matters."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:  # the finaliser of splitmix64, once a number
        mixed = (mixed ^ number) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
