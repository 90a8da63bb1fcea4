from __future__ import annotations

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from anomaly_lit.config import config_dir, instantiate, plain
from anomaly_lit.losses import CosineLoss, MSECosineLoss, loss_terms

LOSSES = ["l1", "mse", "cosine", "mse_cosine"]


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 5, generator=generator), torch.randn(
        2, 3, 4, 5, generator=generator
    )


def test_cosine_loss_is_the_mean_over_positions() -> None:
    prediction, target = maps()
    values = []
    for b in range(2):
        for i in range(4):
            for j in range(5):
                p, t = prediction[b, :, i, j].double(), target[b, :, i, j].double()
                values.append(1 - float(p @ t) / math.sqrt(float(p @ p) * float(t @ t)))
    assert CosineLoss()(prediction, target).item() == pytest.approx(sum(values) / len(values))


def test_direction_is_weighted_five_times_and_terms_sum_to_the_loss() -> None:
    prediction, target = maps()
    loss = MSECosineLoss()
    terms = loss.terms(prediction, target)
    assert terms["distance"] == nn.functional.mse_loss(prediction, target)
    assert terms["direction"] == 5 * CosineLoss()(prediction, target)
    torch.testing.assert_close(sum(terms.values()), loss(prediction, target))


def test_a_loss_without_names_is_one_term() -> None:
    prediction, target = maps()
    assert loss_terms(nn.L1Loss(), prediction, target) == {
        "reconstruction": nn.functional.l1_loss(prediction, target)
    }
    assert list(loss_terms(MSECosineLoss(), prediction, target)) == ["distance", "direction"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_takes_two_maps_and_is_zero_where_they_agree(name: str) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"loss={name}", "output_dir=unused"])
    loss = instantiate(plain(cfg)["method"]["loss"])
    prediction, target = maps()
    assert loss(prediction, target).ndim == 0
    assert loss(prediction, target) > 0.1
    assert loss(target, target).item() == pytest.approx(0, abs=1e-5)


def test_length_does_not_change_the_direction() -> None:
    prediction, target = maps()
    torch.testing.assert_close(
        CosineLoss()(10 * prediction, target), CosineLoss()(prediction, target)
    )
