"""Golden cases of OneNIP; run by `make.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers import UNIAD_MAPS, attributes, maps, outputs
from rule import fill, tensor
from torch import nn

ONENIP_SCALES = {"row_embed|col_embed": 4.0, "in_proj_weight": 1.5, "predictor.weight": 8.0}


def cases() -> dict[str, Any]:
    """OneNIP, second version. Its code has no licence: only numbers are taken."""
    small = {"channels": (8, 16), "strides": (8, 16)}
    return {
        "repository": "https://github.com/gaobb/OneNIP",
        "commit": "e93dec597ccfd60f8839cd25827f58607f8f8bb5",
        "licence": "none: numbers only",
        "cases": {
            "paper": onenip_case("onenip paper", 1, (224, 224), 7, 1024, 4, **UNIAD_MAPS),
            "small": onenip_case("onenip small", 2, (96, 128), 3, 48, 2, **small),
            "training": onenip_training((96, 128), 3, 48, 1, **small),
            "start": onenip_start(),
        },
    }


def onenip_network(
    channels: int, grid: Sequence[int], window: int, feedforward: int, depth: int
) -> Any:
    from models.reconstructions.onenip import OneNIP

    return OneNIP(
        [channels],
        [16],
        tuple(grid),
        None,
        attributes(neighbor_size=(window, window), mask=(True, True, True)),
        256,
        "learned",
        None,
        {"method": "xavier_uniform"},
        nhead=8,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        dim_feedforward=feedforward,
        dropout=0.1,
        activation="relu",
        normalize_before=False,
    )


def onenip_case(
    case: str,
    count: int,
    size: Sequence[int],
    window: int,
    feedforward: int,
    depth: int,
    channels: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    """`count` images with one prompt."""
    from models.necks.mfcn import MFCN
    from utils.eval_helper import EvalImageMax

    neck = MFCN(list(channels), [sum(channels)], list(strides), [16])
    grid = [side // 16 for side in size]
    network = onenip_network(sum(channels), grid, window, feedforward, depth)
    fill(network, ONENIP_SCALES)
    network.double().eval()
    query, prompt = (
        neck({"features": maps(f"{case} {name}", number, size, channels, strides)})["query_feat"]
        for name, number in (("image", count), ("prompt", 1))
    )
    with torch.no_grad():
        found = network({"query_feat": query, "prompt_feat": prompt.repeat(count, 1, 1, 1)})
    distance, refined = found["rec_pred"], found["ref_pred"]
    middle = (distance.max() + distance.min()) / 2  # as in the validation of tools/train_val.py
    fused = 0.5 * distance + 0.5 * middle * refined
    score = EvalImageMax.encode_pred(fused[:, 0].numpy(), (16, 16))
    return {
        "scales": ONENIP_SCALES,
        "numbers": {"fusion constant": float(middle)},
        "outputs": outputs(
            distance=distance, refined=refined, anomaly_map=fused, score=torch.from_numpy(score)
        ),
    }


def onenip_training(
    size: Sequence[int],
    window: int,
    feedforward: int,
    depth: int,
    channels: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    """Losses of two images in training, without dropout and jitter."""
    from models.necks.mfcn import MFCN
    from utils.criterion_helper import DiceLoss, FeatureMSELoss

    neck = MFCN(list(channels), [sum(channels)], list(strides), [16])
    grid = [side // 16 for side in size]
    network = onenip_network(sum(channels), grid, window, feedforward, depth)
    fill(network, ONENIP_SCALES)
    network.double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    streams = [
        maps(f"onenip training {name}", 2, size, channels, strides)
        for name in ("image", "corrupted", "prompt")
    ]
    together = [torch.cat(stage) for stage in zip(*streams, strict=True)]
    aligned = neck({"features": together, "prompt": True, "aimage": True})
    found = network(aligned)
    corruption = (tensor("onenip corruption", (2, 1, *size)) > 0.5).double()
    found["mask"] = torch.cat([torch.zeros_like(corruption), corruption])
    reconstruction, dice = (loss(found) for loss in (FeatureMSELoss(1.0), DiceLoss(0.5)))
    loss = reconstruction + 0.5 * dice
    loss.backward()
    weights = dict(network.named_parameters())
    last = "transformer.decoder.layers.0.cross_attn_image_to_prompt.out_proj.weight"
    return {
        "scales": ONENIP_SCALES,
        "outputs": outputs(
            reconstruction=reconstruction,
            dice=0.5 * dice,
            loss=loss,
            gradient_input=weights["input_proj.weight"].grad,
            gradient_decoder=weights[last].grad,
            gradient_refiner=weights["seghead.upconv1.0.weight"].grad,
        ),
    }


def onenip_start() -> dict[str, Any]:
    torch.manual_seed(0)
    state = onenip_network(272, (14, 14), 7, 1024, 4).state_dict()
    attention = "transformer.decoder.layers.0.cross_attn_prompt_to_image."
    return {
        "numbers": {
            "std attention query": float(state[f"{attention}in_proj_weight"][:256].std()),
            "std attention output": float(state[f"{attention}out_proj.weight"].std()),
            "std mlp": float(state["transformer.decoder.layers.0.mlp.lin1.weight"].std()),
            "std refiner": float(state["seghead.upconv1.0.weight"].std()),
            "std refiner up": float(state["seghead.upconv1.3.weight"].std()),
        }
    }
