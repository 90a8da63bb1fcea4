"""OneNIP against its formulas written out, and the facts its description states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.methods.onenip.network import BidirectionalDecoder, Refiner, StoredPrompts
from anomaly_lit.nn.neighbours import neighbour_mask
from anomaly_lit.types import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]
MakeBatch = Callable[..., Any]
Build = Callable[..., Any]
ROWS, COLUMNS, DIM = 3, 4, 8


@pytest.fixture
def method(
    small_method: Callable[..., Any], fit: Callable[..., None], make_batch: MakeBatch
) -> Any:
    """Trained for a step, so that it has prompts."""
    method = small_method("onenip")
    fit(method, make_batch(), 1)
    return method.eval()


def test_decoder_equals_its_formula() -> None:
    torch.manual_seed(0)
    decoder = BidirectionalDecoder(DIM, heads=2, feedforward=16, depth=2)
    image, prompt = torch.randn(2, 1, ROWS * COLUMNS, DIM)
    q = torch.rand(ROWS * COLUMNS, DIM)
    mask = neighbour_mask(ROWS, COLUMNS, 1)
    x, p = image, prompt
    for layer in decoder.layers:
        p1 = layer.norm1(p + layer.to_image(p + q, x + q, x, mask))
        p2 = layer.norm2(p1 + layer.mlp[2](layer.mlp[0](p1).clamp(min=0)))
        x = layer.norm3(x + layer.to_prompt(x + q, p2 + q, p2, mask))
        p = p2
    expected = decoder.norm(p + decoder.last(p + q, x + q, x))
    torch.testing.assert_close(decoder(image, prompt, q, mask), expected)


def test_image_looks_at_the_prompt() -> None:
    """What the authors' first version did not: another prompt changes the image's tokens."""
    torch.manual_seed(0)
    layer = BidirectionalDecoder(DIM, heads=2, feedforward=16, depth=1).layers[0]
    image, one, other = torch.randn(3, 1, ROWS * COLUMNS, DIM)
    q, mask = torch.zeros(ROWS * COLUMNS, DIM), neighbour_mask(ROWS, COLUMNS, 1)
    assert not torch.allclose(layer(image, one, q, mask)[0], layer(image, other, q, mask)[0])


def test_refiner_is_four_times_as_high_and_wide() -> None:
    assert Refiner(6, 4)(torch.rand(2, 6, 5, 7)).shape == (2, 1, 20, 28)


@pytest.mark.parametrize(("size", "reach"), [(224, 3), (256, 4), (320, 5)])
def test_window_follows_the_size_of_the_image(
    published_method: Callable[..., Any], size: int, reach: int
) -> None:
    method = published_method("onenip", size)
    side = size // 16
    middle = side // 2 * side + side // 2
    assert (~method.allowed[middle]).sum() == (2 * reach + 1) ** 2


def test_parameters_are_as_many_as_published(published_method: Callable[..., Any]) -> None:
    method = published_method("onenip", 224)
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(8.373, abs=0.0005)
    assert sum(p.numel() for p in method.refiner.parameters()) / 1e6 == pytest.approx(
        0.593, abs=5e-4
    )


def test_losses_are_those_of_the_paper(method: Any, make_batch: MakeBatch) -> None:
    """In evaluation mode, where neither jitter nor dropout disturbs."""
    batch = make_batch(2)

    def maps(image: Tensor) -> Tensor:
        stages = method.backbone(image)
        return torch.cat(
            [F.interpolate(s, method.grid, mode="bilinear", align_corners=True) for s in stages], 1
        )

    def rebuilt(image: Tensor, prompt: Tensor) -> Tensor:
        return method.reconstruct(method.encode(maps(image)), method.encode(maps(prompt)))

    normal, restored = (rebuilt(batch[key], batch["prompt"]) for key in ("image", "corrupted"))
    clean = maps(batch["image"])
    mse = ((normal - clean).square().mean() + (restored - clean).square().mean()) / 2
    dice = []
    for row in range(2):
        for output, given, truth in (
            (normal[row], clean[row], torch.zeros(1, 64, 64)),
            (restored[row], maps(batch["corrupted"])[row], batch["corruption"][row].float()),
        ):
            logits = method.refiner((output - given).abs()[None])
            p = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=True).sigmoid()[0]
            dice.append(1 - ((p * truth).sum() + 1) / ((p * p).sum() + (truth * truth).sum() + 1))
    losses = method.losses(batch)
    torch.testing.assert_close(losses["reconstruction"], mse)
    torch.testing.assert_close(losses["dice"], 0.5 * torch.stack(dice).mean())
    assert set(losses) == {"reconstruction", "dice"}


def test_both_streams_aim_at_the_clean_features(method: Any, make_batch: MakeBatch) -> None:
    targets = []
    method.loss.register_forward_hook(lambda loss, given, out: targets.append(given[1]))
    method.losses(make_batch(2))
    reconstruction, restoration = targets[0].chunk(2)
    assert torch.equal(reconstruction, restoration)


@pytest.mark.parametrize("stop", [False, True])
def test_refiner_s_gradient_reaches_the_reconstruction_unless_stopped(
    small_method: Callable[..., Any], fit: Callable[..., None], make_batch: MakeBatch, stop: bool
) -> None:
    method = small_method("onenip", stop_gradient=stop)
    fit(method, make_batch(), 1)
    method.zero_grad()
    method.losses(make_batch())["dice"].backward()
    reached = method.head.weight.grad is not None and method.head.weight.grad.abs().sum() > 0
    assert reached != stop


def test_prompt_does_not_depend_on_the_image(method: Any, make_batch: MakeBatch) -> None:
    prompt = torch.rand(1, sum(method.backbone.channels), *method.grid)
    one, other = torch.rand(2, *prompt.shape)
    first = method.encode(torch.cat([one, prompt]))[1]
    second = method.encode(torch.cat([other, prompt]))[1]
    torch.testing.assert_close(first, second)


def test_map_is_the_error_and_the_scaled_refiner_s_map(method: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(2)
    method.fusion_constant.fill_(3.0)
    with torch.inference_mode():
        features = torch.cat(
            [
                F.interpolate(s, method.grid, mode="bilinear", align_corners=True)
                for s in method.backbone(batch["image"])
            ],
            1,
        )
        prompts = method.encode(method.stored.items[[0, 0]])
        distance, refined = method.errors(features, prompts, (64, 64))
        found = method.score_batch(batch)
    torch.testing.assert_close(found.anomaly_map, 0.5 * distance + 1.5 * refined)


def test_fusion_constant_is_the_middle_of_the_error_s_range(
    method: Any, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = torch.tensor([2.0, 4.0, 8.0]).view(3, 1, 1, 1)
    monkeypatch.setattr(method, "errors", lambda *given: (maps, maps))
    monkeypatch.setattr(method, "all_gather", lambda value: value)
    assert method._middle([make_batch(3)], corrupted=True) == 5.0


def test_a_fixed_prompt_is_that_of_the_category_and_the_nearest_needs_none(
    method: Any, make_batch: MakeBatch
) -> None:
    stored = method.stored
    torch.manual_seed(0)
    maps = torch.rand(4, *stored.items.shape[1:])
    stored.keep(maps, ["bolt", "cloth", "bolt", "cloth"], 2)
    method.prompt_tokens.fill(method.encode(stored.items))
    assert stored.categories == ["bolt", "cloth"]
    assert torch.equal(stored.items, maps[[0, 2, 1, 3]])
    assert stored.rows(["cloth", "bolt"], 1) == [3, 1]
    assert stored.rows(["cloth", "bolt"], [0, 1]) == [2, 1]
    assert stored.most_similar(stored.items).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"no prompt for gear.*bolt, cloth.*prompt=nearest"):
        stored.rows(["gear"], 0)
    batch = make_batch(2)
    with torch.inference_mode():
        unknown = method.score_batch({**batch, "category": ["", ""]})
        assert torch.equal(unknown.anomaly_map, method(batch["image"]).anomaly_map)
        method.prompt = "nearest"
        assert torch.equal(method.score_batch(batch).anomaly_map, unknown.anomaly_map)


def test_prompts_are_encoded_anew_only_where_weights_have_moved(
    method: Any, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, encoded = make_batch(2), []
    encode = method.encode
    monkeypatch.setattr(method, "encode", lambda x: encoded.append(len(x)) or encode(x))
    with torch.inference_mode():
        kept = method.score_batch(batch)
        assert encoded == [2]  # the images
        method.calibrated = False  # as in a checkpoint between two validations
        anew = method.score_batch(batch)
    assert encoded == [2, method.prompt_count, 2]
    torch.testing.assert_close(anew.anomaly_map, kept.anomaly_map)


def test_too_few_training_images_serve_as_several_prompts() -> None:
    stored = StoredPrompts(2, 1, 1)
    stored.keep(torch.arange(4.0).view(2, 2, 1, 1), ["bolt", "bolt"], 3)
    assert stored.items[:, 0, 0, 0].tolist() == [0.0, 2.0, 0.0]


def test_random_prompts_are_drawn_among_the_stored_ones(
    method: Any, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    method.prompt = "random"
    drawn = []
    rows = method.stored.rows
    monkeypatch.setattr(
        method.stored, "rows", lambda names, index: drawn.append(index) or rows(names, index)
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        for _ in range(20):
            method.score_batch(make_batch(2))
    assert {number for index in drawn for number in index} == set(range(method.prompt_count))


def test_untrained_method_says_that_it_has_no_prompts(
    small_method: Callable[..., Any], make_batch: MakeBatch
) -> None:
    with pytest.raises(UserError, match="no prompts yet"):
        small_method("onenip").eval()(make_batch()["image"])


def test_prompts_stay_those_of_the_checkpoint(
    small_method: Callable[..., Any], method: Any, fit: Callable[..., None], make_batch: MakeBatch
) -> None:
    other = small_method("onenip")
    other.load_state_dict(method.state_dict())
    fit(other, make_batch(3), 1)
    assert torch.equal(other.stored.items, method.stored.items)


def test_index_beyond_the_prompts_is_refused(small_method: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="prompt_index=5"):
        small_method("onenip", prompt_index=5)


def test_a_constant_from_the_test_set_is_said_in_the_table(
    small_method: Callable[..., Any],
) -> None:
    assert small_method("onenip").oracle == ""
    assert "test" in small_method("onenip", fusion="test").oracle


def test_one_constant_from_the_test_set_for_validation_checkpoint_test_and_prediction(
    small_method: Callable[..., Any], fit: Callable[..., None], make_batch: MakeBatch
) -> None:
    method = small_method("onenip", fusion="test")
    asked = []

    def test_batches() -> list[Any]:
        asked.append(1)
        return [make_batch(2)]

    original = type(method).calibrate

    def calibrate(self: Any) -> None:
        self.trainer.datamodule.test_dataloader = test_batches
        original(self)

    method.calibrate = calibrate.__get__(method)
    fit(method, make_batch(3), 1)
    assert asked
    kept = method.fusion_constant.clone()
    assert kept != 1
    batch = make_batch(2)
    first = method.eval().predict_batch(batch).anomaly_map
    other = small_method("onenip", fusion="test")
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.fusion_constant, kept)
    assert torch.equal(other.eval().predict_batch(batch).anomaly_map, first)
