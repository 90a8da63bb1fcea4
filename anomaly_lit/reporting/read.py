"""Runs as they lie in their folders; nothing of theirs is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_lit.files import runs_below

Value = str | int | float | bool | None


class Run(NamedTuple):
    """A folder with a run's configuration, and its results if it has any."""

    folder: Path
    settings: dict[str, Value]  # every value of config.yaml by its path
    metrics: dict[str, Any]  # empty before the end

    @property
    def categories(self) -> list[str]:
        """Those that were tested; before, those that are to be."""
        tested = [key.split("/")[1] for key in self.metrics if key.count("/") == 2]
        told = str(self.settings.get("dataset.categories", "all")).strip("[]").split(", ")
        return list(dict.fromkeys(tested)) or [name.strip("'") for name in told]

    @property
    def setting(self) -> str:
        """``one-class``, or ``multi-class`` where one model learns several categories."""
        alone = len(self.categories) == 1 and self.categories != ["all"]
        return "one-class" if alone else "multi-class"


def read_runs(folder: Path) -> list[Run]:
    """All runs below a folder, and the folder's own if it is one."""
    return [read_run(run) for run in runs_below(folder)]


def read_run(folder: Path) -> Run:
    """A run's settings and results."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=loader)
    results = folder / "metrics.json"
    metrics = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    return Run(folder, flat(config), metrics)


def flat(config: Any, path: str = "") -> dict[str, Value]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``; lists are values, as text."""
    if isinstance(config, Mapping) and config:
        parts = (
            flat(value, f"{path}.{key}" if path else str(key)) for key, value in config.items()
        )
        return {key: value for part in parts for key, value in part.items()}
    return {path: config if config is None or isinstance(config, Value) else str(config)}
