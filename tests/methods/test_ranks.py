"""Two processes that share a batch learn what one process learns from the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from anomaly_lit.losses import total
from anomaly_lit.methods import files

METHODS = sorted(set(files().values()))
WHOLE = 14  # images of the batch that two processes share: twice a number that no tensor has
LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
FLOATS = ("image", "corrupted", "prompt", "outlier")


class OneDraw(TorchFunctionMode):
    """Has every image of a batch get the same random numbers, however many images there are."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in LIKE:
            return self.drawn(LIKE[function], args[0].shape, [], {"device": args[0].device})
        if function in (torch.rand, torch.randn, torch.randint):
            limits = 0
            while function is torch.randint and isinstance(args[limits], int):
                limits += 1
            sizes = args[limits] if isinstance(args[limits], tuple | list) else args[limits:]
            return self.drawn(function, sizes, args[:limits], kwargs)
        return function(*args, **kwargs)

    def drawn(self, function: Any, shape: Any, limits: Any, kwargs: Any) -> Tensor:
        """Draws for one image, also where images, corrupted ones and prompts are drawn for."""
        one = tuple(1 if size % self.count == 0 else size for size in shape)
        return function(*limits, one, **kwargs).expand(tuple(shape)).clone()


class SyncedNorm(nn.Module):
    """Batch normalisation with the statistics of all ranks: torch's own needs a GPU."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if not self.norm.training:
            return self.norm(x)
        wide = x.double()  # or the order of sums would show in the gradients
        rows = wide.transpose(0, 1).flatten(1)  # (C, B * H * W)
        count = all_reduce(torch.full((), float(rows.shape[1]), dtype=torch.double))
        mean = (all_reduce(rows.sum(1)) / count).view(1, -1, *[1] * (x.ndim - 2))
        squares = (wide - mean).square().transpose(0, 1).flatten(1).sum(1)
        deviation = ((all_reduce(squares) / count).view_as(mean) + self.norm.eps).sqrt()
        scaled = ((wide - mean) / deviation).to(x.dtype)
        return scaled * self.norm.weight.view_as(mean) + self.norm.bias.view_as(mean)


def synced(module: nn.Module) -> None:
    """Replaces batch normalisation within a module, as trainer.sync_batchnorm=true does."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, SyncedNorm(child))
        else:
            synced(child)


class Loss(nn.Module):
    """A method as Lightning wraps it: a call gives the loss."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Any) -> Tensor:
        return total(self.method.losses(batch))


def gradients(model: nn.Module, method: Any, batch: Any) -> dict[str, Tensor]:
    """Of the second of two steps: DDP tells of parameters without a gradient at the second one."""
    for _ in range(2):
        method.zero_grad()
        torch.manual_seed(3)
        with OneDraw(len(batch["image"])):
            model(batch).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }


def share(batch: Any, rank: int) -> Any:
    """Gives the first or second half of a batch."""
    rows = slice(rank * WHOLE // 2, (rank + 1) * WHOLE // 2)
    return {key: value[rows] for key, value in batch.items()}


def prepared(file: Path) -> Any:
    method = torch.load(file, weights_only=False).train()
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return method


def widened(batch: Any) -> Any:
    return {key: value.double() if key in FLOATS else value for key, value in batch.items()}


class Alone(NamedTuple):
    """What one process learns from the whole batch."""

    gradients: dict[str, Tensor]
    wide: bool  # in double precision, where rounding cannot move a value over the kink of a ReLU
    leaves_unused: bool


def alone(folder: Path, name: str, batch: Any) -> Alone:
    method = prepared(folder / f"{name}.pt")
    try:
        found = gradients(Loss(method.double()), method, widened(batch))
        return Alone(found, True, method.leaves_unused)
    except RuntimeError as error:  # the method insists on float32 somewhere
        if "type" not in str(error):
            raise
    method = prepared(folder / f"{name}.pt")
    return Alone(gradients(Loss(method), method, batch), False, method.leaves_unused)


def compared(folder: Path, name: str, rank: int, batch: Any, of_one: Alone) -> dict[str, Any]:
    """Gives by parameter how far the gradients of two ranks are from those of the whole batch."""
    method = prepared(folder / f"{name}.pt")
    if of_one.wide:
        method, batch = method.double(), widened(batch)
    synced(method)
    model = DistributedDataParallel(Loss(method), find_unused_parameters=of_one.leaves_unused)
    found = gradients(model, method, share(batch, rank))
    found = {key.replace(".norm.", "."): value for key, value in found.items()}
    expected = {key.replace(".norm.", "."): value for key, value in of_one.gradients.items()}
    size = max(float(value.abs().max()) for value in expected.values())
    if found.keys() != expected.keys():
        return {"keys": found.keys() ^ expected.keys()}
    return {key: float((found[key] - value).abs().max()) / size for key, value in expected.items()}


def attempted(task: Any, *arguments: Any) -> Any:
    """Gives what a task gives, or its error in words."""
    try:
        return task(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def worker(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    batch, path = torch.load(f"{folder}/batch.pt", weights_only=False), Path(folder)
    of_one = {name: attempted(alone, path, name, batch) for name in names}  # not yet of two
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, found in of_one.items():
        if isinstance(found, Alone):
            found = attempted(compared, path, name, rank, batch, found)
        torch.save(found, f"{folder}/{name}_{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_method: Callable[..., Any],
    fit: Callable[..., Any],
) -> Path:
    """What two ranks found for every method whose test was chosen."""
    chosen = [item for item in request.session.items if item.path == Path(__file__)]
    names = sorted({item.callspec.params["name"] for item in chosen})
    path = tmp_path_factory.mktemp("ranks")
    batch = smooth_batch()
    torch.save(batch, path / "batch.pt")
    for name in names:
        method = small_method(name)
        fit(method, batch, 1)
        method._trainer = None
        torch.save(method, path / f"{name}.pt")
    mp.spawn(worker, args=(str(path), names), nprocs=2)
    return path


def smooth_batch() -> Any:
    """Different images, so that halves of the batch differ."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(WHOLE, 3, 8, 8, generator=generator)
    image = nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    corruption = torch.zeros(WHOLE, 1, 64, 64, dtype=torch.bool)
    for number in range(WHOLE):  # of different sizes, or means over defects would be easy
        corruption[number, :, 16 : 20 + 2 * number, 24:48] = True
    return {
        "image": image,
        "corrupted": torch.where(corruption, 1 - image, image),
        "corruption": corruption,
        "prompt": image.roll(1, dims=0),
        "outlier": 1 - image,
        "index": torch.arange(WHOLE),
        "label": torch.zeros(WHOLE, dtype=torch.bool),
        "gt_mask": torch.zeros(WHOLE, 1, 64, 64, dtype=torch.bool),
        "category": ["bolt"] * WHOLE,
        "defect_type": ["good"] * WHOLE,
        "path": [f"{number:03d}.png" for number in range(WHOLE)],
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_two_processes_are_those_of_the_doubled_batch(name: str, folder: Path) -> None:
    for rank in range(2):
        found = torch.load(folder / f"{name}_{rank}.pt", weights_only=False)
        assert isinstance(found, dict), found
        assert max(found.values()) < 1e-4, found
