"""Runs as they lie in their folders; reading changes nothing there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anomaly_lit.files import runs_below
from anomaly_lit.types import UserError

COSTS = {
    "training_seconds": "training, s",
    "latency_seconds": "one image, s",
    "peak_memory_mb": "memory, MB",
    "peak_gpu_memory_mb": "GPU memory, MB",
    "trainable_parameters": "trainable parameters",
}
SEEN = "SEEN"  # in the selection of a run that learned from test images, which it was not tested on
Value = str | int | float | bool | None
LONGEST, DEEPEST = 1_000_000, 100  # characters, levels of a config.yaml; a run's: 5,000, 10


@dataclass(frozen=True)
class Run:
    """A folder with a run's configuration, and its results if it has any."""

    folder: Path
    settings: dict[str, Value]  # every value of config.yaml by its path
    metrics: dict[str, Any]  # empty before the end
    categories: list[str]  # tested, or to be tested; empty where only a test would tell them

    @property
    def has_seen(self) -> bool:
        """Whether the run learned from some test images, and was tested on the others."""
        return SEEN in str(self.metrics.get("selection"))

    @property
    def setting(self) -> str:
        """`one-class`, or `multi-class` where one model learns several categories.

        `all categories` if neither the settings nor a test tell how many these are.
        """
        if "setting" in self.metrics:
            return str(self.metrics["setting"])
        if not self.categories:
            return "all categories"
        return "one-class" if len(self.categories) == 1 else "multi-class"


def print_warning(text: str) -> None:
    """Print a line on the standard error stream."""
    print(f"warning: {text}", file=sys.stderr)


def read_runs(folder: Path, warn: Callable[[str], None] = print_warning) -> list[Run]:
    """Read all runs below a folder, and the folder's own if it is one.

    Args:
        folder: Such as the output folder of a sweep.
        warn: Called with a sentence about each run that cannot be read, and about each job of a
            sweep that failed before it was one; they are left out.
    """
    runs = []
    for place in runs_below(folder):
        try:
            runs.append(read_run(place))
        except UserError as error:
            warn(f"{error}; the report leaves this run out")
    for place in runs_below(folder, "job.json"):
        if not (place / "config.yaml").exists() and (why := _failure(place / "job.json")):
            warn(f"{place} failed before it began: {why}; the report leaves this job out")
    return with_known_categories(runs)


def with_known_categories(runs: Sequence[Run]) -> list[Run]:
    """Give runs that ask for all categories those of a tested run of the same data set."""
    known = {data_of(run): run.categories for run in runs if tested_categories(run.metrics)}
    return [
        run if run.categories else replace(run, categories=known.get(data_of(run), []))
        for run in runs
    ]


def data_of(run: Run) -> frozenset[tuple[str, Value]]:
    """Return the settings that decide which categories a run finds."""
    keys = ("dataset._target_", "dataset.root", "dataset.categories", "dataset.layout.")
    return frozenset((k, value) for k, value in run.settings.items() if k.startswith(keys))


def _failure(job: Path) -> str:
    """Return why a job of a sweep failed; empty if it did not, or its file says nothing."""
    try:
        facts = json.loads(job.read_text(encoding="utf-8"))
        failed = facts["exit_code"] not in (None, 0)
        return " ".join((facts["error"] or "see its job.log").split()) if failed else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def read_run(folder: Path) -> Run:
    """Read a run's settings and results.

    Raises:
        UserError: Its config.yaml or metrics.json is not what a run writes.
    """
    settings = _read(folder / "config.yaml", _parse_settings)
    results = folder / "metrics.json"
    metrics = _read(results, _parse_metrics) if results.exists() else {}
    return Run(folder, settings, metrics, tested_categories(metrics) or named_categories(settings))


def tested_categories(metrics: Mapping[str, Any]) -> list[str]:
    """Return the categories in the keys of results, `test/<category>/<metric>`, each once."""
    keys = [key.removeprefix("test/") for key in metrics if key.startswith("test/")]
    return list(dict.fromkeys(key.rpartition("/")[0] for key in keys if "/" in key))


def named_categories(settings: Mapping[str, Value]) -> list[str]:
    """Return the categories that settings name; empty where they ask for all that are there."""
    several = settings.get("dataset.categories")
    if several not in (None, "all"):
        return [name.strip("'") for name in str(several).strip("[]").split(", ")]
    one = settings.get("dataset.category", settings.get("dataset.layout.category"))
    return [] if one is None else [str(one)]


def _read(file: Path, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    import yaml

    try:
        return parse(file.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        TypeError,
        ArithmeticError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error


def _parse_settings(text: str) -> dict[str, Value]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast
    _check_size(text, loader)
    config = yaml.load(text, Loader=loader)
    if not isinstance(config, dict):
        raise ValueError(f"expected keys with values, found {type(config).__name__}")
    trainer = config.get("trainer")
    if isinstance(trainer, dict):  # older runs had one node and did not record it
        trainer.setdefault("num_nodes", 1)
    return flat(config)


def _check_size(text: str, loader: Any) -> None:
    """Check, without filling in the aliases of a YAML text, that it would stay small with them.

    A few lines of nested aliases can stand for billions of values, and a text that is nested deeply
    enough makes the C loader overflow its stack.

    Raises:
        ValueError: It is too long, is nested too deeply, or contains itself.
    """
    import yaml

    lengths, anchors = [0], [None]  # of the nodes that are open, the whole document first
    known: dict[str | None, int] = {}  # lengths of the closed nodes, by their anchors
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            lengths.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            known[anchors[-1]] = lengths[-1]
            lengths[-2:] = [lengths[-2] + lengths[-1]]
            anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"the value named &{event.anchor} contains itself")
            lengths[-1] += known.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            known[event.anchor] = 1 + len(event.value)
            lengths[-1] += 1 + len(event.value)
        if len(lengths) > DEEPEST:
            raise ValueError(f"values are nested more than {DEEPEST} deep")
        if lengths[-1] > LONGEST:
            raise ValueError(f"more than {LONGEST:,} letters once its aliases are filled in")


def _parse_metrics(text: str) -> dict[str, Any]:
    metrics = json.loads(text)
    if not isinstance(metrics, dict):
        raise ValueError(f"expected keys with values, found {type(metrics).__name__}")
    for key, value in metrics.items():
        is_number = key in COSTS or key.startswith("test/")
        if is_number and not isinstance(value, int | float | None):
            raise ValueError(f"{key}: expected a number or null, found {type(value).__name__}")
        if is_number and value is not None:
            float(value)  # OverflowError: a whole number of hundreds of digits
    if not isinstance(metrics.get("seed"), Value):
        raise ValueError(f"seed: expected a number, found {type(metrics['seed']).__name__}")
    return metrics


def flat(config: Any, path: str = "") -> dict[str, Value]:
    """Turn `{"a": {"b": 1}}` into `{"a.b": 1}`; a list becomes one value, as text."""
    if isinstance(config, Mapping) and config:
        parts = (
            flat(value, f"{path}.{key}" if path else str(key)) for key, value in config.items()
        )
        return {key: value for part in parts for key, value in part.items()}
    return {path: config if config is None or isinstance(config, Value) else str(config)}
