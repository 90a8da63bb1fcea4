"""Losses: `loss(prediction, target)` on two (B, C, H, W) maps gives a scalar.

A loss with several terms has a method `terms`, which returns the weighted terms; they add up to the
loss. `dice_loss` and `focal_loss` compare a probability with a true mask. They are for methods that
segment and are not options of the group `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from kornia.filters import median_blur
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.types import UserError, check_range


def loss_terms(loss: nn.Module, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the weighted terms of a loss by name; a loss without names gives `reconstruction`."""
    terms: Any = getattr(loss, "terms", None)
    if terms is not None:
        return terms(prediction, target)
    return {"reconstruction": loss(prediction, target)}


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the terms of a loss.

    Raises:
        UserError: One of them is called `loss`, the name of the sum.
    """
    if "loss" in terms:
        raise UserError(
            f"losses returns 'loss' beside {', '.join(sorted(set(terms) - {'loss'})) or 'nothing'}:"
            " return the terms alone under other names, they are added up and logged as train/loss"
        )
    return torch.stack(list(terms.values())).sum()


class SumOfTerms(nn.Module):
    """A loss that is the sum of its `terms`."""

    def terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms, scalars by name."""
        raise NotImplementedError

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar from two (B, C, H, W) maps."""
        return torch.stack(list(self.terms(prediction, target).values())).sum()


class CosineLoss(nn.Module):
    """Mean over images and positions of one minus the cosine between channel vectors."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar in [0, 2] from two (B, C, H, W) maps."""
        return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


class FlatCosineLoss(nn.Module):
    """Mean over images of one minus the cosine between whole maps, as one vector each (RD4AD).

    Unlike in `CosineLoss`, positions with longer vectors count for more.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar in [0, 2] from two (B, C, H, W) maps."""
        return (1 - F.cosine_similarity(prediction.flatten(1), target.flatten(1), dim=1)).mean()


def scale_gradient(values: Tensor, factor: Tensor | float) -> Tensor:
    """Return the values as they are, with gradients multiplied by a factor.

    Args:
        values: Any shape.
        factor: Broadcast to the shape of the values; its own gradient is zero.
    """
    kept = values.detach()
    return kept + factor * (values - kept)


class MSECosineLoss(SumOfTerms):
    """Distance and direction: mean squared error plus a weighted cosine term (AMI-Net).

    AMI-Net passes maps whose channels hold all positions of a patch, so that the direction is that
    of patch tokens.

    Args:
        direction_weight: Weight of the cosine term (5 in AMI-Net's code).

    Raises:
        UserError: The weight is below 0.
    """

    def __init__(self, direction_weight: float = 5.0) -> None:
        super().__init__()
        check_range("method.loss", "[0, inf)", direction_weight=direction_weight)
        self.direction_weight = direction_weight
        self.direction = CosineLoss()

    def terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `distance` and the weighted `direction`."""
        return {
            "distance": F.mse_loss(prediction, target),
            "direction": self.direction_weight * self.direction(prediction, target),
        }


class SSIMLoss(nn.Module):
    """One minus the mean structural similarity, channel by channel (Wang et al., 2004).

    Args:
        window: Side of the Gaussian window, odd, in positions.
        sigma: Its standard deviation, in positions.
        data_range: Difference between the largest and the smallest value that maps should have.

    Raises:
        UserError: The window is even, or another value is not above 0.
    """

    def __init__(self, window: int = 11, sigma: float = 1.5, data_range: float = 1.0) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise UserError(f"method.loss: window={window} must be odd")
        check_range("method.loss", "(0, inf)", sigma=sigma, data_range=data_range)
        self.window = window
        self.sigma = sigma
        self.data_range = data_range

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar in [0, 2] from two (B, C, H, W) maps."""
        similarity = ssim_map(prediction, target, self.window, self.sigma, self.data_range)
        return 1 - similarity.mean()


class HybridLoss(SumOfTerms):
    """Pixels and structure: mean squared error plus a weighted SSIM loss (MFRNet).

    Args:
        structure_weight: Weight of the structural term.
        window: See `SSIMLoss`.
        sigma: See `SSIMLoss`.
        data_range: See `SSIMLoss`.
    """

    def __init__(
        self,
        structure_weight: float = 1.0,
        window: int = 11,
        sigma: float = 1.5,
        data_range: float = 1.0,
    ) -> None:
        super().__init__()
        check_range("method.loss", "[0, inf)", structure_weight=structure_weight)
        self.structure_weight = structure_weight
        self.structure = SSIMLoss(window, sigma, data_range)

    def terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `pixel` and the weighted `structure`."""
        return {
            "pixel": F.mse_loss(prediction, target),
            "structure": self.structure_weight * self.structure(prediction, target),
        }


class WeightedSum(SumOfTerms):
    """A weighted sum of several losses.

    Args:
        losses: Losses by name.
        weights: The weight of each, by the same names.

    Raises:
        UserError: The names differ, there are none, or a weight is below 0.
    """

    def __init__(self, losses: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
        super().__init__()
        if not losses or set(losses) != set(weights):
            raise UserError(
                f"method.loss.losses names {', '.join(sorted(losses)) or 'nothing'}, "
                f"method.loss.weights {', '.join(sorted(weights)) or 'nothing'}: the same names "
                "are needed in both"
            )
        check_range("method.loss.weights", "[0, inf)", **weights)
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)

    def terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return each loss times its weight."""
        return {
            name: self.weights[name] * loss(prediction, target)
            for name, loss in self.losses.items()
        }


def ssim_map(
    prediction: Tensor,
    target: Tensor,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
) -> Tensor:
    """Return the structural similarity at every position and channel, in float32.

    Means, variances and the covariance are taken under a Gaussian window; both maps are padded with
    zeros. Each of the five filters multiplies by a banded matrix from the left and from the right,
    which is faster than a convolution for maps of up to 64 x 64.

    Args:
        prediction: (B, C, H, W).
        target: (B, C, H, W).
        window: Side of the window, odd.
        sigma: Its standard deviation.
        data_range: Difference between the largest and the smallest value that maps should have.

    Returns:
        (B, C, H, W) float32 in [-1, 1].
    """
    with torch.autocast(prediction.device.type, enabled=False):  # has differences of large numbers
        x, y = prediction.float(), target.float()
        rows = _gaussian_band(x.shape[-2], window, sigma, x.device)
        columns = _gaussian_band(x.shape[-1], window, sigma, x.device)
        # separately, so that nothing is differentiated for a target without a gradient
        mean_y, square_y = (rows @ torch.stack([y, y * y]) @ columns).unbind(0)
        mean_x, square_x, product = (rows @ torch.stack([x, x * x, x * y]) @ columns).unbind(0)
        both, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
        variances = (square_x + square_y - squares).clamp(min=0)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        above = (2 * both + c1) * (2 * (product - both) + c2)
        return above / ((squares + c1) * (variances + c2))


def _gaussian_band(length: int, window: int, sigma: float, device: torch.device) -> Tensor:
    """Return a symmetric (length, length) matrix that filters an axis, with zero padding."""
    place = torch.arange(length, device=device, dtype=torch.float32)
    offset = (place[:, None] - place).abs()
    kernel = torch.arange(window, device=device, dtype=torch.float32) - window // 2
    total = torch.exp(-0.5 * (kernel / sigma) ** 2).sum()
    return torch.exp(-0.5 * (offset / sigma) ** 2) / total * (offset <= window // 2)


class MSGMSLoss(nn.Module):
    """One minus the similarity of edges at several scales (RIAD; Xue et al., 2014).

    Edges are gradient magnitudes (Prewitt) of the channels' mean after a 3 x 3 median filter; each
    scale halves the maps. Scales for which maps are too small are left out.

    Args:
        scales: Largest number of scales.
        constant: Keeps flat areas similar; 0.0026 is meant for values in [0, 1].
    """

    def __init__(self, scales: int = 4, constant: float = 0.0026) -> None:
        super().__init__()
        check_range("method.loss", "[1, inf)", scales=scales)
        check_range("method.loss", "(0, inf)", constant=constant)
        self.scales = scales
        self.constant = constant

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar in [0, 1] from two (B, C, H, W) maps."""
        with torch.autocast(prediction.device.type, enabled=False):
            one, other = prediction.float(), target.float()
            gaps = []
            for scale in range(self.scales):
                if scale and min(one.shape[-2:]) < 4:
                    break
                if scale:
                    one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
                gaps.append(1 - gms_map(one, other, self.constant).mean())
            return torch.stack(gaps).mean()


def gms_map(one: Tensor, other: Tensor, constant: float = 0.0026) -> Tensor:
    """Return the similarity of edges of two (B, C, H, W) maps at each position, (B, 1, H, W)."""
    x, y = _edges(one), _edges(other)
    return (2 * x * y + constant) / (x * x + y * y + constant)


def _edges(image: Tensor) -> Tensor:
    """Return the (B, 1, H, W) gradient magnitude of the channels' mean."""
    grey = median_blur(image.mean(dim=1, keepdim=True), (3, 3))
    prewitt = torch.tensor([[-1.0, 0, 1]] * 3, device=image.device) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]
    slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    return (slopes.square().sum(dim=1, keepdim=True) + 1e-12).sqrt()


def dice_loss(probability: Tensor, target: Tensor, factor: float = 1.0) -> Tensor:
    """Return one minus the smoothed overlap of probability and true mask, averaged over images.

    1 - (factor * sum(p t) + 1) / (sum(p^2) + sum(t^2) + 1).

    Args:
        probability: (B, 1, H, W) in [0, 1].
        target: (B, 1, H, W) in {0, 1}.
        factor: 2 is the usual dice loss, 0 for a perfect mask; 1 is the form in OneNIP's code,
            where a perfect mask gives about one half and gradients are half as large.
    """
    overlap = (probability * target).sum(dim=(1, 2, 3))
    total = probability.square().sum(dim=(1, 2, 3)) + target.square().sum(dim=(1, 2, 3))
    return (1 - (factor * overlap + 1) / (total + 1)).mean()


def focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    smooth: float = 0.0,
    alpha: float | None = None,
) -> Tensor:
    """Return the mean cross entropy of two classes, weighted by (1 - p)^gamma of the true class.

    As in Lin et al., 2017.

    Args:
        logits: (B, 1, H, W), of the class 1.
        target: (B, 1, H, W) in {0, 1}.
        gamma: 0 is plain cross entropy.
        smooth: Replaces the probability p of the true class by (1 - s) p + s (1 - p) + s, where s
            is `smooth`, so that the loss of a confident wrong answer is bounded (DSR).
        alpha: Weight of the class 1; the class 0 has 1 - alpha. None gives both a weight of 1.
    """
    if smooth:
        share = torch.where(target > 0.5, logits, -logits).sigmoid()
        share = (1 - smooth) * share + smooth * (1 - share) + smooth
        focal = -((1 - share).clamp(min=0) ** gamma) * share.log()
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        focal = (1 - torch.exp(-entropy)) ** gamma * entropy
    if alpha is not None:
        focal = torch.where(target > 0.5, alpha, 1 - alpha) * focal
    return focal.mean()
