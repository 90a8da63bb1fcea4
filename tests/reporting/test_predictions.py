from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomaly_lit.reporting.predictions import caption_of, choose_images, write_rows


def row(label: bool, score: float, threshold: float | None = 1.0, **more: Any) -> dict[str, Any]:
    verdict = "unknown" if threshold is None else "defect" if score > threshold else "good"
    return {
        "path": f"{score}.png",
        "category": "bolt",
        "defect_type": "scratch" if label else "good",
        "label": label,
        "score": score,
        "threshold": threshold,
        "verdict": verdict,
    } | more


def scores(rows: list[dict[str, Any]], limit: int) -> list[float]:
    return [rows[index]["score"] for index in choose_images(rows, limit)]


MISSED = [row(True, 0.9), row(True, 0.1), row(True, 0.5)]
ALARMS = [row(False, 1.1), row(False, 9.0), row(False, 3.0)]
RIGHT = [row(True, 2.0), row(False, 0.2), row(True, 5.0), row(False, 0.3)]


def test_worst_mistakes_come_first() -> None:
    found = scores([*RIGHT, *ALARMS, *MISSED], 9)
    assert found[:6] == [0.1, 0.5, 0.9, 9.0, 3.0, 1.1]
    assert set(found[6:]) <= {row["score"] for row in RIGHT}


def test_mistakes_of_one_kind_leave_room_for_the_other() -> None:
    missed = [row(True, 0.01 * number) for number in range(40)]
    found = scores([*missed, *ALARMS, *RIGHT], 9)
    assert found[:3] == [0.0, 0.01, 0.02]
    assert found[3:6] == [9.0, 3.0, 1.1]
    assert len(found) == 9


def test_right_verdicts_alternate_between_defects_and_normal_images_of_all_categories() -> None:
    rows = RIGHT + [{**r, "category": "cloth"} for r in RIGHT]
    chosen = [rows[index] for index in choose_images(rows, 4)]
    assert {(r["category"], r["label"]) for r in chosen} == {
        ("bolt", True), ("bolt", False), ("cloth", True), ("cloth", False)
    }  # fmt: skip


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 100])
def test_no_more_than_the_limit_and_none_twice(limit: int) -> None:
    rows = [*RIGHT, *ALARMS, *MISSED]
    chosen = choose_images(rows, limit)
    assert len(chosen) == len(set(chosen)) == min(limit, len(rows))


def chosen_by_rule(rows: list[dict[str, Any]], limit: int) -> list[int]:
    """The rule in its plainest, quadratic form."""
    margin = [row["score"] - (row["threshold"] or 0.0) for row in rows]
    missed = [i for i, r in enumerate(rows) if r["label"] and r["verdict"] == "good"]
    alarms = [i for i, r in enumerate(rows) if not r["label"] and r["verdict"] == "defect"]
    missed = sorted(missed, key=lambda i: margin[i])
    alarms = sorted(alarms, key=lambda i: margin[i], reverse=True)
    mistakes = missed[: max(1, limit // 3)] + alarms[: max(1, limit // 3)]
    right: dict[tuple[str, bool], list[int]] = {}
    for i, r in enumerate(rows):
        if i not in missed and i not in alarms:
            right.setdefault((r["category"], not r["label"]), []).append(i)
    lists = [right[key] for key in sorted(right, key=lambda key: key[1])]
    rest = []
    for depth in range(max((len(indices) for indices in lists), default=0)):
        rest += [indices[depth] for indices in lists if depth < len(indices)]
    return (mistakes[:limit] + rest)[:limit]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0]),  # ties
            st.sampled_from([None, 1.0]),
            st.sampled_from(["bolt", "cloth", "nut"]),
        ),
        max_size=40,
    ),
    st.integers(0, 45),
)
def test_choice_follows_the_rule(
    found: list[tuple[bool, float, float | None, str]], limit: int
) -> None:
    rows = [row(label, score, threshold, category=c) for label, score, threshold, c in found]
    assert choose_images(rows, limit) == chosen_by_rule(rows, limit)


def test_without_thresholds_images_are_chosen_all_the_same() -> None:
    rows = [row(True, 3.0, None), row(False, 1.0, None)]
    assert sorted(choose_images(rows, 5)) == [0, 1]


def test_caption_says_what_it_is_and_what_was_found() -> None:
    text = caption_of(row(True, 2.0))
    for word in ("bolt", "scratch", "2", "threshold 1", "defect"):
        assert word in text
    assert "no threshold" in caption_of(row(True, 2.0, None))


def test_rows_are_written_with_labels_as_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [row(True, 2.0), row(False, 0.5, None, path="a,\nb.png")])
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [r["label"] for r in found] == ["1", "0"]
    assert found[1]["path"] == "a,\nb.png"
    assert found[1]["threshold"] == ""


def test_no_rows_still_give_a_header(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [])
    assert (tmp_path / "rows.csv").read_text().startswith("path")


def test_a_name_that_is_no_utf_8_is_spelt_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", [row(False, 0.5, path="caf\udce9.png", category="büro")])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert (written["path"], written["category"]) == ("caf\\xe9.png", "büro")
