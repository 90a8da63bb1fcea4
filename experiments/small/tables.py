"""Tables of the runs of run.sh, made from their `metrics.json` and never typed.

    python experiments/small/tables.py collect OUTPUT_DIR  # updates results.csv, and writes
    python experiments/small/tables.py write               # writes the tables again

`collect` puts the finished runs below OUTPUT_DIR into `results.csv` beside this file, in place of
older ones of the same method, setting, category, number of steps and seed. The tables stand in
`docs/choosing_a_method.md` and in `experiments/README.md`, between marks. `baselines.csv`, here and
one folder up, holds what another library's methods gave on the same images.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.csv"
CHOOSING = ROOT / "docs" / "choosing_a_method.md"
SIDE_BY_SIDE = ROOT / "experiments" / "README.md"
BEGIN, END = "<!-- small: begin -->", "<!-- small: end -->"
METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "pixel_aupro": "AUPRO",
}
OTHER = {  # than the preset: the end of an option's name, and what tables say
    "head": "residual head",
    "lite0": "Lite0",
    "masks": "masks",
    "no_search": "no search",
    "outliers": "outliers",
    "seen": "seen",
}
SHOWN = ("image_auroc", "pixel_ap", "pixel_aupro")
FIRST = ("toothbrush", "magnetic_tile", "ball_screw")  # of the first pass, which picks candidates
CANDIDATES = 4
BUDGETS = {"two minutes": 240.0, "six minutes": 720.0}  # CPU seconds, all that two cores have then
FACTS = (
    "seed", "steps", "images/train", "images/test", "training_seconds", "training_cpu_seconds",
    "latency_seconds", "peak_memory_mb", "trainable_parameters", "training_loss_falling",
    "precision", "selection", "commit", "hardware",
)  # fmt: skip
COLUMNS = (
    "method", "setting", "backbone", "image_size", "category", *METRICS, "image_auroc_low",
    "image_auroc_high", *FACTS, "command",
)  # fmt: skip
OF_THIS_MACHINE = re.compile(r"(hydra\.run\.dir|output_dir)=\S+ ?")
Row = dict[str, str]


def main(arguments: list[str]) -> None:
    """Run `collect` or `write`."""
    if arguments[0] == "collect":
        RESULTS.write_text(as_csv(merged(read(RESULTS), found_in(Path(arguments[1])))), "utf-8")
    rows = read(RESULTS)
    for page, text in pages(rows, baselines()).items():
        write_between_marks(page, text)


def pages(rows: list[Row], others: list[Row]) -> dict[Path, str]:
    """Return what stands between the marks of each page."""
    minute = [row for row in rows if not is_longer(row)]
    return {CHOOSING: choosing(rows, others), SIDE_BY_SIDE: side_by_side(minute, others)}


# -------------------------------------------------------------------------------------- reading


def found_in(folder: Path) -> list[Row]:
    """Return a row for each category of each finished run below a folder."""
    from anomaly_lit.reporting.read import read_runs

    runs = [run for run in read_runs(folder) if run.metrics and named(run.folder)]
    return [row_of(run, category) for run in runs for category in categories_of(run)]


def categories_of(run: Any) -> list[str]:
    """Return the categories that a run was tested on."""
    found = (re.fullmatch(r"test/(\w+)/image_auroc", key) for key in run.metrics)
    return [match[1] for match in found if match]


def named(folder: Path) -> re.Match[str] | None:
    """Match a run's folder, such as `toothbrush_small_uniad` or `toothbrush_long_uniad`."""
    return re.fullmatch(r"(?P<category>\w+?)_(small|long|full)_(?P<method>\w+)", folder.name)


def row_of(run: Any, category: str) -> Row:
    name = named(run.folder)
    assert name is not None
    scores = {key: run.metrics.get(f"test/{category}/{key}")
              for key in (*METRICS, "image_auroc_low", "image_auroc_high")}  # fmt: skip
    facts = {key: run.metrics.get(key) for key in FACTS}
    values = {
        "method": name["method"],
        "backbone": backbone_of(run.settings),
        "image_size": run.settings["image_size"],
        "setting": run.metrics["setting"],
        "category": category,
        **scores,
        **facts,
        "command": command_of(run.metrics["command"]),
    }
    return {key: "" if value is None else str(value) for key, value in values.items()}


def backbone_of(settings: dict[str, Any]) -> str:
    """Return the names of a method's backbones, joined by +."""
    nodes = [key.removesuffix("._target_") for key, value in settings.items()
             if key.startswith("method.") and str(value).endswith(".Backbone")]  # fmt: skip
    names = [str(settings[f"{node}.name"]).partition(".")[0] for node in nodes]
    return "+".join(dict.fromkeys(names)) or "none"


def command_of(typed: str) -> str:
    """Return the command of a job without the folders of the machine that it ran on."""
    words = OF_THIS_MACHINE.sub("", typed).partition(" ")[2]
    return re.sub(
        r"--config-dir=\S*(?=experiments/)", "--config-dir=", f"anomaly-train {words}"
    ).strip()


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Return all rows in order; a new one takes the place of an old one of the same run."""
    rows = {
        (row["method"], row["setting"], row["category"], int(row["steps"]), int(row["seed"])): row
        for row in (*old, *new)
    }
    return [rows[key] for key in sorted(rows)]


def read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def baselines() -> list[Row]:
    return read(HERE.parent / "baselines.csv") + read(HERE / "baselines.csv")


def longer() -> list[Row]:
    """Return the one-class runs of `run_small.sh`, which took minutes; a mean over seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for file in sorted(HERE.parent.glob("*/results.csv")):
        rows = [row for row in read(file) if row.get("model") == "one-class"]
        first = [row for row in rows if row["backbone"] != "mobilenetv2_100_tf2"]
        for row in first:
            key = (file.parent.name, row["category"])
            groups.setdefault(key, []).append({**row, "method": file.parent.name})
    return [mean_of_seeds(group) for group in groups.values()]


def mean_of_seeds(group: list[Row]) -> Row:
    """Return one row with the means of the numbers that tables show."""
    numbers = [*METRICS, "training_cpu_seconds", "latency_seconds", "peak_memory_mb",
               "training_loss_falling"]  # fmt: skip
    means = {key: mean_or_nothing([row.get(key, "") for row in group]) for key in numbers}
    told = {key: ", ".join(sorted({row[key] for row in group})) for key in ("seed", "commit")}
    return {**group[0], **means, **told}


def mean_or_nothing(values: list[str]) -> str:
    """Return the mean, or nothing if a value is missing, since other means would be of fewer."""
    return str(statistics.fmean(map(float, values))) if all(values) else ""


def as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --------------------------------------------------------------------------------------- tables


def choosing(rows: list[Row], others: list[Row]) -> str:
    """Return the tables of `docs/choosing_a_method.md`: at a glance, then by category."""
    minute = [row for row in rows if not is_longer(row)]
    shorter = [row for row in rows if not is_full(row)]
    more = [row for row in shorter if is_longer(row)]
    first = first_pass(rows)
    chosen = candidates(rows, first)
    full = [row for row in over_seeds([row for row in rows if is_full(row)]) if row not in chosen]
    parts = [
        f"## The candidates after {' and '.join(BUDGETS)} of two cores\n",
        *both_tables(chosen, others),
        "## The first pass, two minutes of two cores\n",
        f"Means of {', '.join(FIRST)}.\n",
        glance(first, on_the_same(first, others), list(FIRST)),
        notes(first),
    ]
    for title, own, again in (
        ("Some minutes of one core", full, True),
        ("Four categories, older code", on_all_four(shorter), False),
        ("A minute of one core", minute, True),
        ("More than a minute of one core", more, None),
    ):
        if not own:
            continue
        parts.append(f"## {title}\n")
        if again is None:
            parts += ["Image AUROC / pixel AP / AUPRO.\n", side_by_side(own, others)]
        else:
            parts += both_tables(own, others, again)
    return "\n".join(parts)


def both_tables(own: list[Row], others: list[Row], by_category: bool = True) -> list[str]:
    """Return the means and costs of methods, and then what they have on each category."""
    known, compared = on_the_same(own, others), compared_categories(own, others)
    means = f"Means of {', '.join(compared)}; the worst of all that were measured.\n"
    parts = [means, glance(own, known, compared)]
    if not by_category:
        return [*parts, notes(own)]
    return [*parts, "By category, image AUROC / pixel AP / AUPRO:\n", side_by_side(own, others)]


def first_pass(rows: list[Row]) -> list[Row]:
    """Return the longest run of two minutes of each method on the categories of the first pass."""
    found = longest_within(next(iter(BUDGETS.values())), rows, FIRST)
    return [row for group in found.values() for row in group if row["category"] in FIRST]


def candidates(rows: list[Row], first: list[Row]) -> list[Row]:
    """Return the runs of those methods that the first pass picks, the longest of each budget."""
    picked = [own[0]["method"] for _, own in ranked(first, [], list(FIRST))[:CANDIDATES]]
    found: list[Row] = []
    for seconds in BUDGETS.values():
        longest = longest_within(seconds, rows, FIRST)
        found += [row for name in picked for row in longest[name] if row not in found]
    return found


def longest_within(
    seconds: float, rows: list[Row], categories: Iterable[str]
) -> dict[str, list[Row]]:
    """Return each method's one-class runs of most steps that fit a budget, on all categories."""
    own = [row for row in rows if row["setting"] == "one-class" and not mark([row])]
    found: dict[str, list[Row]] = {}
    for group in grouped(over_seeds(own)):
        by_name = {row["category"]: float(row["training_cpu_seconds"]) for row in group}
        if not all(category in by_name for category in categories):
            continue
        took = statistics.fmean(by_name[category] for category in categories)
        name, steps = group[0]["method"], int(group[0]["steps"])
        if took <= seconds and (name not in found or steps > int(found[name][0]["steps"])):
            found[name] = group
    return found


def is_longer(row: Row) -> bool:
    """Return whether a run had more steps than a minute allows."""
    return re.search(r"experiment=(long|full)_|trainer\.max_steps=", row["command"]) is not None


def is_full(row: Row) -> bool:
    """Return whether a run had some minutes of one core."""
    return "experiment=full_" in row["command"]


def over_seeds(rows: list[Row]) -> list[Row]:
    """Return one row for each method, number of steps and category, the mean of its seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["method"], row["setting"], row["steps"], row["category"])
        groups.setdefault(key, []).append(row)
    return [mean_of_seeds(group) for group in groups.values()]


def on_all_four(rows: list[Row]) -> list[Row]:
    """Return the runs on the four categories of the older, longer ones, and these.

    Of the latter only those of methods that have no others.
    """
    older = longer()
    categories = {row["category"] for row in older}
    found = []
    for group in grouped([row for row in rows if row["category"] in categories]):
        if {row["category"] for row in group} == categories:
            found += group
    new = {row["method"] for row in found}
    return [row for row in older if row["method"] not in new] + found


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each method, setting and number of steps."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["method"], row.get("setting", ""), row.get("steps", ""))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def on_the_same(rows: list[Row], others: list[Row]) -> list[Row]:
    """Return those of the others that are on categories of the rows."""
    categories = {row["category"] for row in rows}
    return [row for row in others if row["category"] in categories]


def compared_categories(rows: list[Row], others: list[Row]) -> list[str]:
    """Return the categories of the means: those of both baselines and of most methods."""
    methods = {row["method"] for row in rows}
    found = []
    for category in dict.fromkeys(row["category"] for row in others):
        measured = [row for row in rows if row["category"] == category]
        both = len({row["method"] for row in others if row["category"] == category}) == 2
        if both and 2 * len(measured) > len(methods):
            found.append(category)
    return found


def glance(rows: list[Row], others: list[Row], compared: list[str]) -> str:
    head = ["method", "backbone", "pixels", *(METRICS[metric] for metric in SHOWN),
            "worst image AUROC", "steps", "training, CPU s", "one image, ms", "memory, MB",
            "fall at the end, %"]  # fmt: skip
    lines = [line(head), rule(head, 2)]
    for name, own in ranked(rows, others, compared):
        size = own[0].get("image_size") or "256"
        means = [mean_cell(own, metric, compared) for metric in SHOWN]
        lines.append(line([name, own[0]["backbone"], size, *means, worst(own), *costs(own)]))
    return "\n".join(lines) + "\n"


def side_by_side(rows: list[Row], others: list[Row]) -> str:
    """Return one compact table: image AUROC / pixel AP / AUPRO, a column for each category.

    Where there are no masks, image AUROC stands alone.
    """
    compared = compared_categories(rows, others)
    categories = sorted({row["category"] for row in rows})
    head = ["method", "backbone", "steps", *categories]
    lines = [line(head), rule(head, 2)]
    for name, own in ranked(rows, on_the_same(rows, others), compared):
        by_name = {c: [row for row in own if row["category"] == c] for c in categories}
        cells = [" / ".join(cell(part, metric) for metric in SHOWN) for part in by_name.values()]
        cells = [text.removesuffix(" / - / -") for text in cells]
        lines.append(line([name, own[0]["backbone"], own[0].get("steps") or "", *cells]))
    return "\n".join([*lines, "", notes(rows)])


def ranked(rows: list[Row], others: list[Row], compared: list[str]) -> list[tuple[str, list[Row]]]:
    """Return the rows of each method, the best mean image AUROC first; without a mean last."""
    known = {row["method"] for row in others}

    def place(item: tuple[str, list[Row]]) -> tuple[float, str]:
        mean = mean_of(item[1], "image_auroc", compared)
        return (1.0 if mean is None else -mean, item[0])

    named = []
    for own in grouped((*rows, *others)):
        name = own[0]["method"]
        named.append((f"*{name}*" if name in known else f"{preset_of(name)}{mark(own)}", own))
    return sorted(named, key=place)


def preset_of(name: str) -> str:
    """Return a method's preset, and what a run has in place of its sizes, backbone or parts."""
    found = re.fullmatch(rf"(\w+?)(?:_(\d+|{'|'.join(OTHER)}))?", name)
    assert found is not None
    other = OTHER[found[2]] if found[2] in OTHER else found[2] and f"{found[2]} px"
    return f"`{found[1]}_small`" + (f", {other}" if other else "")


def mark(own: list[Row]) -> str:
    """Return the mark of one model for all, and of one that took something from the test set."""
    seen = any(re.search("SEEN|ORACLE", row["selection"]) for row in own)
    return ", one model" * (own[0].get("setting") == "multi-class") + " †" * seen


def mean_of(own: list[Row], metric: str, categories: list[str]) -> float | None:
    """Return the mean over categories; None unless there is a value for each."""
    values = {row["category"]: row[metric] for row in own if row.get(metric)}
    if not categories or any(category not in values for category in categories):
        return None
    return statistics.fmean(float(values[category]) for category in categories)


def mean_cell(own: list[Row], metric: str, categories: list[str]) -> str:
    mean = mean_of(own, metric, categories)
    return "-" if mean is None else f"{100 * mean:.1f}"


def cell(own: list[Row], metric: str) -> str:
    return f"{100 * float(own[0][metric]):.1f}" if own and own[0].get(metric) else "-"


def worst(own: list[Row]) -> str:
    row = min(own, key=lambda row: float(row["image_auroc"]))
    return f"{100 * float(row['image_auroc']):.1f} ({row['category']})"


def costs(own: list[Row]) -> list[str]:
    if "steps" not in own[0]:
        return [""] * 5
    keys = ("training_cpu_seconds", 1), ("latency_seconds", 1000), ("peak_memory_mb", 1)
    falling = [float(row["training_loss_falling"]) for row in own if row["training_loss_falling"]]
    told = f"{100 * max(falling):.0f}" if falling else "-"
    return [own[0]["steps"], *(mean_cost(own, key, scale) for key, scale in keys), told]


def mean_cost(own: list[Row], key: str, scale: float) -> str:
    return f"{scale * statistics.fmean(float(row[key]) for row in own):,.0f}"


def notes(rows: list[Row]) -> str:
    """Return under which conditions the numbers were measured."""
    told = {key: ", ".join(sorted({part for row in rows for part in row[key].split(", ")}))
            for key in ("category", "seed", "commit")}  # fmt: skip
    told["hardware"] = " or ".join(sorted({row["hardware"] for row in rows}))
    few = sorted({row["method"] for row in rows if row.get("images/test") == "20"})
    drawn = sorted({row["method"] for row in rows if "synthetic" in row["selection"]})
    last = f"Weights of the last step{' but for ' + ', '.join(drawn) if drawn else ''}"
    parts = (f"seed {told['seed']}", f"commit {told['commit']}", told["hardware"])
    chosen = ", whose step drawn defects in held-out images chose" if drawn else ""
    text = f"Per cent, on {told['category']}. {last}{chosen}; {'; '.join(parts)}."
    if few:
        text += f" On 20 test images only: {', '.join(few)}."
    if any("†" in mark([row]) for row in rows):
        text += " † took something from the test set: no fair comparison."
    return text + "\n"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rule(head: list[str], texts: int = 1) -> str:
    return line(["---"] * texts + ["--:"] * (len(head) - texts))


def write_between_marks(page: Path, text: str) -> None:
    """Replace the text between two marks; raise `IndexError` if a mark is missing."""
    whole = page.read_text(encoding="utf-8")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
