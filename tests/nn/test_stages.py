"""Stages of training."""

from __future__ import annotations

import pytest

from anomaly_lit.nn.stages import Stages
from anomaly_lit.types import UserError


def test_stages_follow_their_shares() -> None:
    stages = Stages({"first": 1, "second": 2, "third": 1})
    found = [stages.at(done) for done in (0.0, 0.2, 0.25, 0.5, 0.74, 0.75, 1.0)]
    assert [name for name, _ in found] == ["first"] * 2 + ["second"] * 3 + ["third"] * 2
    assert [within for _, within in found] == pytest.approx([0, 0.8, 0, 0.5, 0.98, 0, 1])


def test_a_stage_without_a_share_is_left_out() -> None:
    stages = Stages({"first": 0, "second": 1, "third": 0})
    assert stages.at(0.0) == ("second", 0.0)
    assert stages.at(1.0) == ("second", 1.0)


def test_each_start_is_called_once_also_of_a_stage_shorter_than_a_step() -> None:
    called: list[str] = []
    stages = Stages({"first": 0.5, "second": 0.1, "third": 0.4}, called.append)
    assert stages.enter(0.0) == ("first", 0.0)
    assert stages.enter(0.25)[0] == "first"
    assert called == ["first"]
    assert stages.enter(0.75)[0] == "third"
    assert called == ["first", "second", "third"]
    stages.enter(1.0)
    assert called == ["first", "second", "third"]


def test_a_state_dict_remembers_which_have_started() -> None:
    called: list[str] = []
    stages = Stages({"first": 1, "second": 1})
    stages.enter(0.0)
    other = Stages({"first": 1, "second": 1}, called.append)
    other.load_state_dict(stages.state_dict())
    other.enter(0.25)
    assert called == []
    other.enter(0.5)
    assert called == ["second"]


@pytest.mark.parametrize("shares", [{}, {"first": 0.0}, {"first": -1.0, "second": 2.0}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match="shares of training"):
        Stages(shares)
