"""The Distorter's bound and steps, who gets which gradient, and the score."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.losses import total
from anomaly_lit.methods.adversarial_distorter import network as module
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def gradients(part: Any) -> list[Tensor]:
    return [p.grad for p in part.parameters() if p.grad is not None]


def test_added_vector_has_the_norm_of_the_bound() -> None:
    z, answer = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    found = module.add(z, answer, 0.3) - z
    for own, encoding, said in zip(found, z, answer, strict=True):
        rms = encoding.square().mean().sqrt()
        assert own.square().mean().sqrt() <= (0.3 + 1e-5) * rms
        size = encoding.numel() ** 0.5
        expected = 0.3 * rms * size * said.tanh() / (said.tanh().norm() + 1e-8)
        torch.testing.assert_close(own, expected)


def test_shares_are_taken_away() -> None:
    z, answer = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(
        module.multiply(z, answer, 0.8), z * (1 - 0.8 / (1 + (-answer).exp()))
    )


def test_mask_drops_the_positions_with_the_highest_answers() -> None:
    z, answer = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4, requires_grad=True)
    found = module.mask(z, answer, 0.125)
    for own, encoding, said in zip(found, z, answer, strict=True):
        highest = said.mean(dim=0).flatten().argsort(descending=True)[:2].tolist()
        for place in range(16):
            row, column = divmod(place, 4)
            kept = torch.zeros(4) if place in highest else encoding[:, row, column]
            torch.testing.assert_close(own[:, row, column], kept)
    found.square().sum().backward()
    assert answer.grad is not None
    assert answer.grad.any()


@pytest.mark.parametrize("mode", ["additive", "multiplicative", "mask"])
def test_no_strength_changes_nothing_to_the_bit(mode: str) -> None:
    z = torch.randn(2, 4, 5, 6)
    assert torch.equal(module.PERTURB[mode](z, torch.randn(2, 4, 5, 6), 0.0), z)


def test_similarity_is_the_squared_mean_cosine_of_pairs_in_units_of_the_error(
    small_method: Build,
) -> None:
    method = small_method("adversarial_distorter", similarity_weight=0.1)
    z, answer = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    change = (module.add(z, answer, 0.3) - z).flatten(1)
    cosines = [
        F.cosine_similarity(change[i], change[j], dim=0)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    clean = torch.tensor(0.002, requires_grad=True)
    expected = 0.1 * 0.002 * (sum(cosines) / 6) ** 2
    found = method.similarity(z, answer, clean)["similarity"]
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad  # the error is a unit, and not lowered by it
    assert method.similarity(z[:1], answer[:1], clean)["similarity"] == 0


def test_auto_encoder_s_loss_does_not_reach_the_distorter(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("adversarial_distorter"), make_batch()
    terms = method.losses(batch)
    assert set(terms) == {"perturbed", "clean"}
    total(terms).backward()
    assert not gradients(method.distorter)
    assert len(gradients(method.encoder)) == len(list(method.encoder.parameters()))
    assert len(gradients(method.decoder)) == len(list(method.decoder.parameters()))


def test_a_step_of_the_distorter_moves_it_alone_and_raises_the_error(
    small_method: Build, make_batch: Build
) -> None:
    method, batch = small_method("adversarial_distorter", similarity_weight=0.0), make_batch()
    optimizer = torch.optim.SGD(method.distorter.parameters(), lr=1.0)
    before = method.distorter_losses(batch)["distorter"]
    before.backward()
    assert not gradients(method.encoder)
    assert gradients(method.distorter)
    optimizer.step()
    assert method.distorter_losses(batch)["distorter"] < before


def test_distorter_moves_every_second_step(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    """And no step of one network leaves a gradient for the other."""
    seen: list[tuple[bool, bool]] = []
    method = small_method("adversarial_distorter", distorter_every=2)
    descend = method.descend

    def watched(optimizer: Any, loss: Tensor) -> None:
        before = copy.deepcopy([method.encoder.state_dict(), method.distorter.state_dict()])
        weights = [p.detach().clone() for p in method.encoder.parameters()]
        descend(optimizer, loss)
        moved = any(
            not torch.equal(a, b) for a, b in zip(weights, method.encoder.parameters(), strict=True)
        )
        after = method.distorter.state_dict()
        rival = any(not torch.equal(before[1][key], after[key]) for key in after)
        seen.append((moved, rival))

    method.descend = watched
    fit(method, make_batch(), 4)
    one, other = (True, False), (False, True)
    assert seen == [one, other, one, one, other, one]


def test_reversal_gives_each_network_the_gradient_of_its_own_aim(
    small_method: Build, make_batch: Build
) -> None:
    """Both see the same statistics here: in training, the clean half shares those of a batch."""
    batch = make_batch()
    turns = small_method("adversarial_distorter").eval()
    joint = small_method("adversarial_distorter", adversary="reversal").eval()
    total(turns.losses(batch)).backward()
    turned = copy.deepcopy(gradients(turns.encoder))
    turns.zero_grad()
    total(turns.distorter_losses(batch)).backward()
    total(joint.losses(batch)).backward()
    torch.testing.assert_close(gradients(joint.encoder), turned)
    torch.testing.assert_close(gradients(joint.distorter), gradients(turns.distorter))


def test_reversal_trains_with_one_optimiser_and_moves_the_average(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("adversarial_distorter", adversary="reversal"), make_batch()
    fit(method, batch, 3)
    assert method.automatic_optimization
    assert method.averaged.n_averaged == 3
    assert small_method("adversarial_distorter").averaged.n_averaged == 0


def test_without_strength_it_is_a_plain_auto_encoder(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    """Whatever the Distorter says."""
    batch, ends = make_batch(), []
    for seed in (1, 2):
        method = small_method("adversarial_distorter", strength=0.0)
        torch.manual_seed(seed)
        for parameter in method.distorter.parameters():
            parameter.data.normal_()
        z = method.encoder(batch["image"])
        assert torch.equal(method.perturb(z, method.distorter(batch["image"])), z)
        fit(method, batch, 3)
        ends.append(method.scoring_part().state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_strength_rises_during_the_warmup(
    small_method: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = small_method("adversarial_distorter", strength=0.4, warmup=0.2)
    z, answer = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    for done, strength in ((0.0, 0.0), (0.1, 0.2), (0.2, 0.4), (0.9, 0.4)):
        monkeypatch.setattr(type(method), "done", property(lambda self, done=done: done))
        torch.testing.assert_close(method.perturb(z, answer), module.add(z, answer, strength))


def test_scoring_takes_the_averaged_networks(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("adversarial_distorter", smoothing=0.0, pool=5), make_batch()
    fit(method, batch, 2)
    method.eval()
    encoder, decoder = method.averaged.module
    assert not torch.equal(encoder[0][0].weight, method.encoder[0][0].weight)
    with torch.no_grad():
        error = (decoder(encoder(batch["image"])) - batch["image"]).square().mean(1, keepdim=True)
        found = method(batch["image"])
    torch.testing.assert_close(found.anomaly_map, error)
    torch.testing.assert_close(found.score, F.avg_pool2d(error, 5, 1).amax(dim=(1, 2, 3)))
    method.score = "mean"
    with torch.no_grad():
        torch.testing.assert_close(method(batch["image"]).score, error.mean(dim=(1, 2, 3)))


def test_signed_values_are_seen_in_minus_one_to_one(small_method: Build, make_batch: Build) -> None:
    method, image = small_method("adversarial_distorter", values="signed"), make_batch()["image"]
    assert torch.equal(method.scaled(image), 2 * image - 1)
    with torch.no_grad():
        rebuilt = method.decoder(20 * torch.randn(2, 16, 8, 8))
    assert rebuilt.min() < 0
    assert rebuilt.abs().max() <= 1


@pytest.mark.parametrize(
    ("channels", "scoring", "rival"),
    [([64, 128, 256, 256], 2.71, 0.69), ([64, 128, 256], 1.07, 0.30)],
)
def test_parameters_are_as_many_as_said(
    channels: list[int], scoring: float, rival: float, small_method: Build
) -> None:
    method = small_method("adversarial_distorter", channels=channels)
    millions = [
        sum(p.numel() for p in part.parameters()) / 1e6
        for part in (method.scoring_part(), method.distorter)
    ]
    assert millions == pytest.approx([scoring, rival], abs=0.005)
    assert method.encoder(torch.rand(1, 3, 32, 32)).shape[1] == channels[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "sine"}, r"method\.mode=sine: choose additive, multiplicative or mask"),
        ({"adversary": "none"}, r"method\.adversary=none: choose alternating or reversal"),
        ({"score": "top"}, r"method\.score=top: choose max or mean"),
        ({"values": "8bit"}, r"method\.values=8bit: choose unit or signed"),
        ({"mode": "mask", "strength": 2.0}, r"method\.strength=2.0 is out of range"),
        ({"average": 1.0}, r"average=1.0"),
    ],
)
def test_unknown_and_impossible_values_are_named(
    changes: dict[str, Any], words: str, small_method: Build
) -> None:
    with pytest.raises(UserError, match=words):
        small_method("adversarial_distorter", **changes)


def test_images_that_cannot_be_halved_are_named(small_method: Build) -> None:
    method = small_method("adversarial_distorter")
    with pytest.raises(UserError, match="images of 60 x 64: 60 is no multiple of 8"):
        method(torch.rand(1, 3, 60, 64))


def test_several_processes_need_a_strategy_that_allows_unused_parameters(
    small_method: Build,
) -> None:
    method = small_method("adversarial_distorter")
    method._trainer = SimpleNamespace(strategy=DDPStrategy())
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        method.on_fit_start()
