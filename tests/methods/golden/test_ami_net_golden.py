"""AMI-Net against the authors' code; `tests/golden/ami_net.json` names repository and commit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.losses import MSECosineLoss, total
from anomaly_lit.methods.ami_net import AMINet, adaptive_mask, token_distance
from anomaly_lit.nn.aggregate import aggregate

BLOCK = {
    r"(norm\d\..*)": r"\2",
    r"attention\.query\.(.*)": r"attn.qkv.\2[0/3]",
    r"attention\.key\.(.*)": r"attn.qkv.\2[1/3]",
    r"attention\.value\.(.*)": r"attn.qkv.\2[2/3]",
    r"attention\.output\.(.*)": r"attn.proj.\2",
    r"mlp\.0\.(.*)": r"mlp.fc1.\2",
    r"mlp\.2\.(.*)": r"mlp.fc2.\2",
}
NAMES = {
    r"inpainting\.embed\.(.*)": r"patch_embed.proj.\1",
    r"inpainting\.mask_token": "mask_token",
    r"inpainting\.norm\.(.*)": r"norm.\1",
    r"inpainting\.head\.(.*)": r"inpainting_pred.\1",
    r"clustering\.embed\.(.*)": r"auxi_embed.proj.\1",
    r"clustering\.centres": "cls_token",
    r"clustering\.norm\.(.*)": r"norm_auxi.\1",
    **{
        rf"{branch}\.blocks\.(\d)\.{ours}": rf"{blocks}.\1.{theirs}"
        for branch, blocks in {"inpainting": "blocks", "clustering": "auxiliary"}.items()
        for ours, theirs in BLOCK.items()
    },
}
CHANNELS, PATCH, DIM = 28, 4, 96
SIZE = (256, 256)
MAPS = {"channels": (4, 8, 16), "strides": (4, 8, 16)}


@pytest.fixture(scope="module")
def golden(rule: Any) -> Any:
    return rule.Golden("ami_net")


@pytest.fixture
def build(golden: Any, rule: Any, given_maps: Callable[..., Any]) -> Callable[..., Any]:
    def filled(case: str, mask: Any = None, dim: int = DIM, depth: int = 2) -> AMINet:
        backbone = given_maps([f"ami_net {case}"], 2, SIZE, **MAPS)
        method = AMINet(
            backbone,
            mask,
            MSECosineLoss(),
            partial(torch.optim.AdamW),
            dim=dim,
            heads=4,
            depth=depth,
            clusters=5,
            jitter=20 / dim**0.5,
        )
        if case != "start":
            rule.fill_ours(method, NAMES, golden.scales(case))
            order_patches_by_channel(method.inpainting.head)
        return method

    return filled


@torch.no_grad()
def order_patches_by_channel(head: torch.nn.Linear) -> None:
    """The authors' patches are (row, column, channel), ours (channel, row, column)."""
    for part in (head.weight, head.bias):
        theirs = part.unflatten(0, (PATCH**2, CHANNELS))
        part.copy_(theirs.transpose(0, 1).flatten(0, 1).clone())


@torch.no_grad()
def test_mask_inpainting_map_and_score_are_the_authors(
    golden: Any, build: Callable[..., Any], numbered: Callable[..., Tensor]
) -> None:
    method = build("scoring").eval()
    features = aggregate(method.backbone.maps, (64, 64), average=True)
    target = method.tokens(method.backbone.maps)
    distance = token_distance(*method.clustering(target))
    hidden = adaptive_mask(distance, method.sigma)
    inpainted = F.pixel_shuffle(method.map_of(method.inpainting(target, hidden)), PATCH)
    anomaly_map, score = method(numbered([0, 1], SIZE))
    assert len(distance.argmin(dim=-1).unique()) > 2
    golden.check(
        "scoring",
        features=features,
        nearest=distance.amin(dim=-1),
        hidden=hidden,
        inpainted=inpainted,
        anomaly_map=anomaly_map,
        score=score,
    )


@torch.no_grad()
def test_features_of_unit_length_are_the_authors(
    golden: Any, given_maps: Callable[..., Any]
) -> None:
    backbone = given_maps(["ami_net unit length"], 1, SIZE, (2, 4, 8, 16), (4, 4, 8, 16))
    no_mask: Any = None
    method = AMINet(
        backbone,
        no_mask,
        MSECosineLoss(),
        partial(torch.optim.AdamW),
        dim=DIM,
        depth=1,
        average=False,
        normalise=True,
    )
    tokens = method.tokens(backbone.maps)
    golden.check("unit length", features=F.pixel_shuffle(method.map_of(tokens), PATCH))


def test_losses_and_gradients_in_training_are_the_authors(
    golden: Any,
    rule: Any,
    build: Callable[..., Any],
    numbered: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = rule.tensor("ami_net hidden", (2, 256)).argsort(dim=1).argsort(dim=1)
    hidden = rank < torch.tensor([[int(256 * 0.3)], [int(256 * 0.6)]])
    method = build("training", mask=lambda *_: hidden.view(1, 2, 16, 16)).train()
    # the authors' first noise is that of the clusters
    noises = iter(
        rule.tensor(f"ami_net {name} noise", (2, 256, DIM)) for name in ("second", "first")
    )
    monkeypatch.setattr(torch, "randn_like", lambda _: next(noises))
    terms = method.losses({"image": numbered([0, 1], SIZE)})
    loss = total(terms)
    loss.backward()
    golden.check("training", loss=loss, **terms)
    weights = dict(method.named_parameters())
    golden.check(
        "training",
        tolerance=1e-4,
        gradient_embed=weights["inpainting.embed.weight"].grad,
        gradient_centres=weights["clustering.centres"].grad,
        gradient_mask_token=weights["inpainting.mask_token"].grad,
    )


@pytest.fixture
def new_method(build: Callable[..., Any]) -> AMINet:
    torch.manual_seed(0)
    return build("start", dim=768, depth=1)


def test_weights_start_as_the_authors(golden: Any, new_method: AMINet) -> None:
    block: Any = new_method.inpainting.blocks[0]
    attention = block.attention
    projections = (attention.query, attention.key, attention.value)
    stds = {
        "embed": new_method.inpainting.embed.weight,
        "cluster embed": new_method.clustering.embed.weight,
        "cluster embed bias": new_method.clustering.embed.bias,
        "centres": new_method.clustering.centres,
        "attention": torch.cat([part.weight for part in projections]),
        "attention output": attention.output.weight,
        "mlp": block.mlp[0].weight,
        "head": new_method.inpainting.head.weight,
    }
    for name, weight in stds.items():
        assert weight.std().item() == pytest.approx(golden.number("start", f"std {name}"), rel=0.05)


def test_bias_of_the_embedding_starts_as_the_authors(golden: Any, new_method: AMINet) -> None:
    std = new_method.inpainting.embed.bias.std().item()
    assert std == pytest.approx(golden.number("start", "std embed bias"), rel=0.05)
