"""What a checkpoint of unknown origin may build.

A checkpoint holds a configuration, and a configuration names classes. If the checkpoint is not
trusted, only the classes of `KINDS` are built: our own, found by their type, and torch's losses and
optimisers, listed here. None of them opens, writes, starts or downloads anything when built with
the allowed arguments; `tests/test_trust.py` tries every other name.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from types import UnionType
from typing import Any, Literal, NamedTuple

from anomaly_lit.config.build import import_target, nodes
from anomaly_lit.config.validate import validate
from anomaly_lit.types import UserError

Part = Literal["method", "dataset", "evaluation"]

LOSSES = (  # of torch.nn, those that compare a prediction with a target
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
)
OPTIMISERS = (  # of torch.optim
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
BACKBONE_OPTIONS = (  # arguments of timm's networks; those of timm.create_model can download files
    "drop_path_rate",
    "dynamic_img_pad",
    "dynamic_img_size",
    "img_size",
    "output_stride",
    "pad_type",
    "strict_img_size",
)
MOST_DEPTH, MOST_VALUES = 32, 100_000  # of a configuration; ours have about 6 levels and 200 values


class Kind(NamedTuple):
    """A kind of class that a checkpoint may name.

    Attributes:
        module: The module of their `_target_`: `module.Name`, and no other path.
        base: Their base class.
        names: The allowed names; empty allows all.
        waits: Whether they are passed on unbuilt, with `_partial_: true`.
    """

    module: str
    base: str
    names: tuple[str, ...] = ()
    waits: bool = False


BACKBONE = Kind("anomaly_lit.nn.backbone", "anomaly_lit.nn.backbone.Backbone")
CACHES = (
    Kind("anomaly_lit.data", "anomaly_lit.data.caches.memory.ImageCache"),
    Kind("anomaly_lit.data", "anomaly_lit.data.caches.features.FeatureCache"),
)
KINDS: dict[Part, tuple[Kind, ...]] = {  # what each part may be
    "method": (Kind("anomaly_lit.methods", "anomaly_lit.methods.base.Method"),),
    "dataset": (Kind("anomaly_lit.data", "anomaly_lit.data.datamodule.AnomalyDataModule"),),
    "evaluation": (
        Kind("anomaly_lit.callbacks", "anomaly_lit.callbacks.evaluation.Evaluation"),
    ),
}  # fmt: skip
KINDS_WITHIN: dict[Part, tuple[Kind, ...]] = {  # and what it may contain
    "method": (
        BACKBONE,
        Kind("anomaly_lit.methods", "anomaly_lit.methods.base.Method"),
        Kind("anomaly_lit.masks", "anomaly_lit.masks.Mask"),
        Kind("anomaly_lit.nn.latent", "anomaly_lit.nn.latent.LatentAutoencoder"),
        Kind("anomaly_lit.losses", "torch.nn.Module"),
        Kind("anomaly_lit.schedules", "builtins.object"),
        Kind("torch.nn", "torch.nn.Module", LOSSES),
        Kind("anomaly_lit.optim", "torch.optim.Optimizer", waits=True),
        Kind("torch.optim", "torch.optim.Optimizer", OPTIMISERS, waits=True),
    ),
    "dataset": (
        Kind("anomaly_lit.synthesis", "anomaly_lit.synthesis.base.Synthesis"),
        Kind("anomaly_lit.data", "anomaly_lit.data.layouts.base.Layout"),
        *CACHES,
    ),
    "evaluation": (),
}


def admit(node: Any, part: Part, trust: bool = False) -> Any:
    """Return a checkpoint's node in a form that may be built.

    What only training reads from files is left out (see `without_files`). If the checkpoint is not
    trusted, every `_target_` must be an allowed class, in a place meant for it.

    Args:
        node: Plain data from a checkpoint.
        part: What it describes.
        trust: Allow all code.

    Raises:
        UserError: The node names something that is not allowed, or does not fit the code.
    """
    check_size(node, part)
    if trust is not True:  # a string such as "no" must not count as trust
        refuse([*_foreign(part, node, part)])
    node = without_files(node, part)
    validate({part: node}, None)
    return node


def refuse(problems: list[str]) -> None:
    """Raise one error for all problems, if there are any."""
    if problems:
        raise UserError(
            f"the checkpoint may not be built as it asks: {'; '.join(problems)}; "
            "set trust=true only if you know who made it"
        )


def check_size(config: Any, path: str) -> None:
    """Refuse endless configurations, and short files that expand to very large ones.

    Raises:
        UserError: The configuration is nested too deeply, or holds too many values.
    """
    level, left = [config], MOST_VALUES
    for _ in range(MOST_DEPTH):
        level = list(islice(_values_in(level), left))
        left -= len(level)
        if not level or not left:
            break
    if level:
        raise UserError(
            f"the checkpoint's {path} has more than {MOST_DEPTH} levels or {MOST_VALUES} values: "
            "it is damaged or made to do harm; use another checkpoint"
        )


def _values_in(items: list[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, Mapping):
            yield from item.values()
        elif isinstance(item, list | tuple):
            yield from item


def without_files(node: Any, part: Part) -> Any:
    """Leave out what only training reads from files or keeps in them.

    The state dict holds the weights of backbones, textures are for training, and a cache on disk
    does not pay off in a single pass. The folders of a data set stay, since a test has to read
    them.
    """
    if isinstance(node, list | tuple):
        return [without_files(value, part) for value in node]
    if not isinstance(node, Mapping):
        return node
    found = found_class(node.get("_target_"), (*KINDS[part], *KINDS_WITHIN[part]))
    if found is None or _is_of(found, KINDS["dataset"]):
        return {key: without_files(value, part) for key, value in node.items()}
    if _is_of(found, CACHES) and "folder" in inspect.signature(found).parameters:
        return None
    kept = {
        key: without_files(value, part)
        for key, value in node.items()
        if not (names_file(key) and isinstance(value, str))
    }
    return kept | {"weights": "random"} if _is_of(found, (BACKBONE,)) else kept


def names_file(parameter: str) -> bool:
    """Return whether a parameter of this name takes a file or a folder if its value is a string."""
    return parameter.split("_")[-1] in ("dir", "file", "folder", "path", "stem", "weights")


def found_class(target: Any, kinds: tuple[Kind, ...]) -> type | None:
    """Return the class of one of these kinds that a `_target_` names, or None.

    Only the module of the kind is imported, and only one name is looked up in it.
    """
    if not isinstance(target, str):
        return None
    module, _, name = target.rpartition(".")
    for kind in kinds:
        if module != kind.module or name.startswith("_") or name not in (kind.names or (name,)):
            continue
        found = getattr(import_module(module), name, None)
        if (
            inspect.isclass(found)
            and f"{found.__module__}.".startswith(f"{module}.")
            and _is_of(found, (kind,))
        ):
            return found
    return None


def _is_of(found: type, kinds: tuple[Kind, ...]) -> bool:
    return any(issubclass(found, import_target(kind.base)) for kind in kinds)


# ------------------------------------------------------------------------------ what is refused


def _foreign(path: str, node: Any, part: Part) -> Iterator[str]:
    """Yield what is not allowed in a part."""
    odd = [*_odd_values(path, node)]
    yield from odd
    if not isinstance(node, Mapping) or "_target_" not in node:
        yield f"{path} names no class"
    elif not odd:
        yield from _foreign_classes(path, node, part)


def _foreign_classes(path: str, node: Mapping[str, Any], part: Part) -> Iterator[str]:
    for place, inner in nodes(node, path):
        kinds = KINDS[part] if place == path else KINDS_WITHIN[part]
        yield from _misnamed(place, inner, kinds)
        found = found_class(inner["_target_"], kinds)
        if found is not None:
            yield from _misplaced(place, inner, found, part)


def _misnamed(path: str, node: Mapping[str, Any], kinds: tuple[Kind, ...]) -> Iterator[str]:
    """Yield why a node is refused: its class is of none of these kinds, or its call not allowed."""
    target, waiting = node["_target_"], tuple(kind for kind in kinds if kind.waits)
    found = found_class(target, kinds)
    if found is None:
        shown = " ".join(str(target).split())[:200]
        yield f"{path}: {shown} is not on the list of what a checkpoint may name here"
        return
    waits = found_class(target, waiting) is not None
    if node.get("_partial_", False) is not waits:
        yield f"{path}: {target} {'needs' if waits else 'takes no'} _partial_: true"
    for key in node:
        if key.startswith("_") and key not in ("_target_", "_partial_"):
            yield f"{path}.{key} is not allowed"


def _misplaced(path: str, node: Mapping[str, Any], found: type, part: Part) -> Iterator[str]:
    """Yield unknown arguments, and those that hold a class not meant for their parameter."""
    hints = typing.get_type_hints(found.__init__)  # type: ignore[misc]
    parameters = inspect.signature(found).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # as nn.Module does
    for key, value in node.items():
        if takes_any and key not in (*parameters, "_target_", "_partial_"):
            yield f"{path}: {node['_target_']} has no parameter {key!r}"
        yield from _not_taken(f"{path}.{key}", value, (hints.get(key, Any),), part)
    if _is_of(found, (BACKBONE,)) and isinstance(node.get("options"), Mapping):
        for key in node["options"]:
            if key not in BACKBONE_OPTIONS:
                known = ", ".join(BACKBONE_OPTIONS)
                yield f"{path}.options.{key} is not among the options allowed here ({known})"


def _not_taken(path: str, value: Any, hints: tuple[Any, ...], part: Part) -> Iterator[str]:
    """Yield the values of an argument whose parameter, of the types `hints`, does not take them."""
    options = [option for hint in hints for option in _alternatives(hint)]
    if isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _not_taken(f"{path}[{position}]", item, _types_within(options), part)
    elif isinstance(value, Mapping) and "_target_" not in value:
        for key, item in value.items():
            yield from _not_taken(f"{path}.{key}", item, _types_within(options), part)
    elif isinstance(value, Mapping):
        found = found_class(value["_target_"], KINDS_WITHIN[part])
        if found is not None and not any(_takes(option, found, value) for option in options):
            yield f"{path}: {value['_target_']} is not meant for this parameter"


def _alternatives(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) \
        else [hint]  # fmt: skip


def _types_within(options: list[Any]) -> tuple[Any, ...]:
    """Return the types of the values inside lists and mappings of these types."""
    inner: list[Any] = []
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if inspect.isclass(origin) and issubclass(origin, Mapping):
            inner += arguments[1:]
        elif origin is not Callable and origin is not typing.Literal:
            inner += arguments
    return tuple(inner)


def _takes(option: Any, found: type, node: Mapping[str, Any]) -> bool:
    """Return whether a parameter of this type takes what the node builds."""
    if typing.get_origin(option) is Callable:
        if not node.get("_partial_"):
            return any("__call__" in vars(base) for base in found.__mro__)
        option = typing.get_args(option)[-1]  # what the call returns
    elif node.get("_partial_"):
        return False
    return inspect.isclass(option) and option not in (object, Any) and issubclass(found, option)


def _odd_values(path: str, value: Any) -> Iterator[str]:
    """Yield what is not plain data, and strings that would refer to other values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{path} has the key {key!r}, which is not a string"
            else:
                yield from _odd_values(path, key)
                yield from _odd_values(f"{path}.{key}", item)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _odd_values(f"{path}[{position}]", item)
    elif isinstance(value, str):
        if "${" in value:
            yield f"{path}: {value} is an interpolation"
    elif not (value is None or isinstance(value, bool | int | float)):
        yield f"{path} is a {type(value).__name__}, not plain data"
