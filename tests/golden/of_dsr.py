"""Golden cases of DSR; run by `make.py`."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from helpers import outputs
from rule import fill, tensor

DSR_SIZE = (64, 96)
DSR_ENCODER = r"_encoder_.*weight|_pre_vq.*weight"
DSR_LATENT_SCALES = {r"_embedding\.weight": 4.0, DSR_ENCODER: 1.5}
DSR_SCALES = {r"_embedding\.weight": 8.0, DSR_ENCODER: 1.35}  # nearest vectors are no close calls


def cases() -> dict[str, Any]:
    """DSR; `whole` and `training` have vectors of 128, since the object decoder's code does."""
    loaders = ("data_loader", "data_loader_test")  # need OpenCV and imgaug, and are not used
    sys.modules.update({name: mock.MagicMock() for name in loaders})
    networks = dsr_networks()
    return {
        "repository": "https://github.com/VitjanZ/DSR_anomaly_detection",
        "commit": "672bfb81434fd2a6c5ef00db858cef8834c54f28",
        "licence": "Apache-2.0",
        "cases": {
            "codebook": dsr_codebook(1),
            "codebook after 200 moves": dsr_codebook(200),
            "corruption": dsr_corruption(),
            "residual": dsr_residual(),
            "latent": dsr_latent(),
            "restriction": dsr_restriction(),
            "detector": dsr_unet("detector", 6),
            "upsampler": dsr_unet("upsampler", 8),
            "focal": dsr_focal(2.0),
            "focal confident": dsr_focal(20.0),
            "object decoder": dsr_object_decoder(networks),
            "whole": dsr_whole(networks),
            "training": dsr_training(networks),
            "start": dsr_start(),
        },
    }


def dsr_codebook(moves: int) -> dict[str, Any]:
    """Nearest vectors, then the vectors after moves towards what was assigned to them."""
    from discrete_model import VectorQuantizerEMA

    book = VectorQuantizerEMA(32, 8, 0.25, 0.99)
    fill(book, {r"_embedding\.weight|_ema_w": 2.0}, "book.")
    book.double().eval()
    z = tensor("dsr z", (2, 8, 4, 6)).double()
    commitment, quantised, _, _ = book(z)
    book._ema_cluster_size = 2 + tensor("dsr uses", (32,)).double()
    book.train()
    for _ in range(moves):
        book(z)
    return {
        "scales": {r"_embedding\.weight|_ema_w": 2.0},
        "outputs": outputs(
            commitment=commitment,
            quantised=quantised,
            vectors=book._embedding.weight,
            sums=book._ema_w,
        ),
    }


def dsr_corruption() -> dict[str, Any]:
    """Codes drawn from those that are far, where a mask is."""
    from train_dsr import generate_fake_anomalies_joined

    z, clean = (tensor(f"dsr corruption {name}", (2, 8, 4, 6)).double() for name in ("z", "clean"))
    vectors = tensor("dsr corruption vectors", (50, 8)).double()
    mask = (tensor("dsr corruption mask", (2, 1, 16, 24)) > 0.9).double()
    shares = iter(tensor("dsr corruption share", (2, 24)).double().abs())
    strength = torch.tensor([0.437, 0.93])
    with mock.patch.object(torch, "randint", lambda most, size: (next(shares) * most).long()):
        corrupted = generate_fake_anomalies_joined(z, clean, vectors, mask, strength=strength)
    return {"outputs": outputs(corrupted=corrupted)}


def dsr_residual() -> dict[str, Any]:
    from discrete_model import ResidualStack

    stack = ResidualStack(12, 12, 2, 6)
    fill(stack, {}, "stack.")
    with torch.no_grad():
        answer = stack.double()(tensor("dsr residual", (2, 12, 5, 7)).double())
    return {"outputs": outputs(answer=answer)}


def dsr_latent() -> dict[str, Any]:
    from discrete_model import DiscreteLatentModel

    latent = DiscreteLatentModel(16, 2, 8, 64, 16, 0.25, 0.99)
    fill(latent, DSR_LATENT_SCALES)
    latent.double().eval()
    image = tensor("dsr latent image", (2, 3, *DSR_SIZE), 0.5).double() + 0.5
    with torch.no_grad():
        loss_high, loss_low, rebuilt, low, high = latent(image)
    return {
        "scales": DSR_LATENT_SCALES,
        "outputs": outputs(
            low=low, high=high, rebuilt=rebuilt, commitment_low=loss_low, commitment_high=loss_high
        ),
    }


def dsr_restriction() -> dict[str, Any]:
    from dsr_model import SubspaceRestrictionNetwork

    network = SubspaceRestrictionNetwork(8, 8, 8)
    fill(network, {}, "unet.")
    with torch.no_grad():
        answer = network.double()(tensor("dsr restriction", (2, 8, 16, 24)).double())
    return {"outputs": outputs(answer=answer)}


def dsr_unet(name: str, channels: int) -> dict[str, Any]:
    from dsr_model import UnetModel

    network = UnetModel(channels, 2, 8)
    fill(network, {}, f"{name}.unet.")
    with torch.no_grad():
        answer = network.double()(tensor(f"dsr {name}", (2, channels, *DSR_SIZE)).double())
    return {"outputs": outputs(answer=answer)}


def dsr_focal(scale: float) -> dict[str, Any]:
    from loss import FocalLoss

    logits = tensor("dsr logits", (2, 2, 16, 24), scale).double()
    truth = (tensor("dsr truth", (2, 1, 16, 24)) > 0).double()
    return {"outputs": outputs(loss=FocalLoss()(logits.softmax(dim=1), truth))}


def dsr_networks() -> Any:
    """All networks, filled, with codebooks of 64 vectors."""
    from discrete_model import DiscreteLatentModel
    from dsr_model import ImageReconstructionNetwork, SubspaceRestrictionNetwork, UnetModel

    networks = {
        "latent": DiscreteLatentModel(128, 2, 64, 64, 128, 0.25, 0.99),
        "low": SubspaceRestrictionNetwork(128, 128, 32),
        "high": SubspaceRestrictionNetwork(128, 128, 32),
        "object": ImageReconstructionNetwork(256, 128, 2, 64),
        "detector": UnetModel(6, 2, 16),
        "upsampler": UnetModel(8, 2, 16),
    }
    prefixes = {"latent": "", "object": "object."}
    for name, network in networks.items():
        fill(network, DSR_SCALES, prefixes.get(name, f"{name}.unet."))
        network.double().eval()
    return SimpleNamespace(**networks)


def dsr_object_decoder(networks: Any) -> dict[str, Any]:
    with torch.no_grad():
        answer = networks.object(tensor("dsr codes", (1, 256, 16, 24)).double())
    return {"scales": DSR_SCALES, "outputs": outputs(answer=answer)}


def dsr_whole(networks: Any) -> dict[str, Any]:
    """From the image to map and score, in the order of test_dsr.py."""
    latent = networks.latent
    image = tensor("dsr image", (1, 3, *DSR_SIZE), 0.5).double() + 0.5
    with torch.no_grad():
        *_, general, low, high = latent(image)
        quantised_high = latent._vq_vae_bot.get_quantized(networks.high(high))
        quantised_low = latent._vq_vae_top.get_quantized(networks.low(low))
        joined = torch.cat([latent.upsample_t(quantised_low), quantised_high], dim=1)
        specific = networks.object(joined)
        share = networks.detector(torch.cat([specific, general], dim=1)).softmax(dim=1)
        seen = torch.cat([specific, general, share], dim=1)
        map_ = networks.upsampler(seen).softmax(dim=1)[:, 1:]
        around = torch.nn.functional.avg_pool2d(share[:, 1:], 21, stride=1, padding=10)
    return {
        "scales": DSR_SCALES,
        "outputs": outputs(
            specific=specific,
            general=general,
            share=share,
            anomaly_map=map_,
            score=around.amax(dim=(1, 2, 3)),
        ),
    }


def dsr_training(networks: Any) -> dict[str, Any]:
    """Losses of the second stage for given codes, in the order of train_dsr.py."""
    from loss import FocalLoss

    latent = networks.latent
    image = tensor("dsr image", (1, 3, *DSR_SIZE), 0.5).double() + 0.5
    clean_low, low = (tensor(f"dsr {n} low", (1, 128, 8, 12)).double() for n in ("clean", "bad"))
    clean_high, high = (
        tensor(f"dsr {n} high", (1, 128, 16, 24)).double() for n in ("clean", "bad")
    )
    truth = (tensor("dsr training truth", (1, 1, *DSR_SIZE)) > 0).double()
    restricted_high, restricted_low = networks.high(high), networks.low(low)
    quantised_high = latent._vq_vae_bot.get_quantized(restricted_high)
    quantised_low = latent._vq_vae_top.get_quantized(restricted_low)
    with torch.no_grad():
        general = latent._decoder_b(torch.cat([latent.upsample_t(low), high], dim=1))
    joined = torch.cat([latent.upsample_t(quantised_low), quantised_high], dim=1)
    specific = networks.object(joined)
    share = networks.detector(torch.cat([specific.detach(), general], dim=1)).softmax(dim=1)
    mse = torch.nn.functional.mse_loss
    codes = mse(restricted_low, clean_low) + mse(restricted_high, clean_high)
    error = 10 * mse(specific, image)
    detection = FocalLoss()(share, truth)
    (codes + error + detection).backward()
    return {
        "scales": DSR_SCALES,
        "outputs": outputs(
            codes=codes,
            image=error,
            detection=detection,
            gradient_low=networks.low.decoder.fin_out[0].weight.grad,
            gradient_object=networks.object._conv_1.weight.grad,
            gradient_detector=networks.detector.decoder.fin_out[0].weight.grad,
        ),
    }


def dsr_start() -> dict[str, Any]:
    from dsr_model import (
        AnomalyDetectionModule,
        ImageReconstructionNetwork,
        SubspaceRestrictionModule,
        UpsamplingModule,
    )
    from train_dsr import weights_init

    torch.manual_seed(0)
    detector, decoder = AnomalyDetectionModule(), ImageReconstructionNetwork(256, 128, 2, 64)
    detector.apply(weights_init)
    decoder.apply(weights_init)
    first = {
        "restriction": SubspaceRestrictionModule(128).unet.encoder.block3[0],
        "object decoder": decoder.block2[0],
        "object decoder up": decoder.upblock1,
        "detector": detector.unet.encoder.block3[0],
        "upsampler": UpsamplingModule().unet.encoder.block3[0],
    }
    numbers = {f"std {name}": conv.weight.std().item() for name, conv in first.items()}
    numbers["std detector bias"] = first["detector"].bias.std().item()
    return {"numbers": numbers}
