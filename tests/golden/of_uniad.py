"""Golden cases of UniAD; run by `make.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers import UNIAD_MAPS, attributes, drawn, maps, outputs
from rule import fill, tensor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cases() -> dict[str, Any]:
    """UniAD, and EfficientNet-B4 as UniAD and OneNIP build it."""
    return {
        "repository": "https://github.com/zhiyuanyou/UniAD",
        "commit": "a5b9d9d20c2aae680fa00fe5088616b611e05f3c",
        "licence": "Apache-2.0",
        "cases": {
            "paper": uniad_case("uniad paper", 1, (224, 224), 7, (256, 8, 1024, 4), **UNIAD_MAPS),
            "small": uniad_case(
                "uniad small", 2, (96, 128), 3, (32, 4, 48, 2), channels=(8, 16), strides=(8, 16)
            ),
            "jitter": uniad_jitter(),
            "start": uniad_start(),
            **{f"backbone {size}": efficientnet(size) for size in (224, 256, 320)},
        },
    }


def uniad_network(channels: int, grid: Sequence[int], window: int, numbers: Sequence[int]) -> Any:
    from models.reconstructions.uniad import UniAD

    dim, heads, feedforward, depth = numbers
    return UniAD(
        [channels],
        [16],
        tuple(grid),
        attributes(scale=20.0, prob=1.0),
        attributes(neighbor_size=(window, window), mask=(True, True, True)),
        dim,
        "learned",
        None,
        {"method": "xavier_uniform"},
        nhead=heads,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        dim_feedforward=feedforward,
        dropout=0.1,
        activation="relu",
        normalize_before=False,
    )


def uniad_case(
    case: str,
    count: int,
    size: Sequence[int],
    window: int,
    numbers: Sequence[int],
    channels: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    from models.necks.mfcn import MFCN
    from utils.criterion_helper import FeatureMSELoss
    from utils.eval_helper import EvalImageMax, EvalImageMean, EvalImageStd

    scales = {"learned_embed|row_embed|col_embed": 4.0, "in_proj_weight": 1.5}
    grid = [side // 16 for side in size]
    neck = MFCN(list(channels), [sum(channels)], list(strides), [16])
    network = uniad_network(sum(channels), grid, window, numbers)
    fill(network, scales)
    network.double().eval()
    features = neck({"features": maps(case, count, size, channels, strides)})["feature_align"]
    found = network({"feature_align": features})
    loss = FeatureMSELoss(1.0)(found)
    loss.backward()
    map_ = found["pred"].detach()[:, 0].numpy()
    scores = {
        "score_max": EvalImageMax.encode_pred(map_, (16, 16)),
        "score_std": EvalImageStd.encode_pred(map_),
        "score_mean": EvalImageMean.encode_pred(map_),
    }
    named = {name: torch.from_numpy(score) for name, score in scores.items()}
    if case == "uniad small":  # with more units, one at the kink of its ReLU shows in a gradient
        weights = dict(network.named_parameters())
        first = "transformer.encoder.layers.0.self_attn.in_proj_weight"
        query = "transformer.decoder.layers.1.learned_embed.weight"
        named |= {
            "gradient_input": weights["input_proj.weight"].grad,
            "gradient_encoder": weights[first].grad,
            "gradient_query": weights[query].grad,
            "gradient_row": weights["pos_embed.row_embed.weight"].grad,
        }
    return {
        "scales": scales,
        "outputs": outputs(loss=loss, anomaly_map=found["pred"], **named),
    }


def uniad_jitter() -> dict[str, Any]:
    network = uniad_network(24, (3, 4), 1, (32, 4, 48, 1))
    tokens = tensor("uniad tokens", (2, 12, 24)).transpose(0, 1)
    noise = tensor("uniad noise", (2, 12, 24)).transpose(0, 1)
    with drawn("randn", noise):
        noisy = network.add_jitter(tokens, 20.0, 1.0)
    return {"outputs": outputs(noisy=noisy.transpose(0, 1))}


def uniad_start() -> dict[str, Any]:
    torch.manual_seed(0)
    state = uniad_network(272, (14, 14), 7, (256, 8, 1024, 4)).state_dict()
    layer, query = "transformer.encoder.layers.0.", "transformer.decoder.layers.{}.learned_embed"
    queries = [state[f"{query.format(number)}.weight"] for number in (0, 3)]
    return {
        "numbers": {
            "std embed": float(state["input_proj.weight"].std()),
            "std head": float(state["output_proj.weight"].std()),
            "std mlp": float(state[f"{layer}linear1.weight"].std()),
            "std attention query": float(state[f"{layer}self_attn.in_proj_weight"][:256].std()),
            "std attention output": float(state[f"{layer}self_attn.out_proj.weight"].std()),
            "std learned query": float(queries[0].std()),
            "layers start equal": float(torch.equal(*queries)),
        }
    }


def efficientnet(size: int) -> dict[str, Any]:
    from models.backbones.efficientnet import efficientnet_b4

    scales = {"_se_.*bias": 5.0}
    network = efficientnet_b4(False, outblocks=[1, 5, 9, 21], outstrides=[2, 4, 8, 16])
    fill(network, scales, "backbone.")
    network.double().eval()
    image = tensor(f"backbone image {size}", (1, 3, size, size), 0.5) + 0.5
    mean, std = (torch.tensor(part).double().view(1, 3, 1, 1) for part in IMAGENET)
    with torch.no_grad():
        found = network({"image": (image.double() - mean) / std})["features"]
    named = {f"stage{number}": map_ for number, map_ in enumerate(found)}
    return {"scales": scales, "outputs": outputs(**named)}
