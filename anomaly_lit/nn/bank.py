"""A bank of feature vectors: nearest neighbours, a sample, a coreset, k-means.

Memory is bounded: distances are computed in blocks of at most `BLOCK` values, however many vectors
there are. Distances are Euclidean and in float32, even under autocast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_lit.types import UserError

BLOCK = 2**24  # distances held at once, 64 MiB


class Bank(nn.Module):
    """A store of items whose number is known only once `fill` is called.

    The items are part of the state dict, and a state dict with any number of items can be loaded.

    Args:
        shape: Shape of an item, such as the length of a vector.
        dtype: Kind of number.

    Attributes:
        items: (n, *shape).
    """

    items: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(0, *shape, dtype=dtype))

    def __len__(self) -> int:
        return len(self.items)

    def fill(self, items: Tensor) -> None:
        """Replace the stored items by these, (n, *shape)."""
        assert items.shape[1:] == self.items.shape[1:], (items.shape, self.items.shape)
        self.items = items.detach().to(self.items)

    def nearest(self, queries: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """Return the distances and rows of the nearest items, nearest first.

        Args:
            queries: (m, D), where an item is a vector of length D.
            count: Number k of neighbours of each query.

        Returns:
            (m, k) float32 and (m, k) int64.

        Raises:
            UserError: The bank holds fewer than `count` items.
        """
        if len(self) < count:
            raise UserError(
                f"{count} nearest neighbours requested, but only {len(self)} vectors are stored: "
                "train first, load a checkpoint, or request fewer neighbours"
            )
        rows = nearest_rows(queries, self.items, count)
        return distances_to(queries, self.items, rows), rows

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        kept = state_dict.get(f"{prefix}items")
        if kept is not None:  # take on its length
            self.items = self.items.new_zeros(kept.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def partial_distances(queries: Tensor, items: Tensor) -> Tensor:
    """Return (m, n) squared distances minus each query's squared norm: enough for ordering."""
    with torch.autocast(queries.device.type, enabled=False):
        return items.square().sum(dim=1) - 2 * queries @ items.T


def nearest_rows(queries: Tensor, items: Tensor, count: int = 1) -> Tensor:
    """Return the rows of the nearest items of each query, nearest first: (m, count) int64.

    Args:
        queries: (m, D).
        items: (n, D), n at least `count`.
        count: Number of neighbours of each query.
    """
    queries, items = queries.float(), items.float()
    width = min(len(items), max(BLOCK // 1024, count))  # items in a block
    found = []
    for part in queries.split(max(BLOCK // width, 1)):
        if len(items) <= width:
            found.append(_smallest(partial_distances(part, items), count))
            continue
        best, rows = _first_block(part, items[:width], count)
        for start in range(width, len(items), width):
            gaps = partial_distances(part, items[start : start + width])
            there = torch.arange(start, start + gaps.shape[1], device=rows.device)
            gaps = torch.cat([best, gaps], dim=1)
            rows = torch.cat([rows, there.expand(len(part), -1)], dim=1)
            chosen = _smallest(gaps, count)
            best, rows = gaps.gather(1, chosen), rows.gather(1, chosen)
        found.append(rows)
    return torch.cat(found) if found else torch.zeros(0, count, dtype=torch.long)


def _first_block(queries: Tensor, items: Tensor, count: int) -> tuple[Tensor, Tensor]:
    gaps = partial_distances(queries, items)
    rows = _smallest(gaps, count)
    return gaps.gather(1, rows), rows


def _smallest(gaps: Tensor, count: int) -> Tensor:
    """Return the positions of the smallest values of each row, in order."""
    if count == 1:  # faster, and among ties always the first
        return gaps.argmin(dim=1, keepdim=True)
    return gaps.topk(count, dim=1, largest=False).indices


def distances_to(queries: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """Return exact distances, (m, k), from (m, D) queries to (m, k) rows of the (n, D) items."""
    queries, items = queries.float(), items.float()
    size = max(BLOCK // max(rows.shape[1] * items.shape[1], 1), 1)
    parts = zip(queries.split(size), rows.split(size), strict=True)
    return torch.cat([(part[:, None] - items[row]).norm(dim=2) for part, row in parts])


class Reservoir:
    """Draws vectors from a stream of any length, each with the same chance.

    It never holds more than twice the vectors to draw, however long the stream is.

    Args:
        most: Largest number of vectors to draw.
        generator: Random generator on the vectors' device.
    """

    def __init__(self, most: int, generator: torch.Generator) -> None:
        self.most = most
        self.generator = generator
        self._held: list[tuple[Tensor, Tensor]] = []  # a random key for each vector; smallest win
        self._limit = torch.inf

    def add(self, items: Tensor) -> None:
        """Take the next vectors of the stream, (n, D)."""
        draw = {"generator": self.generator, "device": items.device, "dtype": torch.float64}
        keys = torch.rand(len(items), **draw)  # type: ignore[call-overload]
        chosen = keys <= self._limit
        self._held.append((keys[chosen], items[chosen]))
        if sum(len(keys) for keys, _ in self._held) > 2 * self.most:
            self._thin()

    def drawn(self) -> Tensor:
        """Return what was drawn, (at most `most`, D), in the order of the stream.

        Raises:
            UserError: The stream was empty.
        """
        if not self._held:
            raise UserError("no vectors to draw from: there are no normal images to learn from")
        self._thin()
        return self._held[0][1]

    def _thin(self) -> None:
        keys, items = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        if len(keys) > self.most:
            chosen = keys.topk(self.most, largest=False).indices.sort().values
            keys, items = keys[chosen], items[chosen]
            self._limit = float(keys.max())
        self._held = [(keys, items)]


def coreset_bytes(count: int, dim: int) -> int:
    """Return the bytes that `coreset` needs beside `count` vectors of length `dim`."""
    return count * (4 * dim + 16)


def coreset(items: Tensor, count: int, first: int = 0, title: str = "") -> Tensor:
    """Choose rows that cover all items: each new one is the farthest from those chosen before.

    The greedy k-centre algorithm (Gonzalez, 1985): at most twice the best covering radius.
    It takes `count` passes over the items, O(n * count * D): project long vectors first, see
    `random_projection`, and draw from a long stream first, see `Reservoir`, since a fixed share of
    the items makes the cost quadratic. It needs a copy of the items in float32 and 16 more bytes
    per item, see `coreset_bytes`.

    Args:
        items: (n, D).
        count: Number of rows to choose; all if there are not more.
        first: The first row.
        title: Shown beside a progress bar, with the number of vectors and the memory needed; empty
            shows none.

    Returns:
        (count,) int64, in the order chosen.
    """
    count = min(count, len(items))
    if title:
        mebibytes = coreset_bytes(*items.shape) / 2**20
        title = f"{title}: {count:,} of {len(items):,} vectors, {mebibytes:,.0f} MiB"
    items = items.float()
    items = items - items.mean(dim=0)  # subtracting large numbers would lose digits
    squares = torch.linalg.vector_norm(items, dim=1).square()  # without another copy
    gaps = torch.full_like(squares, torch.inf)
    chosen = torch.full((count,), first, dtype=torch.long, device=items.device)
    for number in _shown(range(1, count), title):
        row = chosen[number - 1 : number]
        with torch.autocast(items.device.type, enabled=False):
            new = squares + squares[row] - 2 * (items @ items[row].T)[:, 0]
        gaps = torch.minimum(gaps, new).index_fill_(0, row, -torch.inf)  # never again
        chosen[number] = gaps.argmax()
    return chosen


def random_projection(items: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Project (n, D) vectors to (n, dim), which roughly keeps their distances.

    The matrix has entries from N(0, 1 / dim) (Johnson and Lindenstrauss, 1984); vectors with at
    most `dim` values are returned unchanged.
    """
    if items.shape[1] <= dim:
        return items
    matrix = torch.randn(items.shape[1], dim, generator=generator, device=items.device)
    with torch.autocast(items.device.type, enabled=False):
        return items.float() @ matrix / dim**0.5


def kmeans(
    items: Tensor,
    count: int,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-4,
    title: str = "",
) -> Tensor:
    """Return `count` cluster centres, (count, D) float32 (Lloyd's algorithm).

    It starts from items drawn with a probability proportional to the squared distance from those
    drawn before (k-means++). A centre that is nearest to no item moves to the item that is farthest
    from its own centre.

    Args:
        items: (n, D), n at least `count`.
        count: Number of centres.
        generator: Random generator on the items' device.
        iterations: Largest number of passes over the items.
        tolerance: Stop when the centres move less than this, in total and relative to the items'
            variance.
        title: Shown beside a progress bar; empty shows none.

    Raises:
        UserError: There are fewer items than centres.
    """
    if len(items) < count:
        raise UserError(f"{count} clusters requested from {len(items)} vectors: request fewer")
    items = items.float()
    centres = _spread(items, count, generator)
    limit = tolerance * items.var(dim=0, unbiased=False).mean()
    for _ in _shown(range(iterations), title):
        moved = _lloyd(items, centres)
        shift, centres = (moved - centres).square().sum(), moved
        if shift <= limit:
            break
    return centres


def _spread(items: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw centres by k-means++."""
    rows = torch.randint(len(items), (1,), generator=generator, device=items.device)
    gaps = torch.full((len(items),), torch.inf, device=items.device)
    for _ in range(count - 1):
        gaps = torch.minimum(gaps, (items - items[rows[-1]]).square().sum(dim=1))
        # inverts a cumulative sum, since `multinomial` takes at most 2^24 items
        sums = gaps.double().cumsum(dim=0)
        draw = torch.rand(1, generator=generator, device=items.device, dtype=torch.float64)
        row = torch.searchsorted(sums, draw * sums[-1], right=True)
        rows = torch.cat([rows, row.clamp(max=len(items) - 1)])
    return items[rows]


def _lloyd(items: Tensor, centres: Tensor) -> Tensor:
    """Return, for each centre, the mean of the items nearest to it."""
    rows = nearest_rows(items, centres)
    nearest = rows[:, 0]
    total = torch.zeros_like(centres).index_add_(0, nearest, items)
    uses = torch.bincount(nearest, minlength=len(centres))
    moved = total / uses.clamp(min=1)[:, None]
    empty = uses == 0
    if empty.any():
        away = distances_to(items, centres, rows)[:, 0]
        moved[empty] = items[away.topk(int(empty.sum())).indices]
    return moved


def _shown(steps: Iterable[int], title: str) -> Iterable[int]:
    """Pass the steps on and show a progress bar."""
    if not title:
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, title, transient=True, console=Console(stderr=True))
