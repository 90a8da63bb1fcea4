"""Golden cases of FastFlow; run by `make.py`."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from helpers import Given, maps, outputs
from rule import fill, tensor
from torch import Tensor

FASTFLOW_STRIDES = (4, 8, 16)


def cases() -> dict[str, Any]:
    """FastFlow as re-implemented; the authors published no code."""
    return {
        "repository": "https://github.com/gathierry/FastFlow",
        "commit": "2cf1f2f4c562a7f13cfb1959e3afe5df2f2d2565",
        "licence": "Apache-2.0",
        "also": {
            "repository": "https://github.com/vislearn/FrEIA",
            "commit": "1779d1fba1e21000fda1927b59eeac0a6fcaa284",
            "licence": "MIT",
            "note": "as FastFlow requires it; later versions divide the input of tanh by the clamp",
        },
        "cases": {
            "alternating": fastflow_case("fastflow alternating", (6, 8, 10), 4, False, 1.0),
            "uneven": fastflow_case("fastflow uneven", (5, 7, 9), 3, True, 0.6),
            "start": fastflow_start(),
        },
    }


def fastflow_network(
    given: Sequence[Tensor], steps: int, conv3x3_only: bool, hidden_ratio: float
) -> Any:
    import timm
    from fastflow import FastFlow

    extractor: Any = Given(list(given))
    extractor.feature_info = SimpleNamespace(
        channels=lambda: [map_.shape[1] for map_ in given], reduction=lambda: FASTFLOW_STRIDES
    )
    with mock.patch.object(timm, "create_model", return_value=extractor):
        return FastFlow("resnet18", steps, 64, conv3x3_only, hidden_ratio)


def fastflow_case(
    case: str, channels: Sequence[int], steps: int, conv3x3_only: bool, hidden_ratio: float
) -> dict[str, Any]:
    """Two images of 64 x 64; a step permutes by the order of drawn numbers."""
    given = maps(case, 2, (64, 64), channels, FASTFLOW_STRIDES)
    network = fastflow_network(given, steps, conv3x3_only, hidden_ratio)
    fill(network)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("global_scale"):
                value.add_(10)  # the scale itself is then about 1
            if name.endswith("w_perm"):
                order = tensor(name, value.shape[:1]).argsort()
                matrix = torch.eye(len(order))[order].view_as(value)
                value.copy_(matrix)
                network.state_dict()[f"{name}_inv"].copy_(matrix.transpose(0, 1))
    network.double().eval()
    found = network(torch.zeros(2, 3, 64, 64))
    found["loss"].backward()
    named: dict[str, Tensor] = {}
    for number, (norm, flow, map_) in enumerate(
        zip(network.norms, network.nf_flows, given, strict=True)
    ):
        noise, log_det = flow(norm(map_))
        named |= {f"noise{number}": noise, f"log_det{number}": log_det}
        named[f"inverse{number}"] = flow(
            tensor(f"{case} noise {number}", map_.shape).double(), rev=True
        )[0]
    weights = dict(network.named_parameters())
    anomaly_map = found["anomaly_map"]
    return {
        "outputs": outputs(
            loss=found["loss"],
            anomaly_map=anomaly_map,
            score=anomaly_map.amax(dim=(1, 2, 3)),
            **named,
            gradient_conv=weights["nf_flows.0.module_list.0.subnet.0.weight"].grad,
            gradient_scale=weights["nf_flows.2.module_list.1.global_scale"].grad,
            gradient_norm=weights["norms.1.weight"].grad,
        )
    }


def fastflow_start() -> dict[str, Any]:
    """Parameters of the flows, and the log determinant, at the start."""
    torch.manual_seed(0)
    counts = {}
    for name, channels, conv3x3_only in (
        ("ResNet-18", (64, 128, 256), True),
        ("WideResNet-50-2", (256, 512, 1024), False),
    ):
        given = [
            torch.zeros(1, c, 64 // s, 64 // s)
            for c, s in zip(channels, FASTFLOW_STRIDES, strict=True)
        ]
        network = fastflow_network(given, 8, conv3x3_only, 1.0)
        flows = network.nf_flows
        counts[f"parameters {name}"] = sum(p.numel() for p in flows.parameters() if p.requires_grad)
    block = flows[0].module_list[0]
    scale = block.global_scale_activation(block.global_scale)
    counts["scale"] = float(scale.mean().item())
    counts["std subnet"] = block.subnet[0].weight.std().item()
    return {"numbers": counts}
