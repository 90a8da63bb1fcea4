"""Predictions of a test as rows: a file, a line of text, and the choice of what is worth a look."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from anomaly_lit.files import replace_file


def choose_images(rows: list[dict[str, Any]], limit: int) -> list[int]:
    """Indices of the images worth a look, worst mistakes first.

    Up to a third of the places goes to missed defects, a third to false alarms; right verdicts,
    a defect and a normal image of each category in turn, take what is left.
    """
    margin = [row["score"] - (row["threshold"] or 0.0) for row in rows]

    def kind(label: bool, verdict: str) -> list[int]:
        found = [
            i for i, row in enumerate(rows) if (row["label"], row["verdict"]) == (label, verdict)
        ]
        return sorted(found, key=lambda i: margin[i], reverse=not label)

    missed, alarms = kind(True, "good"), kind(False, "defect")
    mistakes = missed[: max(1, limit // 3)] + alarms[: max(1, limit // 3)]
    right: dict[tuple[str, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if index not in missed and index not in alarms:
            right.setdefault((row["category"], not row["label"]), []).append(index)
    rest = []
    lists = [indices for _, indices in sorted(right.items(), key=lambda item: item[0][1])]
    for depth in range(max((len(indices) for indices in lists), default=0)):
        rest += [indices[depth] for indices in lists if depth < len(indices)]
    return (mistakes[:limit] + rest)[:limit]


def caption_of(row: dict[str, Any]) -> str:
    """One line on an image: what it is, its score, and the verdict."""
    threshold = "no threshold" if row["threshold"] is None else f"threshold {row['threshold']:.4g}"
    return (
        f"{row['category']} / {row['defect_type']}: score {row['score']:.4g}, {threshold}: "
        f"{row['verdict']}"
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with a line per row; labels as 0 and 1."""
    with replace_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["path"])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: int(v) if isinstance(v, bool) else v for k, v in row.items()})
