import pytest
import torch
from torch import nn

from anomaly_lit.methods.base import Method
from anomaly_lit.schedules import Cosine, Decay, Ramp, Step
from anomaly_lit.types import UserError


def test_cosine_rises_then_falls_to_its_end():
    schedule = Cosine(warmup=0.1, end=0.2)
    assert schedule(0.05) == pytest.approx(0.5)
    assert schedule(0.1) == pytest.approx(1.0)
    assert schedule(0.55) == pytest.approx(0.6)
    assert schedule(1.0) == schedule(1.5) == pytest.approx(0.2)


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"warmup": -0.1}, {"end": 1.1}])
def test_cosine_refuses_what_is_out_of_range(wrong):
    with pytest.raises(UserError, match="schedule"):
        Cosine(**wrong)


def test_step_is_lower_from_its_share_on():
    schedule = Step(at=0.8, factor=0.1)
    assert [schedule(done) for done in (0, 0.79, 0.8, 1)] == [1, 1, 0.1, 0.1]
    warm = Step(at=0.8, factor=0.1, warmup=0.5)
    assert [warm(done) for done in (0, 0.25, 0.5, 0.8)] == [0, 0.5, 1, 0.1]
    several = Step(at=[0.5, 0.7, 0.9], factor=0.1)
    assert [several(done) for done in (0, 0.5, 0.8, 1)] == pytest.approx([1, 0.1, 0.01, 0.001])
    with pytest.raises(UserError, match="at=80"):
        Step(at=80)
    with pytest.raises(UserError, match=r"warmup=0\.9"):
        Step(at=0.8, warmup=0.9)


def test_a_schedule_sees_the_share_of_training_that_is_done():
    class Toy(Method):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=2.0), schedule=lambda done: 1 - done)
            self.weight = nn.Parameter(torch.zeros(1))

    class Trainer:
        estimated_stepping_batches = 4

    toy = Toy()
    toy._trainer = Trainer()
    made = toy.configure_optimizers()
    rates = []
    for _ in range(4):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_decay_falls_at_even_distances():
    schedule = Decay(factor=0.9, times=10)
    assert [schedule(done) for done in (0.0, 0.09, 0.1, 0.55, 0.99, 1.0)] == pytest.approx(
        [1, 1, 0.9, 0.9**5, 0.9**9, 0.9**9]
    )
    with pytest.raises(UserError, match="times=0"):
        Decay(times=0)


def test_ramp_goes_to_its_last_value_and_stays():
    ramp = Ramp(over=0.1, first=0.2, last=1.0)
    assert [ramp(done) for done in (0, 0.05, 0.1, 1)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert Ramp(over=0.0)(0.0) == 1.0
    with pytest.raises(UserError, match=r"over=1\.5"):
        Ramp(over=1.5)
