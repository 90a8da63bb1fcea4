from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from kornia.losses import binary_focal_loss_with_logits
from scipy import ndimage
from skimage.metrics import structural_similarity
from torch import nn

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.losses import (
    CosineLoss,
    FlatCosineLoss,
    HybridLoss,
    MSECosineLoss,
    MSGMSLoss,
    SSIMLoss,
    WeightedSum,
    dice_loss,
    focal_loss,
    loss_terms,
    scale_gradient,
    ssim_map,
)
from anomaly_lit.types import UserError

LOSSES = sorted(path.stem for path in Path(config_dir(), "loss").glob("*.yaml"))


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 5, generator=generator), torch.randn(
        2, 3, 4, 5, generator=generator
    )


def test_cosine_loss_is_the_mean_over_positions() -> None:
    prediction, target = maps()
    values = []
    for b in range(2):
        for i in range(4):
            for j in range(5):
                p, t = prediction[b, :, i, j].double(), target[b, :, i, j].double()
                values.append(1 - float(p @ t) / math.sqrt(float(p @ p) * float(t @ t)))
    assert CosineLoss()(prediction, target).item() == pytest.approx(sum(values) / len(values))


def test_flat_cosine_loss_compares_whole_maps() -> None:
    prediction, target = maps()
    expected = 0.0
    for p, t in zip(prediction.flatten(1).double(), target.flatten(1).double(), strict=True):
        expected += (1 - float(p @ t) / math.sqrt(float(p @ p) * float(t @ t))) / 2
    assert FlatCosineLoss()(prediction, target).item() == pytest.approx(expected)


def test_scaling_a_gradient_keeps_the_values() -> None:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factor = torch.tensor([0.0, 0.1, 2.0])[:, None]
    scaled = scale_gradient(values, factor)
    assert torch.equal(scaled, values)
    scaled.square().sum().backward()
    assert torch.allclose(values.grad, 2 * values.detach() * factor)
    with torch.no_grad():
        assert torch.equal(scale_gradient(values, factor), values)


def test_direction_is_weighted_five_times_and_terms_sum_to_the_loss() -> None:
    prediction, target = maps()
    loss = MSECosineLoss()
    terms = loss.terms(prediction, target)
    assert terms["distance"] == nn.functional.mse_loss(prediction, target)
    assert terms["direction"] == 5 * CosineLoss()(prediction, target)
    torch.testing.assert_close(sum(terms.values()), loss(prediction, target))


def test_a_loss_without_names_is_one_term() -> None:
    prediction, target = maps()
    assert loss_terms(nn.L1Loss(), prediction, target) == {
        "reconstruction": nn.functional.l1_loss(prediction, target)
    }
    assert list(loss_terms(MSECosineLoss(), prediction, target)) == ["distance", "direction"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_takes_two_maps_and_is_zero_where_they_agree(name: str) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"loss={name}", "output_dir=unused"])
    loss = instantiate(plain(cfg)["method"]["loss"])
    prediction, target = maps()
    assert loss(prediction, target).ndim == 0
    assert loss(prediction, target) > 0.1
    assert loss(target, target).item() == pytest.approx(0, abs=1e-5)


def test_length_does_not_change_the_direction() -> None:
    prediction, target = maps()
    torch.testing.assert_close(
        CosineLoss()(10 * prediction, target), CosineLoss()(prediction, target)
    )


def plain_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Window by window, from the definition, with zeros beyond the border."""
    offsets = range(-5, 6)
    weights = torch.tensor(
        [[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in offsets] for i in offsets]
    ).double()
    weights /= weights.sum()
    x, y = (nn.functional.pad(m.double(), (5, 5, 5, 5)) for m in (x, y))
    result = torch.zeros(x.shape[0] - 10, x.shape[1] - 10, dtype=torch.float64)
    for i in range(len(result)):
        for j in range(result.shape[1]):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * p * p).sum() - mp**2, (weights * q * q).sum() - mq**2
            cov = (weights * p * q).sum() - mp * mq
            result[i, j] = ((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)) / (
                (mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)
            )
    return result


@pytest.mark.parametrize("size", [(7, 9), (16, 14)])
def test_ssim_equals_its_definition(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(2, 1, 2, *size, generator=generator)
    found = ssim_map(x, y)
    for channel in range(2):
        expected = plain_ssim(x[0, channel], y[0, channel])
        torch.testing.assert_close(found[0, channel].double(), expected, rtol=1e-4, atol=1e-5)


def test_ssim_equals_scikit_image_s_within_the_border() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 24, 20, generator=generator)
    _, expected = structural_similarity(
        x.numpy(), y.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=1.0, full=True,
    )  # fmt: skip
    found = ssim_map(x[None, None], y[None, None])[0, 0]
    torch.testing.assert_close(
        found[5:-5, 5:-5], torch.from_numpy(expected)[5:-5, 5:-5], rtol=1e-3, atol=1e-4
    )


def test_ssim_of_a_map_with_itself_is_one_under_any_precision() -> None:
    x = torch.rand(1, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim_map(x, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones_like(found))
    assert SSIMLoss()(x, x).item() == pytest.approx(0, abs=1e-6)


def test_hybrid_is_the_pixel_term_and_the_weighted_structure() -> None:
    prediction, target = maps()
    terms = HybridLoss(structure_weight=3.0).terms(prediction, target)
    assert terms["pixel"] == nn.functional.mse_loss(prediction, target)
    assert terms["structure"] == 3 * SSIMLoss()(prediction, target)


def test_weighted_sum_weighs_each_and_refuses_other_names() -> None:
    prediction, target = maps()
    loss = WeightedSum({"near": nn.L1Loss(), "far": nn.MSELoss()}, {"near": 2.0, "far": 0.5})
    expected = 2 * nn.L1Loss()(prediction, target) + 0.5 * nn.MSELoss()(prediction, target)
    torch.testing.assert_close(loss(prediction, target), expected)
    assert list(loss_terms(loss, prediction, target)) == ["near", "far"]
    with pytest.raises(UserError, match=r"losses names near.*weights near, other"):
        WeightedSum({"near": nn.L1Loss()}, {"near": 1.0, "other": 1.0})


def test_even_window_is_refused() -> None:
    with pytest.raises(UserError, match="window=10"):
        SSIMLoss(window=10)


def test_dice_has_the_form_of_the_code_and_the_usual_one() -> None:
    truth = torch.zeros(2, 1, 4, 4)
    truth[0, 0, :2] = 1
    probability = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 2.0):
        values = []
        for p, t in zip(probability, truth, strict=True):
            overlap, total = (p * t).sum(), (p * p).sum() + (t * t).sum()
            values.append(1 - (factor * overlap + 1) / (total + 1))
        expected = torch.stack(values).mean()
        torch.testing.assert_close(dice_loss(probability, truth, factor), expected)
    assert dice_loss(truth, truth, 2.0).item() == 0
    assert dice_loss(truth[:1], truth[:1]).item() == pytest.approx(1 - 9 / 17)


def test_focal_loss_is_kornia_s_and_cross_entropy_without_focus() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 4, 4, generator=generator)
    truth = (torch.rand(2, 1, 4, 4, generator=generator) > 0.5).float()
    expected = binary_focal_loss_with_logits(logits, truth, alpha=None, gamma=2.0, reduction="mean")
    torch.testing.assert_close(focal_loss(logits, truth), expected)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(focal_loss(logits, truth, gamma=0.0), entropy)


def test_msgms_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    image = [torch.rand(1, 3, 12, 8, generator=generator) for _ in range(2)]

    def edges(map_: np.ndarray) -> np.ndarray:
        grey = ndimage.median_filter(map_, 3, mode="mirror")
        padded = np.pad(grey, 1, mode="edge")
        slopes = [ndimage.prewitt(padded, axis) / 3 for axis in (0, 1)]
        return np.sqrt(slopes[0] ** 2 + slopes[1] ** 2)[1:-1, 1:-1]

    gaps = []
    for size in (1, 2):
        x, y = (
            edges(nn.functional.avg_pool2d(i, size).mean(dim=1)[0].double().numpy()) for i in image
        )
        gaps.append(1 - ((2 * x * y + 0.0026) / (x * x + y * y + 0.0026)).mean())
    assert float(MSGMSLoss(scales=2)(*image)) == pytest.approx(np.mean(gaps), abs=1e-4)
    assert float(MSGMSLoss()(image[0], image[0])) == pytest.approx(0, abs=1e-6)


def test_msgms_leaves_out_scales_that_do_not_fit() -> None:
    image = torch.rand(2, 1, 1, 4, 4).unbind(0)
    assert MSGMSLoss(scales=4)(*image) == pytest.approx(float(MSGMSLoss(scales=2)(*image)))
