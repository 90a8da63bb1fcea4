"""Tables of experiments, made from the ``metrics.json`` of runs and never typed.

    python experiments/tables.py collect experiments/NAME RUNS_FOLDER   # copies results, writes
    python experiments/tables.py write experiments/NAME                 # writes again

``collect`` copies each run's metrics into ``experiments/NAME/runs/``; both write
``results.csv`` and the part of ``README.md`` between the two marks.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
NAME = re.compile(r"(?P<backbone>.+?)_(?P<category>[a-z]+(_[a-z]+)?)_seed(?P<seed>\d+)")
METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "pixel_aupro": "AUPRO 0.3",
}
COSTS = ("steps", "training_seconds", "training_cpu_seconds", "latency_seconds", "peak_memory_mb")
Run = dict[str, object]


def main(arguments: list[str]) -> None:
    """Runs ``collect`` or ``write``."""
    folder = Path(arguments[1])
    if arguments[0] == "collect":
        collect(folder, Path(arguments[2]))
    write(folder)


def collect(folder: Path, outputs: Path) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    for metrics in sorted(outputs.glob("*/metrics.json")):
        shutil.copyfile(metrics, folder / "runs" / f"{metrics.parent.name}.json")


def write(folder: Path) -> None:
    runs = read_runs(folder)
    (folder / "results.csv").write_text(as_csv(runs), encoding="utf-8")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{as_markdown(runs)}{END}{after}", encoding="utf-8")


def read_runs(folder: Path) -> list[Run]:
    """One row per run and category; the rows of a model of several categories say so."""
    rows: list[Run] = []
    for path in sorted((folder / "runs").glob("*.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        found = NAME.fullmatch(path.stem)
        assert found, path
        categories = list(dict.fromkeys(k.split("/")[1] for k in metrics if k.count("/") == 2))
        for category in categories:
            rows.append(
                {
                    "run": path.stem,
                    "backbone": found["backbone"],
                    "model": "multi-class" if len(categories) > 1 else "one-class",
                    "category": category,
                    "seed": metrics["seed"],
                    **{key: metrics[f"test/{category}/{key}"] for key in METRICS},
                    "image_auroc_low": metrics[f"test/{category}/image_auroc_low"],
                    "image_auroc_high": metrics[f"test/{category}/image_auroc_high"],
                    **{key: metrics[key] for key in COSTS},
                    "trainable_parameters": metrics["trainable_parameters"],
                    "selection": metrics["selection"],
                    "commit": metrics["commit"],
                    "hardware": metrics["hardware"],
                    "command": metrics["command"],
                }
            )
    return rows


def as_csv(rows: list[Run]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[Run]) -> str:
    """Per category and for their mean: mean over seeds, deviation where there are several."""
    titles = ["backbone", "model", "category", "seeds", *METRICS.values(), "training, s",
              "training, CPU s", "one image, s", "peak memory, MB"]  # fmt: skip
    lines = [_row(titles), _row(["---"] * 4 + ["--:"] * (len(titles) - 4))]
    groups = dict.fromkeys((row["backbone"], row["model"]) for row in rows)
    for backbone, model in groups:
        group = [r for r in rows if (r["backbone"], r["model"]) == (backbone, model)]
        for category in dict.fromkeys(row["category"] for row in group):
            part = [row for row in group if row["category"] == category]
            lines.append(_row([backbone, model, category, len(part), *_cells(part)]))
        means = [_mean_over_categories([r for r in group if r["seed"] == seed])
                 for seed in dict.fromkeys(row["seed"] for row in group)]  # fmt: skip
        cells = [f"**{cell}**" for cell in _cells(means)]
        count = len({row["category"] for row in group})
        lines.append(_row([backbone, model, f"**mean of {count}**", len(means), *cells]))
    notes = {key: ", ".join(sorted({str(row[key]) for row in rows}))
             for key in ("commit", "hardware", "selection")}  # fmt: skip
    lines.append(
        "\nPer cent; mean over seeds ± standard deviation. Weights: "
        f"{notes['selection']}. Commit {notes['commit']}; {notes['hardware']}. The commands are in "
        "`results.csv`."
    )
    return "\n".join(lines) + "\n"


def _mean_over_categories(rows: list[Run]) -> Run:
    return {key: _mean([row[key] for row in rows]) for key in (*METRICS, *COSTS)}


def _cells(rows: list[Run]) -> list[str]:
    scores = [_with_deviation([100 * float(str(row[key])) for row in rows]) for key in METRICS]
    costs = [_mean([row[key] for row in rows]) for key in COSTS[1:]]
    return [*scores, *(f"{cost:.0f}" for cost in costs[:2]), f"{costs[2]:.2f}", f"{costs[3]:.0f}"]


def _with_deviation(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _mean(values: list[object]) -> float:
    numbers = [float(str(value)) for value in values]
    return math.fsum(numbers) / len(numbers)


def _row(cells: list[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])
