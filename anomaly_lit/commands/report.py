"""``anomaly-report``: the runs of a folder as tables, and as one page that needs no network.

Reads what runs leave behind, also of sweeps that are not finished; changes nothing of theirs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_lit.files import replace_file, runs_below
from anomaly_lit.reporting.terminal import COLUMNS

METRICS = {key: title for key, title in COLUMNS.items() if "rate" not in key}
COSTS = {
    "training_seconds": "training, s",
    "latency_seconds": "one image, s",
    "peak_memory_mb": "memory, MB",
    "peak_gpu_memory_mb": "GPU memory, MB",
    "trainable_parameters": "trainable parameters",
}
NOT_TOLD = ("output_dir", "seed", "dataset.categories", "dataset.root", "logger", "callbacks")
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


class Row(NamedTuple):
    """Runs that differ in nothing but their seed and, one-class, their category."""

    name: str
    runs: list[Run]

    def values(self, metric: str, category: str | None) -> list[float]:
        """A value for each run that has it; without a category, of the whole run."""
        key = f"test/{category}/{metric}" if category else metric
        found = [run.metrics.get(key) for run in self.runs]
        return [float(value) for value in found if value is not None and not math.isnan(value)]

    def mean(self, metric: str, categories: Sequence[str]) -> list[float]:
        """The mean over all categories, for each seed that has all of them."""
        by_seed: dict[Any, dict[str, float]] = {}
        for run in self.runs:
            for category in run.categories:
                value = run.metrics.get(f"test/{category}/{metric}")
                if value is not None and not math.isnan(value):
                    by_seed.setdefault(run.metrics.get("seed"), {})[category] = value
        return [
            statistics.fmean(values.values())
            for values in by_seed.values()
            if set(values) >= set(categories)
        ]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(
        prog="anomaly-report",
        description="Tables (CSV, Markdown, LaTeX) and a page (HTML) of all runs below a folder.",
    )
    parser.add_argument("folder", type=Path, help="output_dir of a sweep, or of several runs")
    parser.add_argument("--output", type=Path, help="where to write; default: FOLDER/report")
    parser.add_argument("--pictures", type=int, default=3, help="images a category in the gallery")
    options = parser.parse_args(arguments)
    runs = read_runs(options.folder)
    if not runs:
        sys.exit(f"error: no run (a folder with config.yaml) below {options.folder}")
    output = options.output or options.folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    rows = rows_of(runs)
    texts = {"csv": as_csv(rows), "md": as_markdown(rows), "tex": as_latex(rows)}
    texts["html"] = as_page(rows, options.folder, options.pictures)
    for suffix, text in texts.items():
        with replace_file(output / f"report.{suffix}", encoding="utf-8") as file:
            file.write(text)
    done = sum(bool(run.metrics) for run in runs)
    print(f"{done} of {len(runs)} runs have results, in {len(rows)} rows: {output / 'report.html'}")


# ---------------------------------------------------------------------------------- reading


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


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Groups runs, and names each group by its method and by what sets it apart."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    told: dict[int, dict[str, Value]] = {}
    for run in runs:
        own = {k: v for k, v in run.settings.items() if not k.startswith(NOT_TOLD)}
        own["setting"] = run.setting
        learnt = tuple(run.categories) if run.setting == "multi-class" else ()
        key = (learnt, *sorted((k, repr(v)) for k, v in own.items()))
        groups.setdefault(key, []).append(run)
        told[id(groups[key])] = own
    names = name_groups([told[id(group)] for group in groups.values()])
    rows = [Row(name, group) for name, group in zip(names, groups.values(), strict=True)]
    return sorted(rows, key=lambda row: row.name)


def name_groups(settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """A name for each: the method, and the settings in which those of this method differ."""
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
    """Of several keys of one node that differ together, the one that names it."""
    keys = set(keys)
    nodes = {k.rpartition(".")[0] for k in keys if k.endswith(("._target_", "backbone.name"))}
    named = {k for k in keys if k.endswith(("._target_", "backbone.name"))}
    return [k for k in keys if k in named or not any(k.startswith(f"{node}.") for node in nodes)]


def method_of(settings: Mapping[str, Value]) -> str:
    """``UniAD`` of ``anomaly_lit.methods.UniAD``."""
    return str(settings.get("method._target_", "run")).rpartition(".")[2]


def short(key: str) -> str:
    """``backbone`` of ``method.backbone.name``."""
    parts = [p for p in key.split(".") if p not in ("method", "_target_", "name")]
    return parts[-1] if parts else key


def short_value(value: Value) -> str:
    """``resnet18`` of ``resnet18.tv_in1k``, ``MSELoss`` of ``torch.nn.MSELoss``."""
    text = "none" if value is None else str(value)
    if isinstance(value, str) and "." in value and "/" not in value:
        first, last = text.split(".", 1)[0], text.rpartition(".")[2]
        return last if first in ("anomaly_lit", "torch") else first
    return text


def categories_of(rows: Iterable[Row]) -> list[str]:
    """All categories of all runs, in the order of the alphabet; ``all`` once others are known."""
    found = sorted({c for row in rows for run in row.runs for c in run.categories})
    return [c for c in found if c != "all"] or found


# ----------------------------------------------------------------------------------- tables


def cell(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean, and deviation where there are several; a dash where there is nothing."""
    if not values:
        return "-"
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def cost(values: Sequence[float]) -> str:
    """A number of any size, legibly."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if abs(mean) < 100 else f"{mean:,.0f}"


def table(rows: Sequence[Row], metric: str) -> list[list[str]]:
    """Names, a column for each category, and the mean; the first row is the head."""
    categories = categories_of(rows)
    head = [METRICS[metric], *categories, "mean", "seeds"]
    lines = [head]
    for row in rows:
        cells = [cell(row.values(metric, category)) for category in categories]
        seeds = len({run.settings.get("seed") for run in row.runs})
        lines.append([row.name, *cells, cell(row.mean(metric, categories)), str(seeds)])
    return lines


def cost_table(rows: Sequence[Row]) -> list[list[str]]:
    """Names and what runs took."""
    known = {key: title for key, title in COSTS.items() if any(r.values(key, None) for r in rows)}
    lines = [["", *known.values(), "runs with results", "chosen by"]]
    for row in rows:
        done = [run for run in row.runs if run.metrics]
        rules = ", ".join(sorted({str(run.metrics.get("selection", "?")) for run in done}))
        count = f"{len(done)} of {len(row.runs)}"
        costs = [cost(row.values(key, None)) for key in known]
        lines.append([row.name, *costs, count, rules or "-"])
    return lines


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each run and category, with its command: for pandas."""
    text = io.StringIO()
    facts = ("seed", "selection", "setting", *COSTS, "commit", "hardware", "command")
    keys = ("row", "folder", "category", *METRICS, *facts)
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for run in row.runs:
            for category in run.categories if run.metrics else []:
                scores = {key: run.metrics.get(f"test/{category}/{key}") for key in METRICS}
                told = {key: run.metrics.get(key) for key in facts}
                place = {"row": row.name, "folder": str(run.folder), "category": category}
                writer.writerow(place | scores | told)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """All tables, for an issue or a README."""
    parts = []
    for lines in (*(table(rows, metric) for metric in METRICS), cost_table(rows)):
        rule = ["---", *("--:" for _ in lines[0][1:])]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])))
    return "\n\n".join([*parts, notes(rows)]) + "\n"


def as_latex(rows: Sequence[Row]) -> str:
    """All tables, for a paper; needs the package booktabs."""
    parts = []
    for lines in (*(table(rows, metric) for metric in METRICS), cost_table(rows)):
        body = [" & ".join(latex(text) for text in line) + r" \\" for line in lines]
        columns = "l" + "r" * (len(lines[0]) - 1)
        inner = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
        whole = [rf"\begin{{tabular}}{{{columns}}}", *inner, r"\end{tabular}"]
        parts.append("\n".join(whole))
    comment = "\n".join(f"% {line}" for line in notes(rows).splitlines())
    return "\n\n".join([*parts, comment]) + "\n"


def latex(text: str) -> str:
    """Text with LaTeX's own characters made harmless."""
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("±", r"$\pm$")


def notes(rows: Sequence[Row]) -> str:
    """Under which conditions the numbers came about."""
    runs = [run for row in rows for run in row.runs]
    done = [run for run in runs if run.metrics]
    told = {
        key: ", ".join(sorted({str(run.metrics.get(key)) for run in done}))
        for key in ("selection", "commit", "hardware")
    }
    rest = len(runs) - len(done)
    lines = [
        "Per cent; mean over seeds ± standard deviation; - is missing or undefined.",
        f"Weights: {told['selection'] or '-'}. Commit {told['commit'] or '-'}; {told['hardware']}.",
    ]
    oracle = [run for run in done if "ORACLE" in str(run.metrics.get("selection"))]
    if oracle:
        lines.append(f"{len(oracle)} runs took something from the test set: no fair comparison.")
    if rest:
        lines.append(f"{rest} runs have no results (yet).")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- page


def as_page(rows: Sequence[Row], folder: Path, pictures: int) -> str:
    """One page with everything, pictures included."""
    from anomaly_lit.reporting import page

    categories = categories_of(rows)
    sections = [
        page.section("Results", *(page.table(table(rows, m), shaded=True) for m in METRICS)),
        page.section("Costs", page.table(cost_table(rows))),
    ]
    points = [
        (row.name, statistics.fmean(x), 100 * statistics.fmean(y))
        for row in rows
        if (x := row.values("latency_seconds", None)) and (y := row.mean("image_auroc", categories))
    ]
    memory = [
        (row.name, statistics.fmean(x), 100 * statistics.fmean(y))
        for row in rows
        if (x := row.values("peak_memory_mb", None)) and (y := row.mean("image_auroc", categories))
    ]
    if points:
        sections.append(
            page.section(
                "Accuracy and cost",
                page.scatter(points, "time per image, s", "image AUROC, mean"),
                page.scatter(memory, "peak memory, MB", "image AUROC, mean"),
            )
        )
    curves = [
        page.curve(row.name, page.loss_curve(row.runs[0].folder), "step", "train/loss")
        for row in rows
    ]
    if any(curves):
        sections.append(page.section("Loss, of each row's first run", *curves))
    gallery = page.gallery([(row.name, [r.folder for r in row.runs]) for row in rows], pictures)
    if gallery:
        sections.append(page.section("The same images, by method", gallery))
    runs = [["run", "row", "result", "command"]]
    for row in rows:
        for run in row.runs:
            command = str(run.metrics.get("command", ""))
            state = "finished" if run.metrics else "no results"
            runs.append([str(run.folder.relative_to(folder)), row.name, state, command])
    sections.append(page.section("Runs and their commands", page.table(runs)))
    sections.append(page.section("What sets the rows apart", page.table(differences(rows))))
    return page.whole(f"{folder.resolve().name}: {len(rows)} rows", notes(rows), sections)


def differences(rows: Sequence[Row]) -> list[list[str]]:
    """Every setting in which rows differ, and its value in each."""
    settings = [row.runs[0].settings for row in rows]
    keys = sorted({key for own in settings for key in own if not key.startswith(NOT_TOLD)})
    apart = [k for k in keys if len({repr(own.get(k, "absent")) for own in settings}) > 1]
    head = ["setting", *(row.name for row in rows)]
    return [head, *([key, *(str(own.get(key, "-")) for own in settings)] for key in apart)]


if __name__ == "__main__":
    main()
