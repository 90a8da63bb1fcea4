"""From plain data to objects: build what a configuration describes, without Hydra."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from anomaly_lit.types import UserError


def instantiate(config: Any, path: str = "") -> Any:
    """Build what plain data describes: a node with a `_target_` becomes a call of it.

    As in Hydra, `_args_` are its positional arguments, and `_partial_` gives a function that still
    takes the other arguments. Nested nodes are built first.

    Args:
        config: Plain data; anything without a `_target_` is returned unchanged.
        path: Its place in the configuration, for error messages.

    Raises:
        UserError: A `_target_` cannot be imported, or its call failed.
    """
    if isinstance(config, list | tuple):
        return [instantiate(value, f"{path}[{place}]") for place, value in enumerate(config)]
    if not isinstance(config, Mapping):
        return config
    built = {key: instantiate(value, f"{path}.{key}" if path else key)
             for key, value in config.items()}  # fmt: skip
    if "_target_" not in built:
        return built
    target = import_target(built.pop("_target_"))
    arguments, waits = built.pop("_args_", []), built.pop("_partial_", False)
    call = partial(target, *arguments, **built)
    if waits:
        return call
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        name = config["_target_"]
        where = f"{path}: " if path else ""
        raise UserError(
            f"{where}{name} cannot be built: {error or type(error).__name__}"
        ) from error


def import_target(path: str) -> Any:
    """Return the class or function that a `_target_` names.

    Raises:
        UserError: There is nothing of that name.
    """
    parts = str(path).split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise UserError(f"cannot import {path!r}: it is not of the form package.module.Name")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue  # the last parts may name a nested class
            raise UserError(f"cannot import {path!r}: {error}") from error
        except Exception as error:
            raise UserError(f"cannot import {path!r}: {error}") from error
        for position, part in enumerate(parts[length:], start=length):
            try:
                found = getattr(found, part)
            except AttributeError as error:
                home = ".".join(parts[:position])
                raise UserError(f"cannot import {path!r}: {home} has no {part!r}") from error
        return found
    raise UserError(f"cannot import {path!r}: there is no module {parts[0]!r}")


def nodes(config: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every node with a `_target_` and its path, outermost first."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for position, value in enumerate(config):
            yield from nodes(value, f"{path}[{position}]")


def moved(config: Any, folder: str) -> Any:
    """Return a run's configuration as if its output_dir had been `folder`.

    What refers to output_dir moves with it, also within an address. A longer name, such as
    `/a/run_data` for `/a/run`, is another path and stays.
    """
    whole = re.compile(rf"(?<![\w.~-]){re.escape(config['output_dir'])}(?=[/\\]|$)")

    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, list):
            return [move(item) for item in value]
        return whole.sub(lambda _: folder, value) if isinstance(value, str) else value

    return move(config)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return the keys in which two plain configurations differ, each with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = list(dict.fromkeys([*before, *after]))
        absent = object()
        return [
            line
            for key in keys
            for line in differences(
                before.get(key, absent), after.get(key, absent), f"{path}.{key}" if path else key
            )
        ]
    if before == after:
        return []
    shown = [json.dumps(v) if _is_plain(v) else "absent" for v in (before, after)]
    return [f"{path}: {shown[0]} there, {shown[1]} now"]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)
