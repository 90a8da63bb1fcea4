"""SIVT: what reaches the reconstruction, its formulas written out, and the facts it states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomaly_lit.losses import MSECosineLoss, total
from anomaly_lit.masks import BlockMask, CrossedMasks, NoMask
from anomaly_lit.methods.sivt import SelfInduction
from anomaly_lit.nn.transformer import TransformerBlock, sincos_positions
from anomaly_lit.types import UserError

Build = MakeBatch = Fit = Callable[..., Any]
TOKENS, TOKEN_DIM, DIM = 12, 6, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("sivt")


def make_transformer(placed: bool = False) -> SelfInduction:
    blocks = [nn.Sequential(TransformerBlock(DIM, 2)) for _ in range(2)]
    transformer = SelfInduction(TOKEN_DIM, sincos_positions(DIM, 3, 4), *blocks, placed)
    nn.init.normal_(transformer.induction)
    return transformer


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(1))


def deal(sets: int = 4, batch: int = 2) -> Tensor:
    mask = CrossedMasks(sizes=[1], sets=sets)
    return mask(batch, 3, 4, torch.Generator().manual_seed(0)).flatten(2)


@pytest.mark.parametrize("placed", [False, True])
def test_each_token_is_what_its_own_set_makes_of_the_induction_token(
    placed: bool, tokens: Tensor
) -> None:
    transformer, hidden = make_transformer(placed), deal()
    found = transformer.induct(tokens, hidden)
    for image in range(2):
        for position in range(TOKENS):
            number = next(n for n in range(4) if hidden[n, image, position])
            row = []
            for place in range(TOKENS):
                code = transformer.positions[place]
                if hidden[number, image, place]:
                    row.append(transformer.induction + code * placed)
                else:
                    row.append(transformer.embed(tokens[image, place]) + code)
            encoded = transformer.encoder_norm(transformer.encoder(torch.stack(row)[None]))
            torch.testing.assert_close(
                found[image, position], encoded[0, position], rtol=1e-4, atol=1e-5
            )


def test_without_positions_the_induction_tokens_of_a_set_end_equal(tokens: Tensor) -> None:
    hidden = deal()
    for placed in (False, True):
        filled = make_transformer(placed).induct(tokens, hidden)
        distinct = len(torch.unique(filled[0].detach().mul(1e3).round(), dim=0))
        assert distinct == (TOKENS if placed else 4)


def test_no_token_reaches_its_own_place_before_the_decoder(tokens: Tensor) -> None:
    """By its gradient; the decoder then mixes the sets."""
    transformer, hidden = make_transformer(), deal()
    tokens.requires_grad_()
    weight = torch.randn(DIM)  # the plain sum is constant after a layer norm
    for position in range(TOKENS):
        filled = transformer.induct(tokens, hidden)[:, position] @ weight
        (gradient,) = torch.autograd.grad(filled.sum(), tokens)
        number = [next(n for n in range(4) if hidden[n, i, position]) for i in range(2)]
        for image in range(2):
            own = hidden[number[image], image]
            assert not gradient[image, own].any()
            assert gradient[image, ~own].any(dim=1).all()


def test_features_reach_the_reconstruction_through_the_induction_tokens_alone(
    tokens: Tensor,
) -> None:
    transformer = make_transformer()
    tokens.requires_grad_()
    whole, detached = transformer.induct, lambda *given: whole(*given).detach()
    transformer.induct = detached  # type: ignore[method-assign, assignment]
    rebuilt = transformer(tokens, deal())
    assert not torch.autograd.grad(rebuilt.sum(), tokens, allow_unused=True)[0]


def test_a_token_that_no_set_hides_keeps_itself(tokens: Tensor) -> None:
    """Which makes `mask=none` a plain transformer."""
    transformer = make_transformer()
    plain = transformer.encoder_norm(
        transformer.encoder(transformer.embed(tokens) + transformer.positions)
    )
    nothing = torch.zeros(1, 1, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(transformer.induct(tokens, nothing), plain)


def test_a_token_in_several_sets_is_their_mean(tokens: Tensor) -> None:
    transformer = make_transformer()
    first, second = deal(2)[:1], torch.ones(1, 2, TOKENS, dtype=torch.bool)
    both = transformer.induct(tokens, torch.cat([first, second]))
    parts = [transformer.induct(tokens, part) for part in (first, second)]
    expected = torch.where(first[0][..., None], (parts[0] + parts[1]) / 2, parts[1])
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_as_many_as_published(published_method: Build) -> None:
    method = published_method("sivt", 256)
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count == 14_469_008
    codes = 2 * method.transformer.positions.numel()  # PSA-VT counts one for each half
    assert (count + codes) / 1e6 == pytest.approx(14.59, abs=0.005)
    assert sum(method.backbone.channels) * method.patch**2 == 1088
    assert method.cells == (16, 16)


def test_the_published_mask_hides_each_token_once(published_method: Build) -> None:
    hidden = published_method("sivt", 256).hidden
    assert hidden.shape == (1, 4, 1, 16, 16)
    assert (hidden[0].sum(dim=0) == 1).all()
    assert hidden[0].flatten(1).sum(dim=1).tolist() == [64] * 4


def test_loss_compares_directions_of_tokens_or_of_positions(
    small_method: Build, make_batch: MakeBatch
) -> None:
    batch = make_batch()
    for per in ("token", "position"):
        method = small_method("sivt", cosine_per=per, loss=MSECosineLoss())
        torch.manual_seed(0)
        terms = method.losses(batch)
        target = method.tokens(method.backbone(batch["image"]))
        torch.manual_seed(0)
        hidden = method.mask(2, *method.cells, method.generator()).flatten(2)
        rebuilt = method.transformer(target, hidden)
        if per == "position":
            target, rebuilt = (
                method.feature_map(part).flatten(2).transpose(1, 2) for part in (target, rebuilt)
            )
        angles = [
            1 - float(a @ b / (a.norm() * b.norm()))
            for a, b in zip(target.flatten(0, 1), rebuilt.flatten(0, 1), strict=True)
        ]
        expected = 5 * sum(angles) / len(angles)
        assert float(terms["direction"]) == pytest.approx(expected, rel=1e-3)
        squares = (target - rebuilt).square().mean()
        assert float(terms["distance"]) == pytest.approx(float(squares), rel=1e-4)


def test_map_is_distance_times_direction_and_the_score_its_deviation(
    small_method: Build, make_batch: MakeBatch
) -> None:
    method = small_method("sivt", smoothing=0.0).eval()
    image = make_batch(1)["image"]
    with torch.no_grad():
        target = method.tokens(method.backbone(image))
        rebuilt = method.feature_map(method.transformer(target, method.hidden[0].flatten(2)))
        given = method.feature_map(target)
        found = method(image)
    distance = (rebuilt - given).square().mean(dim=1, keepdim=True)
    direction = 1 - nn.functional.cosine_similarity(rebuilt, given)[:, None]
    maps = [
        nn.functional.interpolate(part, (64, 64), mode="bilinear", align_corners=True)
        for part in (distance, direction)
    ]
    torch.testing.assert_close(found.anomaly_map, maps[0] * maps[1])
    values = found.anomaly_map.flatten().double()
    expected = ((values - values.mean()) ** 2).mean().sqrt()
    torch.testing.assert_close(found.score[0].double(), expected)


def test_only_the_distance_is_smoothed_unless_asked(
    small_method: Build, make_batch: MakeBatch
) -> None:
    image = make_batch(1)["image"]
    with torch.no_grad():
        maps = [
            small_method("sivt", smooth_direction=both).eval()(image).anomaly_map
            for both in (False, True)
        ]
    assert not torch.equal(*maps)


@pytest.mark.parametrize("mask", [BlockMask(0.0), BlockMask(0.9), NoMask(), CrossedMasks([1], 2)])
def test_trains_whatever_is_hidden(
    mask: Any, small_method: Build, fit: Fit, make_batch: MakeBatch
) -> None:
    method, batch = small_method("sivt", mask=mask), make_batch()
    fit(method, batch, 1)
    assert total(method.losses(batch)).isfinite()
    assert method.eval().score_batch(batch).score.isfinite().all()


def test_score_of_an_image_rises_with_a_block_in_it(
    method: Any, fit: Fit, make_batch: MakeBatch
) -> None:
    batch = make_batch()
    fit(method, batch, 80)
    with torch.no_grad():
        clean, corrupted = (method.eval()(batch[of]).score for of in ("image", "corrupted"))
    assert (corrupted > clean).all()


def test_a_head_that_starts_at_the_mean_answers_with_the_mean_token(
    small_method: Build, make_batch: MakeBatch
) -> None:
    method, batch = small_method("sivt", head="mean"), make_batch(3)
    method.normal_batches = lambda split: iter([batch])
    method.learn()
    with torch.no_grad():
        tokens = method.tokens(method.backbone(batch["image"]))
        rebuilt = method.transformer(tokens, method.hidden[0].flatten(2))
    torch.testing.assert_close(rebuilt, tokens.mean(dim=(0, 1)).expand_as(rebuilt))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"patch": 3}, "patch=3"),
        ({"dim": 30}, "dim=30"),
        ({"decoder_heads": 3}, "decoder_heads=3"),
        ({"score": "mean"}, "score=mean: choose std or max"),
        ({"cosine_per": "map"}, "cosine_per=map"),
        ({"head": "zero"}, "head=zero: choose random or mean"),
    ],
)
def test_impossible_values_are_refused(
    changes: dict[str, Any], text: str, small_method: Build
) -> None:
    with pytest.raises(UserError, match=text):
        small_method("sivt", **changes)
