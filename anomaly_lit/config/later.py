"""Keys that a stored configuration lacks because a later version of the code added them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from anomaly_lit.config.build import import_target
from anomaly_lit.config.hydra import config_dir
from anomaly_lit.config.validate import HINTS


def with_later_keys(stored: Any, now: Any) -> dict[str, Any]:
    """Return a run's stored configuration, completed by later keys that change nothing.

    Such a key is in `now` alone, and its value is what the code does without it: the default of a
    parameter of its `_target_` or, for a key of the command itself, the value in `conf/train.yaml`.
    Everything else stays as stored, and so counts as a difference.

    Args:
        stored: Plain data, as in the run's `config.yaml`.
        now: The composed configuration as plain data.
    """
    filled = _with_parameters(stored, now)
    defaults = yaml.safe_load(Path(config_dir(), "train.yaml").read_text(encoding="utf-8"))
    for path in HINTS["train"]:
        section, _, key = path.rpartition(".")
        there, here, default = (
            (part.get(section) or {}) if section else part for part in (filled, now, defaults)
        )
        if key not in there and key in here and _same(here[key], default.get(key, _NONE)):
            there[key] = here[key]
            filled |= {section: there} if section else {}
    return filled


def _with_parameters(stored: Any, now: Any) -> Any:
    """Add later parameters that change nothing to all nodes that are of the same class in both."""
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        return [_with_parameters(*pair) for pair in zip(stored, now, strict=True)]
    if not isinstance(stored, Mapping) or not isinstance(now, Mapping):
        return stored
    filled = {k: _with_parameters(v, now[k]) if k in now else v for k, v in stored.items()}
    if "_target_" in now and stored.get("_target_") == now["_target_"]:
        for name, default in _defaults(now["_target_"]):
            if name in now and name not in stored and _same(now[name], default):
                filled[name] = now[name]
    return filled


def _defaults(target: str) -> Iterator[tuple[str, Any]]:
    """Yield name and default of each parameter that has a default."""
    try:
        parameters = inspect.signature(import_target(target)).parameters.values()
    except ValueError:  # a builtin without a signature
        return
    yield from ((p.name, p.default) for p in parameters if p.default is not p.empty)


_NONE = object()


def _same(value: Any, default: Any) -> bool:
    """Return whether a value is exactly this default; `1`, `1.0` and `true` all differ."""
    try:
        return json.dumps(value) == json.dumps(default)
    except TypeError:  # the default is not plain data
        return False
