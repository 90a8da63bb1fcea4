"""How a training step is computed: compiled or not, memory layout, optimiser, data feeding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anomaly_lit.data.caches.memory import DeviceCache
from anomaly_lit.methods.base import Method
from anomaly_lit.types import UserError

# Defaults for options left null; on a CPU, those that benchmarks/step.py measured as faster.
ON = {"cpu": {"persistent_workers"}, "cuda": {"persistent_workers", "pin_memory"}}


class FastStep(pl.Callback):
    """Compute training steps faster; their results change by rounding only.

    Only training is affected: validations do not use compiled code, and once training ends the
    network returns to its first memory layout, so that a test gives what a loaded checkpoint gives.
    Checkpoints keep the same keys, and training can resume from one with other options. None takes
    the default in `ON`.

    Args:
        compile: Compile the networks with `torch.compile`. The first step then takes long.
        channels_last: Store weights and maps with the channels innermost. Noise and dropout drawn
            over a map then fall on other positions.
        fused: Let the optimiser update all parameters in one loop over memory.
        pin_memory: Hand over batches in page-locked memory, from which a GPU copies by itself.
        persistent_workers: Keep the `dataset.num_workers` processes alive from one epoch to the
            next.

    Raises:
        UserError: When training starts, if an option set to true is not available here.
    """

    def __init__(
        self,
        compile: bool | None = None,
        channels_last: bool | None = None,
        fused: bool | None = None,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
    ) -> None:
        self.options = {
            "compile": compile,
            "channels_last": channels_last,
            "fused": fused,
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers,
        }
        self.compiled: dict[nn.Module, Callable[..., Any]] = {}

    def chosen(self, device: str) -> dict[str, bool]:
        """Return all options for a type of device, such as `cpu`."""
        on = ON.get(device, set())
        return {k: k in on if value is None else value for k, value in self.options.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check all options, and prepare everything except the compiled networks."""
        if stage != "fit":
            return
        assert isinstance(pl_module, Method)
        device = trainer.strategy.root_device
        chosen = self.chosen(device.type)
        if chosen["compile"]:
            check_compiler(device)
        if chosen["channels_last"]:
            lay_out(pl_module, torch.channels_last)
        self._check_feeding(trainer, device)

    def feeding(self, device: str) -> dict[str, bool]:
        """Return the arguments of a data module for a type of device, such as `cpu`."""
        chosen = self.chosen(device)
        return {name: chosen[name] for name in ("pin_memory", "persistent_workers")}

    def _check_feeding(self, trainer: pl.Trainer, device: torch.device) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            return
        pin, persist = self.options["pin_memory"], self.options["persistent_workers"]
        if pin and device.type != "cuda":
            raise UserError(
                f"step.pin_memory=true speeds up copies to a GPU, but training runs on "
                f"{device.type}: set step.pin_memory=null"
            )
        if pin and isinstance(datamodule.cache, DeviceCache):
            raise UserError(
                "step.pin_memory=true speeds up copies to a GPU, but with cache=device images are "
                "already there: set step.pin_memory=null"
            )
        if persist and not datamodule.num_workers:
            raise UserError(
                "step.persistent_workers=true needs worker processes: "
                "set dataset.num_workers=2, or step.persistent_workers=null"
            )
        for name, asked in (("pin_memory", pin), ("persistent_workers", persist)):
            if asked is not None and getattr(datamodule, name, asked) != asked:
                raise UserError(
                    f"{type(datamodule).__name__} was built with {name}={not asked} and "
                    f"FastStep with {name}={asked}: give both the same value"
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuse the optimisers, and let Lightning clip gradients for them if there is no scaler."""
        for optimizer in trainer.optimizers:
            if self.options["fused"] is not None:
                fuse(optimizer, self.options["fused"], trainer)
            if getattr(trainer.precision_plugin, "scaler", None) is None:
                # Lightning 2.6 takes this attribute to mean that gradients are still scaled
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adapt a checkpoint's optimiser state to this run, and mark networks for compilation."""
        for optimizer in trainer.optimizers:
            adapt_state(optimizer)
        if self.chosen(pl_module.device.type)["compile"]:
            torch.compiler.reset()  # else networks of earlier jobs count against the same limit
            for network in networks(pl_module):
                # the shapes of a training step never change; random draws equal those of the plain
                # network
                network.compile(fullgraph=True, dynamic=False, options={"fallback_random": True})
                self.compiled[network] = network._compiled_call_impl  # type: ignore[assignment]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the plain networks."""
        for network in self.compiled:
            network._compiled_call_impl = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the compiled networks again."""
        for network, call in self.compiled.items():
            network._compiled_call_impl = call

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the plain networks from now on."""
        self.on_validation_start(trainer, pl_module)
        self.compiled.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the network's first memory layout."""
        if stage == "fit" and self.chosen(pl_module.device.type)["channels_last"]:
            lay_out(pl_module, torch.contiguous_format)


def lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    """Bring weights with four dimensions into a layout; `Module.to` fails on those with five."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost parts that are called as a whole and consist of several layers."""
    for child in module.children():
        called = type(child).forward is not nn.Module.forward
        if not called:
            yield from networks(child)
        elif any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child


def check_compiler(device: torch.device) -> None:
    """Compile a trivial function to see whether the compiler works.

    Raises:
        UserError: It does not work here.
    """
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.ones(2, device=device))
    except Exception as error:
        raise UserError(
            f"step.compile=true: torch cannot compile for {device.type} here: "
            f"{str(error).strip().splitlines()[0]}. Install a C++ compiler (g++ or what CXX "
            "names; for a GPU Triton as well), or set step.compile=false"
        ) from error


def compile_error(error: BaseException) -> str | None:
    """Return a readable message if torch failed to compile a network, else None."""
    if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
        return None
    text = str(error).strip().splitlines()
    return f"step.compile=true: torch cannot compile this method: {text[0]}. Set step.compile=false"


def fuse(optimizer: Optimizer, fused: bool, trainer: pl.Trainer) -> None:
    """Turn an optimiser's fused form, which updates all parameters in one loop, on or off.

    Raises:
        UserError: It has no fused form, or none for its device, its other arguments or a scaler.
    """
    problem = why_not_fused(optimizer, trainer)
    if problem is not None:
        if fused:
            raise UserError(f"step.fused=true: {problem}")
        return
    known = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known}
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    try:
        type(optimizer)(groups, **{**settings, "fused": fused})  # raises if impossible
    except RuntimeError as error:
        raise UserError(f"step.fused={str(fused).lower()}: {error}") from error
    for holder in (optimizer.defaults, *optimizer.param_groups):
        holder["fused"] = fused


def why_not_fused(optimizer: Optimizer, trainer: pl.Trainer) -> str | None:
    """Return why an optimiser cannot be fused, or None if it can."""
    if "fused" not in inspect.signature(type(optimizer)).parameters:
        return (
            f"{type(optimizer).__name__} has no fused form; Adam, AdamW, SGD and Adagrad have one"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return (
            f"trainer.precision={trainer.precision} scales gradients, and a fused optimiser undoes "
            "this too late for clipping; choose trainer.precision=bf16-mixed"
        )
    return None


def adapt_state(optimizer: Optimizer) -> None:
    """Adapt a checkpoint's optimiser state to this optimiser's form and the parameters' layout.

    A fused step checks neither: it would read moments stored in another memory order as if they
    were in the right one.
    """
    fused = optimizer.defaults.get("fused")
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if name == "step":
                    there = fused or group.get("capturable")
                    state[name] = value.to(parameter.device if there else "cpu")
                elif value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
