"""The patch auto-encoder: a prior for what a normal background looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.autoencoder import halving
from anomaly_lit.types import UserError


class PatchAutoencoder(nn.Module):
    """Rebuilds an image patch by patch and blends the patches under a Hann window.

    Args:
        patch: Side p of a patch, a multiple of 8.
        stride: Pixels from one patch to the next, at most half a patch.
        channels: Channels of the three convolutions, finest first.
        latent: Numbers d that describe a patch.
        positions: Whether the decoder is also told where the patch lies, for aligned objects.

    Raises:
        UserError: Patches are no multiple of 8, or too far apart.
    """

    window: Tensor

    def __init__(
        self, patch: int, stride: int, channels: Sequence[int], latent: int, positions: bool
    ) -> None:
        super().__init__()
        if patch % 8 or len(channels) != 3:
            raise UserError(
                f"method.patch={patch} must be a multiple of 8 and method.channels={channels} be "
                "three numbers: the network halves a patch three times"
            )
        if not 1 <= stride <= patch // 2 or (patch - stride) % 2:
            raise UserError(
                f"method.stride={stride} must be at most half of method.patch={patch}, and even"
            )
        self.patch = patch
        self.stride = stride
        self.side = patch // 8  # of the coarsest map
        first, second, third = channels
        self.encoder = nn.Sequential(
            *halving(3, first), *halving(first, second), *halving(second, third), nn.Flatten(),
            nn.Linear(third * self.side**2, latent),
        )  # fmt: skip
        self.position = (
            nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32)) if positions else None
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent + (32 if positions else 0), third * self.side**2),
            nn.Unflatten(1, (third, self.side, self.side)),
            *doubling(third, second), *doubling(second, first),
            nn.ConvTranspose2d(first, 3, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip
        hann = (torch.pi * (torch.arange(patch) + 0.5) / patch).sin().square()
        self.register_buffer("window", hann[:, None] * hann, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, H, W) to the blended image and to its (B, L, 3, p, p) patches."""
        patches = self.unfold(image)
        flat = patches.flatten(0, 1)
        latent = self.encoder(flat)
        if self.position is not None:
            places = self.position(self.places(image)).repeat(len(image), 1)
            latent = torch.cat([latent, places.to(latent.dtype)], dim=1)
        rebuilt = self.decoder(latent).float().view(patches.shape)
        return self.fold(rebuilt, image.shape[-2:]), rebuilt

    def unfold(self, image: Tensor) -> Tensor:
        """Cut (B, 3, H, W) into overlapping patches, (B, L, 3, p, p), with reflected margins."""
        left, top, right, bottom = self.margins(image.shape[-2:])
        padded = F.pad(image, (left, right, top, bottom), mode="reflect")
        columns = F.unfold(padded, self.patch, stride=self.stride)  # (B, 3 p p, L)
        return columns.mT.unflatten(2, (3, self.patch, self.patch))

    def fold(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """Blend (B, L, 3, p, p) patches to (B, 3, *size)."""
        left, top, right, bottom = self.margins(size)
        padded = (size[0] + top + bottom, size[1] + left + right)
        weights = self.window.expand(1, *patches.shape[1:])
        blended = self._add(patches * self.window, padded) / self._add(weights, padded)
        return blended[..., top : top + size[0], left : left + size[1]]

    def margins(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the pixels added left, top, right and below, so that patches fit."""
        near = (self.patch - self.stride) // 2
        return near, near, near + -size[1] % self.stride, near + -size[0] % self.stride

    def places(self, image: Tensor) -> Tensor:
        """Return where the L patches of an image lie, (L, 2) in [-1, 1]: row, column."""
        rows, columns = (-(-length // self.stride) for length in image.shape[-2:])
        axes = [torch.linspace(-1, 1, count, device=image.device) for count in (rows, columns)]
        return torch.cartesian_prod(*axes)

    def _add(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        return F.fold(patches.flatten(2).mT, size, self.patch, stride=self.stride)


def doubling(given: int, made: int) -> list[nn.Module]:
    """Return the layers of a stage that doubles a map."""
    return [
        nn.ConvTranspose2d(given, made, 4, 2, 1, bias=False),
        nn.BatchNorm2d(made),
        nn.LeakyReLU(0.2),
    ]
