"""What two processes share is what one process has of their joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from anomaly_lit.nn.bank import Bank
from anomaly_lit.nn.ranks import all_ranks, copy_first, mean_of_marked, ranks, sum_of_ranks

VALUES = torch.linspace(-1, 2, 24).view(2, 3, 4)  # half of it for each rank
MARKED = VALUES > 0.3  # 1 mark on the first rank, all on the second


def shared(weight: torch.Tensor, values: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """A loss that needs the joined batch: a mean over marks, and the logarithm of a sum."""
    scaled = weight * values
    return mean_of_marked(scaled, marked) + sum_of_ranks(scaled.exp().sum()).log()


class Part(nn.Module):
    """Tensors of the kinds that methods have."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bank, self.empty = Bank(5), Bank(2)
        self.bank.fill(torch.rand(6, 5))
        self.register_buffer("kept", torch.rand(4) > 0.5)
        self.register_buffer("count", torch.randint(9, ()))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weight = torch.tensor(1.5, requires_grad=True)
    shared(weight, VALUES[rank], MARKED[rank]).backward()
    part, buffers = Part(rank), Part(rank)
    copy_first(part)
    copy_first(buffers, parameters=False)
    with torch.no_grad():  # as in a validation, where ranks may have different batches
        alone = ranks(), all_ranks(VALUES[rank]), sum_of_ranks(VALUES[rank])
    found = {
        "ranks": ranks(),
        "all": all_ranks(VALUES[rank]),
        "gradient": weight.grad,
        "alone": alone,
        "part": part.state_dict(),
        "buffers": buffers.state_dict(),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_values_of_all_ranks_are_those_of_the_joined_batch(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["ranks"] == 2
        assert torch.equal(own["all"], VALUES.flatten())


def test_averaged_gradients_are_those_of_the_joined_batch(found: list[dict[str, Any]]) -> None:
    weight = torch.tensor(1.5, requires_grad=True)
    shared(weight, VALUES, MARKED).backward()
    torch.testing.assert_close(torch.stack([own["gradient"] for own in found]).mean(), weight.grad)


def test_without_gradients_each_rank_goes_by_its_own_values(found: list[dict[str, Any]]) -> None:
    for own, values in zip(found, VALUES, strict=True):
        count, gathered, summed = own["alone"]
        assert count == 1
        assert torch.equal(gathered, values.flatten())
        assert torch.equal(summed, values)


def test_all_ranks_take_over_the_values_of_the_first(found: list[dict[str, Any]]) -> None:
    first = Part(0).state_dict()
    for own in found:
        assert all(torch.equal(value, first[name]) for name, value in own["part"].items())
    second, mine = Part(1), found[1]["buffers"]
    assert torch.equal(mine["layer.weight"], second.layer.weight)
    for name in ("bank.items", "kept", "count"):
        assert torch.equal(mine[name], first[name])


def test_a_mean_of_nothing_is_0() -> None:
    assert float(mean_of_marked(torch.ones(2, 3), torch.zeros(3, dtype=torch.bool))) == 0
    assert float(mean_of_marked(torch.arange(3.0), torch.tensor([True, False, True]))) == 1
