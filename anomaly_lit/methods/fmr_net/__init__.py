"""FMR-Net: feature memory rearrangement network (Yao, Yu, Wang, 2023, arXiv:2206.10830).

For defects of textured surfaces. An encoder joins several scales; a memory of normal features,
learned by contrast, replaces what is unlike all its slots (CMFM). The laterals (skip connections)
from encoder to decoder still carry the defect: there, each patch that the memory calls a defect is
rewritten from normal patches elsewhere in the image (GFRM). Training first learns to rebuild normal
texture and fills the memory by k-means, then learns to restore images with synthetic defects. Three
maps of the difference, in pixels, structure and edges, are put on one scale and averaged.

We had the abstract and notes on the paper, not its text. The modules, the two stages and the three
maps are the paper's; all formulas, sizes, losses and constants are ours. Our readings:

- Laterals are closed while normal texture is learned, so that the memory is needed.
- A texton of GFRM is the patch of a lateral around one position of the memory's map.
- Maps are put on one scale by mean and deviation on held-out normal images (on training images if
  none are held out), and clipped at 0.
- The paper splits detection between edge device and cloud. Here `fast=true` scores by the memory
  alone, without decoder and maps; where each part runs is left to the user.

Training sees crops of `crop` pixels; any larger image can be scored, if 2 to the number of stages
divides its sides.

Paper: Yao, Yu, Wang: A Feature Memory Rearrangement Network for Visual Inspection of Textured
Surface Defects Toward Edge Intelligent Manufacturing. IEEE T-ASE 20(4), 2023, arXiv:2206.10830.
Status: works; measured small (experiments/small), and beside itself without its memory
(experiments/memory), which gains 13 points of image AUROC on toothbrush, less than its interval.
Too short to compare.
Note: no code was published and its text was not at hand: formulas, sizes and losses are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import MSGMSLoss, SSIMLoss, gms_map, ssim_map
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.fmr_net.network import (
    ContrastiveMemory,
    Decoder,
    Encoder,
    Rearrangement,
    Recall,
    contrast,
)
from anomaly_lit.nn.aggregate import check_multiple, resize, smooth
from anomaly_lit.nn.bank import kmeans
from anomaly_lit.nn.ranks import all_ranks, copy_first, mean_of_marked
from anomaly_lit.nn.stages import Stages
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

STAGES = ("warmup", "memory", "restoration")
START_IMAGES = 64  # normal images from which the memory starts
SCALE_IMAGES = 64  # normal images that put the maps on one scale
RIVALS = 32  # defective positions of an image that the contrast sees
SCALES = 3  # of the map of edges


class FMRNet(Method):
    """Feature memory rearrangement network.

    Args:
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over each half: until the restoration, and over it.
        gradient_clip: Largest norm of the gradients.
        widths: Channels of the encoder's stages, each half the size of the one before.
        dim: Channels of the memory's map, and length of a slot.
        slots: Slots of the memory.
        temperature: Divides cosines when the memory is read and in the contrast.
        momentum: Share of the gate's threshold that is kept in each step.
        rearrange: How laterals are rewritten: `texton` (cosines of patches), `attention` (learned
            projections), `none` (as they are).
        overlap: Positions that a texton reaches beyond its own.
        texton_temperature: Divides cosines of textons.
        shares: Shares of training of the warm-up, the memory and the restoration. A restoration of
            0 is left out, and laterals then stay closed.
        restore_rate: Learning rate of the restoration, relative to the rate before it.
        encoder_rate: The encoder's rate in the restoration, relative to the rest of the network.
        contrast_weight: Weight of the contrast.
        spread_weight: Weight of slots that are too similar.
        edge_weight: Weight of the similarity of edges in the restoration.
        defect_weight: Weight of the mean absolute error inside of synthetic defects.
        crop: Side of training crops, in pixels; None trains on whole images.
        fast: Score by the memory alone.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: A number is out of range, or a name is unknown.
    """

    needs = frozenset({"corrupted"})
    leaves_unused = True  # the first two stages, those of later ones
    scale: Tensor

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        widths: Sequence[int] = (64, 128, 256),
        dim: int = 256,
        slots: int = 100,
        temperature: float = 0.1,
        momentum: float = 0.99,
        rearrange: Literal["texton", "attention", "none"] = "texton",
        overlap: int = 1,
        texton_temperature: float = 0.05,
        shares: Sequence[float] = (5, 95, 200),
        restore_rate: float = 0.2,
        encoder_rate: float = 0.1,
        contrast_weight: float = 0.1,
        spread_weight: float = 0.01,
        edge_weight: float = 0.5,
        defect_weight: float = 1.0,
        crop: int | None = 256,
        fast: bool = False,
        smoothing: float = 4.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", widths=widths, dim=dim, crop=crop)
        check_range("method", "[2, inf)", slots=slots)
        check_range(
            "method", "(0, inf)", temperature=temperature, restore_rate=restore_rate,
            texton_temperature=texton_temperature,
        )  # fmt: skip
        check_range(
            "method", "[0, inf)", overlap=overlap, encoder_rate=encoder_rate, smoothing=smoothing,
            contrast_weight=contrast_weight, spread_weight=spread_weight, edge_weight=edge_weight,
            defect_weight=defect_weight, shares=shares,
        )  # fmt: skip
        check_range("method", "[0, 1)", momentum=momentum)
        if len(shares) != 3 or shares[1] <= 0:
            raise UserError(
                f"method.shares={list(shares)}: give three shares, that of the memory above 0"
            )
        check_choice("method", ("texton", "attention", "none"), rearrange=rearrange)
        self.multiple = 2 ** len(widths)
        if crop is not None and crop % self.multiple:
            raise UserError(f"method.crop={crop} must be a multiple of {self.multiple}")
        self.temperature, self.momentum = temperature, momentum
        self.restore_rate, self.encoder_rate = restore_rate, encoder_rate
        self.contrast_weight, self.spread_weight = contrast_weight, spread_weight
        self.edge_weight, self.defect_weight = edge_weight, defect_weight
        self.crop, self.fast, self.smoothing = crop, fast, smoothing
        self.stages = Stages(dict(zip(STAGES, shares, strict=True)), self.start_stage)
        self.ssim, self.msgms = SSIMLoss(), MSGMSLoss()
        self.encoder = Encoder(widths, dim)
        self.memory = ContrastiveMemory(dim, slots, temperature)
        self.rearrange: nn.ModuleList | None = None
        if rearrange != "none":
            last = len(widths) - 1
            self.rearrange = nn.ModuleList(
                Rearrangement(width, 2 ** (last - n), overlap, texton_temperature, rearrange)
                for n, width in enumerate(widths[:-1])
            )
        self.decoder = Decoder(widths, dim)
        self.register_buffer("scale", torch.tensor([[0.0, 1.0]] * 3))  # mean and deviation of maps
        self.seen: Tensor | None = None  # scores of a step's positions, NaN at defects

    # --------------------------------------------------------------------------- the network

    def restore(self, image: Tensor, stage: str) -> tuple[Tensor, Recall]:
        """Return restored images, in [0, 1], and what the memory did, as in a stage of training."""
        joined, (*laterals, _) = self.encoder(image)
        recall = self.memory(joined)
        if stage != "restoration":
            laterals = [torch.zeros_like(lateral) for lateral in laterals]
        elif self.rearrange is not None:
            laterals = [
                part(lateral, recall.gate)
                for part, lateral in zip(self.rearrange, laterals, strict=True)
            ]
        return self.decoder(joined if stage == "warmup" else recall.out, laterals), recall

    @property
    def last_stage(self) -> str:
        """Name of the stage that training ends with, and that scoring is done as."""
        return self.stages.names[-1]

    # ------------------------------------------------------------------------------ training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the current stage; in evaluation those of the last one."""
        stage = self.stages.at(self.done)[0] if self.training else self.last_stage
        image, target, defect = self.cropped(batch)
        if stage != "restoration":
            image, defect = target, torch.zeros_like(defect)
        restored, recall = self.restore(image, stage)
        restored = restored.float()
        terms = {"l1": F.l1_loss(restored, target), "ssim": self.ssim(restored, target)}
        if stage == "restoration":
            terms["edges"] = self.edge_weight * self.msgms(restored, target)
            away = (restored - target).abs().mean(dim=1, keepdim=True)
            terms["defects"] = self.defect_weight * mean_of_marked(away, defect)
        if stage != "warmup":
            terms |= self.memory_losses(recall, defect)
        return terms

    def memory_losses(self, recall: Recall, defect: Tensor) -> dict[str, Tensor]:
        """Return the contrast of normal and defective positions, and the spread of the slots."""
        covered = F.adaptive_max_pool2d(defect.float(), recall.gate.shape[-2:]).flatten(1) > 0
        keys = torch.rand(covered.shape, generator=self.generator(), device=covered.device)
        few = min(RIVALS, keys.shape[1])
        chosen = (keys - covered.float()).topk(few, dim=1, largest=False).indices
        chosen = chosen + keys.shape[1] * torch.arange(len(keys), device=keys.device)[:, None]
        if self.training:
            self.seen = all_ranks(recall.score().masked_fill(covered, torch.nan))
        found = contrast(recall, covered.flatten(), chosen.flatten(), self.temperature)
        spread = self.spread_weight * self.memory.spread()
        return {"contrast": self.contrast_weight * found, "spread": spread}

    def cropped(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return corrupted images, clean ones and defects; in training a common crop of them."""
        parts = batch["corrupted"], batch["image"], batch["corruption"]
        if self.crop is None or not self.training:
            return parts
        height, width = parts[0].shape[-2:]
        tall, wide = min(height, self.crop), min(width, self.crop)
        rows, columns = (
            torch.randint(length - part + 1, (1,), device=self.device)
            + torch.arange(part, device=self.device)
            for length, part in ((height, tall), (width, wide))
        )
        corrupted, image, defect = (p.index_select(2, rows).index_select(3, columns) for p in parts)
        return corrupted, image, defect

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin stages of training where they are due."""
        super().on_train_batch_start(batch, batch_idx)
        self.stages.enter(self.done)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss as in the base class; move the threshold of the memory's gate."""
        self.seen = None
        loss = super().training_step(batch, batch_idx)
        if self.seen is not None:
            with torch.no_grad():
                self.memory.move_threshold(self.seen, self.momentum)
        return loss

    def start_stage(self, name: str) -> None:
        """Fill the memory by k-means over normal features when its stage begins."""
        if name != "memory":
            return
        with self._evaluating():
            batches = self.normal_batches("train", START_IMAGES)
            found = [self.memory.tokens(self.encoder(b["image"])[0]).flatten(0, 1) for b in batches]
            tokens = torch.cat(found)
            centres = kmeans(tokens, len(self.memory.slots), self.generator())
            self.memory.start(centres, tokens)
        copy_first(self.memory)

    def configure_optimizers(self) -> Any:
        """Return one optimiser; its rates follow the schedule in each half of training."""
        encoder = list(self.encoder.parameters())
        mine = {id(parameter) for parameter in encoder}
        others = [p for p in self.parameters() if id(p) not in mine]
        groups = [{"params": encoder}, {"params": others}]
        rates = [lambda done: self.rate(done, True), lambda done: self.rate(done, False)]
        return self.scheduled(self.optimizer(groups), rates)

    def rate(self, done: float, encoder: bool) -> float:
        """Return the factor of the learning rate at a share of training."""
        stage, within = self.stages.at(done)
        factor = 1.0
        if stage == "restoration":
            factor = self.restore_rate * (self.encoder_rate if encoder else 1.0)
        elif "restoration" in self.stages.names:
            within = done / self.stages.ends[-2]
        else:
            within = done
        return factor * (1.0 if self.schedule is None else self.schedule(within))

    # ------------------------------------------------------------------------------- scoring

    def modalities(self, image: Tensor) -> Tensor:
        """Return the difference of pixels, structure and edges, (B, 3, H, W), larger is worse."""
        restored, _ = self.restore(image, self.last_stage)
        restored = restored.float()
        pixels = (image - restored).abs().mean(dim=1, keepdim=True)
        structure = 1 - ssim_map(restored, image).mean(dim=1, keepdim=True)
        return torch.cat([pixels, structure, edge_difference(restored, image)], dim=1)

    def calibrate(self) -> None:
        """Take mean and deviation of each map from held-out images, or else from training images.

        Without restored images (`fast`) there is nothing to take.
        """
        if self.fast:
            return
        batches = [*self.normal_batches("holdout", SCALE_IMAGES)]
        batches = batches or [*self.normal_batches("train", SCALE_IMAGES)]
        maps = torch.cat([self.modalities(batch["image"]) for batch in batches])
        values = maps.transpose(0, 1).flatten(1)
        self.scale.copy_(torch.stack([values.mean(dim=1), values.std(dim=1)], dim=1))

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        size = image.shape[-2:]
        check_multiple(size, self.multiple, "the stride of FMR-Net's coarsest map")
        if self.fast:
            joined, _ = self.encoder(image)
            score = self.memory(joined).score().unflatten(1, joined.shape[-2:])[:, None]
            return Prediction(resize(score, size), score.amax(dim=(1, 2, 3)))
        mean, deviation = self.scale.T[..., None, None]
        raised = ((self.modalities(image) - mean) / deviation.clamp(min=1e-6)).clamp(min=0)
        anomaly_map = smooth(raised.mean(dim=1, keepdim=True), self.smoothing)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


def edge_difference(one: Tensor, other: Tensor) -> Tensor:
    """Return one minus the similarity of edges, averaged over three scales, (B, 1, H, W)."""
    size = one.shape[-2:]
    found = []
    for scale in range(SCALES):
        if scale:
            one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
        found.append(resize(1 - gms_map(one, other), size))
    return torch.stack(found).mean(dim=0)
