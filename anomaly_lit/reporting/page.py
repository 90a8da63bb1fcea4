"""The report as a page that is one file: tables that sort, plots, and figures of runs."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_lit.reporting import plots
from anomaly_lit.reporting.read import print_warning
from anomaly_lit.reporting.rows import Row, categories_of
from anomaly_lit.reporting.tables import METRICS, cost_table, differences, notes, result_tables

KINDS = "missed|false_alarm|found|passed"
PANEL = re.compile(rf"\d+_({KINDS})_(?P<image>.+)\.png")  # as runs name their panels
PANEL_WIDTH = 640

Warn = Callable[[str], None]


class Figure(NamedTuple):
    """A panel that a run drew, small enough for the page."""

    row: str
    file: str
    width: int
    height: int
    jpeg: str  # base64


def as_page(rows: Sequence[Row], folder: Path, pictures: int, warn: Warn = print_warning) -> str:
    """Return one page with everything, figures included.

    Args:
        rows: The rows of the tables.
        folder: The folder that the runs lie in.
        pictures: Most images of each category in the gallery.
        warn: Called with a sentence about each file that cannot be read; it is left out.
    """
    categories = categories_of(rows)
    costs = {"latency_seconds": "time per image, s", "peak_memory_mb": "peak memory, MB"}
    points = {title: _accuracy_at(rows, key, categories) for key, title in costs.items()}
    curves = {row.name: loss_curve(row.runs[0].folder, warn) for row in rows}
    runs = [["run", "row", "result", "command"]]
    for row in rows:
        for run in row.runs:
            state = "finished" if run.metrics else "no results"
            command = str(run.metrics.get("command", ""))
            runs.append([str(run.folder.relative_to(folder)), row.name, state, command])
    return _template().render(
        title=f"{folder.resolve().name}: {len(rows)} rows",
        notes=notes(rows),
        results=[(lines, lines[0][0] in METRICS.values()) for lines in result_tables(rows)],
        costs=cost_table(rows),
        scatters=[
            plots.scatter(found, title, "image AUROC, mean")
            for title, found in points.items()
            if found
        ],
        losses=[
            (name, plots.curve(line, "step", "train/loss")) for name, line in curves.items() if line
        ],
        gallery=gallery(
            [(row.name, [run.folder for run in row.runs]) for row in rows], pictures, warn
        ),
        runs=runs,
        differences=differences(rows),
        colours=plots.COLOURS,
        width=plots.WIDTH,
        height=plots.HEIGHT,
    )


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cells"] = cells
    return environment.get_template("page.html.j2")


def _accuracy_at(
    rows: Sequence[Row], cost: str, categories: Sequence[str]
) -> list[tuple[str, float, float]]:
    """Return name, cost and mean image AUROC (per cent) of each row that has both."""
    return [
        (row.name, statistics.fmean(x), 100 * statistics.fmean(y))
        for row in rows
        if (x := row.values(cost, None)) and (y := row.mean("image_auroc", categories))
    ]


def cells(
    lines: Sequence[Sequence[str]], shaded: bool = False
) -> list[list[tuple[str, int | None]]]:
    """Give each cell below a table's head a hue: red for its column's lowest number, up to green.

    Args:
        lines: Texts of the cells; the first line is the head.
        shaded: Whether to shade; false gives no cell a hue.
    """
    hues = [
        _hues(column) if shaded else [None] * len(column) for column in zip(*lines[1:], strict=True)
    ]
    return [
        list(zip(line, line_hues, strict=True))
        for line, line_hues in zip(lines[1:], zip(*hues, strict=True), strict=True)
    ]


def _hues(column: Sequence[str]) -> list[int | None]:
    numbers = [re.fullmatch(r"(-?\d+\.\d+)( ± .*)?", text) for text in column]
    known = [float(number[1]) for number in numbers if number]
    if not known or min(known) == max(known):
        return [None] * len(column)
    low, span = min(known), max(known) - min(known)
    return [round(10 + 110 * (float(n[1]) - low) / span) if n else None for n in numbers]


def loss_curve(
    folder: Path, warn: Warn = print_warning, most: int = 200
) -> list[tuple[float, float]]:
    """Return steps and training loss from a run's CSV logs, thinned; empty if there are none."""
    points: list[tuple[float, float]] = []
    for file in sorted((folder / "logs").glob("*/metrics.csv")):
        try:
            with file.open(encoding="utf-8", newline="") as log:
                lines = [row for row in csv.DictReader(log) if row.get("train/loss")]
            points += [(float(row["step"]), float(row["train/loss"])) for row in lines]
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            warn(f"cannot read {file}: {error}; the page leaves its losses out")
    finite = [point for point in points if all(map(math.isfinite, point))]
    return finite[:: -(-len(finite) // most)] if finite else []


def gallery(
    rows: Sequence[tuple[str, Sequence[Path]]], most: int, warn: Warn = print_warning
) -> list[tuple[str, list[Figure]]]:
    """Return the same test images as each row's runs drew them.

    Args:
        rows: Names, and the folders of their runs.
        most: Images of each category and kind of defect; those that most rows drew come first.
        warn: Called with a sentence about each panel that cannot be read; it is left out.
    """
    drawn: dict[str, dict[str, Path]] = {}  # by image, then by row
    for name, folders in rows:
        for folder in folders:
            for file in sorted((folder / "images").glob("*.png")):
                if found := PANEL.fullmatch(file.name):
                    drawn.setdefault(found["image"], {}).setdefault(name, file)
    chosen = []
    count: Counter[str] = Counter()
    for image in sorted(drawn, key=lambda image: (-len(drawn[image]), image)):
        group = image.rpartition("_")[0]  # category and kind of defect
        count[group] += 1
        if count[group] <= most:
            chosen.append(image)
    figures = {
        image: [
            figure for name, file in drawn[image].items() if (figure := _shrink(name, file, warn))
        ]
        for image in sorted(chosen)
    }
    return [(image, shown) for image, shown in figures.items() if shown]


def _shrink(row: str, file: Path, warn: Warn) -> Figure | None:
    from PIL import Image

    content = io.BytesIO()
    try:
        with Image.open(file) as panel:
            small = panel.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        warn(f"cannot read {file}: {error}; the page leaves it out")
        return None
    small.thumbnail((PANEL_WIDTH, PANEL_WIDTH))
    small.save(content, "JPEG", quality=80)
    jpeg = base64.b64encode(content.getvalue()).decode()
    return Figure(row, file.name, small.width, small.height, jpeg)
