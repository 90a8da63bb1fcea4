"""MFRNet: multi-feature reconstruction with crossed masks (Wang et al., 2024, arXiv:2404.13273).

A frozen backbone turns an image into one map of multi-scale features. Several sets of cells, which
together cover the map, are hidden one after the other, and a hybrid of transformer and convolutions
restores the hidden cells. Every position is thus predicted without its own cell, so no defect can
be copied. The restored map is compared with the features value by value and by structural
similarity (SSIM): in training this is the loss, at test time it shows the defect.

No code was published, and we had only the paper's abstract, summaries, and the record of the patent
CN117372720B. They describe the aggregated features of a VGG16, the crossed masks, a transformer
whose block (DefT, arXiv:2207.08319) combines a local position code, multi-pooling attention and a
convolutional feed-forward network, and the hybrid loss for training and scoring. All numbers here
are our own choice, and so are the answers to the questions that they leave open:

- masks hide all scales jointly, and one network restores every copy (`restoration="joint"`), or
  each stage of the backbone has its own network (`"per_stage"`);
- `mask.sets` 3, or 2 for strict complements; `mask.sizes` 2, 4 and 8, all used in scoring;
- pixel and structural maps are added, each divided by its spread on held-out images
  (`combine="sum"`), or multiplied (`"product"`);
- values are clipped to [0, 1] for both maps of the score; otherwise the unbounded squared error of
  a few channels would decide it. The losses see them unclipped, so that a restored value outside
  still has a gradient;
- the structural loss has a weight of 0.1 (`loss=hybrid`): with a weight of 1 the norms of the two
  losses' gradients differed by a factor of 5 to 16. With 0.1, the pixel loss's norm was 3.6, 2.0
  and 0.6 times the structural one's at steps 10, 20 and 30 (toothbrush). `train/gradient_pixel` and
  `train/gradient_structure` log both;
- the score of an image is the largest value of its map. The small preset takes the mean: after 100
  steps it told held-out normal images far better from the same with synthetic defects (image AUROC
  86, the largest value 60; experiments/mfrnet), since rough but normal textures stand out, too;
- convolutions start with the variance 2 / fan-out, as in networks of this family;
- hidden positions are filled with a learned vector, features are scaled to [0, 1] channel by
  channel between percentiles of the training images, and SSIM is taken channel by channel.

Do not report its results as those of the published MFRNet. With VGG16 at a 64 x 64 map there are
17.03 million trainable parameters.

Paper: Wang et al.: Multi-feature Reconstruction Network using Crossed-mask Restoration for
Unsupervised Industrial Anomaly Detection. arXiv:2404.13273.
Status: works; measured small (experiments/mfrnet).
Note: no code was published; what the paper leaves open to us is an option and said in the
docstring. **Patent** CN117372720B (Nanjing University of Aeronautics and Astronautics, listed as
active): have it checked before commercial use in China.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from anomaly_lit.losses import loss_terms, ssim_map
from anomaly_lit.masks import Mask
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.mfrnet.network import RestorationNetwork, init_fan_out
from anomaly_lit.nn.aggregate import grid_pair, resize, shrink, smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

SAMPLED = 256  # positions per training image, for the channels' percentiles


class MFRNet(Method):
    """Multi-feature reconstruction network.

    Args:
        backbone: Frozen feature extractor; the paper takes VGG16.
        mask: Hides positions of the map; `crossed` covers all of them. A position that no set hides
            is restored although it is visible: the mean over the sets counts.
        loss: Reconstruction loss on (B, C, h, w) maps in about [0, 1]. Scoring always uses both the
            pixel map and the structural map.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        grid: Side, or height and width, of the feature map, in positions; a multiple of
            2^(levels - 1).
        dims: Channels of each level of the restoration network.
        depths: Hybrid blocks of each level.
        head_dim: Channels of an attention head; divides `dims`.
        pools: Sides of the pooled maps that attention looks at; the first level also uses 16 if its
            map is larger.
        restoration: One network for all stages (`joint`) or one per stage (`per_stage`).
        structure_weight: Weight of the structural map in the score.
        combine: `sum` or `product` of the two maps.
        smoothing: Standard deviation of the Gaussian filter on the map, in pixels.
        score: How the image's score follows from the map: `max`, `top` (mean of the highest
            hundredth of its values), `mean` or `std` (their standard deviation).
        mask_seed: Seed of the masks in scoring.

    Raises:
        UserError: The numbers do not fit each other.
    """

    hidden: Tensor
    low: Tensor
    high: Tensor
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
        score: Literal["max", "top", "mean", "std"] = "max",
        mask_seed: int = 0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        self.grid = grid_pair(grid)
        check_range("method", "[1, 1024]", grid=self.grid)
        check_range("method", "[1, inf)", dims=dims, head_dim=head_dim, pools=pools)
        check_range("method", "[0, inf)", depths=depths, structure_weight=structure_weight)
        check_range("method", "[0, inf)", smoothing=smoothing, mask_seed=mask_seed)
        shrink = 2 ** (len(dims) - 1)
        if len(dims) != len(depths) or any(side % shrink for side in self.grid):
            raise UserError(
                f"method.dims={list(dims)} and method.depths={list(depths)} need one entry for "
                f"each level, and method.grid={list(self.grid)} must be a multiple of {shrink}"
            )
        check_choice("method", ("joint", "per_stage"), restoration=restoration)
        check_choice("method", ("sum", "product"), combine=combine)
        check_choice("method", ("max", "top", "mean", "std"), score=score)
        if any(dim % head_dim for dim in dims):
            raise UserError(f"method.head_dim={head_dim} must divide method.dims={list(dims)}")
        self.backbone = backbone
        self.mask = mask
        self.loss = loss
        self.structure_weight = structure_weight
        self.combine = combine
        self.smoothing = smoothing
        self.score = score
        masks = mask.for_scoring(*self.grid, torch.Generator().manual_seed(mask_seed))
        self.register_buffer("hidden", torch.stack(masks), persistent=False)
        channels = sum(backbone.channels)
        self.groups = [channels] if restoration == "joint" else list(backbone.channels)
        self.register_buffer("low", torch.zeros(channels, 1, 1))
        self.register_buffer("high", torch.ones(channels, 1, 1))
        self.register_buffer("spread", torch.ones(2))  # of the pixel and of the structural map
        self.fill = nn.Parameter(torch.zeros(channels, 1, 1))
        self.restoration = nn.ModuleList(
            RestorationNetwork(group, dims, depths, head_dim, pools, self.grid)
            for group in self.groups
        )
        self.restoration.apply(init_fan_out)

    def scaled(self, features: Sequence[Tensor]) -> Tensor:
        """Join the resized stages to one map, (B, C, *grid), about [0, 1] in every channel."""
        maps = [shrink(feature.float(), self.grid) for feature in features]
        return (torch.cat(maps, dim=1) - self.low) / (self.high - self.low)

    def restore(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Restore every position without its own cell.

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
        """Return the distance of the restored map to the features."""
        target = self.scaled(self.features(self.backbone, batch))
        hidden = self.mask(len(target), *self.grid, self.generator())
        restored = self.restore(target, hidden)
        terms = loss_terms(self.loss, restored, target)
        if self._logs_now():
            self.report({f"gradient_{k}": self.gradient_norm(term) for k, term in terms.items()})
        return terms

    def gradient_norm(self, term: Tensor) -> Tensor:
        """Return the norm of a term's gradient over all trained weights."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        return torch.stack(norms).norm()

    def _logs_now(self) -> bool:
        """Return whether this is a training step whose numbers are logged."""
        trainer = self._trainer
        if trainer is None or not (trainer.training and self.training):
            return False
        every = getattr(trainer, "log_every_n_steps", 0)
        return every > 0 and (trainer.global_step + 1) % every == 0

    def differences(self, image: Tensor) -> Tensor:
        """Return pixel and structural maps, (passes, 2, B, h, w), one pass for each cell size."""
        features = self.scaled(self.backbone(image))
        shown = features.clamp(0, 1)
        passes = []
        for hidden in self.hidden:  # (n, 1, h, w), the same on every device
            restored = self.restore(features, hidden).clamp(0, 1)
            pixel = (restored - shown).square().mean(dim=1)
            similarity = ssim_map(restored, shown)
            passes.append(torch.stack([pixel, 1 - similarity.mean(dim=1)]))
        return torch.stack(passes)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        pixel, structure = (self.differences(image) / self.spread.view(2, 1, 1, 1)).unbind(1)
        if self.combine == "sum":
            combined = (pixel + self.structure_weight * structure).mean(dim=0)
        else:
            combined = (pixel * structure).mean(dim=0)
        anomaly_map = smooth(resize(combined.unsqueeze(1), image.shape[-2:]), self.smoothing)
        return Prediction(anomaly_map, score_of(anomaly_map, self.score))

    # ----------------------------------------------------------- what is taken from the data

    def learn(self) -> None:
        """Find the 0.1 % and 99.9 % quantiles of each channel, which `scaled` maps to 0 and 1."""
        generator = self.generator()
        values = []
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
        # a constant channel is shifted, not scaled
        self.high.copy_(torch.where(high > low, high, low + 1).view(-1, 1, 1))

    def calibrate(self) -> None:
        """Compute the spread of both maps over held-out images."""
        maps = [
            self.differences(batch["image"]).transpose(0, 1).flatten(1)
            for batch in self.normal_batches("holdout")
        ]
        if maps:  # without held-out images neither map is scaled
            self.spread.copy_(torch.cat(maps, dim=1).std(dim=1).clamp(min=1e-12))


def score_of(anomaly_map: Tensor, rule: str) -> Tensor:
    """Map (B, 1, H, W) to scores (B,); see `score` of `MFRNet`."""
    values = anomaly_map.flatten(1)
    if rule == "mean":
        return values.mean(dim=1)
    if rule == "std":
        return values.std(dim=1, unbiased=False)
    count = max(values.shape[1] // 100, 1) if rule == "top" else 1
    return values.topk(count, dim=1).values.mean(dim=1)
