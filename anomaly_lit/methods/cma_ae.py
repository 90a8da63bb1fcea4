"""CMA-AE: clear memory-augmented auto-encoder (Luo et al., 2023, arXiv:2208.03879).

An auto-encoder repairs corrupted images. Plain ones keep the defect; memory ones lose the fine
background. Here two gates decide, value by value, what is kept of the encoding (forget gate) and
what is written of what a memory of normal encodings would say (input gate): the defect goes, the
background stays clear. Where frozen features of the image and of its repaired copy differ, over
several scales, lies the defect.

The full text was not at hand. The gates' form is the paper's; the network, its constants, the
losses and the fusion of scales are those of the description we worked from, ours where that is
silent, and none is checked against the paper. Its F1 is reported at a threshold from held-out
normal images: ``test/segmentation_f1``, beside the greatest F1 over all thresholds
(``pixel_f1max``), which takes the test set to choose. There are 18.0 million trainable parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall

from anomaly_lit.losses import loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError

THRESHOLD_IMAGES = 256  # held-out images from which the threshold is taken


class CMAAE(Method):
    """Clear memory-augmented auto-encoder.

    Args:
        backbone: Frozen; compares images with their repaired copies.
        loss: Of repaired and clean images, (B, 3, H, W) in [0, 1].
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Greatest norm of the gradients.
        channels: Of the encoder's stages, each half the size of the one before.
        memories: How many of the coarsest stages have a memory; finer ones are handed on beside
            the decoder once cleared, other stages are not.
        items: Vectors in each memory.
        temperature: Of the softmax over the items.
        gates: ``lstm``: two gates; ``convex``: the input gate is 1 - the forget gate; ``memory``:
            what the memory says, alone; ``none``: no memory, a plain auto-encoder.
        entropy_weight: Weight of the entropy of what is read from the memory.
        gate_weight: Weight of the cross entropy between forget gate and the clean area.
        fuse: How residuals of several scales become one: ``sum`` or ``prod``.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.
        pixel_weight: Weight of the mean absolute difference of pixels in the map.
        least_region: Smallest region of a segmentation, in pixels.

    Raises:
        UserError: More memories than stages, or a number out of range.
    """

    needs = frozenset({"corrupted"})
    map_mean: Tensor
    map_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        channels: Sequence[int] = (64, 128, 256, 512),
        memories: int = 2,
        items: int = 200,
        temperature: float = 0.1,
        gates: Literal["lstm", "convex", "memory", "none"] = "lstm",
        entropy_weight: float = 2e-4,
        gate_weight: float = 0.0,
        fuse: Literal["sum", "prod"] = "sum",
        smoothing: float = 4.0,
        pixel_weight: float = 0.0,
        least_region: int = 10,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        if not 1 <= memories <= len(channels) or items < 2 or temperature <= 0:
            raise UserError(
                f"method.memories={memories} must lie in 1 to {len(channels)} (the stages), "
                f"items={items} be at least 2 and temperature={temperature} above 0"
            )
        self.backbone = backbone
        self.loss = loss
        self.entropy_weight = entropy_weight
        self.gate_weight = gate_weight
        self.fuse = fuse
        self.smoothing = smoothing
        self.pixel_weight = pixel_weight
        self.least_region = least_region
        self.encoder = Encoder(channels)
        coarse_first = list(reversed(channels))
        self.memories = nn.ModuleList(
            ClearMemory(count, items, temperature, gates) for count in coarse_first[:memories]
        )
        self.decoder = Decoder(coarse_first, memories)
        self.register_buffer("map_mean", torch.full((), torch.nan))
        self.register_buffer("map_std", torch.full((), torch.nan))
        scores = {"precision": BinaryPrecision(), "recall": BinaryRecall(), "f1": BinaryF1Score()}
        self.segmentation = MetricCollection(scores, prefix="test/segmentation_")  # type: ignore[arg-type]

    def repair(self, image: Tensor) -> tuple[Tensor, list[Recall]]:
        """(B, 3, H, W) to the same in [0, 1], and what each memory did, coarsest first."""
        stages = self.encoder(image)
        recalls = [memory(z) for memory, z in zip(self.memories, reversed(stages), strict=False)]
        return self.decoder([recall.out for recall in recalls]), recalls

    def training_backbones(self) -> dict[str, Backbone]:
        """None: the backbone compares images only when they are scored."""
        return {}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Repair towards the clean image, sparse reading, and, where weighted, the gate's truth.

        ``gate_inside`` and ``gate_outside`` are the mean forget gate in and out of the corruption:
        the paper's claim is that the first falls and the second stays high.
        """
        repaired, recalls = self.repair(batch["corrupted"])
        terms = loss_terms(self.loss, repaired.float(), batch["image"])
        kept = [recall.forget.float().mean(dim=1, keepdim=True) for recall in recalls]
        corrupted = [cover(batch["corruption"], gate.shape[-2:]) for gate in kept]
        entropies = torch.stack([recall.entropy() for recall in recalls])
        terms["entropy"] = self.entropy_weight * entropies.sum()
        if self.gate_weight:
            pairs = zip(kept, corrupted, strict=True)
            with torch.autocast(self.device.type, enabled=False):
                wrong = [F.binary_cross_entropy(gate, 1 - area) for gate, area in pairs]
            terms["gate"] = self.gate_weight * torch.stack(wrong).mean()
        loss = torch.stack(list(terms.values())).sum()
        gate, area = kept[0].detach(), corrupted[0]
        terms["gate_inside"] = (gate * area).sum() / area.sum().clamp(min=1)
        terms["gate_outside"] = (gate * (1 - area)).sum() / (1 - area).sum().clamp(min=1)
        return {**terms, "loss": loss}

    def forward(self, image: Tensor) -> Prediction:
        """Scores images; see the base class."""
        repaired, _ = self.repair(image)
        residuals = [
            F.interpolate(1 - F.cosine_similarity(a, b)[:, None], image.shape[-2:], mode="bilinear")
            for a, b in zip(self.backbone(image), self.backbone(repaired), strict=True)
        ]
        stacked = torch.stack(residuals)  # (scales, B, 1, H, W)
        anomaly_map = stacked.sum(dim=0) if self.fuse == "sum" else (stacked + 1e-4).prod(dim=0)
        if self.pixel_weight:
            difference = (image - repaired).abs().mean(dim=1, keepdim=True)
            anomaly_map = anomaly_map + self.pixel_weight * difference
        anomaly_map = smooth(anomaly_map, self.smoothing)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))

    # ------------------------------------------------------------------------- segmentation

    @torch.no_grad()
    def on_validation_start(self) -> None:
        """Takes mean and deviation of the maps of held-out normal images."""
        with torch.autocast(self.device.type, enabled=False):
            batches = self.normal_batches("holdout", THRESHOLD_IMAGES)
            maps = [self(batch["image"]).anomaly_map.flatten(1) for batch in batches]
        if maps:
            values = torch.cat(maps)
            moments = torch.stack([values.mean(), values.square().mean()])
            moments = self.all_gather(moments).reshape(-1, 2).mean(dim=0)  # type: ignore[union-attr]
            self.map_mean.copy_(moments[0])
            self.map_std.copy_((moments[1] - moments[0].square()).clamp(min=0).sqrt())

    def segment(self, anomaly_map: Tensor) -> Tensor:
        """(B, 1, H, W) bool: above mean + 3 deviations, opened by 3 x 3, without small regions."""
        high = (anomaly_map > self.map_mean + 3 * self.map_std).float()
        opened = F.max_pool2d(1 - F.max_pool2d(1 - high, 3, 1, 1), 3, 1, 1) > 0
        for mask in opened[:, 0].cpu().numpy() if self.least_region > 1 else []:
            regions, _ = ndimage.label(mask)
            mask &= ndimage.sum_labels(mask, regions, regions) >= self.least_region
        return opened

    def on_test_start(self) -> None:
        """Asks once whether there is a threshold."""
        self.has_threshold = bool(self.map_mean.isfinite())

    def test_step(self, batch: Batch, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Predicts, and counts pixels of the segmentation where there was a held-out image."""
        prediction = super().test_step(batch, batch_idx)
        if self.has_threshold:
            known = ~batch["label"] | batch["gt_mask"].flatten(1).any(dim=1)  # masks may be absent
            found = self.segment(prediction.anomaly_map)[known]
            self.segmentation.update(found.flatten().int(), batch["gt_mask"][known].flatten().int())
            self.log_dict(self.segmentation, on_step=False, on_epoch=True)
        return prediction


class Recall(NamedTuple):
    """What a memory made of an encoding of (B, C, h, w)."""

    out: Tensor  # (B, C, h, w)
    forget: Tensor  # (B, C, h, w) in [0, 1], what was kept of the encoding
    attention: Tensor | None  # (B, h * w, items), rows sum to 1

    def entropy(self) -> Tensor:
        """Mean entropy of what was read, in nats; 0 where there is no memory."""
        if self.attention is None:
            return self.out.new_zeros(())
        weight = self.attention.float()
        return -(weight * (weight + 1e-12).log()).sum(dim=-1).mean()


class ClearMemory(nn.Module):
    """Drops part of an encoding and writes in what a memory of normal ones says.

    Args:
        channels: C of the encoding.
        items: Vectors in the memory.
        temperature: Of the softmax.
        gates: See ``CMAAE``.
    """

    def __init__(self, channels: int, items: int, temperature: float, gates: str) -> None:
        super().__init__()
        self.temperature = temperature
        self.gates = gates
        if gates != "none":
            self.items = nn.Parameter(torch.randn(items, channels) / channels**0.5)
        if gates in ("lstm", "convex"):
            count = 2 if gates == "lstm" else 1
            self.gate = nn.Conv2d(2 * channels, count * channels, 3, padding=1)
            nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]
            nn.init.ones_(self.gate.bias[:channels])  # type: ignore[index]  # near a plain auto-encoder

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) to the memory's version of it and the (B, h * w, items) attention.

        Softmax over cosines, then hard shrinkage at 1 / items and normalisation (MemAE).
        """
        tokens = z.flatten(2).mT.float()  # (B, h * w, C)
        items = self.items.float()
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(items, dim=-1).T
        attention = (cosine / self.temperature).softmax(dim=-1)
        above = attention - 1 / len(items)
        attention = F.normalize(above.relu() * attention / (above.abs() + 1e-12), p=1, dim=-1)
        return (attention @ items).mT.reshape(z.shape).to(z.dtype), attention

    def forward(self, z: Tensor) -> Recall:
        """(B, C, h, w) to what is handed on."""
        if self.gates == "none":
            return Recall(z, torch.ones_like(z), None)
        remembered, attention = self.read(z)
        if self.gates == "memory":
            return Recall(remembered, torch.zeros_like(z), attention)
        gates = self.gate(torch.cat([z, remembered], dim=1)).sigmoid()
        forget = gates[:, : z.shape[1]]
        write = gates[:, z.shape[1] :] if self.gates == "lstm" else 1 - forget
        return Recall(forget * z + write * remembered, forget, attention)


class Encoder(nn.Module):
    """Stages of a 4 x 4 convolution that halves, batch normalisation and leaky ReLU.

    Args:
        channels: Of the stages, finest first.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(given, made, 4, 2, 1, bias=False), nn.BatchNorm2d(made), nn.LeakyReLU(0.2)
            )
            for given, made in zip([3, *channels[:-1]], channels, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the maps of all stages, finest first."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps


class Decoder(nn.Module):
    """The encoder mirrored; maps handed on are joined where they have their size.

    Args:
        channels: Of the encoder's stages, coarsest first.
        given: How many of them are handed on, from the coarsest.
    """

    def __init__(self, channels: Sequence[int], given: int) -> None:
        super().__init__()
        made = [*channels[1:], 3]
        read = [count * (2 if 0 < n < given else 1) for n, count in enumerate(channels)]
        self.stages = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, 2, 1)
            for before, after in zip(read, made, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in made[:-1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, coarsest first, to (B, 3, H, W) in [0, 1]."""
        x = maps[0]
        for number, (stage, norm) in enumerate(zip(self.stages[:-1], self.norms, strict=True), 1):
            x = F.leaky_relu(norm(stage(x)), 0.2)
            if number < len(maps):
                x = torch.cat([x, maps[number]], dim=1)
        return self.stages[-1](x).sigmoid()


def cover(corruption: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 1, H, W) bool to (B, 1, *size) in {0., 1.}: 1 where a position holds any of it."""
    return F.adaptive_max_pool2d(corruption.float(), (size[0], size[1]))
