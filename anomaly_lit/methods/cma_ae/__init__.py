"""CMA-AE: clear memory-augmented auto-encoder (Luo et al., 2023, arXiv:2208.03879).

An auto-encoder repairs corrupted images. Plain auto-encoders keep the defect; those with a memory
lose the fine detail of the background. Here two gates decide, value by value, how much of the
encoding is kept (forget gate) and how much is taken from a memory of normal encodings (input gate):
the defect goes, the background stays clear. The defect is where frozen features of the image and of
its repaired copy differ, over several scales.

We did not have the paper's full text. The form of the gates is the paper's. The network, its
constants, the losses and the fusion of scales follow the description we worked from, or are our own
where it says nothing; none is checked against the paper. `test/segmentation_f1` is the F1 at a
threshold from held-out normal images; it stands beside `pixel_f1max`, the largest F1 over all
thresholds, which only the test set can choose. There are 18.0 million trainable parameters.

Paper: Luo et al.: Clear Memory-Augmented Auto-Encoder for Surface Defect Detection.
arXiv:2208.03879.
Status: works; measured small (experiments/cma_ae), too short to compare.
Note: no code was published and its text was not at hand: network, losses and fusion of scales are
ours; the docstring says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall

from anomaly_lit.losses import loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.cma_ae.network import ClearMemory, Recall, cover
from anomaly_lit.nn.aggregate import smooth
from anomaly_lit.nn.autoencoder import Decoder, Encoder
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.regions import opened
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

START_IMAGES = 16  # whose encodings the memories start from
THRESHOLD_IMAGES = 256  # held-out images from which the threshold is taken


class CMAAE(Method):
    """Clear memory-augmented auto-encoder.

    Args:
        backbone: Frozen; compares images with their repaired copies.
        loss: Loss of repaired against clean images, (B, 3, H, W) in [0, 1].
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        channels: Channels of the encoder's stages, each half the size of the one before.
        memories: How many of the coarsest stages have a memory. The coarsest stage feeds the
            decoder, the others with a memory reach it by skip connections, all of them cleared.
            Stages without a memory have no skip connection.
        items: Vectors in each memory.
        temperature: Temperature of the softmax over the items.
        gates: `lstm`: two gates; `convex`: the input gate is 1 - the forget gate; `memory`:
            the memory's output only; `none`: no memory, a plain auto-encoder.
        entropy_weight: Weight of the entropy of the attention over a memory's items.
        gate_weight: Weight of the cross entropy between the forget gate and the clean area.
        fuse: How residuals of several scales are combined: `sum` or `prod`.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.
        pixel_weight: Weight of the mean absolute difference of pixels in the map.
        least_region: Smallest region that a segmentation keeps, in pixels.

    Raises:
        UserError: There are more memories than stages, or a number is out of range.
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
        check_range("method", "[1, inf)", channels=channels)
        check_range("method", "[0, inf)", entropy_weight=entropy_weight, gate_weight=gate_weight)
        check_range("method", "[0, inf)", smoothing=smoothing, pixel_weight=pixel_weight)
        check_range("method", "[0, inf)", least_region=least_region)
        check_choice("method", ("lstm", "convex", "memory", "none"), gates=gates)
        check_choice("method", ("sum", "prod"), fuse=fuse)
        if not 1 <= memories <= len(channels) or items < 2 or not temperature > 0:
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
        self.multiple = 2 ** len(channels)
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
        """Return repaired images, in [0, 1], and what each memory did, coarsest first."""
        stages = self.encoder(image)
        recalls = [memory(z) for memory, z in zip(self.memories, reversed(stages), strict=False)]
        return self.decoder([recall.out for recall in recalls]), recalls

    def training_backbones(self) -> dict[str, Backbone]:
        """Return none: the backbone compares images only in scoring."""
        return {}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of repair, of the entropy and, if it has a weight, of the gate.

        This also logs the mean forget gate inside and outside the corruption, `gate_inside` and
        `gate_outside` (the paper claims that the first falls and the second stays high), and
        `memory_share`, the memory's part of what the decoder gets.
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
        gate, inside = kept[0], corrupted[0]
        self.report({"memory_share": recalls[0].share()})
        areas = {"gate_inside": inside, "gate_outside": 1 - inside}
        self.report({k: (gate * area).sum() / area.sum().clamp(min=1) for k, area in areas.items()})
        return terms

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
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

    def learn(self) -> None:
        """Start the memories' items from encodings of normal images."""
        generator = self.generator()
        memories: list[Any] = list(self.memories)
        self.encoder.train()  # its running statistics are still empty
        batches = self.normal_batches("train", START_IMAGES)
        stages = self.encoder(torch.cat([batch["image"] for batch in batches]))
        for memory, z in zip(memories, reversed(stages), strict=False):
            memory.start(z, generator)

    # ------------------------------------------------------------------------- segmentation

    def calibrate(self) -> None:
        """Compute mean and standard deviation of the maps of held-out normal images."""
        batches = self.normal_batches("holdout", THRESHOLD_IMAGES)
        maps = [self(batch["image"]).anomaly_map.flatten(1) for batch in batches]
        if maps:
            values = torch.cat(maps)
            moments = torch.stack([values.mean(), values.square().mean()])
            self.map_mean.copy_(moments[0])
            self.map_std.copy_((moments[1] - moments[0].square()).clamp(min=0).sqrt())

    def segment(self, anomaly_map: Tensor) -> Tensor:
        """Mark what exceeds mean + 3 standard deviations; open it by 3 x 3, drop small regions."""
        return opened(anomaly_map > self.map_mean + 3 * self.map_std, self.least_region)

    def on_test_start(self) -> None:
        """Calibrate, and find out once whether there is a threshold."""
        super().on_test_start()
        self.has_threshold = bool(self.map_mean.isfinite())

    def test_step(self, batch: Batch, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Predict, and score the segmentation if images were held out."""
        prediction = super().test_step(batch, batch_idx)
        if self.has_threshold:
            known = ~batch["label"] | batch["gt_mask"].flatten(1).any(dim=1)  # masks may be missing
            assert prediction.anomaly_map is not None
            found = self.segment(prediction.anomaly_map)[known]
            self.segmentation.update(found.flatten().int(), batch["gt_mask"][known].flatten().int())
            self.log_dict(self.segmentation, on_step=False, on_epoch=True)
        return prediction
