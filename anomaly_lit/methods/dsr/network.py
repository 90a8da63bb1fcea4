"""The networks of DSR: a quantised latent model, and those trained around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.bank import nearest_rows, partial_distances
from anomaly_lit.nn.unet import conv3, doubled
from anomaly_lit.synthesis.augment import rotate

ROWS = 4096  # vectors whose distances to all codes are sorted at once


class Codes(NamedTuple):
    """Both levels of an image's latent codes, as vectors of the codebooks."""

    low: Tensor  # (B, D, H / 8, W / 8)
    high: Tensor  # (B, D, H / 4, W / 4)


class Codebook(nn.Module):
    """Vectors of which each position takes the nearest; they follow the encodings that take them.

    A vector is the moving average of the sum of its encodings, divided by that of their number
    (Laplace smoothing 1e-5). A vector that was unused for more than `reseed` updates restarts at a
    random encoding.

    Args:
        count: Number K of vectors.
        dim: Length D of a vector.
        decay: Decay of the averages.
        reseed: Number of updates without use after which a vector is replaced.
    """

    vectors: Tensor
    sums: Tensor
    uses: Tensor
    idle: Tensor

    def __init__(self, count: int, dim: int, decay: float = 0.99, reseed: int = 1000) -> None:
        super().__init__()
        self.decay = decay
        self.reseed = reseed
        self.register_buffer("vectors", torch.randn(count, dim))
        self.register_buffer("sums", self.vectors.clone())
        self.register_buffer("uses", torch.ones(count))
        self.register_buffer("idle", torch.zeros(count, dtype=torch.long))

    def nearest(self, z: Tensor) -> Tensor:
        """Map (B, D, h, w) to the indices, (B, h, w), of the nearest vectors (squared distance)."""
        return nearest_rows(tokens(z), self.vectors).view(len(z), *z.shape[2:])

    def look_up(self, number: Tensor) -> Tensor:
        """Map indices (B, h, w) to vectors (B, D, h, w)."""
        return F.embedding(number, self.vectors).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, D, h, w) to the nearest vectors; the gradient passes straight through to `z`."""
        nearest = self.look_up(self.nearest(z.detach())).to(z.dtype)
        return z + (nearest - z).detach()

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Draw the vectors from encodings (B, D, h, w)."""
        rows = tokens(z)
        self._replace(torch.ones_like(self.idle, dtype=torch.bool), rows)

    def _replace(self, which: Tensor, rows: Tensor) -> None:
        drawn = rows[torch.randint(len(rows), (len(which),), device=rows.device)]
        self.vectors.copy_(torch.where(which[:, None], drawn, self.vectors))
        self.sums.copy_(torch.where(which[:, None], drawn, self.sums))
        self.uses.copy_(torch.where(which, torch.ones_like(self.uses), self.uses))
        self.idle.masked_fill_(which, 0)

    @torch.no_grad()
    def assigned(self, z: Tensor) -> Tensor:
        """Return each vector's encodings in (B, D, h, w), summed, and their number: (K, D + 1)."""
        rows = tokens(z)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        total = rows.new_zeros(len(self.vectors), rows.shape[1])
        return total.index_add_(0, self.nearest(z).flatten(), rows)

    @torch.no_grad()
    def move(self, assigned: Tensor, z: Tensor) -> None:
        """Update the averages; replace vectors that have long been unused by encodings in `z`."""
        self.sums.lerp_(assigned[:, :-1], 1 - self.decay)
        self.uses.lerp_(assigned[:, -1], 1 - self.decay)
        total = self.uses.sum()
        smoothed = (self.uses + 1e-5) / (total + 1e-5 * len(self.uses)) * total
        self.uses.copy_(smoothed)  # kept, as in the code
        self.vectors.copy_(self.sums / smoothed[:, None])
        self.idle.add_(1).masked_fill_(assigned[:, -1] > 0, 0)
        self._replace(self.idle > self.reseed, tokens(z))


def tokens(z: Tensor) -> Tensor:
    """Map (B, D, h, w) to (B * h * w, D) float32."""
    return z.float().permute(0, 2, 3, 1).flatten(0, 2)


class ResidualStack(nn.Module):
    """Two residual blocks, then ReLU.

    Args:
        channels: Channels in and out.
        hidden: Channels between the convolutions of a block.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 1, bias=False),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        for block in self.blocks:
            x = F.relu(x)  # the authors' first ReLU acts in place, and so on the shortcut too
            x = x + block(x)
        return F.relu(x)


class LatentModel(nn.Module):
    """Two levels of quantised encodings, and the general decoder (after VQ-VAE-2).

    Args:
        hidden: Channels, and length of the vectors.
        residual: Channels inside residual blocks.
        codes: Number of vectors of each level.
        reseed: See `Codebook`.
    """

    def __init__(self, hidden: int, residual: int, codes: int, reseed: int) -> None:
        super().__init__()
        self.encode_high = nn.Sequential(
            nn.Conv2d(3, hidden // 2, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(hidden // 2, hidden, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            ResidualStack(hidden, residual),
        )
        self.encode_low = nn.Sequential(
            nn.Conv2d(hidden, hidden, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            ResidualStack(hidden, residual),
            nn.Conv2d(hidden, hidden, 1),
        )
        self.low = Codebook(codes, hidden, reseed=reseed)
        self.high = Codebook(codes, hidden, reseed=reseed)
        self.up = nn.ConvTranspose2d(hidden, hidden, 4, 2, 1)
        self.join = nn.Conv2d(2 * hidden, hidden, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * hidden, hidden, 3, padding=1),
            ResidualStack(hidden, residual),
            nn.ConvTranspose2d(hidden, hidden // 2, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden // 2, 3, 4, 2, 1),
        )

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the finer features, (B, D, H / 4, W / 4), and the low level's encoding."""
        features = self.encode_high(image)
        return features, self.encode_low(features)

    def encoding_high(self, features: Tensor, low: Tensor) -> Tensor:
        """Return the high level's encoding, which depends on the low level's codes."""
        return self.join(torch.cat([features, self.up(low)], dim=1))

    def joined(self, codes: Codes) -> Tensor:
        """Join both levels to (B, 2 D, H / 4, W / 4), as the decoders read them."""
        return torch.cat([self.up(codes.low), codes.high], dim=1)

    def codes(self, image: Tensor) -> tuple[Codes, Tensor, Tensor]:
        """Return codes of images, the finer features, and the low level's encoding."""
        features, z_low = self.encode(image)
        low = self.low(z_low)
        return Codes(low, self.high(self.encoding_high(features, low))), features, z_low


def corrupt_codes(
    z: Tensor, clean: Tensor, where: Tensor, book: Codebook, generator: torch.Generator
) -> Tensor:
    """Replace codes in the anomalous area by others far from the encoding, but not too far.

    Each image has a strength s in [0.2, 1): at each position one of the int(s K) + 1 nearest
    vectors is drawn, except the nearest twentieth.

    Args:
        z: (B, D, h, w) encoding.
        clean: (B, D, h, w), its nearest vectors.
        where: (B, 1, h, w) bool.
        book: The level's codebook of K vectors.
        generator: Random generator.
    """
    count = len(book.vectors)
    strength = 0.2 + 0.8 * torch.rand(len(z), generator=generator, device=z.device)
    last = ((strength * count).long() + 1).clamp(1, count - 1).clamp(min=count // 20 + 1)
    image, row, column = where[:, 0].nonzero(as_tuple=True)  # only these are sorted
    share = torch.rand(len(image), generator=generator, device=z.device)
    first = count // 20
    rank = first + (share * (last[image] - first)).long()
    found = [
        partial_distances(rows, book.vectors).argsort(dim=1).gather(1, ranks[:, None])[:, 0]
        for rows, ranks in zip(
            z.detach().permute(0, 2, 3, 1)[image, row, column].float().split(ROWS),
            rank.split(ROWS),
            strict=True,
        )
    ]
    changed = clean.detach().permute(0, 2, 3, 1).clone()
    if found:
        changed[image, row, column] = book.vectors[torch.cat(found)].to(changed.dtype)
    return changed.permute(0, 3, 1, 2)


class Restriction(nn.Module):
    """Maps any codes to codes of normal images, through a bottleneck without skip connections.

    Args:
        dim: Length of the vectors.
        width: Channels of the first stage.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList(
            [
                conv3(dim, w, w),
                conv3(w, 2 * w, 2 * w),
                conv3(2 * w, 4 * w, 4 * w),
            ]
        )
        self.up = nn.ModuleList([conv3(4 * w, 2 * w, 2 * w, 2 * w), conv3(2 * w, w, w, w)])
        self.out = nn.Conv2d(w, dim, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Map (B, D, h, w) to the same; h and w are multiples of 4."""
        for number, stage in enumerate(self.down):
            codes = stage(F.max_pool2d(codes, 2) if number else codes)
        for stage in self.up:
            codes = stage(doubled(codes))
        return self.out(codes)


class ObjectDecoder(nn.Sequential):
    """Decodes one category's codes, (B, 2 D, h, w), to images (B, 3, 4 h, 4 w).

    Args:
        dim: Length D of the vectors.
        residual: Channels inside residual blocks.
        width: Channels of the first stage.
        neck: Channels of the narrowest map, (B, neck, h / 4, w / 4); None for a quarter of `width`.
    """

    def __init__(self, dim: int, residual: int, width: int, neck: int | None = None) -> None:
        w, thin = width, neck or width // 4
        super().__init__(
            conv3(2 * dim, w, 2 * w),
            nn.MaxPool2d(2),
            conv3(2 * w, 2 * w, 4 * w),
            nn.MaxPool2d(2),
            nn.Conv2d(4 * w, thin, 1),
            nn.ConvTranspose2d(thin, thin, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(thin, thin, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(thin, dim, 3, padding=1),
            ResidualStack(dim, residual),
            nn.ConvTranspose2d(dim, dim // 2, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(dim // 2, 3, 4, 2, 1),
        )


def init_gaussian(module: nn.Module) -> None:
    """Draw weights of convolutions from N(0, 0.02^2)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)


def levelled(image: Tensor, seen: Tensor) -> Tensor:
    """Add to each colour of each image its median difference to `seen`, as a constant.

    Args:
        image: (B, 3, H, W).
        seen: The same shape.
    """
    gap = (seen - image).detach().float().flatten(2).median(dim=2).values
    return image + gap.to(image.dtype)[..., None, None]


def mirrored(image: Tensor) -> Tensor:
    """Mirror each image left to right, or leave it as it is."""
    chosen = torch.rand(len(image), 1, 1, 1, device=image.device) < 0.5
    return torch.where(chosen, image.flip(-1), image)


def turn(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Turn about a share of the images by up to 90 degrees; fill what is empty with black."""
    draw = torch.rand(2, len(image), generator=generator, device=image.device)
    angle = torch.where(draw[0] < share, 180 * draw[1] - 90, torch.zeros_like(draw[1]))
    with torch.autocast(image.device.type, enabled=False):
        moved = rotate(image.float(), angle).to(image.dtype)
    return torch.where((draw[0] < share).view(-1, 1, 1, 1), moved, image)
