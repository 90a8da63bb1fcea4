"""The checks of values that constructors share."""

from __future__ import annotations

import math

import pytest

from anomaly_lit.types import UserError, check_choice, check_range


@pytest.mark.parametrize(
    ("interval", "value"),
    [("[1, inf)", 1), ("(0, 1)", 0.5), ("[0, 1]", [0, 1]), ("(-inf, inf)", -3.0), ("(0, 1)", None)],
)
def test_values_inside_pass(interval: str, value: float | list[float] | None) -> None:
    check_range("method", interval, depth=value)


@pytest.mark.parametrize(
    ("interval", "value"),
    [
        ("[1, inf)", 0),
        ("[1, inf)", math.inf),
        ("(0, 1)", 0),
        ("(0, 1)", 1),
        ("[0, 1]", math.nan),
        ("(-inf, inf)", math.nan),
        ("[0, 1]", [0, 2]),
        ("[0, 1]", []),
    ],
)
def test_values_outside_are_refused(interval: str, value: float | list[float]) -> None:
    with pytest.raises(UserError, match=r"method\.depth="):
        check_range("method", interval, depth=value)


def test_all_values_are_named_with_the_bound() -> None:
    with pytest.raises(UserError) as refusal:
        check_range("method", "[1, inf)", depth=-1, heads=2, dims=[8, 0])
    assert str(refusal.value) == "method.depth=-1, method.dims=[8, 0]: each must be at least 1"


@pytest.mark.parametrize("value", ["max", None, [], ["mean", "max"]])
def test_known_choices_pass(value: str | list[str] | None) -> None:
    check_choice("method", ("max", "mean"), score=value)


def test_all_unknown_choices_are_named_with_the_known() -> None:
    with pytest.raises(UserError) as refusal:
        check_choice("method", {"a": 1, "b": 2, "c": 3}, one="d", two="a", both=["b", "e"])
    assert str(refusal.value) == "method.one=d, method.both=['b', 'e']: choose a, b or c"
