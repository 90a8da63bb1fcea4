"""PMB: partition memory bank and histogram error estimation (Xing, Li, 2023, arXiv:2209.12441).

An auto-encoder rebuilds normal images. Skip connections would let it copy a defect, and a memory
that is read pixel by pixel rebuilds a defect from scraps of normal images. Here the laterals from
the encoder to the decoder are in turn plain skips and memories. Each memory is split: every part of
the map has its own slots, so that stored pieces keep their meaning. It is read by queries that see
a block and its neighbours. The error that remains in normal areas is estimated from the histogram
of the difference image and removed, at no cost in training.

We had the abstract and notes on the paper, not its text. The abstract states the ideas above; the
network, the number of slots, the form of queries, all constants and the rule of the histogram are
ours. They are arguments, and each part can be switched off. Slots and network learn together from
the loss of reconstruction and the entropy of reading (MemAE).

Partitions suit aligned objects. Set `partition=1` for textures and objects that are turned.

Paper: Xing, Li: Visual Anomaly Detection via Partition Memory Bank Module and Error Estimation.
IEEE TCSVT 33(8), 2023, arXiv:2209.12441.
Status: works; measured small (experiments/small), and beside itself without memories
(experiments/memory): they gain 9 to 19 points of image AUROC on toothbrush. Too short to compare.
Note: no code was published and its text was not at hand: network, constants and the rule of the
histogram are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.pmb.network import Decoder, PartitionMemory, entropy
from anomaly_lit.nn.aggregate import smooth
from anomaly_lit.nn.autoencoder import Encoder
from anomaly_lit.types import Batch, Prediction, UserError, check_range

LATERALS = ("none", "skip", "pmb")
GUARD_IMAGES = 64  # held-out images that bound what may be removed
GUARD_SHARE = 0.995  # of their pixels lie below it


class PMB(Method):
    """Auto-encoder with partition memories and histogram error estimation.

    Args:
        loss: Loss of rebuilt against given images, (B, 3, H, W) in [0, 1].
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        channels: Channels of the encoder's stages, each half the size of the one before.
        laterals: How each stage reaches the decoder, finest first: `none`, `skip` (as it is) or
            `pmb` (through a memory). The last is the bottleneck, which must not be `none`.
        partition: Parts per side of each stage's memory, finest first, or one number for all.
        slots: Vectors in each part of a memory.
        block: Side of the block that a query stands for, in positions; a query sees three blocks.
        temperature: Divides cosines before the softmax over the slots.
        entropy_weight: Weight of the entropy of reading.
        memory_rate: Learning rate of the slots, relative to the network's.
        hee: Remove the background error, estimated from the histogram of the difference image.
        bins: Bins of the histogram.
        box: Bins of the box that smooths it, odd.
        level: The background ends where the histogram falls below this share of its peak.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.
        top: Share of the pixels, those with the largest values, whose mean is the score; in (0, 1].

    Raises:
        UserError: A number is out of range, or there is not one lateral and partition per stage.
    """

    guard: Tensor

    def __init__(
        self,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        laterals: Sequence[str] = ("none", "pmb", "skip", "pmb", "pmb"),
        partition: int | Sequence[int] = (4, 4, 2, 2, 1),
        slots: int = 100,
        block: int = 2,
        temperature: float = 0.1,
        entropy_weight: float = 2e-4,
        memory_rate: float = 5.0,
        hee: bool = True,
        bins: int = 256,
        box: int = 5,
        level: float = 0.05,
        smoothing: float = 4.0,
        top: float = 0.005,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        parts = [partition] * len(channels) if isinstance(partition, int) else list(partition)
        check_laterals(laterals, len(channels), parts)
        if box % 2 == 0:
            raise UserError(f"method.box={box} must be odd")
        check_range("method", "[1, inf)", channels=channels, partition=parts, block=block, box=box)
        check_range("method", "[2, inf)", slots=slots, bins=bins)
        check_range("method", "(0, inf)", temperature=temperature, memory_rate=memory_rate)
        check_range("method", "[0, inf)", entropy_weight=entropy_weight, smoothing=smoothing)
        check_range("method", "(0, 1)", level=level)
        check_range("method", "(0, 1]", top=top)
        self.loss = loss
        self.entropy_weight = entropy_weight
        self.memory_rate = memory_rate
        self.hee = hee
        self.bins, self.box, self.level = bins, box, level
        self.smoothing = smoothing
        self.top = top
        self.laterals = tuple(laterals)
        self.encoder = Encoder(channels)
        self.memories = nn.ModuleDict(
            {
                str(number): PartitionMemory(channels[number], part, slots, block, temperature)
                for number, (kind, part) in enumerate(zip(laterals, parts, strict=True))
                if kind == "pmb"
            }
        )
        self.decoder = Decoder(channels, [kind != "none" for kind in laterals])
        units = [2 ** (int(n) + 1) * block * memory.parts for n, memory in self.memories.items()]
        self.multiple = math.lcm(2 ** len(channels), *units)
        self.register_buffer("guard", torch.full((), torch.inf))

    def rebuild(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return rebuilt images, in [0, 1], and each memory's attention, (B, windows, Q, slots)."""
        handed: list[Tensor | None] = []
        attentions = []
        for number, (kind, stage) in enumerate(
            zip(self.laterals, self.encoder(2 * image - 1), strict=True)
        ):
            if kind == "pmb":
                stage, attention = self.memories[str(number)](stage)
                attentions.append(attention)
            handed.append(None if kind == "none" else stage)
        return self.decoder(handed), attentions

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of reconstruction and the entropy of reading."""
        rebuilt, attentions = self.rebuild(batch["image"])
        terms = loss_terms(self.loss, rebuilt.float(), batch["image"])
        if attentions:
            entropies = torch.stack([entropy(attention) for attention in attentions])
            terms["entropy"] = self.entropy_weight * entropies.sum()
        return terms

    def configure_optimizers(self) -> Any:
        """Return one optimiser; the slots' rate is `memory_rate` times that of the rest."""
        slots = [memory.slots for memory in self.memories.values()]
        others = [p for name, p in self.named_parameters() if not name.endswith(".slots")]

        def factor(done: float) -> float:
            return 1.0 if self.schedule is None else self.schedule(done)

        if not slots:
            return self.scheduled(self.optimizer(others))
        groups = [{"params": others}, {"params": slots}]
        rates = [factor, lambda done: self.memory_rate * factor(done)]
        return self.scheduled(self.optimizer(groups), rates)

    # ------------------------------------------------------------------------------- scoring

    def difference(self, image: Tensor) -> Tensor:
        """Return the mean absolute difference over the channels, (B, 1, H, W) in [0, 1]."""
        return (image - self.rebuild(image)[0]).abs().mean(dim=1, keepdim=True)

    def calibrate(self) -> None:
        """Take from held-out images the largest difference that may count as background."""
        found = [
            self.difference(batch["image"]).flatten()
            for batch in self.normal_batches("holdout", GUARD_IMAGES)
        ]
        if found:
            values = torch.cat(found)
            self.guard.copy_(values.kthvalue(max(int(GUARD_SHARE * len(values)), 1)).values)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class.

        The score is that of the difference image as it is: what the histogram removes from each
        image is no longer comparable between images.
        """
        difference = self.difference(image)
        whole = smooth(difference, self.smoothing)
        values = whole.flatten(1)
        most = max(1, int(self.top * values.shape[1]))
        score = values.topk(most, dim=1).values.mean(dim=1)
        if not self.hee:
            return Prediction(whole, score)
        cut = background_level(difference, self.bins, self.box, self.level)
        cut = torch.minimum(cut, self.guard)
        return Prediction(smooth((difference - cut).clamp(min=0), self.smoothing), score)


def background_level(difference: Tensor, bins: int, box: int, level: float) -> Tensor:
    """Return the difference below which pixels count as background, (B, 1, 1, 1).

    The background is the peak of the histogram. It ends at the first bin to its right whose count
    falls below a share of the peak; if there is none, at the largest difference.

    Args:
        difference: (B, 1, H, W), at least 0.
        bins: Bins of each image's histogram, from 0 to its largest difference.
        box: Bins of the box that smooths the histogram, odd.
        level: The share of the peak.
    """
    values = difference.flatten(1)
    largest = values.amax(dim=1, keepdim=True)
    place = (values / largest.clamp(min=1e-12) * bins).long().clamp(max=bins - 1)
    counts = values.new_zeros(len(values), bins).scatter_add(1, place, torch.ones_like(values))
    counts = F.avg_pool1d(counts[:, None], box, 1, box // 2)[:, 0]
    peak, mode = counts.max(dim=1, keepdim=True)
    number = torch.arange(bins, device=values.device)
    ended = (number > mode) & (counts < level * peak)
    first = ended.int().argmax(dim=1, keepdim=True)
    cut = torch.where(ended.any(dim=1, keepdim=True), (first + 0.5) / bins * largest, largest)
    return cut.view(-1, 1, 1, 1)


def check_laterals(laterals: Sequence[str], stages: int, parts: Sequence[int]) -> None:
    """Raise unless each stage has a lateral and a partition, and the last one is not `none`."""
    unknown = sorted(set(laterals) - set(LATERALS))
    if unknown or len(laterals) != stages or laterals[-1] == "none":
        raise UserError(
            f"method.laterals={list(laterals)}: give one of {', '.join(LATERALS)} for each of the "
            f"{stages} stages, and not none for the last"
        )
    if len(parts) != stages:
        raise UserError(
            f"method.partition={list(parts)}: give {stages} numbers, one per stage, or a single one"
        )
