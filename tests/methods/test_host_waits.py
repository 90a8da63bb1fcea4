"""A training step asks the device for no value: no wait, and no shape that depends on values.

Seen on a CPU by what is called. A wait would stall a GPU in every step, and shapes that depend on
values bar CUDA graphs and compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.trainer.connectors.logger_connector import _LoggerConnector
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.methods import files

CONF = Path(config_dir())
METHODS = sorted(set(files().values()))
SYNTHESES = sorted(path.stem for path in (CONF / "synthesis").glob("*.yaml"))
METHOD_CALLS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__",
    "__array__", "__contains__",
}  # fmt: skip
OPERATIONS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
DEVICE: dict[Any, bool] = {Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# The positions that are made to differ are chosen by a mask, and only these are sorted among
# thousands of codes: all of them would take some GB.
KNOWN = {"dsr": {"nonzero"}}


class Calls(TorchFunctionMode):
    """Notes the methods of a tensor that hand a value to Python, and pretends to be on a GPU.

    Where a CPU may be asked for a value at no cost, the code asks which device it is on.
    """

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in DEVICE:
            return DEVICE[func]
        name = getattr(func, "__name__", "")
        if name in METHOD_CALLS:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Notes operations that copy a value to the host, or whose result's shape follows from one."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATIONS or (name in INDEXING and by_mask(args[1])):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def waits(found: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(Calls(found))
        stack.enter_context(Operations(found))
        yield


def watch(monkeypatch: pytest.MonkeyPatch, method: Any, name: str, found: set[str]) -> None:
    original = getattr(method, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with waits(found):
            return original(*args, **kwargs)

    monkeypatch.setattr(method, name, watched)


def overlook(monkeypatch: pytest.MonkeyPatch, found: set[str]) -> None:
    """Forget what an optimiser asks within a `training_step`: its counts lie on the CPU."""
    step = LightningOptimizer.step

    def overlooked(*args: Any, **kwargs: Any) -> Any:
        before = set(found)
        result = step(*args, **kwargs)
        found.intersection_update(before)
        return result

    monkeypatch.setattr(LightningOptimizer, "step", overlooked)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*")
@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_waits_for_nothing(
    name: str,
    small_method: Callable[..., Any],
    fit: Callable[..., None],
    make_batch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, batch = small_method(name), make_batch()
    found: set[str] = set()
    # its seed is a number of the host's own generator
    monkeypatch.setattr(type(method), "generator", lambda self: torch.Generator().manual_seed(0))
    watch(monkeypatch, _LoggerConnector, "on_batch_end", found)  # prog_bar=True would wait
    for part in ("training_step", "backward", "configure_gradient_clipping"):
        watch(monkeypatch, method, part, found)
    if not method.automatic_optimization:
        overlook(monkeypatch, found)
    fit(method, batch, 4)  # in several stages, where there are some
    assert found == KNOWN.get(name, set())


@pytest.mark.parametrize("name", [name for name in SYNTHESES if name != "none"])
def test_making_anomalies_waits_for_nothing(name: str, make_batch: Callable[..., Any]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        line = [f"synthesis={name}", "method=uniad_small", "output_dir=unused"]
        config: Mapping[str, Any] = plain(compose("train", line))["dataset"]["synthesis"]
    synthesis, batch = instantiate(config), make_batch(2, 32, 32)
    found: set[str] = set()
    with waits(found):
        synthesis(batch["image"], torch.Generator().manual_seed(0), batch["category"])
    assert found == set()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda x: float(x[0, 0]), "__float__"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: 1 if x.sum() > 0 else 0, "__bool__"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_waits_are_seen(what: Callable[[Tensor], Any], name: str) -> None:
    found: set[str] = set()
    with waits(found):
        what(torch.ones(2, 2))
    assert name in found
