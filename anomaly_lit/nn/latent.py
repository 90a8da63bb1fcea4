"""Auto-encoders that pass a whole patch through one vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.types import UserError, check_choice


class LatentAutoencoder(nn.Module):
    """Base of auto-encoders from (N, 3, p, p) patches in [0, 1] to (N, latent) codes and back.

    A subclass defines `new_encoder` and `new_decoder`.

    Args:
        patch: Side p of a patch, in pixels.
        latent: Length of a code.

    Attributes:
        encoder: Maps patches to codes.
        decoder: Maps codes to patches before the sigmoid.
    """

    def __init__(self, patch: int, latent: int) -> None:
        super().__init__()
        self.patch = patch
        self.latent = latent
        self.encoder = self.new_encoder()
        self.decoder = self.new_decoder()

    def new_encoder(self) -> nn.Module:
        """Return an encoder with new weights; a discriminator begins with one as well."""
        raise NotImplementedError

    def new_decoder(self) -> nn.Module:
        """Return a decoder with new weights."""
        raise NotImplementedError


class SmallAutoencoder(LatentAutoencoder):
    """The network of NLN for small images: 2 x 2 convolutions and pooling, a dense code.

    Args:
        patch: Side of a patch, a multiple of 4.
        latent: Length of a code.
        width: Channels of each convolution.

    Raises:
        UserError: 4 does not divide the patch.
    """

    def __init__(self, patch: int = 32, latent: int = 32, width: int = 32) -> None:
        if patch < 4 or patch % 4:
            raise UserError(f"method.autoencoder.patch={patch}: it must be a multiple of 4")
        self.width = width
        super().__init__(patch, latent)

    def new_encoder(self) -> nn.Module:
        """Return three convolutions, of which the first two are pooled, and a dense layer."""
        width, side = self.width, self.patch // 4
        return nn.Sequential(
            SameConv(3, width), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(width),
            SameConv(width, width), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(width),
            SameConv(width, width), nn.ReLU(), nn.BatchNorm2d(width),
            nn.Flatten(), nn.Linear(width * side * side, self.latent),
        )  # fmt: skip

    def new_decoder(self) -> nn.Module:
        """Return a dense layer and three convolutions, of which two double the map."""
        width, side = self.width, self.patch // 4
        return nn.Sequential(
            nn.Linear(self.latent, width * side * side), nn.ReLU(),
            nn.Unflatten(1, (width, side, side)),
            SameConv(width, width), nn.ReLU(), nn.Upsample(scale_factor=2), nn.BatchNorm2d(width),
            SameConv(width, width), nn.ReLU(), nn.Upsample(scale_factor=2), nn.BatchNorm2d(width),
            SameConv(width, 3),
        )  # fmt: skip


class StridedAutoencoder(LatentAutoencoder):
    """The network of NLN for industrial images: strided convolutions down to 8 x 8, then to 1 x 1.

    Args:
        patch: Side of a patch: 32, 64, 128 or 256.
        latent: Length of a code.
        width: Channels n; some layers have 2n or 4n.

    Raises:
        UserError: The patch has another side.
    """

    def __init__(self, patch: int = 128, latent: int = 128, width: int = 32) -> None:
        check_choice("method.autoencoder", (32, 64, 128, 256), patch=patch)
        self.width = width
        self.halvings = int(math.log2(patch // 8))
        super().__init__(patch, latent)

    def new_encoder(self) -> nn.Module:
        """Return the convolutions, each but the last with a leaky ReLU."""
        n = self.width
        first = [nn.Conv2d(n if number else 3, n, 4, 2, 1) for number in range(self.halvings - 1)]
        layers = [
            *first, nn.Conv2d(n, n, 3, 1, 1), nn.Conv2d(n, 2 * n, 4, 2, 1),
            nn.Conv2d(2 * n, 2 * n, 3, 1, 1), nn.Conv2d(2 * n, 2 * n, 3, 1, 1),
            nn.Conv2d(2 * n, n, 3, 1, 1), nn.Conv2d(n, self.latent, 8),
        ]  # fmt: skip
        return nn.Sequential(*_with_leaky_relu(layers), nn.Flatten())

    def new_decoder(self) -> nn.Module:
        """Return the convolutions and their transposes, each but the last with a leaky ReLU."""
        n = self.width
        last = [nn.ConvTranspose2d(n, n, 4, 2, 1) for _ in range(self.halvings - 2)]
        layers = [
            nn.ConvTranspose2d(self.latent, n, 8), nn.Conv2d(n, 2 * n, 3, 1, 1),
            nn.Conv2d(2 * n, 4 * n, 3, 1, 1), nn.Conv2d(4 * n, 2 * n, 3, 1, 1),
            nn.ConvTranspose2d(2 * n, n, 4, 2, 1), nn.Conv2d(n, n, 3, 1, 1),
            *last, nn.ConvTranspose2d(n, 3, 4, 2, 1),
        ]  # fmt: skip
        return nn.Sequential(nn.Unflatten(1, (self.latent, 1, 1)), *_with_leaky_relu(layers))


class SameConv(nn.Module):
    """A 2 x 2 convolution that keeps the map's size; zeros are added below and on the right.

    The published transposed convolutions of this size and stride 1 do the same, with zeros above
    and on the left instead.

    Args:
        given: Channels of the input.
        made: Channels of the output.
    """

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(given, made, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, given, h, w) to (N, made, h, w)."""
        return self.convolution(F.pad(x, (0, 1, 0, 1)))


def _with_leaky_relu(layers: Sequence[nn.Module]) -> list[nn.Module]:
    pairs = [part for layer in layers[:-1] for part in (layer, nn.LeakyReLU(0.2))]
    return [*pairs, layers[-1]]
