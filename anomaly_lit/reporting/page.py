"""Parts of a page that is one file: tables that sort, plots as SVG, pictures within the text."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from anomaly_lit.reporting.rows import Row, categories_of
from anomaly_lit.reporting.tables import METRICS, cost_table, differences, notes, table

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 560, 320, 56, 24, 40  # of a plot, in pixels
KINDS = "missed|false_alarm|found|passed"
PICTURE = re.compile(rf"\d+_({KINDS})_(?P<image>.+)\.png")  # as runs name their pictures
PICTURE_WIDTH = 640

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1rem;
  color: #1c1f23; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.notes { color: #555; white-space: pre-line; }
.wide { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th { cursor: pointer; background: #f4f5f7; }
th[data-order]::after { content: " " attr(data-order); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.long { max-width: 40rem; overflow: hidden; text-overflow: ellipsis; text-align: left;
  font-family: ui-monospace, monospace; font-size: 12px; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } svg { max-width: 100%; height: auto; }
.plots > * { max-width: 100%; min-width: 0; }
@media (max-width: 700px) {
  body { font-size: 13px; padding: 0.6rem; } th, td { padding: 0.2rem 0.35rem; }
  th:first-child, td:first-child { white-space: normal; min-width: 8rem; max-width: 8rem;
    overflow-wrap: break-word; }
}
ol { margin: 0; padding-left: 1.4rem; }
figure { margin: 0.5rem 0; } figcaption { color: #555; font-size: 13px; }
figure img { max-width: 100%; height: auto; display: block; }
"""
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), place = head.cellIndex;
  const up = head.dataset.order !== "▲";
  for (const other of table.querySelectorAll("th")) delete other.dataset.order;
  head.dataset.order = up ? "▲" : "▼";
  const key = row => {
    const text = row.cells[place].innerText.replaceAll(",", ""), number = parseFloat(text);
    return isNaN(number) ? text : number;
  };
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    const less = typeof x === typeof y ? x < y : typeof x === "string";
    return (less ? -1 : x === y ? 0 : 1) * (up ? 1 : -1);
  });
  table.tBodies[0].append(...rows);
};
"""


def as_page(rows: Sequence[Row], folder: Path, pictures: int) -> str:
    """One page with everything, pictures included."""
    categories = categories_of(rows)
    sections = [
        section("Results", *(sorting_table(table(rows, m), shaded=True) for m in METRICS)),
        section("Costs", sorting_table(cost_table(rows))),
    ]
    points = [
        (row.name, statistics.fmean(x), 100 * statistics.fmean(y))
        for row in rows
        if (x := row.values("latency_seconds", None)) and (y := row.mean("image_auroc", categories))
    ]
    memory = [
        (row.name, statistics.fmean(x), 100 * statistics.fmean(y))
        for row in rows
        if (x := row.values("peak_memory_mb", None)) and (y := row.mean("image_auroc", categories))
    ]
    if points:
        sections.append(
            section(
                "Accuracy and cost",
                scatter(points, "time per image, s", "image AUROC, mean"),
                scatter(memory, "peak memory, MB", "image AUROC, mean"),
            )
        )
    curves = [curve(row.name, loss_curve(row.runs[0].folder), "step", "train/loss") for row in rows]
    if any(curves):
        sections.append(section("Loss, of each row's first run", *curves))
    shown = gallery([(row.name, [r.folder for r in row.runs]) for row in rows], pictures)
    if shown:
        sections.append(section("The same images, by method", shown))
    runs = [["run", "row", "result", "command"]]
    for row in rows:
        for run in row.runs:
            command = str(run.metrics.get("command", ""))
            state = "finished" if run.metrics else "no results"
            runs.append([str(run.folder.relative_to(folder)), row.name, state, command])
    sections.append(section("Runs and their commands", sorting_table(runs)))
    sections.append(section("What sets the rows apart", sorting_table(differences(rows))))
    return whole(f"{folder.resolve().name}: {len(rows)} rows", notes(rows), sections)


def whole(title: str, notes: str, sections: Sequence[str]) -> str:
    """The page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p class=notes>{html.escape(notes)}</p>"
        f"{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; plots side by side where there is room."""
    return f"<h2>{html.escape(title)}</h2><div class=plots>{''.join(parts)}</div>"


def sorting_table(lines: Sequence[Sequence[str]], shaded: bool = False) -> str:
    """A table that sorts by a click; the first line is its head.

    Args:
        lines: Texts of the cells.
        shaded: Colour cells between the least and the greatest number of their column.
    """
    head = "".join(f"<th>{html.escape(text)}</th>" for text in lines[0])
    ranges = [_range(column) if shaded else None for column in zip(*lines[1:], strict=True)]
    body = "".join(
        f"<tr>{''.join(_cell(t, r) for t, r in zip(line, ranges, strict=True))}</tr>"
        for line in lines[1:]
    )
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, bounds: tuple[float, float] | None) -> str:
    value = _number(text)
    style = ""
    if bounds is not None and value is not None and bounds[1] > bounds[0]:
        share = (value - bounds[0]) / (bounds[1] - bounds[0])
        style = f' style="background: hsl({10 + 110 * share:.0f} 70% 88%)"'
    kind = " class=long" if len(text) > 48 else ""
    title = f' title="{html.escape(text)}"' if kind else ""
    return f"<td{kind}{style}{title}>{html.escape(text)}</td>"


def _number(text: str) -> float | None:
    found = re.fullmatch(r"(-?\d+\.\d+)( ± .*)?", text)
    return float(found[1]) if found else None


def _range(column: Sequence[str]) -> tuple[float, float] | None:
    numbers = [n for text in column if (n := _number(text)) is not None]
    return (min(numbers), max(numbers)) if numbers else None


# ------------------------------------------------------------------------------------ plots


def scatter(points: Sequence[tuple[str, float, float]], x_title: str, y_title: str) -> str:
    """Named points; the line joins those that none beats in both (less x, more y)."""
    if not points:
        return ""
    xs, ys = [p[1] for p in points], [p[2] for p in points]
    x_range, y_range = _wider(xs, log=True), _wider(ys)
    best: list[tuple[float, float]] = []
    for _, x, y in sorted(points, key=lambda p: (p[1], -p[2])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    parts = [_axes(x_range, y_range, x_title, y_title, log=True)]
    path = " ".join(f"{_x(x, x_range, True):.1f},{_y(y, y_range):.1f}" for x, y in best)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#bbb" stroke-dasharray="4"/>')
    for place, (name, x, y) in enumerate(points):
        px, py = _x(x, x_range, True), _y(y, y_range)
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{COLOURS[place % len(COLOURS)]}">'
            f"<title>{html.escape(f'{name}: {x:.3g}, {y:.1f}')}</title></circle>"
            f'<text x="{px + 8:.1f}" y="{py + 4:.1f}" font-size="12">{place + 1}</text>'
        )
    names = "".join(f"<li>{html.escape(name)}</li>" for name, _, _ in points)
    return f"<figure>{_svg(parts)}<figcaption><ol>{names}</ol></figcaption></figure>"


def curve(name: str, points: Sequence[tuple[float, float]], x_title: str, y_title: str) -> str:
    """A small plot of one curve under its name; nothing without points."""
    if not points:
        return ""
    x_range, y_range = _wider([x for x, _ in points]), _wider([y for _, y in points])
    path = " ".join(f"{_x(x, x_range):.1f},{_y(y, y_range):.1f}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
    drawn = _svg([_axes(x_range, y_range, x_title, y_title), line], share=0.6)
    return f"<figure>{drawn}<figcaption>{html.escape(name)}</figcaption></figure>"


def _svg(parts: Sequence[str], share: float = 1.0) -> str:
    width, height = round(share * WIDTH), round(share * HEIGHT)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{width}" height="{height}" role="img" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def _wider(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log and low > 0:
        return low / 1.3, high * 1.3
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _x(value: float, bounds: tuple[float, float], log: bool = False) -> float:
    if log and bounds[0] > 0:
        value, bounds = math.log(value), (math.log(bounds[0]), math.log(bounds[1]))
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - bounds[0]) / (bounds[1] - bounds[0])


def _y(value: float, bounds: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * (value - bounds[0]) / (bounds[1] - bounds[0])


def _axes(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_title: str,
    y_title: str,
    log: bool = False,
) -> str:
    parts = [
        f'<path d="M{LEFT} 10V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" font-size="12" text-anchor="middle">'
        f"{html.escape(x_title)}</text>",
        f'<text transform="translate(14 {HEIGHT / 2 - 10}) rotate(-90)" font-size="12" '
        f'text-anchor="middle">{html.escape(y_title)}</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y_range[0] + share * (y_range[1] - y_range[0])
        if log and x_range[0] > 0:
            x = x_range[0] * (x_range[1] / x_range[0]) ** share
        else:
            x = x_range[0] + share * (x_range[1] - x_range[0])
        parts.append(
            f'<text x="{LEFT - 5}" y="{_y(y, y_range) + 4:.1f}" font-size="11" '
            f'text-anchor="end">{_tick(y)}</text>'
            f'<text x="{_x(x, x_range, log):.1f}" y="{HEIGHT - BOTTOM + 15}" font-size="11" '
            f'text-anchor="middle">{_tick(x)}</text>'
        )
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def loss_curve(folder: Path, most: int = 200) -> list[tuple[float, float]]:
    """Steps and training loss from a run's CSV log, thinned; empty where there is none."""
    files = sorted((folder / "logs").glob("*/metrics.csv"))
    points: list[tuple[float, float]] = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                if row.get("train/loss"):
                    points.append((float(row["step"]), float(row["train/loss"])))
    finite = [point for point in points if math.isfinite(point[1])]
    return finite[:: -(-len(finite) // most)] if finite else []


# --------------------------------------------------------------------------------- pictures


def gallery(rows: Sequence[tuple[str, Sequence[Path]]], most: int) -> str:
    """The same test images as each row's runs drew them.

    Args:
        rows: Names, and the folders of their runs.
        most: Images of each category; those that most rows drew come first.
    """
    drawn: dict[str, dict[str, Path]] = {}  # by image, then by row
    for name, folders in rows:
        for folder in folders:
            for file in sorted((folder / "images").glob("*.png")):
                if found := PICTURE.fullmatch(file.name):
                    drawn.setdefault(found["image"], {}).setdefault(name, file)
    chosen: list[str] = []
    count: dict[str, int] = {}
    for image in sorted(drawn, key=lambda image: (-len(drawn[image]), image)):
        group = image.rpartition("_")[0]  # category and kind of defect
        if count.get(group, 0) < most:
            count[group] = count.get(group, 0) + 1
            chosen.append(image)
    figures = [
        f"<h3>{html.escape(image)}</h3><div class=plots>"
        + "".join(_figure(name, file) for name, file in drawn[image].items())
        + "</div>"
        for image in sorted(chosen)
    ]
    return f"<div>{''.join(figures)}</div>" if figures else ""


def _figure(name: str, file: Path) -> str:
    from PIL import Image

    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=80)
    text = base64.b64encode(data.getvalue()).decode()
    return (
        f'<figure><img loading="lazy" alt="{html.escape(file.name)}" width="{small.width}" '
        f'height="{small.height}" src="data:image/jpeg;base64,{text}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
    )
