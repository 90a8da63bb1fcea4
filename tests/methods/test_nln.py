"""NLN's networks, neighbours, errors, maps and phases, and whole images of CIFAR's format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anomaly_lit.methods.nln import NLN, cut, join, quantile, random_crops, turned
from anomaly_lit.methods.nln.variants import VARIANTS
from anomaly_lit.nn.latent import SameConv, SmallAutoencoder, StridedAutoencoder
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def trained(small_method: Build, fit: Build, make_batch: Build) -> Build:
    """Builds ``trained(**changes)``, trained for two steps on the batch that it gives as well."""

    def build(**changes: Any) -> tuple[Any, Any]:
        method, batch = small_method("nln", **changes), make_batch()
        fit(method, batch, 2)
        return method.eval(), batch

    return build


# ---------------------------------------------------------------------------------- the networks


def test_parameters_of_the_small_network() -> None:
    """Convolutions 2 x 2 with 32 filters, normalisations, and a dense layer each way."""
    first, inner, last = 3 * 32 * 4 + 32, 32 * 32 * 4 + 32, 32 * 3 * 4 + 3
    for side in (28, 32):
        flat = 32 * (side // 4) ** 2
        encoder = first + 2 * inner + 3 * 64 + flat * 32 + 32
        decoder = 32 * flat + flat + 2 * inner + 2 * 64 + last
        network = SmallAutoencoder(side)
        assert parameters(network) == encoder + decoder < 1e6
        assert network.decoder(network.encoder(torch.rand(2, 3, side, side))).shape[2:] == (
            side,
            side,
        )


@pytest.mark.parametrize(("patch", "halvings"), [(32, 2), (64, 3), (128, 4), (256, 5)])
def test_the_strided_network_has_one_stage_for_each_halving(patch: int, halvings: int) -> None:
    network = StridedAutoencoder(patch, 16, 4)
    kinds = [m for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.stride == (2, 2) for m in kinds) == halvings
    doubled = [m for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert sum(m.stride == (2, 2) for m in doubled) == halvings
    code = network.encoder(torch.rand(1, 3, patch, patch))
    assert code.shape == (1, 16)
    assert network.decoder(code).shape == (1, 3, patch, patch)


def test_parameters_of_the_strided_network() -> None:
    n, z = 32, 128
    encoder = (3 + n + n) * n * 16 + n * n * 9 + n * 2 * n * 16 + 2 * (2 * n * 2 * n * 9)
    encoder += 2 * n * n * 9 + n * z * 64 + 3 * n + n + 3 * 2 * n + n + z
    decoder = z * n * 64 + n * 2 * n * 9 + 2 * n * 4 * n * 9 + 4 * n * 2 * n * 9
    decoder += 2 * n * n * 16 + n * n * 9 + 2 * n * n * 16 + n * 3 * 16
    decoder += n + 2 * n + 4 * n + 2 * n + n + n + 2 * n + 3
    assert parameters(StridedAutoencoder()) == encoder + decoder
    assert 0.9e6 < encoder + decoder < 1.5e6


def test_a_small_convolution_keeps_the_size_and_looks_right_and_down() -> None:
    layer, x = SameConv(2, 3), torch.randn(1, 2, 4, 5)
    found = layer(x)
    weight, bias = layer.convolution.weight, layer.convolution.bias
    for row in range(4):
        for column in range(5):
            expected = bias.clone()
            for i in range(2):
                for j in range(2):
                    if row + i < 4 and column + j < 5:
                        expected = expected + weight[:, :, i, j] @ x[0, :, row + i, column + j]
            torch.testing.assert_close(found[0, :, row, column], expected)


# -------------------------------------------------------------------------------------- patches


def test_joined_patches_are_the_image_exactly() -> None:
    image = torch.rand(2, 3, 64, 96)
    patches = cut(image, 32)
    assert patches.shape == (12, 3, 32, 32)
    assert torch.equal(patches[7], image[1, :, :32, 32:64])
    assert torch.equal(join(patches, image.shape[-2:]), image)
    with pytest.raises(UserError, match="images of 64 x 96 cannot be cut into patches of 40"):
        cut(image, 40)


def test_crops_lie_in_their_image_and_half_of_them_are_turned() -> None:
    torch.manual_seed(0)
    image = torch.arange(2.0)[:, None, None, None] * 1000 + torch.arange(30.0).view(1, 1, 5, 6)
    crops = random_crops(image, 3, 120)
    places = {(b, r, c): image[b, :, r : r + 3, c : c + 3]
              for b in range(2) for r in range(3) for c in range(4)}  # fmt: skip
    seen = set()
    for number, crop in enumerate(crops):
        place = [key for key, patch in places.items() if torch.equal(patch, crop)]
        assert len(place) == 1
        assert place[0][0] == number // 120
        seen.add(place[0])
    assert len(seen) == len(places)
    after = turned(crops, 0.5)
    turns = [
        next(n for n in range(4) if torch.equal(one.rot90(n, (1, 2)), other))
        for one, other in zip(crops, after, strict=True)
    ]
    assert 80 < turns.count(0) < 160
    assert min(turns.count(n) for n in (1, 2, 3)) > 20
    assert torch.equal(turned(crops, 0.0), crops)


def test_crops_are_of_training_only(small_method: Build, make_batch: Build) -> None:
    method, image = small_method("nln", crops=2), make_batch()["image"]
    assert len(method.train().patches(image)) == 3 * 8
    assert torch.equal(method.eval().patches(image), cut(image, 32))


# -------------------------------------------------------------------------------------- scoring


def test_a_training_patch_has_no_distance_and_its_own_error(trained: Build) -> None:
    method, batch = trained(neighbours=1)
    with torch.no_grad():
        found = method.compare(batch["image"])
        method.error = "own"
        own = method.compare(batch["image"])
    assert found.distance.abs().max() < 1e-5
    torch.testing.assert_close(found.pixel, own.pixel, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.patch, own.patch, atol=1e-5, rtol=1e-4)


def test_duplicates_in_the_bank_change_nothing_for_one_neighbour(
    trained: Build, make_batch: Build
) -> None:
    method, _ = trained(neighbours=1)
    other = make_batch(3)["image"]
    with torch.no_grad():
        before = method.compare(other)
        method.bank.fill(method.bank.items.repeat(3, 1))
        after = method.compare(other)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("distance", ["mean", "max"])
def test_score_and_map_are_the_formula(trained: Build, make_batch: Build, distance: str) -> None:
    method, _ = trained(neighbours=3, alpha=0.3, distance=distance)
    image = make_batch(3)["image"]
    low, high = method.limits.T
    with torch.no_grad():
        found = method(image)
        for b in range(3):
            scores = []
            for row in range(2):
                for column in range(2):
                    area = (
                        ...,
                        slice(32 * row, 32 * row + 32),
                        slice(32 * column, 32 * column + 32),
                    )
                    patch = image[b][area]
                    code = method.model.encode(patch[None])[0]
                    gaps = (method.bank.items - code).norm(dim=1)
                    near = gaps.argsort()[:3]
                    d = gaps[near].mean() if distance == "mean" else gaps[near].max()
                    e = torch.zeros(32, 32)
                    for index in near:
                        rebuilt = method.model.decode(method.bank.items[index][None])[0]
                        e += (patch - rebuilt).abs().mean(dim=0) / 3
                    d = (d - low[2]) / (high[2] - low[2])
                    expected = 0.7 * (e - low[0]) / (high[0] - low[0]) + 0.3 * d
                    torch.testing.assert_close(
                        found.anomaly_map[b, 0][area], expected, atol=1e-3, rtol=1e-3
                    )
                    error = (e.mean() - low[1]) / (high[1] - low[1])
                    scores.append(0.7 * error + 0.3 * d)
            torch.testing.assert_close(found.score[b], max(scores), atol=1e-3, rtol=1e-3)


def test_limits_are_quantiles_of_held_out_images(
    trained: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = trained()
    held = make_batch(5)

    def batches(split: str, most: int | None = 256) -> list[Any]:
        return [batch] if split == "train" else [held]

    monkeypatch.setattr(method, "normal_batches", batches)
    with torch.no_grad():
        method.calibrate()
        assert len(method.bank) == 8
        for limits, values in zip(method.limits, method.compare(held["image"]), strict=True):
            ordered = values.flatten().sort().values
            for limit, share in zip(limits, (0.01, 0.99), strict=True):
                assert limit == ordered[max(1, round(share * len(ordered))) - 1]
    assert quantile(torch.tensor([3.0, 1.0, 2.0]), 0.5) == 2


def test_without_held_out_images_training_images_are_compared_without_themselves(
    trained: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = trained(neighbours=1)
    monkeypatch.setattr(
        method, "normal_batches", lambda split, most=256: [batch] if split == "train" else []
    )
    with torch.no_grad():
        method.calibrate()
        assert (method.compare(batch["image"], skip=1).distance > 1e-4).all()
    assert method.limits[2, 0] > 1e-4
    assert not torch.equal(method.limits[0], torch.tensor([0.0, 1.0]))


# ------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_trains_scores_and_is_restored(trained: Build, variant: str) -> None:
    method, batch = trained(variant=variant)
    with torch.no_grad():
        found = method(batch["image"])
    assert found.score.isfinite().all()
    assert found.anomaly_map.isfinite().all()
    assert method.automatic_optimization == (variant in ("plain", "variational"))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_phase_changes_its_parts_alone(small_method: Build, variant: str) -> None:
    model, patches = small_method("nln", variant=variant).model, torch.rand(4, 3, 32, 32)
    changed = set()
    for name, phase in model.phases().items():
        own = {id(p) for part in phase.parts for p in part.parameters()}
        model.zero_grad()
        torch.stack(list(model.losses(name, patches).values())).sum().backward()
        moved = {key for key, p in model.named_parameters() if id(p) in own and p.grad is not None}
        assert moved, name
        changed |= moved
    assert changed == {key for key, _ in model.named_parameters()}


def test_rates_are_the_published_ones_or_those_named(small_method: Build, fit: Build) -> None:
    def rates(**changes: Any) -> list[float]:
        method = small_method("nln", **changes)
        return [each["optimizer"].param_groups[0]["lr"] for each in method.configure_optimizers()]

    assert rates() == [1e-3]
    assert rates(variant="adversarial") == [1e-5, 1e-5, 1e-5]
    assert rates(variant="residual", rates={"fool": 1e-4}) == [1e-3, 1e-5, 1e-4]
    assert rates(variant="consistent") == [1e-4, 1e-4, 1e-4]
    with pytest.raises(UserError, match=r"rates names fool, but .*are reconstruct$"):
        small_method("nln", rates={"fool": 1e-4})


def test_the_reconstruction_loss_is_the_cross_entropy(small_method: Build) -> None:
    model, patches = small_method("nln").model.eval(), torch.rand(4, 3, 32, 32)
    rebuilt = model.decode(model.encode(patches))
    expected = -(patches * rebuilt.log() + (1 - patches) * (1 - rebuilt).log()).mean()
    torch.testing.assert_close(model.losses("reconstruct", patches)["reconstruction"], expected)


def test_errors_of_residual_and_consistent_are_between_features_and_codes(
    small_method: Build,
) -> None:
    patches, near = torch.rand(3, 3, 32, 32), torch.randn(3, 2, 16)
    for variant in ("residual", "consistent"):
        model = small_method("nln", variant=variant).model.eval()
        code = model.encode(patches)
        rebuilt = torch.stack([model.decode(each) for each in near])
        found = model.error(patches, code, near, rebuilt)
        for n in range(3):
            total = 0.0
            for i in range(2):
                if variant == "residual":
                    there = model.describe(rebuilt[n, i][None]) - model.describe(patches[n][None])
                else:
                    there = near[n, i] - model.second(model.decode(code[n][None]))
                total += float(there.abs().mean()) / 2
            assert float(found[n]) == pytest.approx(total, rel=1e-4)


def test_the_divergence_is_that_of_torch(small_method: Build) -> None:
    model, patches = (
        small_method("nln", variant="variational").model.eval(),
        torch.rand(4, 3, 32, 32),
    )
    inner = model.narrow(model.autoencoder.encoder(patches))
    spread = (model.log_variance(inner) / 2).exp()
    one = torch.distributions.Normal(model.mean(inner), spread)
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0, 1))
    found = model.losses("reconstruct", patches)
    torch.testing.assert_close(found["divergence"], expected.sum(dim=1).mean())
    torch.testing.assert_close(
        found["reconstruction"] / 32**2, F.binary_cross_entropy(
            model.decode(model.mean(inner)), patches), atol=0.05, rtol=0.1,
    )  # fmt: skip


def test_values_out_of_range_are_named(small_method: Build) -> None:
    wrong = {
        "variant": "own", "distance": "min", "error": "both", "neighbours": 0, "alpha": 1.5,
        "crops": -1, "rotation": 2.0,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(UserError, match=rf"{name}={value}"):
            small_method("nln", **{name: value})
    with pytest.raises(UserError, match="patch=30: it must be a multiple of 4"):
        SmallAutoencoder(30)
    with pytest.raises(UserError, match="patch=48: choose 32, 64, 128 or 256"):
        StridedAutoencoder(48)


def test_any_auto_encoder_can_be_passed_in(make_batch: Build, fit: Build) -> None:
    method = NLN(SmallAutoencoder(64, 8, 4), torch.optim.Adam, neighbours=1, crops=0)
    batch = make_batch()
    fit(method, batch, 1)
    with torch.no_grad():
        assert method.eval()(batch["image"]).anomaly_map.shape == (2, 1, 64, 64)
