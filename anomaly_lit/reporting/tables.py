"""Tables of rows: as lists of texts, and as CSV, Markdown and LaTeX.

pandas is not used: its import takes 0.4 s, while the whole report of 1,000 runs takes 1 s. It would
not make the code shorter either, most of which finds the runs that belong in a cell.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from anomaly_lit.reporting.read import COSTS
from anomaly_lit.reporting.rows import MARK, NOT_TOLD, Row, categories_of
from anomaly_lit.reporting.terminal import COLUMNS

METRICS = {key: title for key, title in COLUMNS.items() if "rate" not in key}


def cell(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Return the mean, with the standard deviation of several values; a dash for none."""
    if not values:
        return "-"
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def cost(values: Sequence[float]) -> str:
    """Return the mean with three digits, or as a whole number from 100 on; a dash for none."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if abs(mean) < 100 else f"{mean:,.0f}"


def table(rows: Sequence[Row], metric: str) -> list[list[str]]:
    """Return names, a column for each category, and the mean; the first line is the head."""
    categories = categories_of(rows)
    head = [METRICS[metric], *categories, "mean", "seeds"]
    lines = [head]
    for row in rows:
        cells = [cell(row.values(metric, category)) for category in categories]
        seeds = len({run.settings.get("seed") for run in row.runs})
        lines.append([row.name, *cells, cell(row.mean(metric, categories)), str(seeds)])
    return lines


def cost_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return names and what the runs cost; the first line is the head."""
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
    """Return a line for each run and category, with its command: for a spreadsheet or pandas."""
    text = io.StringIO()
    facts = ("seed", "selection", "setting", *COSTS, "commit", "hardware", "command")
    keys = ("row", "folder", "category", *METRICS, *facts)
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for run in row.runs:
            for category in (run.categories or [""]) if run.metrics else []:
                scores = {key: run.metrics.get(f"test/{category}/{key}") for key in METRICS}
                told = {key: run.metrics.get(key) for key in facts}
                place = {"row": row.name, "folder": str(run.folder), "category": category}
                writer.writerow(place | scores | told)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Return all tables, for an issue or a README."""
    parts = []
    for lines in (*(table(rows, metric) for metric in METRICS), cost_table(rows)):
        rule = ["---", *("--:" for _ in lines[0][1:])]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])))
    return "\n\n".join([*parts, notes(rows)]) + "\n"


def as_latex(rows: Sequence[Row]) -> str:
    """Return all tables, for a paper; they need the package booktabs."""
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
    """Return a text with LaTeX's special characters escaped."""
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("±", r"$\pm$").replace(MARK, r"$\dagger$")


def notes(rows: Sequence[Row]) -> str:
    """Return the conditions under which the numbers were measured."""
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
    seen = [run for run in done if run.has_seen]
    if seen:
        lines.append(
            f"{MARK} {len(seen)} runs learned from real defects of the test set (dataset.seen) and "
            "were tested on the rest: compare them only with each other."
        )
    if rest:
        lines.append(f"{rest} runs have no results (yet).")
    return "\n".join(lines)


def differences(rows: Sequence[Row]) -> list[list[str]]:
    """Return every setting in which rows differ, with its value in each row."""
    settings = [row.runs[0].settings for row in rows]
    keys = sorted({key for own in settings for key in own if not key.startswith(NOT_TOLD)})
    apart = [k for k in keys if len({repr(own.get(k, "absent")) for own in settings}) > 1]
    head = ["setting", *(row.name for row in rows)]
    return [head, *([key, *(str(own.get(key, "-")) for own in settings)] for key in apart)]
