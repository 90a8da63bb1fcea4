"""Tables of results for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "pixel_aupro": "AUPRO",
    "false_positive_rate": "false alarms",
    "true_positive_rate": "found",
}

UNTESTED = "There are no test images, so nothing was tested."


def results_table(results: Mapping[str, float], selection: str) -> Table:
    """Return a row for each category and their mean, with `-` where a metric is undefined.

    Args:
        results: `<category>/<metric>` and `<metric>`, in [0, 1].
        selection: The rule by which the weights were chosen.
    """
    from rich.table import Table

    table = Table(title=f"Test images, per cent; weights: {selection}", title_justify="left")
    table.add_column("category")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    categories = list(dict.fromkeys(key.rpartition("/")[0] for key in results if "/" in key))
    for category in categories:
        cells = [_cell(results, f"{category}/{key}", with_interval=key) for key in COLUMNS]
        table.add_row(category, *cells)
    if len(categories) > 1:
        table.add_section()
        table.add_row("mean", *[_cell(results, key) for key in COLUMNS], style="bold")
    return table


def print_table(table: Table) -> None:
    """Print a table; it is 160 characters wide if the output goes to a file."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def print_results(metrics: Mapping[str, Any], directory: Path) -> None:
    """Print the table of a run's results, and where its files are."""
    if not was_tested(metrics):
        print(f"{UNTESTED}\nNumbers:  {directory / 'metrics.json'}")
        return
    print_table(table_of_run(metrics))
    print(f"Pictures: {directory / 'images'}")
    print(f"Numbers:  {directory / 'metrics.json'}, {directory / 'predictions.csv'}")


def was_tested(metrics: Mapping[str, Any]) -> bool:
    """Return whether there were any test images."""
    return any(key.startswith("test/") for key in metrics)


def table_of_run(metrics: Mapping[str, Any]) -> Table:
    """Return the table of a run's `metrics.json`."""
    results = {
        key.removeprefix("test/"): math.nan if value is None else value
        for key, value in metrics.items()
        if key.startswith("test/")
    }
    return results_table(results, metrics["selection"])


def results_text(metrics: Mapping[str, Any]) -> str:
    """Return the table of a run's results as plain text, for a log."""
    from rich.box import ASCII
    from rich.console import Console

    if not was_tested(metrics):
        return UNTESTED
    table = table_of_run(metrics)
    table.box = ASCII  # a log may have any encoding
    console = Console(width=160, file=StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _cell(results: Mapping[str, float], key: str, with_interval: str = "") -> str:
    value = results.get(key, math.nan)
    if math.isnan(value):
        return "-"
    low, high = (results.get(f"{key}_{end}", math.nan) for end in ("low", "high"))
    interval = "" if math.isnan(low) else f" [{100 * low:.0f}-{100 * high:.0f}]"
    return f"{100 * value:.1f}{interval}"
