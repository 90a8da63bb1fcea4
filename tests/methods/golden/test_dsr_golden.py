"""DSR against the authors' code; `tests/golden/dsr.json` names repository, commit and licence.

Networks with instance normalisation run in float64: over few positions it enlarges rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import focal_loss
from anomaly_lit.methods.dsr import DSR, odds
from anomaly_lit.methods.dsr.network import (
    Codebook,
    Codes,
    LatentModel,
    ObjectDecoder,
    ResidualStack,
    Restriction,
    corrupt_codes,
)
from anomaly_lit.nn.unet import UNet


def stack(ours: str, theirs: str) -> dict[str, str]:
    """Names within a residual stack."""
    return {rf"{ours}\.blocks\.(\d)\.([13])\.weight": rf"{theirs}._layers.\1._block.\2.weight"}


def named(prefix: str, of: str, names: dict[str, str]) -> dict[str, str]:
    """A table for a part of ours whose authors' names begin with `of`."""
    return {rf"{prefix}{ours}": f"{of}{theirs}" for ours, theirs in names.items()}


STACK = stack("stack", "stack")
LATENT = {
    **stack(r"encode_high\.5", "_encoder_b._residual_stack"),
    **stack(r"encode_low\.4", "_encoder_t._residual_stack"),
    **stack(r"decoder\.1", "_decoder_b._residual_stack"),
    r"encode_high\.0\.(.*)": r"_encoder_b._conv_1.\1",
    r"encode_high\.2\.(.*)": r"_encoder_b._conv_2.\1",
    r"encode_high\.4\.(.*)": r"_encoder_b._conv_3.\1",
    r"encode_low\.0\.(.*)": r"_encoder_t._conv_1.\1",
    r"encode_low\.2\.(.*)": r"_encoder_t._conv_2.\1",
    r"encode_low\.5\.(.*)": r"_pre_vq_conv_top.\1",
    r"low\.vectors": "_vq_vae_top._embedding.weight",
    r"high\.vectors": "_vq_vae_bot._embedding.weight",
    r"(?:low|high)\.(?:sums|uses)": "",
    r"up\.(.*)": r"upsample_t.\1",
    r"join\.(.*)": r"_pre_vq_conv_bot.\1",
    r"decoder\.0\.(.*)": r"_decoder_b._conv_1.\1",
    r"decoder\.2\.(.*)": r"_decoder_b._conv_trans_1.\1",
    r"decoder\.4\.(.*)": r"_decoder_b._conv_trans_2.\1",
}
DOWN = {rf"down\.{n}\.(.*)": rf"unet.encoder.block{n + 1}.\1" for n in range(4)}
RESTRICTION = {
    **DOWN,
    r"up\.0\.0\.(.*)": r"unet.decoder.up2.1.\1",
    r"up\.0\.3\.(.*)": r"unet.decoder.db2.0.\1",
    r"up\.0\.6\.(.*)": r"unet.decoder.db2.3.\1",
    r"up\.1\.0\.(.*)": r"unet.decoder.up3.1.\1",
    r"up\.1\.3\.(.*)": r"unet.decoder.db3.0.\1",
    r"up\.1\.6\.(.*)": r"unet.decoder.db3.3.\1",
    r"out\.(.*)": r"unet.decoder.fin_out.0.\1",
}
UNET = {
    **DOWN,
    **{rf"shrink\.{n}\.0\.(.*)": rf"unet.decoder.up{n + 1}.1.\1" for n in range(3)},
    **{rf"up\.{n}\.(.*)": rf"unet.decoder.db{n + 1}.\1" for n in range(3)},
    r"out\.(.*)": r"unet.decoder.fin_out.0.\1",
}
OBJECT = {
    **stack("10", "_residual_stack"),
    r"0\.(.*)": r"block1.\1",
    r"2\.(.*)": r"block2.\1",
    r"4\.(.*)": r"pre_vq_conv.\1",
    r"5\.(.*)": r"upblock1.\1",
    r"7\.(.*)": r"upblock2.\1",
    r"9\.(.*)": r"_conv_1.\1",
    r"11\.(.*)": r"_conv_trans_1.\1",
    r"13\.(.*)": r"_conv_trans_2.\1",
}
WHOLE = {
    "started": "",
    **named(r"latent\.", "", LATENT),
    **named(r"restrict_low\.", "low.", RESTRICTION),
    **named(r"restrict_high\.", "high.", RESTRICTION),
    **named(r"object_decoder\.", "object.", OBJECT),
    **named(r"detector\.", "detector.", UNET),
    **named(r"upsampler\.", "upsampler.", UNET),
}
SIZE = (64, 96)


@pytest.fixture(scope="module")
def golden(rule: Any) -> Any:
    return rule.Golden("dsr")


@pytest.fixture(scope="module")
def image(rule: Any) -> Tensor:
    return (rule.tensor("dsr image", (1, 3, *SIZE), 0.5) + 0.5).double()


@pytest.fixture
def book(rule: Any, golden: Any) -> Codebook:
    book = Codebook(32, 8, reseed=10**6)
    names = {"vectors": "_embedding.weight", "sums": "_ema_w", "uses": ""}
    rule.fill_ours(book, named("", "book.", names) | {"uses": ""}, golden.scales("codebook"))
    book.uses.copy_(2 + rule.tensor("dsr uses", (32,)))
    return book


@torch.no_grad()
def test_nearest_vectors_and_commitment_are_the_authors(
    golden: Any, rule: Any, book: Codebook
) -> None:
    z = rule.tensor("dsr z", (2, 8, 4, 6))
    quantised = book(z)
    commitment = 0.25 * F.mse_loss(z, quantised)
    golden.check("codebook", quantised=quantised, commitment=commitment)


def test_move_of_a_codebook_is_the_authors(golden: Any, rule: Any, book: Codebook) -> None:
    z = rule.tensor("dsr z", (2, 8, 4, 6))
    book.move(book.assigned(z), z)
    golden.check("codebook", vectors=book.vectors, sums=book.sums)


def test_many_moves_of_a_codebook_are_the_authors(golden: Any, rule: Any, book: Codebook) -> None:
    z = rule.tensor("dsr z", (2, 8, 4, 6))
    for _ in range(200):
        book.move(book.assigned(z), z)
    golden.check("codebook after 200 moves", vectors=book.vectors)


def test_corrupted_codes_are_the_authors(
    golden: Any, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, clean = (rule.tensor(f"dsr corruption {name}", (2, 8, 4, 6)) for name in ("z", "clean"))
    book = Codebook(50, 8)
    book.vectors.copy_(rule.tensor("dsr corruption vectors", (50, 8)))
    mask = rule.tensor("dsr corruption mask", (2, 1, 16, 24)) > 0.9
    where = F.max_pool2d(mask.float(), 4) > 0
    strength = (torch.tensor([0.437, 0.93]) - 0.2) / 0.8
    share = rule.tensor("dsr corruption share", (2, 24)).abs()[where.flatten(1)]
    draws = iter([strength, share])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(draws))
    corrupted = corrupt_codes(z, clean, where, book, torch.Generator())
    golden.check("corruption", corrupted=corrupted)


@torch.no_grad()
def test_residual_stack_is_the_authors(golden: Any, rule: Any) -> None:
    module = nn.ModuleDict({"stack": ResidualStack(12, 6)})
    rule.fill_ours(module, STACK)
    golden.check("residual", answer=module["stack"](rule.tensor("dsr residual", (2, 12, 5, 7))))


@torch.no_grad()
def test_latent_model_is_the_authors(golden: Any, rule: Any) -> None:
    latent = LatentModel(16, 8, 64, 10**6)
    rule.fill_ours(latent, LATENT, golden.scales("latent"))
    image = rule.tensor("dsr latent image", (2, 3, *SIZE), 0.5) + 0.5
    codes, features, z_low = latent.codes(image)
    z_high = latent.encoding_high(features, codes.low)
    golden.check(
        "latent",
        low=codes.low,
        high=codes.high,
        rebuilt=latent.decoder(latent.joined(codes)),
        commitment_low=0.25 * F.mse_loss(z_low, codes.low),
        commitment_high=0.25 * F.mse_loss(z_high, codes.high),
    )


@torch.no_grad()
def test_restriction_network_is_the_authors(golden: Any, rule: Any) -> None:
    network = Restriction(8, 8)
    rule.fill_ours(network, RESTRICTION)
    answer = network.double()(rule.tensor("dsr restriction", (2, 8, 16, 24)).double())
    golden.check("restriction", answer=answer)


@pytest.mark.parametrize(("name", "channels"), [("detector", 6), ("upsampler", 8)])
@torch.no_grad()
def test_detector_and_upsampler_are_the_authors(
    name: str, channels: int, golden: Any, rule: Any
) -> None:
    network = UNet(channels, (8, 16, 32, 32))
    rule.fill_ours(network, named("", f"{name}.", UNET))
    answer = network.double()(rule.tensor(f"dsr {name}", (2, channels, *SIZE)).double())
    golden.check(name, answer=answer)


@torch.no_grad()
def test_object_decoder_is_the_authors(golden: Any, rule: Any) -> None:
    network = ObjectDecoder(128, 64, 256)
    scales = golden.scales("object decoder")
    rule.fill_ours(network, named("", "object.", OBJECT), scales)
    answer = network(rule.tensor("dsr codes", (1, 256, 16, 24)))
    golden.check("object decoder", answer=answer)


def focal(rule: Any, scale: float) -> Tensor:
    logits = rule.tensor("dsr logits", (2, 2, 16, 24), scale)
    truth = (rule.tensor("dsr truth", (2, 1, 16, 24)) > 0).float()
    return focal_loss(odds(logits), truth, smooth=1e-5)


def test_focal_loss_is_the_authors(golden: Any, rule: Any) -> None:
    golden.check("focal", loss=focal(rule, 2.0))


def test_focal_loss_of_confident_answers_is_the_authors(golden: Any, rule: Any) -> None:
    golden.check("focal confident", tolerance=1e-4, loss=focal(rule, 20.0))


@pytest.fixture(scope="module")
def method(golden: Any, rule: Any) -> DSR:
    optimizer = partial(torch.optim.Adam)
    method = DSR(optimizer, codes=64, restriction=32, detector=(16, 32, 64, 64))
    rule.fill_ours(method, WHOLE, golden.scales("whole"))
    method.double().eval()
    for book in (method.latent.low, method.latent.high):
        book.float()  # vectors are compared in float32 whatever the network's precision
    return method


@torch.no_grad()
def test_images_map_and_score_are_the_authors(golden: Any, image: Tensor, method: DSR) -> None:
    specific, general, share = method.detect(image)
    anomaly_map, score = method(image)
    golden.check(
        "whole",
        specific=specific,
        general=general,
        share=share,
        anomaly_map=anomaly_map,
        score=score,
    )


def test_losses_and_gradients_of_the_second_stage_are_the_authors(
    golden: Any, rule: Any, image: Tensor, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, bad = (
        Codes(
            rule.tensor(f"dsr {name} low", (1, 128, 8, 12)).double(),
            rule.tensor(f"dsr {name} high", (1, 128, 16, 24)).double(),
        )
        for name in ("clean", "bad")
    )
    truth = (rule.tensor("dsr training truth", (1, 1, *SIZE)) > 0).float()
    monkeypatch.setattr(method, "corrupted_codes", lambda *_: (clean, bad, truth))
    terms = method.detection_losses({"image": image})
    torch.stack(list(terms.values())).sum().backward()
    weights = dict(method.named_parameters())
    golden.check(
        "training",
        **terms,
        gradient_low=weights["restrict_low.out.weight"].grad,
        gradient_object=weights["object_decoder.9.weight"].grad,
        gradient_detector=weights["detector.out.weight"].grad,
    )


@pytest.fixture(scope="module")
def new_method(published_method: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return published_method("dsr", 256)


def test_weights_start_as_the_authors(golden: Any, new_method: Any) -> None:
    stds = {
        "restriction": new_method.restrict_low.down[2][0].weight,
        "object decoder": new_method.object_decoder[2][0].weight,
        "object decoder up": new_method.object_decoder[5].weight,
        "detector": new_method.detector.down[2][0].weight,
    }
    for name, weight in stds.items():
        assert weight.std().item() == pytest.approx(golden.number("start", f"std {name}"), rel=0.05)


def test_upsampler_starts_as_the_authors(golden: Any, new_method: Any) -> None:
    std = new_method.upsampler.down[2][0].weight.std().item()
    assert std == pytest.approx(golden.number("start", "std upsampler"), rel=0.05)
