"""UniAD against the authors' code; `tests/golden/uniad.json` names repository, commit, licence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from anomaly_lit.losses import total
from anomaly_lit.methods.uniad import UniAD
from anomaly_lit.nn.transformer import add_jitter

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
            "to_encoded": "self_attn",
            "to_previous": "multihead_attn",
        }.items()
        for ours, theirs in ATTENTION.items()
    },
    r"embed\.(.*)": r"input_proj.\1",
    r"head\.(.*)": r"output_proj.\1",
    r"positions\.row": "pos_embed.row_embed.weight",
    r"positions\.column": "pos_embed.col_embed.weight",
    r"(.*)\.mlp\.0\.(.*)": r"transformer.\1.linear1.\2",
    r"(.*)\.mlp\.3\.(.*)": r"transformer.\1.linear2.\2",
    r"(.*)\.query": r"transformer.\1.learned_embed.weight",
    r"((?:encoder|decoder)\..*norm.*)": r"transformer.\1",
}
CASES: dict[str, dict[str, Any]] = {
    "paper": {
        "maps": (1, (224, 224), (24, 32, 56, 160), (2, 4, 8, 16)),
        "numbers": {},  # those of the paper are our defaults
    },
    "small": {
        "maps": (2, (96, 128), (8, 16), (8, 16)),
        "numbers": {
            "dim": 32,
            "heads": 4,
            "feedforward": 48,
            "encoder_depth": 2,
            "decoder_depth": 2,
            "window": 3,
        },
    },
}


@pytest.fixture(scope="module")
def golden(rule: Any) -> Any:
    return rule.Golden("uniad")


@pytest.mark.parametrize("case", CASES)
def test_maps_scores_loss_and_gradients_are_the_authors(
    case: str, golden: Any, rule: Any, given_maps: Callable[..., Any], numbered: Any
) -> None:
    count, size, channels, strides = CASES[case]["maps"]
    backbone = given_maps([f"uniad {case}"], count, size, channels, strides)
    optimizer = partial(torch.optim.AdamW)
    options = {"image_size": size, "stride": 16, **CASES[case]["numbers"]}
    method: Any = UniAD(backbone, nn.MSELoss(), optimizer, **options)
    rule.fill_ours(method, NAMES, golden.scales(case))
    method.eval()

    image = numbered(range(count), size)
    loss = total(method.losses({"image": image}))
    loss.backward()
    with torch.no_grad():
        prediction = method(image)
        scores = {}
        for score in ("std", "mean"):
            method.score = score
            scores[f"score_{score}"] = method(image).score

    named = {"anomaly_map": prediction.anomaly_map, "score_max": prediction.score}
    golden.check(case, loss=loss, **named, **scores)
    if case == "small":
        weights = dict(method.named_parameters())
        first = "encoder.layers.0.attention"
        golden.check(
            case,
            tolerance=1e-4,
            gradient_input=weights["embed.weight"].grad,
            gradient_encoder=torch.cat(
                [weights[f"{first}.{part}.weight"].grad for part in ("query", "key", "value")]
            ),
            gradient_query=weights["decoder.layers.1.query"].grad,
            gradient_row=weights["positions.row"].grad,
        )


def test_jitter_is_the_authors(golden: Any, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, noise = (rule.tensor(f"uniad {name}", (2, 12, 24)) for name in ("tokens", "noise"))
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    golden.check("jitter", noisy=add_jitter(tokens, 20 / 24**0.5))


@pytest.fixture(scope="module")
def new_method(published_method: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return published_method("uniad", 224)


def test_linear_layers_start_as_the_authors(golden: Any, new_method: Any) -> None:
    stds = {
        "embed": new_method.embed.weight,
        "head": new_method.head.weight,
        "mlp": new_method.encoder.layers[0].mlp[0].weight,
        "attention output": new_method.encoder.layers[0].attention.output.weight,
        "learned query": new_method.decoder.layers[0].query,
    }
    for name, weight in stds.items():
        assert weight.std().item() == pytest.approx(golden.number("start", f"std {name}"), rel=0.03)


def test_attention_starts_as_the_authors(golden: Any, new_method: Any) -> None:
    std = new_method.encoder.layers[0].attention.query.weight.std().item()
    assert std == pytest.approx(golden.number("start", "std attention query"), rel=0.03)


def test_layers_start_equal_as_the_authors(golden: Any, new_method: Any) -> None:
    assert golden.number("start", "layers start equal") == 1
    layers = new_method.decoder.layers
    assert torch.equal(layers[0].query, layers[3].query)
