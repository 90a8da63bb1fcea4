"""SGSF: what guides what, the terms of its loss, and the facts it states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from anomaly_lit.config.hydra import config_dir
from anomaly_lit.losses import HybridLoss, total
from anomaly_lit.metrics.functional import auroc
from anomaly_lit.synthesis import SaliencyPerlin
from anomaly_lit.types import UserError

Build = MakeBatch = Fit = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def method(small_method: Build) -> Any:
    return small_method("sgsf")


def test_guidance_comes_from_all_stages_of_the_decoder_but_the_finest(method: Any) -> None:
    image = torch.rand(2, 3, 32, 48)
    kept: list[Any] = []
    for stage in method.guide.up:
        stage.register_forward_hook(lambda part, given, made: kept.append(made))
    restored, guidance = method.guide(image)
    assert restored.shape == image.shape
    assert [g.shape for g in guidance] == [(2, 8, 16, 24), (2, 8, 8, 12)]
    assert torch.equal(guidance[0], kept[1])
    assert torch.equal(guidance[1], kept[0])


def test_the_guidance_network_has_no_way_around_its_bottleneck(method: Any) -> None:
    """Were the coarsest map constant, so would be the restored image away from the border."""
    method.eval()
    method.guide.down[-1].forward = lambda x: torch.ones(len(x), 8, *x.shape[-2:])
    with torch.no_grad():
        first, second = (method.guide(torch.rand(1, 3, 64, 64))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_joined_goes_to_the_next_scale_and_over_the_skip(method: Any) -> None:
    method.eval()
    seg, image = method.segmenter, torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        guidance = method.guide(image)[1]
        halved = torch.nn.functional.max_pool2d
        fine = seg.down[0](image)
        middle = seg.join[0](torch.cat([seg.down[1](halved(fine, 2)), guidance[0]], dim=1))
        coarse = seg.join[1](torch.cat([seg.down[2](halved(middle, 2)), guidance[1]], dim=1))
        up = seg.up[0](torch.cat([seg.grow[0](coarse), middle], dim=1))
        up = seg.up[1](torch.cat([seg.grow[1](up), fine], dim=1))
        torch.testing.assert_close(seg(image, guidance), seg.head(up))


@pytest.mark.parametrize("detached", [True, False])
def test_gradient_of_the_segmentation_reaches_the_guidance_only_if_asked(
    detached: bool, small_method: Build, make_batch: MakeBatch
) -> None:
    method = small_method("sgsf", detach_guidance=detached)
    method.losses(make_batch())["segmentation"].backward()
    assert all(p.grad is None for p in method.guide.parameters()) == detached
    assert all(p.grad is not None for p in method.segmenter.parameters())


def test_terms_are_those_of_the_formulas(small_method: Build, make_batch: MakeBatch) -> None:
    method = small_method(
        "sgsf", loss=HybridLoss(), restoration_weight=0.5, consistency_weight=0.1
    ).train()  # before training, an image's features are all the same without its statistics
    batch = make_batch()
    with torch.no_grad():
        terms = method.losses(batch)
        restored, guidance = method.guide(batch["corrupted"])
        clean = method.guide(batch["image"])[1]
        probability = method(batch["corrupted"]).anomaly_map
    squares = (restored - batch["image"]).square().mean()
    assert float(terms["pixel"]) == pytest.approx(0.5 * float(squares), rel=1e-4)
    truth = batch["corruption"].float()
    right = probability * truth + (1 - probability) * (1 - truth)
    focal = (-((1 - right) ** 2) * right.log()).mean()
    assert float(terms["segmentation"]) == pytest.approx(float(focal), rel=1e-3)
    gaps = []
    for one, other in zip(guidance, clean, strict=True):
        angle = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp(min=1e-8)
        gaps.append(float((1 - angle).mean()))
    assert float(terms["consistency"]) == pytest.approx(0.1 * sum(gaps) / len(gaps), rel=1e-3)
    assert set(terms) == {"pixel", "structure", "segmentation", "consistency"}
    without = small_method("sgsf", consistency_weight=0.0).losses(batch)
    assert "consistency" not in without


def test_score_is_the_largest_mean_over_a_window(method: Any, make_batch: MakeBatch) -> None:
    with torch.no_grad():
        anomaly_map, score = method.eval()(make_batch(1)["image"])
    assert 0 <= anomaly_map.min() <= anomaly_map.max() <= 1
    padded = torch.nn.functional.pad(anomaly_map[0, 0], (1, 1, 1, 1))
    windows = [padded[r : r + 3, c : c + 3].mean() for r in range(64) for c in range(64)]
    torch.testing.assert_close(score[0], torch.stack(windows).max())


def test_parameters_are_as_many_as_stated(published_method: Build) -> None:
    method = published_method("sgsf", 256)
    assert sum(p.numel() for p in method.parameters()) / 1e6 == pytest.approx(52.65, abs=0.01)


@pytest.mark.slow
def test_forgeries_on_stripes_are_told_from_clean_images_after_200_steps(
    small_method: Build,
) -> None:
    """Images and forgeries that training has not seen; the rate drops as the authors' does.

    At a constant rate, the running statistics of batch normalisation do not catch up with the
    weights, and from some starts the network gives one answer for all in evaluation.
    """
    generator = torch.Generator().manual_seed(0)
    recipe = SaliencyPerlin("none", probability=1.0)

    def draw(count: int) -> Any:
        phase = 6 * torch.rand(count, 1, 1, 1, generator=generator)
        image = (0.5 + 0.3 * torch.sin(torch.arange(32) * 0.7 + phase)).expand(count, 3, 32, 32)
        corrupted, corruption = recipe(image, generator)
        return {"image": image, "corrupted": corrupted, "corruption": corruption}

    torch.manual_seed(0)
    method = small_method("sgsf", widths=[8, 16, 16], window=5).train()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100, 140, 180], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        total(method.losses(draw(4))).backward()
        optimizer.step()
        drops.step()
    unseen = draw(32)
    with torch.no_grad():
        forged, clean = (method.eval()(unseen[of]).score for of in ("corrupted", "image"))
    forged = forged[unseen["corruption"].flatten(1).any(dim=1)]  # some draws changed nothing
    assert len(forged) > 16
    assert auroc(torch.cat([forged, clean]), torch.arange(len(forged) + 32) < len(forged)) > 0.9


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"widths": [8]}, "widths="),
        ({"window": 4}, "window=4"),
        ({"consistency_weight": -1.0}, "consistency_weight=-1"),
    ],
)
def test_impossible_values_are_refused(
    changes: dict[str, Any], text: str, small_method: Build
) -> None:
    with pytest.raises(UserError, match=text):
        small_method("sgsf", **changes)


def test_an_image_that_cannot_be_halved_is_refused(method: Any) -> None:
    with pytest.raises(UserError, match="images of 30 x 32: 30 is no multiple of"):
        method(torch.rand(1, 3, 30, 32))


@pytest.mark.parametrize("method", ["sgsf", "sgsf_small", "pmb"])
def test_pixels_and_structure_weigh_the_same_in_the_presets(method: str) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"method={method}"])
    assert cfg.method.loss.structure_weight == 1
