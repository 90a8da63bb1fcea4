"""DFR: deep feature reconstruction (Yang, Shi, Qi, 2020, arXiv:2012.07122).

A frozen backbone describes each position by a stack of features. A 1 x 1 convolutional
auto-encoder learns to rebuild the stacks of normal images; the squared error of a stack is its
anomaly score.

Differs from the paper: the latent size is an argument, where the paper picks it by PCA.
"""

from __future__ import annotations

from torch import Tensor, nn

from anomaly_lit.losses import loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn
from anomaly_lit.nn.aggregate import aggregate, resize
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction


class DFR(Method):
    """Deep feature reconstruction.

    Args:
        backbone: Frozen feature extractor.
        loss: Reconstruction loss on (B, C, h, w) maps.
        optimizer: Builds the optimiser.
        grid: Side of the feature map.
        latent_dim: Channels of the bottleneck.
    """

    def __init__(
        self,
        backbone: Backbone,
        loss: nn.Module,
        optimizer: OptimizerFn,
        grid: int = 32,
        latent_dim: int = 64,
    ) -> None:
        super().__init__(optimizer)
        self.backbone = backbone
        self.loss = loss
        self.grid = (grid, grid)
        channels = sum(backbone.channels)
        middle = (channels + latent_dim) // 2
        self.autoencoder = nn.Sequential(
            nn.Conv2d(channels, middle, 1),
            nn.ReLU(),
            nn.Conv2d(middle, latent_dim, 1),
            nn.Conv2d(latent_dim, middle, 1),
            nn.ReLU(),
            nn.Conv2d(middle, channels, 1),
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the error of the rebuilt stacks."""
        stacks = aggregate(self.features(self.backbone, batch), self.grid).float()
        return loss_terms(self.loss, self.autoencoder(stacks).float(), stacks)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        stacks = aggregate(self.backbone(image), self.grid)  # (B, C, h, w)
        error = (self.autoencoder(stacks) - stacks).square().mean(dim=1, keepdim=True)
        anomaly_map = resize(error, image.shape[-2:])  # (B, 1, H, W)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))
