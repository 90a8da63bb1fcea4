"""PRN: prototypical residual network (Zhang et al., CVPR 2023, arXiv:2212.02031).

A frozen backbone describes the image at several scales. For each scale there are prototypes, which
are whole feature maps of normal images; the residual, the squared difference to the nearest one,
shows what is not normal. A segmenter learns from features and residuals to mark anomalies: its
stages exchange what they hold, patches of several sizes attend to each other, and a decoder draws
the map. It learns from synthetic anomalies and, if there are any, from a few real defects
(`dataset.seen`), which are also changed and pasted on normal images.

The authors published no code. Shapes and numbers follow our notes of the paper and of an unofficial
reimplementation. What differs from these, or was chosen where they are silent:

- queries, keys and values are the map times a weight for each channel, where the reimplementation
  has a weight for each element of a patch; we also scale logits by the root of a token's length;
- features and residuals each have a fusion of their own; the reimplementation shares one;
- prototypes of all categories lie in one store, so that an image needs no category to be scored;
- the synthesis leaves half of the images normal; `seen_share` of the others show a real defect in
  place of a synthetic one. The reimplementation has the same shares, but as fixed counts in each
  epoch. It shows each real image five times before it extends it; here `real_share` decides;
- a pasted defect moves as a whole. The reimplementation moves each connected part by itself, but
  while the parts are found, a GPU has to wait;
- the last weights are tested; the reimplementation takes the best on the test set.

A checkpoint is tied to its image size: feature maps of images of another size are resized to those
of the prototypes.
With ResNet-18 there are 55.70 million trainable parameters, 50.63 million of them in the attention.

Paper: Zhang, Wu, Wang, Chen, Jiang: Prototypical Residual Networks for Anomaly Detection and
Localization. CVPR 2023, arXiv:2212.02031.
Status: works; measured small, 150 steps of 4 images on toothbrush at 256 x 256 (about 250 CPU
seconds, commit 115f69e). Synthetic anomalies alone: image AUROC 97.8, pixel AUROC 97.5, pixel AP
49.2. With `dataset.seen=3`, on the 39 test images that are left: 98.8, 97.2 and 48.5, where the
former run has 97.8, 97.4 and 46.7. One seed; not yet at the paper's size.
Note: the authors published no code. By default it sees no real defect, where the paper has 10 of
each category; `dataset.seen=k` draws k of each type from the test set, which lacks them then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import focal_loss
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.prn.network import ResidualSegmenter
from anomaly_lit.nn.aggregate import check_multiple, grid_of, resize
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.bank import Bank, kmeans, nearest_rows
from anomaly_lit.synthesis.base import foreground_of
from anomaly_lit.synthesis.extended import extend, paste
from anomaly_lit.types import Batch, Prediction, UserError, check_range


class PRN(Method):
    """Prototypical residual network.

    Args:
        backbone: Frozen feature extractor, each stage half as large as the one before; the last
            one only starts the decoder, the others have prototypes.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        image_size: Height and width of the images, or one number for both.
        share: Prototypes of a category as a share of its training images, in (0, 1]; at least one.
        divisions: Into how many patches attention cuts each side of a map; one number per size.
        blocks: Blocks of attention of each stage.
        focal_weight: Weight of the focal loss; the distance has weight 1.
        gamma: Exponent of the focal loss.
        alpha: Weight of anomalous pixels in the focal loss; normal ones have 1 - alpha.
        smooth: See `focal_loss`.
        seen_share: Share of the anomalous images in a batch that show a real defect, if there are
            any (`dataset.seen`).
        real_share: Share of these that are the real image as it is; in the others its defect is
            changed and pasted on a normal image.
        changes: How many of ten changes a defect gets before it is pasted.
        foreground: Paste defects only where a normal image differs in colour from its border; set
            it to false for textures, to paste them anywhere.
        top: Number of pixels with the largest values; their mean is the score.

    Raises:
        UserError: A number is out of range, the stages do not halve, or the attention cannot cut
            them.
    """

    needs = frozenset({"corrupted", "seen"})

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        image_size: int | Sequence[int] = 256,
        share: float = 0.1,
        divisions: Sequence[int] = (1, 2, 4, 8),
        blocks: int = 3,
        focal_weight: float = 5.0,
        gamma: float = 4.0,
        alpha: float = 0.5,
        smooth: float = 1e-5,
        seen_share: float = 0.5,
        real_share: float = 0.5,
        changes: int = 3,
        foreground: bool = True,
        top: int = 100,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "(0, 1]", share=share)
        check_range("method", "[0, 1]", alpha=alpha, seen_share=seen_share, real_share=real_share)
        check_range("method", "[0, 1)", smooth=smooth)
        check_range("method", "[1, inf)", divisions=divisions, blocks=blocks, top=top)
        check_range("method", "[0, inf)", focal_weight=focal_weight, gamma=gamma)
        check_range("method", "[0, 10]", changes=changes)
        check_stages(backbone.strides)
        self.backbone = backbone
        self.size = grid_of(image_size, 1)
        coarsest, last = backbone.strides[-2:]
        check_multiple(
            self.size,
            math.lcm(last, coarsest * math.lcm(*divisions)),
            f"the stride {coarsest} of the last prototypes times method.divisions",
        )
        self.grids = [grid_of(image_size, stride) for stride in backbone.strides]
        self.share = share
        self.focal_weight, self.gamma, self.alpha, self.smooth = focal_weight, gamma, alpha, smooth
        self.seen_share, self.real_share = seen_share, real_share
        self.changes = changes
        self.foreground = foreground
        self.top = top
        *channels, deepest = backbone.channels
        self.prototypes = nn.ModuleList(
            Bank(count, *grid) for count, grid in zip(channels, self.grids[:-1], strict=True)
        )
        self.segmenter = ResidualSegmenter(channels, deepest, divisions, blocks)

    # --------------------------------------------------------------------------- prototypes

    def learn(self) -> None:
        """Take prototypes of each category and stage: k-means centres of its training maps."""
        generator = torch.Generator(self.device).manual_seed(0)  # the same on every rank
        found: list[list[Tensor]] = [[] for _ in self.prototypes]
        for maps in self.maps_by_category():
            count = max(1, round(self.share * len(maps[0])))
            for centres, own in zip(found, maps, strict=True):
                flat = kmeans(own.flatten(1), count, generator)
                centres.append(flat.view(-1, *own.shape[1:]))
        for bank, centres in zip(self.prototypes, found, strict=True):
            bank.fill(torch.cat(centres))  # type: ignore[operator]

    def maps_by_category(self) -> Iterator[list[Tensor]]:
        """Yield the maps of all training images of a category, (n, C_i, h_i, w_i) float32."""
        held: dict[str, list[list[Tensor]]] = {}
        for batch in self.normal_batches("train", None):  # one category after another
            maps = [feature.float() for feature in self.describe(batch["image"])[:-1]]
            for category in dict.fromkeys(batch["category"]):
                rows = [row for row, name in enumerate(batch["category"]) if name == category]
                held.setdefault(category, []).append([feature[rows] for feature in maps])
            for category in [*held][:-1]:
                yield [torch.cat(parts) for parts in zip(*held.pop(category), strict=True)]
        for batches in held.values():
            yield [torch.cat(parts) for parts in zip(*batches, strict=True)]

    def describe(self, image: Tensor) -> list[Tensor]:
        """Return the features of images, (B, C_i, h_i, w_i), of all stages."""
        return [
            feature if feature.shape[-2:] == grid else resize(feature, grid)
            for feature, grid in zip(self.backbone(image), self.grids, strict=True)
        ]

    def residual(self, feature: Tensor, bank: Bank) -> Tensor:
        """Return the squared difference of maps, (B, C, h, w), to the nearest prototypes.

        Raises:
            UserError: There are no prototypes.
        """
        if not len(bank):
            raise UserError("PRN has no prototypes yet: train first, or load a checkpoint")
        nearest = nearest_rows(feature.flatten(1), bank.items.flatten(1))[:, 0]
        return (feature - bank.items[nearest].to(feature.dtype)).square()

    # ---------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return how far the map is from the truth: smooth L1 distance and focal loss."""
        image, truth = self.draw_images(batch)
        logits, target = self.logits(image).float(), truth.float()
        if target.shape[-2:] != logits.shape[-2:]:
            logits = resize(logits, target.shape[-2:])
        focal = focal_loss(logits, target, self.gamma, self.smooth, self.alpha)
        return {
            "distance": F.smooth_l1_loss(logits.sigmoid(), target),
            "focal": self.focal_weight * focal,
        }

    def draw_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the images to learn from, normal ones among them, and their true masks.

        Where the batch has real defects, some of its anomalous images get one in place of the
        synthetic anomaly.
        """
        image, truth = batch["corrupted"], batch["corruption"]
        if "seen" not in batch:
            return image, truth
        generator = self.generator()
        shown, shown_mask = self.show_seen(batch, generator)
        drawn = torch.rand(len(image), 1, 1, 1, generator=generator, device=image.device)
        anomalous = truth.flatten(1).any(dim=1).view(-1, 1, 1, 1)
        replaced = anomalous & (drawn < self.seen_share)
        return torch.where(replaced, shown, image), torch.where(replaced, shown_mask, truth)

    def show_seen(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return real defects, as they are or extended: images and masks."""
        real, mask, normal = batch["seen"], batch["seen_mask"], batch["image"]
        changed, changed_mask = extend(real, mask, self.changes, generator)
        ground = foreground_of(normal) if self.foreground else torch.ones_like(mask)
        extended, extended_mask = paste(normal, changed, changed_mask, ground, generator)
        drawn = torch.rand(len(real), 1, 1, 1, generator=generator, device=real.device)
        as_it_is = drawn < self.real_share
        return torch.where(as_it_is, real, extended), torch.where(as_it_is, mask, extended_mask)

    def logits(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) to logits (B, 1, *image_size)."""
        *features, deepest = self.describe(image)
        residuals = [
            self.residual(feature, bank)  # type: ignore[arg-type]
            for feature, bank in zip(features, self.prototypes, strict=True)
        ]
        return self.segmenter(features, residuals, deepest, self.size)

    # ----------------------------------------------------------------------------- scoring

    def training_backbones(self) -> dict[str, Backbone]:
        """Return none: training reads corrupted images only."""
        return {}

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class. A map's values lie in [0, 1]."""
        anomaly_map = self.logits(image).sigmoid()
        if anomaly_map.shape[-2:] != image.shape[-2:]:
            anomaly_map = resize(anomaly_map, image.shape[-2:])
        flat = anomaly_map.flatten(1)
        largest = flat.topk(min(self.top, flat.shape[1]), dim=1).values
        return Prediction(anomaly_map, largest.mean(dim=1))


def check_stages(strides: Sequence[int]) -> None:
    """Refuse stages that are too few or do not halve.

    Raises:
        UserError: They are too few or do not halve; the message names their strides.
    """
    if len(strides) < 2 or any(2 * a != b for a, b in pairwise(strides)):
        raise UserError(
            f"method.backbone.out_indices: these stages have strides of {list(strides)} pixels; "
            "PRN needs at least two, each twice the one before"
        )
