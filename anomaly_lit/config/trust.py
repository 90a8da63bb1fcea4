"""What a checkpoint of unknown origin may name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from anomaly_lit.config.build import import_target, nodes
from anomaly_lit.types import UserError

SAFE_TARGETS = ("anomaly_lit.", "torch.nn.", "torch.optim.")


def check_targets(config: Any, trust: bool = False) -> None:
    """Refuses code that a checkpoint of unknown origin might smuggle in.

    A name says little: ``anomaly_lit.files.os.system`` begins well, so the place where the object
    was defined decides. Interpolations are refused, since they may build nodes of their own.

    Raises:
        UserError: A ``_target_`` lies outside anomaly_lit, torch.nn and torch.optim.
    """
    if trust:
        return
    found = [(path, node["_target_"]) for path, node in nodes(config)]
    foreign = [f"  {path}: {target}" for path, target in found if not _is_safe(target)]
    foreign += [f"  {path}: {text}" for path, text in _texts(config) if "${" in text]
    if foreign:
        raise UserError(
            "the checkpoint's configuration names code outside "
            f"{', '.join(name.rstrip('.') for name in SAFE_TARGETS)}:\n" + "\n".join(foreign)
            + "\nLoad it with trust=true only if you know who made it"
        )  # fmt: skip


def _is_safe(target: Any) -> bool:
    if not isinstance(target, str) or not target.startswith(SAFE_TARGETS):
        return False
    found = import_target(target)
    home = f"{getattr(found, '__module__', '')}."
    return home.startswith(SAFE_TARGETS) and (inspect.isclass(found) or home.startswith("torch."))


def _texts(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string, keys included, with its path."""
    if isinstance(config, str):
        yield path, config
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from _texts(key, path)
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for position, value in enumerate(config):
            yield from _texts(value, f"{path}[{position}]")
