"""MFRNet: multi-feature reconstruction with crossed masks (Wang et al., 2024, arXiv:2404.13273).

A frozen backbone turns an image into one map of multi-scale features. The map is hidden cell by
cell: several sets of cells, which together cover it, are hidden one after the other, and a hybrid
of transformer and convolutions restores what it cannot see. Put together, every position is
predicted without its own cell, and no defect can be copied. Pixel and structural similarity train
the network and, compared with the features, outline the defect.

No code was published, and of the paper only the abstract, summaries, and the record of the patent
CN117372720B were at hand. They establish the aggregated features of a VGG16, the crossed masks, a
transformer whose block (DefT, arXiv:2207.08319) joins a local position code, multi-pooling
attention and a convolutional feed-forward network, and the hybrid loss for training and scoring.
All numbers here are our own choice. So are the answers to what remains open; these are options:

- masks hide all scales jointly and every copy is restored by one network
  (``restoration="joint"``), or each stage of the backbone has a network (``"per_stage"``);
- ``mask.sets`` 3, or 2 for strict complements; ``mask.sizes`` 2, 4 and 8, all used in scoring;
- pixel and structural maps are added, each over its spread on held-out images
  (``combine="sum"``), or multiplied (``"product"``);
- values are cut to [0, 1] for the structural map of the score;
- hidden positions are filled with a learned vector, features are scaled to [0, 1] channel by
  channel between percentiles of the training images, and SSIM is taken channel by channel.

Do not call results of it MFRNet as published. With VGG16 at a 64 x 64 map there are 17.03 million
trainable parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import loss_terms, ssim_map
from anomaly_lit.masks import Mask
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import resize, smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError

SAMPLED = 256  # positions of each training image that place the channels' percentiles


class MFRNet(Method):
    """Multi-feature reconstruction network.

    Args:
        backbone: Frozen feature extractor; the paper takes VGG16.
        mask: Hides positions of the map; ``crossed`` covers all of them. Positions that no set
            hides are restored in sight, as the mean over the sets.
        loss: Reconstruction loss on (B, C, h, w) maps in about [0, 1]. Scoring always takes both
            pixel and structural similarity.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Greatest norm of the gradients.
        grid: Side, or height and width, of the feature map, in positions; a multiple of
            2^(levels - 1).
        dims: Channels of each level of the restoration network.
        depths: Hybrid blocks of each level.
        head_dim: Channels of an attention head; divides ``dims``.
        pools: Sides of the pooled maps that attention looks at; the first level adds 16 where
            the map is larger.
        restoration: One network for all stages (``joint``) or one for each (``per_stage``).
        structure_weight: Weight of the structural map in the score.
        combine: ``sum`` or ``product`` of the two maps.
        smoothing: Standard deviation of the Gaussian filter on the map, in pixels.
        mask_seed: Decides the masks in scoring.

    Raises:
        UserError: The numbers do not fit each other.
    """

    low: Tensor
    high: Tensor
    placed: Tensor
    spread: Tensor

    def __init__(
        self,
        backbone: Backbone,
        mask: Mask,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = 1.0,
        grid: int | Sequence[int] = 64,
        dims: Sequence[int] = (128, 256, 512),
        depths: Sequence[int] = (2, 2, 4),
        head_dim: int = 64,
        pools: Sequence[int] = (1, 2, 4, 8),
        restoration: Literal["joint", "per_stage"] = "joint",
        structure_weight: float = 1.0,
        combine: Literal["sum", "product"] = "sum",
        smoothing: float = 4.0,
        mask_seed: int = 0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        self.grid = (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])
        shrink = 2 ** (len(dims) - 1)
        if len(dims) != len(depths) or any(side % shrink for side in self.grid):
            raise UserError(
                f"method.dims={list(dims)} and method.depths={list(depths)} need one entry for "
                f"each level, and method.grid={list(self.grid)} must be a multiple of {shrink}"
            )
        if any(dim % head_dim for dim in dims):
            raise UserError(f"method.head_dim={head_dim} must divide method.dims={list(dims)}")
        self.backbone = backbone
        self.mask = mask
        self.loss = loss
        self.structure_weight = structure_weight
        self.combine = combine
        self.smoothing = smoothing
        self.mask_seed = mask_seed
        channels = sum(backbone.channels)
        self.groups = [channels] if restoration == "joint" else list(backbone.channels)
        self.register_buffer("low", torch.zeros(channels, 1, 1))
        self.register_buffer("high", torch.ones(channels, 1, 1))
        self.register_buffer("placed", torch.tensor(False))
        self.register_buffer("spread", torch.ones(2))  # of the pixel and of the structural map
        self.fill = nn.Parameter(torch.zeros(channels, 1, 1))
        self.restoration = nn.ModuleList(
            RestorationNetwork(group, dims, depths, head_dim, pools, self.grid)
            for group in self.groups
        )
        self.restoration.apply(init_truncated)

    def scaled(self, features: Sequence[Tensor]) -> Tensor:
        """Stages resized to one map, about [0, 1] in every channel: (B, C, *grid)."""
        maps = [
            F.interpolate(f.float(), self.grid, mode="bilinear", antialias=True) for f in features
        ]
        return (torch.cat(maps, dim=1) - self.low) / (self.high - self.low)

    def restore(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Restores every position without its own cell.

        Args:
            features: (B, C, h, w), scaled.
            hidden: (n, B or 1, h, w) bool.

        Returns:
            (B, C, h, w) float32.
        """
        sets = hidden.expand(-1, len(features), -1, -1).unsqueeze(2)  # (n, B, 1, h, w)
        visible = torch.where(sets, self.fill, features)
        inputs = zip(visible.flatten(0, 1).split(self.groups, 1), self.restoration, strict=True)
        shown = sets.flatten(0, 1).to(features.dtype)
        copies = torch.cat([network(part, shown) for part, network in inputs], dim=1)
        copies = copies.float().unflatten(0, sets.shape[:2])  # (n, B, C, h, w)
        unseen = sets.float()
        weight = torch.where(unseen.sum(dim=0) > 0, unseen, 1.0)
        return (weight * copies).sum(dim=0) / weight.sum(dim=0)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Distance of the restored map to the features."""
        target = self.scaled(self.features(self.backbone, batch))
        hidden = self.mask(len(target), *self.grid, self.generator())
        terms = loss_terms(self.loss, self.restore(target, hidden), target)
        return {**terms, "loss": torch.stack(list(terms.values())).sum()}

    def differences(self, image: Tensor) -> Tensor:
        """Pixel and structural map, (passes, 2, B, h, w), one pass for each cell size."""
        features = self.scaled(self.backbone(image))
        generator = torch.Generator(image.device).manual_seed(self.mask_seed)
        passes = []
        for hidden in self.mask.for_scoring(*self.grid, generator):
            restored = self.restore(features, hidden)
            pixel = (restored - features).square().mean(dim=1)
            similarity = ssim_map(restored.clamp(0, 1), features.clamp(0, 1))
            passes.append(torch.stack([pixel, 1 - similarity.mean(dim=1)]))
        return torch.stack(passes)

    def forward(self, image: Tensor) -> Prediction:
        """Scores images; see the base class."""
        pixel, structure = (self.differences(image) / self.spread.view(2, 1, 1, 1)).unbind(1)
        if self.combine == "sum":
            combined = (pixel + self.structure_weight * structure).mean(dim=0)
        else:
            combined = (pixel * structure).mean(dim=0)
        anomaly_map = smooth(resize(combined.unsqueeze(1), image.shape[-2:]), self.smoothing)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))

    # ------------------------------------------------------------- what is taken of the data

    def on_fit_start(self) -> None:
        """Places each channel between its 0.1 and 99.9 % values, unless a checkpoint did."""
        if self.placed:
            return
        self.placed.fill_(True)
        generator = self.generator()
        values = []
        with torch.no_grad():
            for batch in self.normal_batches("train"):
                maps = self.scaled(self.features(self.backbone, batch)).flatten(2)  # (B, C, h * w)
                place = torch.randint(
                    maps.shape[2], (SAMPLED,), generator=generator, device=maps.device
                )
                values.append(maps[..., place].transpose(0, 1).flatten(1).cpu())
        ordered = torch.cat(values, dim=1).sort(dim=1).values  # (C, positions)
        last = ordered.shape[1] - 1
        low, high = ordered[:, round(0.001 * last)], ordered[:, round(0.999 * last)]
        self.low.copy_(low.view(-1, 1, 1))
        # a channel that never changes keeps its scale
        self.high.copy_(torch.where(high > low, high, low + 1).view(-1, 1, 1))

    def on_validation_start(self) -> None:
        """Takes the spread of both maps over held-out images, for the present weights."""
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            maps = [
                self.differences(batch["image"]).transpose(0, 1).flatten(1)
                for batch in self.normal_batches("holdout")
            ]
        if maps:  # without held-out images both maps count as they are
            self.spread.copy_(torch.cat(maps, dim=1).std(dim=1).clamp(min=1e-12))


class RestorationNetwork(nn.Module):
    """A pyramid of hybrid blocks, with skip connections, which carry masked input only.

    Args:
        channels: Channels of the map.
        dims: Channels of each level.
        depths: Blocks of each level.
        head_dim: Channels of an attention head.
        pools: Sides of the pooled maps that attention looks at.
        grid: Height and width of the map.
    """

    def __init__(
        self,
        channels: int,
        dims: Sequence[int],
        depths: Sequence[int],
        head_dim: int,
        pools: Sequence[int],
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels + 1, dims[0], 1), _conv(dims[0], dims[0]), _conv(dims[0], dims[0])
        )
        self.levels = nn.ModuleList()
        self.shrink = nn.ModuleList()
        for level, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side = min(grid) // 2**level
            wanted = [*pools, 16] if level == 0 else pools
            sizes = [size for size in wanted if size < side]  # larger ones would pool nothing
            blocks = [HybridBlock(dim, dim // head_dim, sizes or [1]) for _ in range(depth)]
            self.levels.append(nn.Sequential(*blocks))
            if level:
                self.shrink.append(nn.Conv2d(dims[level - 1], dim, 2, stride=2))
        self.join = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fine + coarse, fine, 1), _conv(fine, fine))
            for fine, coarse in pairwise(dims)
        )
        self.head = nn.Conv2d(dims[0], channels, 1)

    def forward(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, h, w) with hidden positions filled, and (B, 1, h, w), 1 where hidden."""
        x = self.levels[0](self.stem(torch.cat([visible, hidden], dim=1)))
        skips = []
        for shrink, level in zip(self.shrink, list(self.levels)[1:], strict=True):
            skips.append(x)
            x = level(shrink(x))
        for skip, join in zip(reversed(skips), reversed(list(self.join)), strict=True):
            grown = F.interpolate(x, skip.shape[-2:], mode="bilinear")
            x = join(torch.cat([skip, grown], dim=1))
        return self.head(x)


class HybridBlock(nn.Module):
    """Local position code, multi-pooling attention and convolutional feed-forward network.

    Args:
        dim: Channels.
        heads: Attention heads.
        pools: Sides of the pooled maps that attention looks at.
    """

    def __init__(self, dim: int, heads: int, pools: Sequence[int]) -> None:
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = MultiPoolingAttention(dim, heads, pools)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, 4 * dim, 1),
            nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim),
            nn.GELU(),
            nn.Conv2d(4 * dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        x = x + self.position(x)
        x = x + self.attention(_normed(self.norm1, x))
        return x + self.mlp(_normed(self.norm2, x))


class MultiPoolingAttention(nn.Module):
    """Every position looks at the map pooled to a few sizes.

    Args:
        dim: Channels.
        heads: Attention heads; they divide the channels.
        pools: Sides of the pooled maps.
    """

    def __init__(self, dim: int, heads: int, pools: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.pools = tuple(pools)
        self.refine = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in self.pools
        )
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        pooled = [
            refine(F.adaptive_avg_pool2d(x, size)).flatten(2)
            for size, refine in zip(self.pools, self.refine, strict=True)
        ]
        context = self.norm(torch.cat(pooled, dim=2).transpose(1, 2))  # (B, sum of sizes^2, C)
        query = self._split(self.query(x.flatten(2).transpose(1, 2)))
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        return mixed.transpose(1, 2).unflatten(2, x.shape[-2:])

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the channels of (B, C, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()
    )


def init_truncated(module: nn.Module) -> None:
    """Weights from a normal distribution of deviation 0.02, cut at two of them; zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
