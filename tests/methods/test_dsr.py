"""DSR's codebooks, corrupted codes, stages and networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import total
from anomaly_lit.methods import DSR, dsr
from anomaly_lit.methods.dsr.network import (
    Codebook,
    LatentModel,
    ObjectDecoder,
    Restriction,
    corrupt_codes,
    levelled,
    turn,
)
from anomaly_lit.methods.dsr.pretrained import load_latent
from anomaly_lit.nn.unet import UNet
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def codebook(count: int = 40, dim: int = 3, **settings: Any) -> Codebook:
    torch.manual_seed(0)
    return Codebook(count, dim, **settings)


def parameters(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


# ------------------------------------------------------------------------------- codebook


def test_every_position_takes_the_nearest_vector() -> None:
    book, z = codebook(), torch.randn(2, 3, 4, 5)
    found = book.nearest(z)
    for image in range(2):
        for row in range(4):
            for column in range(5):
                gaps = (book.vectors - z[image, :, row, column]).square().sum(dim=1)
                assert found[image, row, column] == gaps.argmin()
    assert torch.equal(book(z)[1, :, 2, 3], book.vectors[found[1, 2, 3]])


def test_gradient_passes_straight_through() -> None:
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    (codebook()(z) * torch.arange(4.0).view(1, 1, 2, 2)).sum().backward()
    torch.testing.assert_close(z.grad, torch.arange(4.0).view(1, 1, 2, 2).expand(1, 3, 2, 2))


def test_vectors_move_as_written() -> None:
    book, z = codebook(4), torch.randn(2, 3, 4, 5)
    sums, uses = book.sums.clone(), book.uses.clone()
    number = book.nearest(z).flatten()
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    for code in range(4):
        mine = rows[number == code]
        sums[code] = 0.99 * sums[code] + 0.01 * mine.sum(dim=0)
        uses[code] = 0.99 * uses[code] + 0.01 * len(mine)
    share = (uses + 1e-5) / (uses.sum() + 4e-5) * uses.sum()
    book.move(book.assigned(z), z)
    torch.testing.assert_close(book.vectors, sums / share[:, None])


def test_idle_vectors_start_anew_at_an_encoding() -> None:
    book = codebook(3, reseed=2)
    book.vectors[2] = 1000.0
    z = torch.randn(1, 3, 4, 4)
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    for step in range(3):
        assert book.vectors[2].max() > 900, step
        book.sums[2] = book.vectors[2] * book.uses[2]
        book.move(book.assigned(z), z)
    assert (rows == book.vectors[2]).all(dim=1).any()
    assert book.idle[2] == 0


# ------------------------------------------------------------------------- corrupted codes


def test_corrupted_codes_are_neither_the_nearest_nor_beyond_the_strength() -> None:
    book, z = codebook(100), torch.randn(6, 3, 5, 4)
    clean = book(z)
    where = torch.rand(6, 1, 5, 4) < 0.7
    seen = []
    for seed in range(20):
        changed = corrupt_codes(z, clean, where, book, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.where(where, clean, changed), clean)
        for image, _, row, column in where.nonzero().tolist():
            code = (book.vectors == changed[image, :, row, column]).all(dim=1).nonzero()
            assert len(code) == 1  # a member of the codebook
            gaps = (book.vectors - z[image, :, row, column]).square().sum(dim=1)
            seen.append((gaps < gaps[code[0, 0]]).sum().item())
    assert min(seen) == 5  # a twentieth of 100 is left out
    assert 60 < max(seen) < 100


def test_without_a_region_codes_stay_clean() -> None:
    book, z = codebook(), torch.randn(2, 3, 4, 4)
    none = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(corrupt_codes(z, book(z), none, book, torch.Generator()), book(z))


def test_levels_are_corrupted_as_described(small_method: Build, make_batch: Build) -> None:
    method = small_method("dsr").eval()
    image = make_batch(256)["image"]
    with torch.no_grad():
        clean, corrupted, truth = method.corrupted_codes(image, torch.Generator().manual_seed(0))
    low = (clean.low != corrupted.low).flatten(1).any(dim=1)
    high = (clean.high != corrupted.high).flatten(1).any(dim=1)
    wrong = truth.flatten(1).any(dim=1)
    assert torch.equal(low | high, wrong)
    assert 0.2 < wrong.float().mean() < 0.6  # half, less those whose noise is empty
    assert (low & high).sum() > (low & ~high).sum() > 0
    assert (high & ~low).sum() > 0
    for only, cell in ((low & ~high, 8), (high & ~low, 4)):
        blocks = F.avg_pool2d(truth[only], cell)
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}
    level = clean.low[low & ~high] != corrupted.low[low & ~high]
    area = F.avg_pool2d(truth[low & ~high], 8) > 0
    assert not (level.any(dim=1, keepdim=True) & ~area).any()


# ------------------------------------------------------------------------------- networks


def test_parameters_are_as_many_as_computed_from_the_paper_s_shapes() -> None:
    with torch.device("meta"):
        latent = LatentModel(128, 64, 4096, 1000)
        assert parameters(latent) == pytest.approx(1.9, abs=0.1)
        assert 2 * latent.low.vectors.numel() / 1e6 == pytest.approx(1.05, abs=0.01)
        assert parameters(Restriction(128, 128)) == pytest.approx(7.8, abs=0.1)
        assert parameters(ObjectDecoder(128, 64, 256)) == pytest.approx(9.4, abs=0.2)
        assert parameters(UNet(6, (64, 128, 256, 256))) == pytest.approx(5.6, abs=0.3)


def test_shapes() -> None:
    latent = LatentModel(8, 4, 16, 10)
    codes, features, z_low = latent.codes(torch.rand(2, 3, 64, 96))
    assert codes.low.shape == z_low.shape == (2, 8, 8, 12)
    assert codes.high.shape == features.shape == (2, 8, 16, 24)
    joined = latent.joined(codes)
    assert latent.decoder(joined).shape == (2, 3, 64, 96)
    assert ObjectDecoder(8, 4, 8)(joined).shape == (2, 3, 64, 96)
    assert ObjectDecoder(8, 4, 8, 5)[4](torch.rand(2, 32, 4, 6)).shape == (2, 5, 4, 6)
    assert Restriction(8, 4)(codes.low).shape == codes.low.shape
    assert UNet(6, (4, 8, 8))(torch.rand(2, 6, 64, 96)).shape == (2, 2, 64, 96)


# --------------------------------------------------------------------------------- stages


def test_stages_follow_the_shares(small_method: Build) -> None:
    method = small_method("dsr", shares=[0.25, 0.5, 0.25])
    assert [method.stages.at(done)[0] for done in (0.0, 0.24, 0.25, 0.74, 0.75, 1.0)] == [
        "latent", "latent", "detection", "detection", "upsampling", "upsampling",
    ]  # fmt: skip
    assert method.stages.at(0.5)[1] == pytest.approx(0.5)
    assert method.stages.at(1.0)[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("done", "moving"),
    [
        (0.0, {"latent"}),
        (0.5, {"restrict_low", "restrict_high", "object_decoder", "detector"}),
        (0.9, {"upsampler"}),
    ],
)
def test_each_stage_has_gradients_for_its_own_parts_alone(
    done: float,
    moving: set[str],
    small_method: Build,
    make_batch: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = small_method("dsr").train()
    monkeypatch.setattr(type(method), "done", done)
    total(method.losses(make_batch(4))).backward()
    found = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    assert found == moving


def test_the_detector_s_loss_reaches_nothing_but_the_detector(
    small_method: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = small_method("dsr").train()
    monkeypatch.setattr(type(method), "done", 0.5)
    method.losses(make_batch(4))["detection"].backward()
    found = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    assert found == {"detector"}


def test_codebooks_move_in_the_first_stage_alone(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("dsr", shares=[0.5, 0.25, 0.25])
    seen: list[Any] = []
    method.on_after_backward = lambda: seen.append(method.latent.low.vectors.clone())
    fit(method, make_batch(), 8)
    still = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert still == [False] * 3 + [True] * 4
    assert torch.equal(method.latent.low.vectors, seen[-1])


def test_rate_falls_within_the_second_stage_only(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("dsr", shares=[0.25, 0.5, 0.25])
    rates: list[float] = []
    method.on_after_backward = lambda: rates.append(
        method.trainer.optimizers[0].param_groups[0]["lr"] / 2e-4
    )
    fit(method, make_batch(), 20)
    assert rates == pytest.approx([1.0] * 13 + [0.1] * 2 + [1.0] * 5)


def test_rate_falls_in_each_scheduled_stage(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("dsr", shares=[0, 0.5, 0.5], scheduled=["detection", "upsampling"])
    rates: list[float] = []
    method.on_after_backward = lambda: rates.append(
        method.trainer.optimizers[0].param_groups[0]["lr"] / 2e-4
    )
    fit(method, make_batch(), 20)
    assert rates == pytest.approx(2 * ([1.0] * 8 + [0.1] * 2))


@pytest.mark.parametrize(("done", "term", "stage"), [(0.5, "image", 0), (0.9, "upsampling", 1)])
def test_images_are_turned_in_their_stage_alone(
    done: float,
    term: str,
    stage: int,
    small_method: Build,
    make_batch: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DSR, "done", done)
    shares: list[float] = []

    def note(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
        shares.append(share)
        return image

    monkeypatch.setattr(dsr, "turn", note)
    method = small_method("dsr", turned=[0.25, 0.75]).train()
    assert term in method.losses(make_batch(2))
    assert shares == [[0.25, 0.75][stage]]


def test_no_image_is_turned_at_a_share_of_zero_and_each_at_one(make_batch: Build) -> None:
    image = make_batch(16)["image"]
    turned = [turn(image, share, torch.Generator().manual_seed(0)) for share in (0.0, 1.0)]
    assert torch.equal(turned[0], image)
    assert (turned[1] != image).flatten(1).any(dim=1).all()


def test_a_levelled_image_differs_by_a_constant_and_has_no_median_difference() -> None:
    image, seen = torch.rand(2, 2, 3, 5, 5)
    image.requires_grad_()
    shifted = levelled(image, seen)
    for number, colour in itertools.product(range(2), range(3)):
        gaps = (seen - image)[number, colour].flatten().sort().values
        expected = image[number, colour] + gaps[12]
        torch.testing.assert_close(shifted[number, colour], expected)
    shifted.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))  # the shift is a constant


def test_brightness_is_levelled_only_if_asked(small_method: Build, make_batch: Build) -> None:
    image = make_batch()["image"]
    for level in (False, True):
        torch.manual_seed(0)
        method = small_method("dsr", level=level).eval()
        with torch.no_grad():
            specific, general, _ = method.detect(image)
        gap = (general - specific).flatten(2).median(dim=2).values.abs().max()
        assert (gap < 1e-6) == level


def test_evaluation_sums_all_stages(small_method: Build, make_batch: Build) -> None:
    losses = small_method("dsr").eval().losses(make_batch())
    names = {"latent", "commitment", "codes", "image", "detection", "upsampling"}
    assert set(losses) == names


def test_latent_model_of_another_run_leaves_the_first_stage_out(
    small_method: Build, fit: Build, make_batch: Build, tmp_path: Path
) -> None:
    first = small_method("dsr")
    fit(first, make_batch(), 4)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = small_method("dsr", latent_weights=str(tmp_path / "first.ckpt"))
    assert second.stages.at(0.0)[0] == "detection"
    fit(second, make_batch(), 4)
    for name, value in first.latent.state_dict().items():
        assert torch.equal(value, second.latent.state_dict()[name]), name


def test_weights_that_are_not_there_are_named(
    small_method: Build, fit: Build, make_batch: Build, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"latent_weights=.*none\.ckpt: no such file"):
        fit(small_method("dsr", latent_weights=str(tmp_path / "none.ckpt")), make_batch(), 1)
    torch.save({"state_dict": {"backbone.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="neither a checkpoint of DSR"):
        fit(small_method("dsr", latent_weights=str(tmp_path / "other.ckpt")), make_batch(), 1)


def released_state(latent: LatentModel) -> dict[str, Tensor]:
    """The authors' names and order of colours for the weights of a latent model."""
    stacks = {
        "encode_high.5": "_encoder_b",
        "encode_low.4": "_encoder_t",
        "decoder.1": "_decoder_b",
    }
    names = {
        "encode_high.0": "_encoder_b._conv_1",
        "encode_high.2": "_encoder_b._conv_2",
        "encode_high.4": "_encoder_b._conv_3",
        "encode_low.0": "_encoder_t._conv_1",
        "encode_low.2": "_encoder_t._conv_2",
        "encode_low.5": "_pre_vq_conv_top",
        "up": "upsample_t",
        "join": "_pre_vq_conv_bot",
        "decoder.0": "_decoder_b._conv_1",
        "decoder.2": "_decoder_b._conv_trans_1",
        "decoder.4": "_decoder_b._conv_trans_2",
        **{
            f"{own}.blocks.{n}.{k}": f"{theirs}._residual_stack._layers.{n}._block.{k}"
            for own, theirs in stacks.items()
            for n in (0, 1)
            for k in (1, 3)
        },
    }
    state = {
        f"{names[module]}.{kind}": value.clone()
        for module, _, kind in (name.rpartition(".") for name in dict(latent.named_parameters()))
        for value in [latent.state_dict()[f"{module}.{kind}"]]
    }
    state["_encoder_b._conv_1.weight"] = state["_encoder_b._conv_1.weight"][:, [2, 1, 0]]
    state["_decoder_b._conv_trans_2.weight"] = state["_decoder_b._conv_trans_2.weight"][
        :, [2, 1, 0]
    ]
    state["_decoder_b._conv_trans_2.bias"] = state["_decoder_b._conv_trans_2.bias"][[2, 1, 0]]
    for book, theirs in ((latent.low, "_vq_vae_top"), (latent.high, "_vq_vae_bot")):
        state[f"{theirs}._embedding.weight"] = book.vectors.clone()
        state[f"{theirs}._ema_w"] = torch.zeros_like(book.vectors)
        state[f"{theirs}._ema_cluster_size"] = torch.zeros_like(book.uses)
    return state


def test_the_authors_first_stage_is_loaded_for_rgb(tmp_path: Path) -> None:
    torch.manual_seed(0)
    released, ours = LatentModel(8, 4, 32, 1000), LatentModel(8, 4, 32, 1000)
    torch.save(released_state(released), tmp_path / "released.pckl")
    load_latent(ours, str(tmp_path / "released.pckl"))
    image = torch.rand(2, 3, 32, 32)
    for model in (released, ours):  # the same weights, so the same answer to the same image
        codes, _, _ = model.codes(image)
        rebuilt = model.decoder(model.joined(codes))
        if model is released:
            expected = rebuilt
    torch.testing.assert_close(rebuilt, expected)


def test_a_latent_model_of_another_size_is_named(tmp_path: Path) -> None:
    torch.save(released_state(LatentModel(8, 4, 32, 1000)), tmp_path / "released.pckl")
    with pytest.raises(UserError, match=r"latent_weights=.*another latent model.*size mismatch"):
        load_latent(LatentModel(16, 4, 32, 1000), str(tmp_path / "released.pckl"))


def test_a_run_may_train_the_latent_model_alone(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("dsr", shares=[1.0, 0.0, 0.0])
    fit(method, make_batch(), 3)
    assert method.stages.at(0.99)[0] == "latent"


# --------------------------------------------------------------------------------- scoring


def test_map_is_the_upsampler_s_and_score_the_detector_s(
    small_method: Build, make_batch: Build
) -> None:
    method, image = small_method("dsr").eval(), make_batch()["image"]
    with torch.no_grad():
        specific, general, share = method.detect(image)
        logits = method.upsampler(torch.cat([specific, general, share], dim=1))
        found = method(image)
    torch.testing.assert_close(found.anomaly_map, logits.softmax(dim=1)[:, 1:])
    around = F.avg_pool2d(share[:, 1:], method.window, 1, method.window // 2)
    torch.testing.assert_close(found.score, around.flatten(1).max(dim=1).values)


def test_an_image_size_that_does_not_halve_is_named(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"72 is no multiple of 32.*set image_size to 64 or 96"):
        small_method("dsr").eval()(torch.rand(1, 3, 72, 64))


@pytest.mark.parametrize("wrong", [{"shares": [0.0, 0.0, 0.0]}, {"window": 20}, {"codes": 5}])
def test_numbers_out_of_range_are_named(small_method: Build, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"method\."):
        small_method("dsr", **wrong)
