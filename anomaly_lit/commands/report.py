"""`anomaly-report`: the runs of a folder as tables, and as one page that works offline.

It reads what runs leave behind, even in unfinished sweeps, and changes nothing there.
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
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="anomaly-report",
        description="Tables (CSV, Markdown, LaTeX) and a page (HTML) of all runs below a folder.",
    )
    parser.add_argument("folder", type=Path, help="output_dir of a sweep, or of several runs")
    parser.add_argument("--output", type=Path, help="where to write; default: FOLDER/report")
    parser.add_argument("--pictures", type=int, default=3, help="images a category in the gallery")
    options = parser.parse_args(arguments)
    if options.pictures < 0:
        parser.error(f"--pictures {options.pictures}: give 0 or more")
    runs = read_runs(options.folder)
    if not runs:
        sys.exit(f"error: no run (a folder with config.yaml) to be read below {options.folder}")
    output = options.output or options.folder / "report"
    rows = rows_of(runs)
    texts = {"csv": as_csv(rows), "md": as_markdown(rows), "tex": as_latex(rows)}
    texts["html"] = as_page(rows, options.folder, options.pictures)
    try:
        for suffix, text in texts.items():
            with replace_file(output / f"report.{suffix}", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        sys.exit(f"error: cannot write into {output}: {error.strerror}; choose another --output")
    done = sum(bool(run.metrics) for run in runs)
    print(f"{done} of {len(runs)} runs have results, in {len(rows)} rows: {output / 'report.html'}")


if __name__ == "__main__":
    main()
