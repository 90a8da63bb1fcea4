"""Rows of the tables: runs that differ only in seed and category."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from anomaly_lit.reporting.read import Run, Value

NOT_TOLD = (
    "output_dir", "seed", "dataset.categories", "dataset.category", "dataset.layout.category",
    "dataset.root", "logger", "callbacks",
)  # fmt: skip

MARK = "†"  # on the names of rows whose runs learned from test images; `notes` says so


class Row(NamedTuple):
    """Runs that differ only in their seed and, where each learns one category, in the category."""

    name: str
    runs: list[Run]

    def values(self, metric: str, category: str | None) -> list[float]:
        """Return the value of each run that has one; without a category, that of the whole run."""
        key = f"test/{category}/{metric}" if category else metric
        found = [run.metrics.get(key) for run in self.runs]
        return [float(value) for value in found if value is not None and math.isfinite(value)]

    def mean(self, metric: str, categories: Sequence[str]) -> list[float]:
        """Return the mean over all categories, for each seed that has all of them."""
        by_seed: dict[Any, dict[str, float]] = {}
        for run in self.runs:
            for category in run.categories:
                value = run.metrics.get(f"test/{category}/{metric}")
                if value is not None and math.isfinite(value):
                    by_seed.setdefault(run.metrics.get("seed"), {})[category] = value
        return [
            statistics.fmean(values.values())
            for values in by_seed.values()
            if set(values) >= set(categories)
        ]


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Group runs, and name each group by its method and by the settings that set it apart."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    told: dict[int, dict[str, Value]] = {}
    for run in runs:
        own = {k: v for k, v in run.settings.items() if not k.startswith(NOT_TOLD)}
        own["setting"] = run.setting
        learnt = tuple(sorted(run.categories)) if run.setting == "multi-class" else ()
        key = (learnt, *sorted((k, repr(v)) for k, v in own.items()))
        groups.setdefault(key, []).append(run)
        told[id(groups[key])] = own
    names = name_groups([told[id(group)] for group in groups.values()])
    rows = [
        Row(f"{name} {MARK}" if any(run.has_seen for run in group) else name, group)
        for name, group in zip(names, groups.values(), strict=True)
    ]
    return sorted(rows, key=lambda row: row.name)


def name_groups(settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """Name each group by its method, and by the settings in which runs of that method differ."""
    names = []
    for own in settings:
        method = method_of(own)
        alike = [other for other in settings if method_of(other) == method]
        keys = {key for other in alike for key in other}
        apart = [k for k in keys if len({repr(other.get(k, "-")) for other in alike}) > 1]
        shown = sorted(telling(apart), key=lambda key: (key.count("."), key))[:4]
        parts = [
            str(own[key]) if key == "setting" else f"{short(key)}={short_value(own.get(key, '-'))}"
            for key in shown
        ]
        names.append(" ".join([method, *parts]))
    seen = Counter(names)
    return [
        f"{name} ({place})" if seen[name] > 1 else name for place, name in enumerate(names, start=1)
    ]


def telling(keys: Iterable[str]) -> list[str]:
    """Keep, of several keys of one node that differ together, the one that names the node."""
    keys = set(keys)
    nodes = {k.rpartition(".")[0] for k in keys if k.endswith(("._target_", "backbone.name"))}
    named = {k for k in keys if k.endswith(("._target_", "backbone.name"))}
    return [k for k in keys if k in named or not any(k.startswith(f"{node}.") for node in nodes)]


def method_of(settings: Mapping[str, Value]) -> str:
    """Return `UniAD` for `anomaly_lit.methods.UniAD`."""
    return str(settings.get("method._target_", "run")).rpartition(".")[2]


def short(key: str) -> str:
    """Return `backbone` for `method.backbone.name`."""
    parts = [p for p in key.split(".") if p not in ("method", "_target_", "name")]
    return parts[-1] if parts else key


def short_value(value: Value) -> str:
    """Return `resnet18` for `resnet18.tv_in1k`, and `MSELoss` for `torch.nn.MSELoss`."""
    text = "none" if value is None else str(value)
    if isinstance(value, str) and "." in value and "/" not in value:
        first, last = text.split(".", 1)[0], text.rpartition(".")[2]
        return last if first in ("anomaly_lit", "torch") else first
    return text


def categories_of(rows: Iterable[Row]) -> list[str]:
    """Return all categories in alphabetical order."""
    return sorted({c for row in rows for run in row.runs for c in run.categories})
