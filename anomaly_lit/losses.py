"""Reconstruction losses: ``loss(prediction, target)`` on two (B, C, H, W) maps gives a scalar.

A loss of several terms has ``terms``, which gives them weighted: they sum to the loss.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def loss_terms(loss: nn.Module, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The weighted terms of a loss by name; one, ``reconstruction``, where it has no names."""
    if isinstance(loss, MSECosineLoss):
        return loss.terms(prediction, target)
    return {"reconstruction": loss(prediction, target)}


class CosineLoss(nn.Module):
    """Mean over images and positions of one minus the cosine between channel vectors."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar in [0, 2] from two (B, C, H, W) maps."""
        return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


class MSECosineLoss(nn.Module):
    """Distance and direction: mean squared error plus a weighted cosine term (AMI-Net).

    AMI-Net hands over its maps with the positions of a patch folded into channels, so that its
    direction term runs over patch tokens.

    Args:
        direction_weight: Weight of the cosine term (5 in AMI-Net's code).
    """

    def __init__(self, direction_weight: float = 5.0) -> None:
        super().__init__()
        self.direction_weight = direction_weight
        self.direction = CosineLoss()

    def terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``distance`` and the weighted ``direction``."""
        return {
            "distance": F.mse_loss(prediction, target),
            "direction": self.direction_weight * self.direction(prediction, target),
        }

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar from two (B, C, H, W) maps."""
        terms = self.terms(prediction, target)
        return terms["distance"] + terms["direction"]
