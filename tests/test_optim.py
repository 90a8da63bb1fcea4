"""Optimisers of our own against their formulas written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from anomaly_lit.optim import StableAdamW
from anomaly_lit.types import UserError

PAPER = {"lr": 2e-3, "weight_decay": 1e-4, "amsgrad": True, "eps": 1e-10}


def steps(optimizer: StableAdamW, parameter: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    found = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        found.append(parameter.detach().clone())
    return found


def test_stable_adamw_gives_dinomaly_s_values() -> None:
    """By hand from its formulas; the large gradient of the second step is slowed down."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, -4.0]))
    gradients = [torch.tensor([0.1, -0.2, 0.3, last]) for last in (0.4, 4.0, 0.4)]
    found = steps(StableAdamW([parameter], **PAPER), parameter, gradients)
    expected = [
        [0.998000, -1.998000, 2.997999, -4.001999],
        [0.996207, -1.996207, 2.996206, -4.003445],
        [0.994207, -1.994206, 2.994206, -4.004812],
    ]
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_stable_adamw_equals_a_loop_over_weights(amsgrad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    gradients = [torch.randn(5, generator=generator) * 10**power for power in (0, 1, -1, 2)]
    parameter = nn.Parameter(start.clone())
    optimizer = StableAdamW([parameter], lr=0.1, weight_decay=0.2, amsgrad=amsgrad, clip=0.5)
    found = steps(optimizer, parameter, gradients)
    p, m, v, top = start.tolist(), [0.0] * 5, [0.0] * 5, [0.0] * 5
    for t, gradient in enumerate(gradients, 1):
        deviation = []
        for i, g in enumerate(gradient.tolist()):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            top[i] = max(top[i], v[i]) if amsgrad else v[i]
            deviation.append(math.sqrt(top[i] / (1 - 0.999**t)) + 1e-8)
        ratios = [(g / d) ** 2 for g, d in zip(gradient.tolist(), deviation, strict=True)]
        slow = max(1.0, math.sqrt(sum(ratios) / 5) / 0.5)
        for i in range(5):
            p[i] -= p[i] * 0.1 * 0.2
            p[i] -= 0.1 / slow * m[i] / (1 - 0.9**t) / deviation[i]
        assert torch.allclose(found[t - 1], torch.tensor(p), atol=1e-5)


def test_without_large_gradients_it_is_adamw() -> None:
    parameters = [nn.Parameter(torch.tensor([1.0, -1.0])) for _ in range(2)]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    ours = StableAdamW([parameters[0]], **settings, clip=1e9)
    theirs = torch.optim.AdamW([parameters[1]], **settings)
    for gradient in ([1.0, 0.5], [3.0, -0.5], [0.1, 0.2]):
        for parameter, optimizer in zip(parameters, (ours, theirs), strict=True):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    assert torch.allclose(*parameters, atol=1e-6)


def test_its_state_goes_on_where_it_was() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = StableAdamW([parameter], **PAPER)
    gradients = list(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    steps(optimizer, parameter, gradients[:2])
    other = nn.Parameter(parameter.detach().clone())
    resumed = StableAdamW([other], **PAPER)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, parameter, gradients[2:])
    steps(resumed, other, gradients[2:])
    assert torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"lr": -1.0}, "lr=-1"), ({"clip": 0.0}, "clip=0"), ({"betas": (0.9, 1.0)}, "betas=")],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StableAdamW([nn.Parameter(torch.ones(1))], **wrong)  # type: ignore[arg-type]
