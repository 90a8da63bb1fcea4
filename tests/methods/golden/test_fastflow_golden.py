"""FastFlow against a public re-implementation; `tests/golden/fastflow.json` says which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from anomaly_lit.losses import total
from anomaly_lit.methods.fastflow import CouplingStep, FastFlow

STEP = r"flows\.(\d)\.steps\.(\d)"
THEIRS = r"nf_flows.\1.module_list.\2"
NAMES = {
    r"flows\.(\d)\.norm\.(.*)": r"norms.\1.\2",
    rf"{STEP}\.subnet\.(.*)": rf"{THEIRS}.subnet.\3",
    rf"{STEP}\.scale": f"{THEIRS}.global_scale",
    rf"{STEP}\.offset": f"{THEIRS}.global_offset",
}
SIZE = (64, 64)
STRIDES = (4, 8, 16)
CASES: dict[str, dict[str, Any]] = {
    "alternating": {"channels": (6, 8, 10), "steps": 4, "kernels": "3-1", "hidden_ratio": 1.0},
    "uneven": {"channels": (5, 7, 9), "steps": 3, "kernels": "3-3", "hidden_ratio": 0.6},
}


@pytest.fixture(scope="module")
def golden(rule: Any) -> Any:
    return rule.Golden("fastflow")


@pytest.fixture
def build(rule: Any, given_maps: Callable[..., Any]) -> Callable[..., Any]:
    def filled(case: str, channels: Sequence[int], **options: Any) -> FastFlow:
        backbone = given_maps([f"fastflow {case}"], 2, SIZE, channels, STRIDES)
        optimizer = partial(torch.optim.Adam)
        method = FastFlow(backbone, optimizer, image_size=SIZE, affine=True, average=0, **options)
        rule.fill_ours(method, NAMES)
        for name, step in method.named_modules():
            if isinstance(step, CouplingStep):
                _, stage, _, number = name.split(".")
                theirs = f"nf_flows.{stage}.module_list.{number}.w_perm"
                step.permutation.copy_(rule.tensor(theirs, step.permutation.shape).argsort())
                step.scale.data += 10
        return method.eval()

    return filled


@pytest.mark.parametrize("case", CASES)
def test_noise_likelihood_map_and_gradients_are_the_reference(
    case: str,
    golden: Any,
    rule: Any,
    build: Callable[..., Any],
    numbered: Callable[..., Tensor],
) -> None:
    method = build(case, **CASES[case])
    image = numbered([0, 1], SIZE)
    loss = total(method.losses({"image": image}))
    loss.backward()
    outputs: dict[str, Tensor] = {}
    log_dets: dict[str, Tensor] = {}
    with torch.no_grad():
        anomaly_map, score = method(image)
        for number, (flow, map_) in enumerate(zip(method.flows, method.backbone.maps, strict=True)):
            noise, log_det = flow(map_)
            given = rule.tensor(f"fastflow {case} noise {number}", map_.shape)
            outputs |= {f"noise{number}": noise, f"inverse{number}": flow.inverse(given)}
            log_dets[f"log_det{number}"] = log_det
    # the reference's map is minus the likelihood, ours one minus it
    golden.check(case, loss=loss, anomaly_map=anomaly_map - 1, score=score - 1, **outputs)
    golden.check(case, tolerance=1e-4, **log_dets)  # sums whose terms cancel
    weights = dict(method.named_parameters())
    golden.check(
        case,
        tolerance=1e-4,
        gradient_conv=weights["flows.0.steps.0.subnet.0.weight"].grad,
        gradient_scale=weights["flows.2.steps.1.scale"].grad,
        gradient_norm=weights["flows.1.norm.weight"].grad,
    )


@pytest.mark.parametrize(
    ("name", "channels", "kernels"),
    [("ResNet-18", (64, 128, 256), "3-3"), ("WideResNet-50-2", (256, 512, 1024), "3-1")],
)
def test_flows_have_the_parameters_and_the_start_of_the_reference(
    name: str,
    channels: Sequence[int],
    kernels: Any,
    golden: Any,
    given_maps: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    backbone = given_maps(["fastflow start"], 1, SIZE, channels, STRIDES)
    method: Any = FastFlow(backbone, partial(torch.optim.Adam), kernels=kernels, average=0)
    count = sum(weight.numel() for weight in method.flows.parameters())
    assert count == golden.number("start", f"parameters {name}")
    step = method.flows[0].steps[0]
    assert step._scale().mean().item() == pytest.approx(golden.number("start", "scale"))
    if name == "WideResNet-50-2":
        std = golden.number("start", "std subnet")
        assert step.subnet[0].weight.std().item() == pytest.approx(std, rel=0.05)
