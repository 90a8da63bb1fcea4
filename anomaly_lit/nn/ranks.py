"""What the processes of a training have to share, so that they learn what one process would learn.

DistributedDataParallel averages the gradients of all processes (ranks), each from a batch of its
own. That is the gradient of the joined batch where a loss is a mean over images. A loss that
counts, sorts or compares across a batch needs numbers of the other ranks, which it gets here.

Only training steps exchange something. Without gradients, as in a validation, ranks may have
different numbers of batches and would wait for each other; each then goes by its own values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> int:
    """Return the number of processes whose batches are joined: 1 without gradients."""
    return dist.get_world_size() if torch.is_grad_enabled() and _several() else 1


def all_ranks(values: Tensor) -> Tensor:
    """Return the values of all ranks, detached, in one dimension; each has equally many."""
    flat = values.detach().flatten()
    if ranks() == 1:
        return flat
    parts = [torch.empty_like(flat) for _ in range(ranks())]
    dist.all_gather(parts, flat.contiguous())
    return torch.cat(parts)


def sum_of_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; the gradient reaches each of them."""
    return values if ranks() == 1 else _Sum.apply(values)


def mean_of_marked(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of marked values in the joined batch; 0 if none is marked.

    On each rank, its own sum is divided by the mean number of marks of a rank. The mean of these
    shares over the ranks is the mean of all marked values, and so are the gradients that
    DistributedDataParallel averages.

    Args:
        values: Any shape.
        where: Bool, broadcast to the values.
    """
    where = where.expand_as(values)
    count = all_ranks(where.sum(dtype=torch.float32)).mean()
    return torch.where(where, values, 0.0).sum() / count.clamp(min=1e-6)


@torch.no_grad()
def copy_first(module: nn.Module, parameters: bool = True) -> None:
    """Give a module the values of the first rank.

    Results that ranks compute from the same images may differ in their last bits between devices,
    and entirely where random numbers decide.

    Args:
        module: Its tensors have the same shapes on all ranks.
        parameters: Copy the parameters as well as the buffers.
    """
    if not _several():
        return
    for value in [*module.buffers(), *(module.parameters() if parameters else ())]:
        if value.numel():
            first = value.contiguous()
            dist.broadcast(first, src=0)
            value.copy_(first)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, of values and of their gradients; torch's own is deprecated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _several() -> bool:
    """Return whether processes train together."""
    return dist.is_available() and dist.is_initialized()
