"""Reverse Distillation: RD4AD (Deng, Li, CVPR 2022, arXiv:2201.10703).

A frozen network, the teacher, describes an image by three maps. A trained bottleneck squeezes them
to one small embedding, and a decoder, the teacher turned upside down, grows the maps back from it.
Both see normal images only. The embedding has no room for what normal images lack, so a defect is
not rebuilt: the map is the distance between given and rebuilt features, summed over the three
scales.

Follows the authors' code. Differs from it:

- The weights that the code creates but never uses are left out: 83.8 million are trained with
  WideResNet-50.
- Any convolutional backbone with three stages, each half the size of the one before, can teach:
  the channels of bottleneck and decoder are those of its stages. Features of some (MobileNet,
  EfficientNet) may be negative, which a decoder that ends in ReLU cannot reach; there it does not
  (`final_activation=auto`).
- `width` makes the inner layers narrower, for CPUs.

Batch normalisation in bottleneck and decoder takes statistics per device unless
`+trainer.sync_batchnorm=true`.

Paper: Deng, Li: Anomaly Detection via Reverse Distillation from One-Class Embedding. CVPR 2022,
arXiv:2201.10703.
Status: works; measured small (experiments/small): steps chosen by drawn defects gave mean image
AUROC 90.8, pixel AP 40.9 and AUPRO 72.5 on four categories, level with PatchCore (91.0, 41.8,
73.2). Not yet at the paper's size.
Note: the authors' code is MIT; written anew from its description. `width` and other teachers than
ResNets are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.losses import CosineLoss, FlatCosineLoss
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.reverse_distillation.network import (
    Bottleneck,
    Decoder,
    Kind,
    init_convolutions,
)
from anomaly_lit.nn.aggregate import check_multiple, resize, smooth, top_mean
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range


class ReverseDistillation(Method):
    """Reverse Distillation.

    Args:
        backbone: Frozen teacher; three stages, each half the size of the one before.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        blocks: Kind of the residual blocks: `bottleneck` for ResNet-50 and larger, else `basic`.
        base_width: Inner channels of a `bottleneck` block per 64 planes; 128 for WideResNet-50,
            else 64.
        squeeze_depth: Residual blocks that make the embedding; 2 for ResNet-18, else 3.
        decoder_depths: Residual blocks of the decoder's stages, the coarsest first; (2, 2, 2) for
            ResNet-18, else (3, 4, 6).
        width: Factor of the channels within bottleneck and decoder, above 0.
        final_activation: `relu`: each stage of the decoder ends in ReLU, as the published
            teacher's do; `none`: rebuilt features may be negative; `auto`: none if the teacher's
            may be, else ReLU.
        distance: Distance in training: `flat` compares whole maps as one vector, as the code does;
            `position` compares each position, as the paper's formula does; it is reported to be
            clearly worse.
        combine: How the maps of the scales are combined: `sum` or `product`.
        align_corners: How maps are brought to the image's size: with aligned corners, as the
            authors' code does, or as squares of pixels (false).
        smoothing: Standard deviation of the Gaussian filter on the map, in pixels.
        score: `max` of the map, or `top`: the mean of its top 1 %.

    Raises:
        UserError: The teacher's stages do not halve, a number is out of range, or an option is
            unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        blocks: Kind = "bottleneck",
        base_width: int = 128,
        squeeze_depth: int = 3,
        decoder_depths: Sequence[int] = (3, 4, 6),
        width: float = 1.0,
        final_activation: Literal["auto", "relu", "none"] = "auto",
        distance: Literal["flat", "position"] = "flat",
        combine: Literal["sum", "product"] = "sum",
        align_corners: bool = True,
        smoothing: float = 4.0,
        score: Literal["max", "top"] = "max",
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_pyramid(backbone)
        check_range("method", "[1, inf)", squeeze_depth=squeeze_depth, base_width=base_width)
        check_range("method", "[1, inf)", decoder_depths=decoder_depths)
        check_range("method", "(0, inf)", width=width)
        check_range("method", "[0, inf)", smoothing=smoothing)
        check_choice("method", ("basic", "bottleneck"), blocks=blocks)
        check_choice("method", ("auto", "relu", "none"), final_activation=final_activation)
        check_choice("method", ("flat", "position"), distance=distance)
        check_choice("method", ("sum", "product"), combine=combine)
        check_choice("method", ("max", "top"), score=score)
        if len(decoder_depths) != 3:
            raise UserError(
                f"method.decoder_depths={list(decoder_depths)}: give a number for each of three "
                "stages, the coarsest first"
            )
        self.backbone = backbone
        self.multiple = 2 * backbone.strides[-1]  # the embedding halves the last map once more
        self.combine = combine
        self.align_corners = align_corners
        self.smoothing = smoothing
        self.score = score
        self.distance = FlatCosineLoss() if distance == "flat" else CosineLoss()
        channels = backbone.channels
        self.bottleneck = Bottleneck(channels, blocks, squeeze_depth, base_width, width)
        auto = final_activation == "auto"
        signed = gives_negative(backbone) if auto else final_activation == "none"
        self.decoder = Decoder(channels, blocks, decoder_depths, base_width, width, signed)
        self.bottleneck.apply(init_convolutions)
        self.decoder.apply(init_convolutions)

    def rebuild(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Rebuild the teacher's maps from their embedding, in float32."""
        return [rebuilt.float() for rebuilt in self.decoder(self.bottleneck(features))]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance between given and rebuilt features, summed over the scales."""
        self.check_size(batch["image"])
        features = self.features(self.backbone, batch)
        pairs = zip(self.rebuild(features), features, strict=True)
        distances = [self.distance(rebuilt, given.float()) for rebuilt, given in pairs]
        return {"distance": torch.stack(distances).sum()}

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        self.check_size(image)
        features = self.backbone(image)
        gaps = [
            1 - F.cosine_similarity(rebuilt, given)[:, None]
            for rebuilt, given in zip(self.rebuild(features), features, strict=True)
        ]
        maps = torch.stack(
            [resize(gap, image.shape[-2:], self.align_corners) for gap in gaps]
        )  # (3, B, 1, H, W)
        combined = maps.sum(dim=0) if self.combine == "sum" else maps.prod(dim=0)
        anomaly_map = smooth(combined, self.smoothing)
        if self.score == "max":
            return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))
        return Prediction(anomaly_map, top_mean(anomaly_map))

    def check_size(self, image: Tensor) -> None:
        """Refuse images whose maps cannot be halved once more and come back to their size."""
        check_multiple(image.shape[-2:], self.multiple, "the stride of the embedding")


def check_pyramid(backbone: Backbone) -> None:
    """Check that a teacher has three stages, each half the size of the one before.

    Raises:
        UserError: It has not.
    """
    strides = backbone.strides
    if len(strides) != 3 or strides[1] != 2 * strides[0] or strides[2] != 2 * strides[1]:
        raise UserError(
            f"method.backbone={backbone.name} has stages at strides {strides}, and Reverse "
            "Distillation needs three, each twice the one before, such as 4, 8, 16: choose a "
            "convolutional backbone with out_indices=[1, 2, 3]"
        )


def gives_negative(backbone: Backbone) -> bool:
    """Return whether maps can be negative: those of networks whose stages end without ReLU.

    It follows from the network, whatever its weights, so one random image tells it. On the meta
    device, where nothing is computed, it is false.
    """
    device, side = backbone.mean.device, 2 * backbone.strides[-1]
    if device.type == "meta":
        return False
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return any(bool((map_ < 0).any()) for map_ in backbone(image.to(device)))
