"""Rows of a test's predictions: write them to a file, put one into words, choose some to show."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from anomaly_lit.files import printable, replace_file


def choose_images(rows: list[dict[str, Any]], limit: int) -> list[int]:
    """Choose the images worth a look, worst mistakes first.

    Missed defects and false alarms get up to a third of the places each. The other images fill the
    rest: in turn a defect of each category, then a normal image of each. Takes O(n log n).

    Args:
        rows: One for each image, as in predictions.csv.
        limit: Most images to choose.

    Returns:
        Positions in `rows`.
    """
    missed, alarms = [], []
    others: dict[tuple[str, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if (row["label"], row["verdict"]) == (True, "good"):
            missed.append(index)
        elif (row["label"], row["verdict"]) == (False, "defect"):
            alarms.append(index)
        else:
            others.setdefault((row["category"], not row["label"]), []).append(index)
    margin = [row["score"] - (row["threshold"] or 0.0) for row in rows]
    missed.sort(key=margin.__getitem__)
    alarms.sort(key=margin.__getitem__, reverse=True)
    third = max(1, limit // 3)
    chosen = (missed[:third] + alarms[:third])[:limit]
    lists = [indices for _, indices in sorted(others.items(), key=lambda item: item[0][1])]
    in_turn = sorted(
        (turn, place, index)
        for place, indices in enumerate(lists)
        for turn, index in enumerate(indices)
    )
    return (chosen + [index for *_, index in in_turn])[:limit]


def caption_of(row: dict[str, Any]) -> str:
    """Return one line on an image: what it is, its score, and the verdict."""
    threshold = "no threshold" if row["threshold"] is None else f"threshold {row['threshold']:.4g}"
    return (
        f"{row['category']} / {row['defect_type']}: score {row['score']:.4g}, {threshold}: "
        f"{row['verdict']}"
    )


def printable_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose text is printable, also where names of files are not UTF-8."""
    return {key: printable(v) if isinstance(v, str) else v for key, v in row.items()}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV file with a line for each row; true and false become 1 and 0."""
    with replace_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["path"])
        writer.writeheader()
        for row in map(printable_row, rows):
            writer.writerow({k: int(v) if isinstance(v, bool) else v for k, v in row.items()})
