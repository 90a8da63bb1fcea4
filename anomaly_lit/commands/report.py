"""``anomaly-report``: the runs of a folder as tables, and as one page that needs no network.

Reads what runs leave behind, also of sweeps that are not finished; changes nothing of theirs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anomaly_lit.files import replace_file
from anomaly_lit.reporting.page import as_page
from anomaly_lit.reporting.read import read_runs
from anomaly_lit.reporting.rows import rows_of
from anomaly_lit.reporting.tables import as_csv, as_latex, as_markdown


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


if __name__ == "__main__":
    main()
