"""OneNIP against the authors' code; `tests/golden/onenip.json` names repository and commit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from anomaly_lit.losses import total
from anomaly_lit.methods.onenip import OneNIP
from anomaly_lit.nn.aggregate import aggregate

ATTENTION = {
    r"(.*)\.@\.query\.(weight|bias)": r"transformer.\1.#.in_proj_\2[0/3]",
    r"(.*)\.@\.key\.(weight|bias)": r"transformer.\1.#.in_proj_\2[1/3]",
    r"(.*)\.@\.value\.(weight|bias)": r"transformer.\1.#.in_proj_\2[2/3]",
    r"(.*)\.@\.output\.(weight|bias)": r"transformer.\1.#.out_proj.\2",
}
NAMES = {
    **{
        ours.replace("@", own): theirs.replace("#", name)
        for own, name in {
            "attention": "self_attn",
            "to_image": "cross_attn_prompt_to_image",
            "to_prompt": "cross_attn_image_to_prompt",
            "last": "final_attn_token_to_image",
        }.items()
        for ours, theirs in ATTENTION.items()
    },
    r"fusion_constant": "",
    r"(stored|prompt_tokens)\.items": "",
    r"embed\.(.*)": r"input_proj.\1",
    r"head\.(.*)": r"output_proj.\1",
    r"positions\.row": "pos_embed.row_embed.weight",
    r"positions\.column": "pos_embed.col_embed.weight",
    r"(encoder.*)\.mlp\.0\.(.*)": r"transformer.\1.linear1.\2",
    r"(encoder.*)\.mlp\.3\.(.*)": r"transformer.\1.linear2.\2",
    r"(decoder.*)\.mlp\.0\.(.*)": r"transformer.\1.mlp.lin1.\2",
    r"(decoder.*)\.mlp\.2\.(.*)": r"transformer.\1.mlp.lin2.\2",
    r"((?:encoder|decoder)\..*norm.*)": r"transformer.\1",
    r"refiner\.([0-3])\.(.*)": r"seghead.upconv1.\1.\2",
    r"refiner\.4\.(.*)": r"seghead.upconv2.0.\1",
    r"refiner\.5\.(.*)": r"seghead.upconv2.1.\1",
    r"refiner\.7\.(.*)": r"seghead.upconv2.3.\1",
    r"refiner\.8\.(.*)": r"seghead.predictor.\1",
}
SIZE = (96, 128)
MAPS = {"channels": (8, 16), "strides": (8, 16)}


@pytest.fixture(scope="module")
def golden(rule: Any) -> Any:
    return rule.Golden("onenip")


@pytest.fixture
def build(golden: Any, rule: Any) -> Callable[..., Any]:
    def filled(case: str, backbone: Any, size: tuple[int, int], **options: Any) -> OneNIP:
        optimizer = partial(torch.optim.AdamW)
        options = {"image_size": size, "stride": 16, "prompts": 1, **options}
        method = OneNIP(backbone, nn.MSELoss(), optimizer, **options)
        rule.fill_ours(method, NAMES, golden.scales(case))
        return method

    return filled


@pytest.mark.parametrize(
    ("case", "count", "size", "maps", "options"),
    [
        # the paper's numbers are our defaults
        ("paper", 1, (224, 224), {"channels": (24, 32, 56, 160), "strides": (2, 4, 8, 16)}, {}),
        (
            "small",
            2,
            SIZE,
            MAPS,
            {"feedforward": 48, "encoder_depth": 2, "decoder_depth": 2, "window": 3},
        ),
    ],
    ids=["paper", "small"],
)
@torch.no_grad()
def test_both_maps_their_fusion_and_the_score_are_the_authors(
    case: str,
    count: int,
    size: tuple[int, int],
    maps: dict[str, Any],
    options: dict[str, Any],
    golden: Any,
    given_maps: Callable[..., Any],
    numbered: Callable[..., Any],
    build: Callable[..., Any],
) -> None:
    backbone = given_maps([f"onenip {case} image"], count, size, **maps)
    method = build(case, backbone, size, **options).eval()
    prompt = given_maps([f"onenip {case} prompt"], 1, size, **maps).maps
    method.stored.keep(aggregate(prompt, method.grid), ["bolt"], 1)
    method.prompt_tokens.fill(method.encode(method.stored.items))
    image = numbered(range(count), size)

    method.fusion_constant.fill_(0)
    distance = 2 * method(image).anomaly_map
    constant = golden.number(case, "fusion constant")
    assert (distance.max() + distance.min()).item() / 2 == pytest.approx(constant, rel=1e-5)
    method.fusion_constant.fill_(constant)
    anomaly_map, score = method(image)
    refined = (2 * anomaly_map - distance) / constant
    golden.check(case, distance=distance, anomaly_map=anomaly_map, score=score, refined=refined)


def test_losses_and_gradients_in_training_are_the_authors(
    golden: Any,
    rule: Any,
    given_maps: Callable[..., Any],
    numbered: Callable[..., Any],
    build: Callable[..., Any],
) -> None:
    names = [f"onenip training {name}" for name in ("image", "corrupted", "prompt")]
    method = build(
        "training",
        given_maps(names, 2, SIZE, **MAPS),
        SIZE,
        feedforward=48,
        encoder_depth=1,
        decoder_depth=1,
        window=3,
        dropout=0.0,
        jitter=0.0,
    ).train()
    terms = method.losses(
        {
            "image": numbered([0, 1], SIZE),
            "corrupted": numbered([2, 3], SIZE),
            "prompt": numbered([4, 5], SIZE),
            "corruption": rule.tensor("onenip corruption", (2, 1, *SIZE)) > 0.5,
            "category": ["bolt"] * 2,
        }
    )
    loss = total(terms)
    loss.backward()
    weights = dict(method.named_parameters())
    golden.check("training", loss=loss, **terms)
    golden.check(
        "training",
        tolerance=1e-4,
        gradient_input=weights["embed.weight"].grad,
        gradient_decoder=weights["decoder.layers.0.to_prompt.output.weight"].grad,
        gradient_refiner=weights["refiner.0.weight"].grad,
    )


@pytest.fixture(scope="module")
def new_method(published_method: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return published_method("onenip", 224)


def test_layers_start_as_the_authors(golden: Any, new_method: Any) -> None:
    layer = new_method.decoder.layers[0]
    stds = {
        "attention output": layer.to_image.output.weight,
        "mlp": layer.mlp[0].weight,
        "refiner": new_method.refiner[0].weight,
        "refiner up": new_method.refiner[3].weight,
    }
    for name, weight in stds.items():
        assert weight.std().item() == pytest.approx(golden.number("start", f"std {name}"), rel=0.03)


def test_attention_starts_as_the_authors(golden: Any, new_method: Any) -> None:
    std = new_method.decoder.layers[0].to_image.query.weight.std().item()
    assert std == pytest.approx(golden.number("start", "std attention query"), rel=0.03)
