"""Tables of experiments, made from the `metrics.json` of runs and never typed.

    python experiments/tables.py collect experiments/NAME RUNS_FOLDER   # copies results, writes
    python experiments/tables.py write experiments/NAME                 # writes again

`collect` copies each run's metrics into `experiments/NAME/runs/`; both write
`results.csv` and the part of `README.md` between the two marks, in the method's folder and, for
all methods side by side, in `experiments/README.md`.
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
from collections.abc import Sequence
from pathlib import Path

MARK = "†"  # beside the model of a run that learned from real defects of the test set
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
COSTS = {
    "training_seconds": ("training, s", "{:.0f}"),
    "training_cpu_seconds": ("training, CPU s", "{:.0f}"),
    "latency_seconds": ("one image, s", "{:.2f}"),
    "peak_memory_mb": ("peak memory, MB", "{:.0f}"),
    "trainable_parameters": ("trainable parameters", "{:.0f}"),
}
Run = dict[str, object]


def main(arguments: list[str]) -> None:
    """Run `collect` or `write`."""
    folder = Path(arguments[1])
    if arguments[0] == "collect":
        collect(folder, Path(arguments[2]))
    runs = read_runs(folder)
    (folder / "results.csv").write_text(as_csv(runs), encoding="utf-8")
    write_between_marks(folder / "README.md", as_markdown(runs))
    write_between_marks(folder.parent / "README.md", comparison(folder.parent))


def collect(folder: Path, outputs: Path) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    for metrics in sorted(outputs.glob("*/metrics.json")):
        shutil.copyfile(metrics, folder / "runs" / f"{metrics.parent.name}.json")


def write_between_marks(readme: Path, text: str) -> None:
    """Replace the text between two marks; raise `IndexError` if a mark is missing."""
    page = readme.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def read_runs(folder: Path) -> list[Run]:
    """One row per run and category; the rows of a model of several categories say so."""
    rows: list[Run] = []
    for path in sorted((folder / "runs").glob("*.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        found = NAME.fullmatch(path.stem)
        assert found, path
        categories = list(dict.fromkeys(k.split("/")[1] for k in metrics if k.count("/") == 2))
        model = "multi-class" if len(categories) > 1 else "one-class"
        for category in categories:
            rows.append(
                {
                    "run": path.stem,
                    "backbone": found["backbone"],
                    "model": model + (f" {MARK}" if "SEEN" in metrics["selection"] else ""),
                    "category": category,
                    "seed": metrics["seed"],
                    **{key: metrics[f"test/{category}/{key}"] for key in METRICS},
                    "image_auroc_low": metrics[f"test/{category}/image_auroc_low"],
                    "image_auroc_high": metrics[f"test/{category}/image_auroc_high"],
                    "steps": metrics["steps"],
                    **{key: metrics[key] for key in COSTS},
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
    titles = ["backbone", "model", "category", "steps", "seeds", *METRICS.values(),
              "image AUROC's 95 %", *(title for title, _ in COSTS.values())]  # fmt: skip
    lines = [_row(titles), _row(["---"] * 3 + ["--:"] * (len(titles) - 3))]
    for backbone, model, steps in dict.fromkeys(_model_of(row) for row in rows):
        group = [r for r in rows if _model_of(r) == (backbone, model, steps)]
        for category in dict.fromkeys(row["category"] for row in group):
            part = [row for row in group if row["category"] == category]
            lines.append(_row([backbone, model, category, steps, len(part), *_cells(part)]))
        means = [_mean_over_categories([r for r in group if r["seed"] == seed])
                 for seed in dict.fromkeys(row["seed"] for row in group)]  # fmt: skip
        cells = [f"**{cell}**" if cell else "" for cell in _cells(means)]
        count = len({row["category"] for row in group})
        mean = f"**mean of {count}**"
        lines.append(_row([backbone, model, mean, steps, len(means), *cells]))
    notes = {key: ", ".join(sorted({str(row[key]) for row in rows}))
             for key in ("commit", "hardware", "selection")}  # fmt: skip
    lines.append(
        "\nPer cent; mean over seeds ± standard deviation; the interval (bootstrap over images) is "
        f"the mean of the seeds' intervals. Weights: {notes['selection']}. Commit "
        f"{notes['commit']}; {notes['hardware']}. The commands are in `results.csv`."
    )
    lines += seen_note(rows)
    return "\n".join(lines) + "\n"


def comparison(experiments: Path) -> str:
    """Return a table of methods x categories per metric, one-class and multi-class, with baselines.

    Means over seeds. `baselines.csv` holds what another library's methods gave on these images.
    """
    methods = [runs.parent for runs in sorted(experiments.glob("*/runs"))]
    rows = [{**row, "method": method.name} for method in methods for row in read_runs(method)]
    with (experiments / "baselines.csv").open(encoding="utf-8", newline="") as file:
        rows += [{**row, "model": "one-class", "steps": ""} for row in csv.DictReader(file)]
    names = ("method", "backbone", "model", "steps")
    categories = sorted({str(row["category"]) for row in rows})
    models = sorted(
        {tuple(str(row[name]) for name in names) for row in rows},
        key=lambda model: (model[2] != "one-class", model[1] != "resnet18", model),
    )
    lines = []
    for metric, title in METRICS.items():
        lines += [f"### {title}", "", _row([*names, *categories, "mean"]),
                  _row(["---"] * 3 + ["--:"] * (len(categories) + 2))]  # fmt: skip
        for model in models:
            own = [row for row in rows if tuple(str(row[name]) for name in names) == model]
            scores = [[row[metric] for row in own if row["category"] == c] for c in categories]
            cells = [f"{100 * _mean(values):.1f}" if values else "" for values in scores]
            whole = f"{100 * _mean([_mean(s) for s in scores]):.1f}" if all(scores) else ""
            lines.append(_row([*model, *cells, whole]))
        lines.append("")
    return "\n".join(lines + seen_note(rows))


def seen_note(rows: list[Run]) -> list[str]:
    """Say what the mark means, where a row has it."""
    marked = any(MARK in str(row["model"]) for row in rows)
    text = "learned from real defects of the test set (`dataset.seen`), and tested on the rest"
    return [f"\n{MARK} {text}: compare such rows only with each other."] * marked


def _model_of(row: Run) -> tuple[object, ...]:
    return row["backbone"], row["model"], row["steps"]


def _mean_over_categories(rows: list[Run]) -> Run:
    return {key: _mean([row[key] for row in rows]) for key in (*METRICS, *COSTS)}


def _cells(rows: list[Run]) -> list[str]:
    scores = [_with_deviation([100 * float(str(row[key])) for row in rows]) for key in METRICS]
    costs = [form.format(_mean([row[key] for row in rows])) for key, (_, form) in COSTS.items()]
    return [*scores, _interval(rows), *costs]


def _interval(rows: list[Run]) -> str:
    if "image_auroc_low" not in rows[0]:
        return ""
    low, high = (_mean([row[f"image_auroc_{end}"] for row in rows]) for end in ("low", "high"))
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _with_deviation(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _mean(values: Sequence[object]) -> float:
    numbers = [float(str(value)) for value in values]
    return math.fsum(numbers) / len(numbers)


def _row(cells: list[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])
