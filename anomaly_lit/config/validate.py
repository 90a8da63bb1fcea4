"""Whether a configuration fits the code: names, types, and what is missing."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from anomaly_lit.config.build import import_target, nodes
from anomaly_lit.types import UserError

HINTS: dict[str, Any] = {  # of keys that belong to no node with a signature
    "seed": int,
    "image_size": int | list[int],
    "output_dir": str,
    "selection": Literal["last", "best", "oracle"],
    "threshold.fpr": float,
    "checkpoint.every_minutes": float,
    "checkpoint.every_steps": int | None,
    "clear_cache": bool,
}


def validate(config: Mapping[str, Any], command: str = "train") -> None:
    """Compares every ``_target_`` node with the signature it is meant for.

    Args:
        config: The composed configuration as plain data.

    Raises:
        UserError: Lists every unknown, missing or ill-typed parameter with its path.
    """
    problems = [problem for path, node in nodes(config) for problem in _misfits(path, node)]
    for path, hint in HINTS.items():
        section, _, key = path.rpartition(".")
        values = config.get(section, {}) if section else config
        if key in values and not fits(values[key], hint):
            problems.append(f"{path}: {values[key]!r} is no {_name(hint)}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"the config does not fit the code:\n{lines}")


def _misfits(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    try:
        target = import_target(node["_target_"])
    except UserError as error:
        yield f"{path}: {error}"
        return
    function = target.__init__ if inspect.isclass(target) else target
    try:
        parameters = dict(inspect.signature(target).parameters)
    except ValueError:  # a builtin that does not tell
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that only a type checker can read
        hints = {}
    for key, value in given.items():
        if key not in parameters:
            if not takes_any:
                near = difflib.get_close_matches(key, parameters, n=1)
                mean = f"; did you mean {near[0]!r}?" if near else ""
                yield f"{path}: {node['_target_']} has no parameter {key!r}{mean}"
        elif key in hints and not fits(value, hints[key]):
            yield f"{path}.{key}: {value!r} is no {_name(hints[key])}"
    if not node.get("_partial_") and "_args_" not in node:
        for key, parameter in parameters.items():
            if (
                parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
                and key not in given
            ):
                yield f"{path}: {node['_target_']} needs {key!r}, which the config does not give"


def fits(value: Any, hint: Any) -> bool:
    """Whether plain data may be passed where ``hint`` is expected; unknown hints accept all."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # built before it is passed
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
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
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if inspect.isclass(hint) and hint.__module__.split(".")[0] in ("torch", "anomaly_lit"):
        return not isinstance(value, str | int | float | bool | list) and value is not None
    return True


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(str(option) for option in typing.get_args(hint))}"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")
