"""PNI refinement: the network that sharpens the maps of a trained PNI (Bae, Lee, Kim, ICCV 2023).

A trained PNI finds where an image is unusual, but its map is coarse. This network sees the image
and the map and learns, on images with synthetic defects whose masks are known, what to add to the
map so that it has the outline of the defect. A little of the refined map is mixed into the old one.

Follows the behaviour of the published code. The network has an encoder for the image and one for
the map. The outputs of their first layers are averaged; the image's encoder continues from there.
Differences:

- The maps come from one PNI, that of `pni_weights`, and cover its categories; the authors train one
  refinement network on the maps of all categories.
- The map is scaled so that its mean over normal pixels of training images is 0, and over synthetic
  defects 1; we do not know how the code brings map and mask to one scale.
- The map is not cropped by 11 pixels, colours are not changed along their principal axes, and the
  recipe of the defects is an option of `synthesis`: we do not know the published one.
- The score is the largest value of the map that is returned.

Paper: Bae, Lee, Kim: PNI: Industrial Anomaly Detection using Position and Neighborhood Information.
ICCV 2023, arXiv:2211.12634.
Status: works; measured small (experiments/small), not yet at the paper's size.
Note: a second run, upon the checkpoint of a PNI; the authors' code has no licence, written from a
description of the paper and its behaviour.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import resize
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.synthesis.augment import colour_jitter, rotate
from anomaly_lit.types import Batch, Prediction, UserError, check_range

SCALE_IMAGES = 64  # training images from which the scale of maps is taken


class PNIRefine(Method):
    """Refinement of PNI's map.

    Args:
        pni: The first method, with the numbers of its own run; it stays as it is.
        encoder: Where the encoders start: a network that timm divides into stages, with the first
            and the last stage in its `out_indices`; the paper takes DenseNet161.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        pni_weights: Checkpoint of a run of PNI. None takes a new bank and new positions from the
            training images, which needs `pni.conditions=[position]` or `[]`.
        size: Side of the image and the map that the network sees, in pixels.
        width: Channels of the decoder's first stage, which each stage halves.
        weight: Share of the refined map in the final one, in [0, 1].
        flip: Share of training images that are mirrored.
        turn: Largest rotation of training images, in degrees.
        jitter: Largest relative change of brightness, contrast and saturation.

    Raises:
        UserError: A number is out of range, or the encoder does not give two stages.
    """

    needs = frozenset({"corrupted"})
    scale: Tensor

    def __init__(
        self,
        pni: Method,
        encoder: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        pni_weights: str | None = None,
        size: int = 320,
        width: int = 768,
        weight: float = 0.1,
        flip: float = 0.5,
        turn: float = 5.0,
        jitter: float = 0.4,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[0, 1]", weight=weight, flip=flip)
        if size % encoder.strides[-1]:
            raise UserError(
                f"method.size={size} must be a multiple of {encoder.strides[-1]}, the encoder's "
                "stride"
            )
        self.pni = pni.requires_grad_(False)
        self.pni_weights = pni_weights
        self.size = size
        self.weight = weight
        self.flip, self.turn, self.jitter = flip, turn, jitter
        self.network = RefineNet(encoder, width)
        self.start = (encoder,)  # in a tuple, so that it is not a part of this module
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))  # mean of the map: normal, defects

    def train(self, mode: bool = True) -> PNIRefine:
        """Set the mode of all but the PNI, which stays in evaluation."""
        super().train(mode)
        self.pni.eval()
        return self

    def training_backbones(self) -> dict[str, Backbone]:
        """Return none: training reads no features of clean images."""
        return {}

    # ---------------------------------------------------------------------- before the start

    def check(self) -> None:
        """Read the checkpoint of the PNI."""
        if self.pni_weights is not None:
            self.load_pni(self.pni_weights)

    def learn(self) -> None:
        """Load the PNI and the encoders, and take the scale of the maps."""
        if self.pni_weights is not None:
            self.load_pni(self.pni_weights)
        else:
            self.build_pni()
        self.start[0].load_weights()
        self.network.copy_stem()
        self.scale.copy_(self.measure_scale())

    def load_pni(self, path: str) -> None:
        """Give the PNI the state of a checkpoint.

        Raises:
            UserError: The file is missing, or the checkpoint is not of a PNI with these numbers.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"method.pni_weights={path}: no such file")
        state = torch.load(file, map_location="cpu", weights_only=True).get("state_dict", {})
        try:
            self.pni.load_state_dict(state)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"method.pni_weights={path} does not fit method.pni: {reason}; give a checkpoint "
                "of method=pni, and set below method.pni what its run set"
            ) from error

    def build_pni(self) -> None:
        """Fill the bank of a new PNI; its network would have to be trained.

        Raises:
            UserError: The PNI has a network.
        """
        pni: Any = self.pni
        if "neighbourhood" in pni.conditions:
            raise UserError(
                "PNI's network must be trained first: set method.pni_weights to the checkpoint of "
                "a run of method=pni, or method.pni.conditions=[position]"
            )
        pni.build(lambda: (pni.backbone(b["image"]) for b in self.normal_batches("train", None)))

    def measure_scale(self) -> Tensor:
        """Return the mean of the map outside and inside of synthetic defects, (2,).

        Raises:
            UserError: No image has a defect.
        """
        sums, areas = self.scale.new_zeros(2), self.scale.new_zeros(2)
        for batch in self.normal_batches("train", SCALE_IMAGES):
            drawn = self.pni(batch["corrupted"]).anomaly_map
            for number, area in enumerate((~batch["corruption"], batch["corruption"])):
                sums[number] += drawn[area].sum()
                areas[number] += area.sum()
        if areas[1] == 0:
            raise UserError(
                f"none of {SCALE_IMAGES} images got a synthetic defect: raise "
                "dataset.synthesis.probability"
            )
        return sums / areas

    # ------------------------------------------------------------------- training and scoring

    def coarse_map(self, image: Tensor) -> Tensor:
        """Return PNI's map, (B, 1, H, W): about 0 where normal and 1 at a synthetic defect."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            drawn = self.pni(image.float()).anomaly_map
        normal, defect = self.scale
        return (drawn - normal) / (defect - normal).abs().clamp(min=1e-6)

    def refine(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Add the network's correction to a (B, 1, size, size) map."""
        return coarse + self.network(image, coarse).float()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the refined map and its slopes against the mask of the defect."""
        image, corruption = batch["corrupted"], batch["corruption"].float()
        whole = torch.cat([image, self.coarse_map(image), corruption], dim=1)  # (B, 5, H, W)
        whole = resize(self.varied(whole) if self.training else whole, (self.size, self.size))
        image, coarse, mask = whole.split([3, 1, 1], dim=1)
        if self.training:
            with torch.autocast(image.device.type, enabled=False):
                image = colour_jitter(image, self.jitter, 0.0, self.generator())
        refined = self.refine(image, coarse)
        rows, columns = (F.mse_loss(refined.diff(dim=d), mask.diff(dim=d)) for d in (2, 3))
        return {"mask": F.mse_loss(refined, mask) / 2, "slopes": (rows + columns) / 4}

    def varied(self, whole: Tensor) -> Tensor:
        """Mirror and turn images together with their maps and masks, (B, 5, H, W)."""
        draw = torch.rand(2, len(whole), generator=self.generator(), device=whole.device)
        mirrored = (draw[0] < self.flip).view(-1, 1, 1, 1)
        whole = torch.where(mirrored, whole.flip(-1), whole)
        angle = (2 * draw[1] - 1) * self.turn
        with torch.autocast(whole.device.type, enabled=False):
            return rotate(whole, angle, padding_mode="reflection")

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        coarse = self.coarse_map(image)
        small = (self.size, self.size)
        seen = resize(coarse, small)
        refined = self.refine(resize(image, small), seen)
        mixed = self.weight * refined + (1 - self.weight) * seen
        anomaly_map = resize(mixed, image.shape[-2:])
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


class RefineNet(nn.Module):
    """Two encoders that share all but their first layers, and a decoder without skips.

    Args:
        encoder: Gives the layers of the image's encoder, which are then trained. Load its weights
            afterwards, then call `copy_stem`.
        width: Channels of the decoder's first stage.

    Raises:
        UserError: The encoder does not give two stages, or timm does not divide it in layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Backbone, width: int) -> None:
        super().__init__()
        layers = getattr(encoder.network, "return_layers", None)
        if layers is None or len(layers) != 2:
            raise UserError(
                f"method.encoder: {encoder.name} with out_indices={list(encoder.out_indices)} must "
                "give its first and its last stage, such as [0, 4] of DenseNet161"
            )
        self.first = next(iter(layers))  # the last layer of the stem
        self.image_encoder = encoder.network.requires_grad_(True)
        self.map_stem = nn.ModuleDict(copy.deepcopy(dict(self.stem())))
        self.register_buffer("mean", encoder.mean.clone())
        self.register_buffer("std", encoder.std.clone())
        doublings = round(math.log2(encoder.strides[-1]))
        widths = [max(width >> number, 1) for number in range(doublings + 1)]
        self.shrink = nn.Conv2d(encoder.channels[-1], width, 1)
        self.up = nn.ModuleList(up_stage(*pair) for pair in pairwise(widths))
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def stem(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the first layers of the image's encoder by name."""
        for name, layer in self.image_encoder.items():
            yield name, layer
            if name == self.first:
                return

    def copy_stem(self) -> None:
        """Start the map's encoder like the image's."""
        self.map_stem.load_state_dict(nn.ModuleDict(dict(self.stem())).state_dict())

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Map (B, 3, H, W) images in [0, 1] and (B, 1, H, W) maps to what to add, (B, 1, H, W)."""
        x = (image - self.mean) / self.std
        other = (coarse.expand(-1, 3, -1, -1) - self.mean) / self.std
        for layer in self.map_stem.values():
            other = layer(other)
        for name, layer in self.image_encoder.items():
            x = layer(x)
            if name == self.first:
                x = (x + other) / 2
        x = self.shrink(x)
        for stage in self.up:
            x = stage(x)
        return self.out(x)


def up_stage(given: int, made: int) -> nn.Sequential:
    """Return layers that double a map and change its channels."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(given, made, 1),
        nn.ReLU(),
        nn.Conv2d(made, made, 3, padding=1),
        nn.ReLU(),
    )
