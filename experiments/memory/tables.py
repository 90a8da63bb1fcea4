"""The table of run.sh, made from the runs' `metrics.json` and never typed.

python experiments/memory/tables.py collect OUTPUT_DIR  # writes results.csv, and the table
python experiments/memory/tables.py write               # writes the table of README.md again
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.csv", HERE / "README.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
WHAT = {  # a run's folder below its category, without the seed
    "pni/given": "`pni_small`",
    "pni/no_conditions": "the same run, all items allowed (`+method.tau=-1`)",
    "pmb/given": "`pmb_small`: memories and skips in turn",
    "pmb/no_hee": "the same run without the histogram (`+method.hee=false`)",
    "pmb/memories": "memories only (`method.laterals=[none,pmb,pmb,pmb,pmb]`)",
    "pmb/skips": "memory off: skips only (`method.laterals=[none,skip,skip,skip,skip]`)",
    "fmr_net/given": "`fmr_net_small`",
    "fmr_net/no_rearrangement": "laterals as they are (`method.rearrange=none`)",
    "fmr_net/without": "memory off, so no rearrangement either (`fmr_net_without.py`)",
    "nln/given": "`nln_small`",
    "nln/own": "the same run, own reconstruction (`+method.error=own`)",
    "sap2/given": "`sap2_small`",
    "sap2/raw": "the same run, two nearest images without the head (`+method.score=raw`)",
}
METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_aupro": "AUPRO",
}
FACTS = ("steps", "training_cpu_seconds", "commit", "hardware")
COLUMNS = (
    "category", "method", "run", "seed", *METRICS, "image_auroc_low", "image_auroc_high", *FACTS,
    "command",
)  # fmt: skip
OF_THIS_MACHINE = re.compile(
    r"(ckpt_path|output_dir)=\S*?((?:/[^/ ]+){3})(/checkpoints/\S+)?(?!\S)"
)
Row = dict[str, str]


def main(arguments: list[str]) -> None:
    """Run `collect` or `write`."""
    if arguments[0] == "collect":
        RESULTS.write_text(as_csv(collected(Path(arguments[1]))), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{as_markdown(read())}{END}{after}", encoding="utf-8")


def collected(folder: Path) -> list[Row]:
    """Return a row for each run, in the order of `WHAT` and within it of categories."""
    rows = [row_of(file, folder) for file in sorted(folder.glob("*/*/*/metrics.json"))]
    order = list(WHAT)
    return sorted(rows, key=lambda row: (row["method"], row["category"], order.index(name_of(row))))


def row_of(file: Path, folder: Path) -> Row:
    category, method, run = file.parent.relative_to(folder).parts
    found = json.loads(file.read_text(encoding="utf-8"))
    scores = {
        key: found.get(f"test/{category}/{key}")
        for key in (*METRICS, "image_auroc_low", "image_auroc_high")
    }
    values = {"category": category, "method": method, "run": run, "seed": found["seed"], **scores,
              **{key: found.get(key) for key in FACTS},
              "command": OF_THIS_MACHINE.sub(r"\1=OUTPUT_DIR\2\3", found["command"])}  # fmt: skip
    return {key: "" if value is None else str(value) for key, value in values.items()}


def name_of(row: Row) -> str:
    """Return the key of `WHAT`."""
    return f"{row['method']}/{re.sub('_[0-9]+$', '', row['run'])}"


def read() -> list[Row]:
    with RESULTS.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[Row]) -> str:
    """Return the table, and what it was measured with."""
    head = ["method", "category", "run", "seed", *METRICS.values(), "steps", "training, CPU s"]
    lines = [line(head), line(["---"] * 3 + ["--:"] * (len(head) - 3))]
    for row in rows:
        scores = [percent(row[key]) for key in METRICS]
        if row["image_auroc_low"]:
            low, high = percent(row["image_auroc_low"]), percent(row["image_auroc_high"])
            scores[0] += f" ({low} to {high})"
        spent = row["training_cpu_seconds"] and f"{float(row['training_cpu_seconds']):.0f}"
        lines.append(
            line([row["method"], row["category"], WHAT[name_of(row)], row["seed"], *scores,
                  row["steps"], spent])
        )  # fmt: skip
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    hardware = " or ".join(sorted({row["hardware"] for row in rows}))
    note = f"Per cent, with 95 % intervals of image AUROC; commit {commits}; {hardware}."
    return "\n".join([*lines, "", note]) + "\n"


def percent(value: str) -> str:
    return f"{100 * float(value):.1f}" if value else "-"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
