"""The auto-encoder of EfficientAD."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.pdn import LOST, ImageNetNorm
from anomaly_lit.types import UserError

# (share, less) of each map on the way up: its side is the image's / share - less
GROWTH = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))


class Autoencoder(nn.Module):
    """Maps an image to a few numbers, and these to a map like the teacher's.

    Args:
        image_size: Height and width of the images, or one number for both.
        latent: Numbers in the middle.
        channels: Channels of the map.
        dropout: Share of the decoder's values that is dropped in training.

    Raises:
        UserError: The image is too small, or `latent` is odd.
    """

    def __init__(
        self, image_size: int | Sequence[int], latent: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if len(sides) != 2 or any(side < 64 or side % 32 for side in sides):
            raise UserError(
                f"image_size={image_size}: EfficientAD needs multiples of 32, of at least 64"
            )
        if latent < 2 or latent % 2:
            raise UserError(f"method.latent={latent} must be even, and at least 2")
        widths = [3, latent // 2, latent // 2, latent, latent, latent]
        layers: list[nn.Module] = [ImageNetNorm()]
        for given, made in pairwise(widths):
            layers += [nn.Conv2d(given, made, 4, stride=2, padding=1), nn.ReLU()]
        squeeze = nn.Conv2d(latent, latent, (sides[0] // 32, sides[1] // 32))
        self.encoder = nn.Sequential(*layers, squeeze)
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(latent, latent, 4, padding=2), nn.ReLU(), nn.Dropout(dropout))
            for _ in GROWTH
        )
        self.last = nn.Sequential(
            nn.Conv2d(latent, latent, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(latent, channels, 3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) images in [0, 1] to (B, channels, H / 4 - 8, W / 4 - 8)."""
        height, width = image.shape[-2:]
        x = self.encoder(image)
        for (share, less), stage in zip(GROWTH, self.decoder, strict=True):
            size = [max(1, side // share - less) for side in (height, width)]
            x = stage(F.interpolate(x, size, mode="bilinear"))
        size = [side // 4 - 2 * LOST for side in (height, width)]
        return self.last(F.interpolate(x, size, mode="bilinear"))
