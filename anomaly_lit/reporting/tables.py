"""Tables of rows: as lists of texts, and as CSV, Markdown and LaTeX.

pandas is not used: its import takes 0.4 s, while the whole report of 1,000 runs takes 1 s. It would
not make the code shorter either, most of which finds the runs that belong in a cell.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence

from anomaly_lit.reporting.read import COSTS, Run
from anomaly_lit.reporting.rows import MARK, NOT_TOLD, Row, categories_of
from anomaly_lit.reporting.terminal import COLUMNS, was_tested

METRICS = {key: title for key, title in COLUMNS.items() if "rate" not in key}
FALSE_ALARMS = "false_positive_rate"  # all that a test on normal images alone can tell


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
    head = [COLUMNS[metric], *categories, "mean", "seeds"]
    lines = [head]
    for row in rows:
        cells = [cell(row.values(metric, category)) for category in categories]
        seeds = len({run.settings.get("seed") for run in row.runs})
        lines.append([row.name, *cells, cell(row.mean(metric, categories)), str(seeds)])
    return lines


def result_tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Return a table for each metric that any run has a value of.

    That of false alarms is added if some run has no other value.
    """
    known = [known_metrics(run) for row in rows for run in row.runs]
    shown = [metric for metric in METRICS if any(metric in own for own in known)]
    if any(FALSE_ALARMS in own and own.isdisjoint(METRICS) for own in known):
        shown.append(FALSE_ALARMS)
    return [table(rows, metric) for metric in shown]


def known_metrics(run: Run) -> set[str]:
    """Return the metrics that a run has a value of, in at least one category."""
    return {
        key.rpartition("/")[2]
        for key, value in run.metrics.items()
        if key.startswith("test/") and value is not None and math.isfinite(value)
    }


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
    keys = ("row", "folder", "category", *COLUMNS, *facts)
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for run in row.runs:
            for category in (run.categories or [""]) if run.metrics else []:
                scores = {key: run.metrics.get(f"test/{category}/{key}") for key in COLUMNS}
                told = {key: run.metrics.get(key) for key in facts}
                place = {"row": row.name, "folder": str(run.folder), "category": category}
                writer.writerow(place | scores | told)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the tables, for an issue or a README."""
    parts = []
    for lines in (*result_tables(rows), cost_table(rows)):
        rule = ["---", *("--:" for _ in lines[0][1:])]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])))
    return "\n\n".join([*parts, notes(rows)]) + "\n"


def as_latex(rows: Sequence[Row]) -> str:
    """Return the tables, for a paper; they need the package booktabs."""
    parts = []
    for lines in (*result_tables(rows), cost_table(rows)):
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
    lines = ["Per cent; mean over seeds ± standard deviation; - is missing or undefined."]
    if done:
        lines.append(f"Weights: {told['selection']}. Commit {told['commit']}; {told['hardware']}.")
    untested = [run for run in done if not was_tested(run.metrics)]
    if untested:
        lines.append(f"{len(untested)} runs had no test images.")
    blank = [run for run in done if was_tested(run.metrics) and not known_metrics(run)]
    if blank:
        lines.append(
            f"{len(blank)} runs were tested without any metric: most need normal and anomalous "
            "test images, and false alarms need a threshold."
        )
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
