"""Check that a configuration fits the code: names, types, and missing values."""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from anomaly_lit.config.build import import_target, nodes
from anomaly_lit.types import UserError

Command = Literal["train", "test", "predict", "data"]

SEED = Annotated[int, 0, 2**32 - 1]  # what numpy takes
COUNT = Annotated[int, 1]
IMAGE_SIZE = int | list[int]

HINTS: dict[Command, dict[str, Any]] = {  # types of keys that belong to no node with a signature
    "train": {
        "seed": SEED,
        "image_size": IMAGE_SIZE,
        "output_dir": str,
        "selection": Literal["last", "best", "synthetic", "oracle"],
        "threshold.fpr": float,
        "checkpoint.every_minutes": float,
        "checkpoint.every_steps": int | None,
        "optimized_metric": str | None,
        "when_changed": Literal["rerun", "keep"],
    },
    "test": {
        "ckpt_path": str | None,
        "output_dir": str,
        "method": dict,
        "dataset._target_": str | None,  # null: as in training; the same below
        "dataset.root": str | None,
        "dataset.categories": str | list[str] | None,
        "dataset.batch_size": int | None,
        "dataset.eval_batch_size": int | None,
        "dataset.num_workers": int | None,
        "max_images": Annotated[int, 0],
        "accelerator": str,
        "trust": bool,
    },
    "predict": {
        "ckpt_path": str | None,
        "input": str | None,
        "output_dir": str,
        "category": str | None,
        "save_maps": bool,
        "exit_code": bool,
        "batch_size": COUNT,
        "max_pixels": COUNT | None,
        "device": str | None,
        "engine": Literal["torch", "openvino"],
        "trust": bool,
    },
    "data": {
        "image_size": IMAGE_SIZE,
        "seed": SEED,
        "output_dir": str,
        "columns": Annotated[int, 1, 64],
        "clear_cache": bool,
    },
}

SHARE = Annotated[float, 0, 1]
LIMIT = COUNT | SHARE | None  # batches, or a share of them
RANGES: dict[Command, dict[str, Any]] = {  # limits of keys whose signatures state a type alone
    "train": {
        "trainer.max_steps": COUNT | Literal[-1] | None,
        "trainer.max_epochs": COUNT | Literal[-1] | None,
        "trainer.val_check_interval": COUNT | SHARE | None,
        "trainer.check_val_every_n_epoch": COUNT | None,
        "trainer.log_every_n_steps": Annotated[int, 0] | None,
        "trainer.accumulate_grad_batches": COUNT,
        "trainer.gradient_clip_val": Annotated[float, 0, math.inf] | None,
        "trainer.num_sanity_val_steps": Annotated[int, -1] | None,
        "trainer.limit_train_batches": LIMIT,
        "trainer.limit_val_batches": LIMIT,
        "trainer.limit_test_batches": LIMIT,
        "trainer.devices": COUNT | Literal[-1] | list[int] | str,
        "trainer.num_nodes": COUNT,
        "trainer.detect_anomaly": bool,
        "trainer.deterministic": bool | Literal["warn"] | None,
        "trainer.enable_model_summary": bool | None,
    },
    "test": {},
    "predict": {},
    "data": {},
}

NODES: dict[Command, tuple[str, ...]] = {  # keys whose values have a `_target_`
    "train": ("callbacks", "dataset", "logger", "method", "pruning", "step", "trainer"),
    "test": ("dataset", "method"),
    "predict": (),
    "data": ("dataset",),
}
NAMED = ("callbacks", "logger")  # keys that hold several nodes, by name


def validate(config: Mapping[str, Any], command: Command | None = "train") -> None:
    """Check every `_target_` node against its signature, and the command's own keys.

    Args:
        config: The composed configuration as plain data.
        command: The command it belongs to; None for a part, of which only nodes are checked.

    Raises:
        UserError: Lists every unknown, missing or ill-typed parameter with its path.
    """
    hints = HINTS[command] if command else {}
    ranges = RANGES[command] if command else {}
    problems = [*_strangers(config, command), *_absent(config, command)] if command else []
    problems += [
        problem
        for path, node in nodes(config)
        if f"{path}._target_" not in hints  # else the checkpoint completes the node
        for problem in _misfits(path, node)
        if problem.partition(":")[0] not in ranges  # reported below
    ]
    problems += [*_endless(config)] if command == "train" else []
    for path, hint in (hints | ranges).items():
        section, _, key = path.rpartition(".")
        values = config.get(section) if section else config
        if isinstance(values, Mapping) and key in values and not fits(values[key], hint):
            problems.append(f"{path}: expected {_name(hint)}, found {values[key]!r}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"the config does not fit the code:\n{lines}")


def _strangers(config: Mapping[str, Any], command: Command) -> Iterator[str]:
    """Yield a problem for each key that nothing reads; Hydra adds any with `+KEY=VALUE`."""
    hints = HINTS[command]
    sections = {path.rpartition(".")[0] for path in hints if "." in path}
    known = {path.partition(".")[0] for path in hints} | {*NODES[command]}
    for key, value in config.items():
        if key not in known:
            yield f"{key}: anomaly-{command} has no such key{_nearest(key, known)}"
        elif key in sections and isinstance(value, Mapping):
            own = {p.removeprefix(f"{key}.") for p in hints if p.startswith(f"{key}.")}
            for inner in value.keys() - own if "_target_" not in own else ():
                yield f"{key}.{inner}: {key} has no such key{_nearest(inner, own)}"
        elif key in NAMED and isinstance(value, Mapping):
            for name, node in value.items():
                if not isinstance(node, Mapping) or "_target_" not in node:
                    yield f"{key}.{name}: it has no _target_, so nothing can be built from it"


def _absent(config: Mapping[str, Any], command: Command) -> Iterator[str]:
    """Yield a problem for each key that is missing or no node; Hydra removes any with `~KEY`."""
    for path in (*HINTS[command], *NODES[command]):
        section, _, key = path.rpartition(".")
        values = config.get(section) if section else config
        if not isinstance(values, Mapping) or key not in values:
            yield f"{path}: anomaly-{command} needs it, and the config does not give it"
    if command == "train":
        for path in ("dataset", "method", "step", "trainer"):
            if path in config and not isinstance(config[path], Mapping):
                yield f"{path}: {config[path]!r} is no node with a _target_"


def _endless(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem if training never ends, or if training, validation or test is left out."""
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    bounds = [trainer.get(name) for name in ("max_steps", "max_epochs", "max_time")]
    if bounds in ([-1, -1, None], [-1, -1, -1]):
        yield "trainer.max_steps: -1 and trainer.max_epochs=-1 never end: set either above 0"
    interval, counted = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch", 1)
    if counted is None and isinstance(interval, float):
        yield (
            f"trainer.val_check_interval: {interval} is no whole number of steps, which it must be "
            "with trainer.check_val_every_n_epoch=null"
        )
    limits = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
    for key in ("val_check_interval", *limits):
        if trainer.get(key) == 0:
            yield f"trainer.{key}: 0 would leave it out: give a number above 0"


def _nearest(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _misfits(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    try:
        target = import_target(node["_target_"])
    except UserError as error:
        yield f"{path}: {error}"
        return
    function = target.__init__ if inspect.isclass(target) else target
    try:
        parameters = dict(inspect.signature(target).parameters)
    except ValueError:  # a builtin without a signature
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that only a type checker can resolve
        hints = {}
    for key, value in given.items():
        if key not in parameters:
            if not takes_any:
                mean = _nearest(key, parameters)
                yield f"{path}: {node['_target_']} has no parameter {key!r}{mean}"
        elif key in hints and not fits(value, hints[key]):
            yield f"{path}.{key}: expected {_name(hints[key])}, found {value!r}"
    if not node.get("_partial_") and "_args_" not in node:
        for key, parameter in parameters.items():
            if (
                parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
                and key not in given
            ):
                yield f"{path}: {node['_target_']} needs {key!r}, which the config does not give"


def fits(value: Any, hint: Any) -> bool:
    """Return whether plain data fits a parameter of type `hint`; unknown hints take anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # is built before it is passed on
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if origin is Annotated:  # with the smallest and possibly the largest number
        kind, least, *greatest = arguments
        inside = fits(value, kind) and least <= value < math.inf
        return inside and all(value <= most for most in greatest)
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence, typing.Sequence):
        return isinstance(value, list) and (
            not arguments or all(fits(item, arguments[0]) for item in value)
        )
    if hint is dict or origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if inspect.isclass(hint) and hint.__module__.split(".")[0] in ("torch", "anomaly_lit"):
        return not isinstance(value, str | int | float | bool | list) and value is not None
    return True


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        words = [str(option) for option in typing.get_args(hint)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if typing.get_origin(hint) is Annotated:
        kind, least, *greatest = typing.get_args(hint)
        within = greatest and greatest[0] < math.inf
        limits = f"from {least} to {greatest[0]}" if within else f"of at least {least}"
        return f"{_name(kind)} {limits}"
    options = typing.get_args(hint)
    if any(typing.get_origin(option) is Annotated or option is bool for option in options):
        return " or ".join(_name(option) for option in options)
    if hint is type(None):
        return "null"
    if hint is bool:
        return "bool (true or false)"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")
