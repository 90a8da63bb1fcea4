"""Video AE: auto-encoder of clips with time shifts, attention and memories (Yan et al., 2023).

From four frames of a clip the network predicts the next one; what moves in a way that normal clips
never showed is predicted badly. Shifting channels between frames brings in time (RTSM), the decoder
weighs its channels (RCAM), and every path from encoder to decoder leads through a memory of normal
patterns, so that details of anomalies cannot slip through.

Only abstracts were at hand. They fix these parts and that a loss keeps normal patterns apart.
Sizes, memory and score are those of MNAD (Park et al., CVPR 2020), the rest is ours:

- Frames are encoded one by one and fused by a 1 x 1 convolution at each level.
- `shift=conv` shifts at each level and adds a convolution; `plain` adds one shift of the fused
  coarsest map, as ASTNet does, whose parts this network seems to take.
- The finest level has no lateral to the decoder (0 in `skip_memory`): full detail lets anomalies
  through.
- The loss for patterns (`dispersion`) keeps the mean queries of two items apart. It takes the
  place of MNAD's triplet loss, `dispersion=false`.
- The squared distance of queries to their items is a mean over channels in the loss, as in MNAD's
  code. As a sum it would weigh as many times more as there are channels, and the queries, which
  carry the picture to the decoder, would shrink to the items.
- A single frame's score, which thresholds need, scales its two parts by their range on training
  clips. In a test of clips each part is scaled to [0, 1] within its clip, as published, which needs
  frames that come later.
- Left out: memories that are updated by test frames that look normal, and memories of whole maps.

With these sizes there are 21.7 million trainable parameters, of which 6.1 million are in the
shifts, the attention and the fusion over time.

Paper: Yan, Xiao, Wang, Sun: Video anomaly detection combining pedestrian spatiotemporal
information. Journal of Graphics 44, 2023; in English by Hu, Zhu, arXiv:2211.10052.
Status: works; measured small (experiments/video_ae), 3 points above a frame difference after 2000
steps.
Note: no code was published and its text was not at hand: the parts are the paper's, the sizes
MNAD's, the rest ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.video_ae.memory import Memory, Recall, dispersion, entropy, separation
from anomaly_lit.methods.video_ae.network import ClipNetwork
from anomaly_lit.nn.aggregate import check_multiple, smooth
from anomaly_lit.types import (
    Batch,
    FramePrediction,
    Prediction,
    UserError,
    check_choice,
    check_range,
)

WEIGHTS = {"predict": 0.1, "rebuild": 0.01}  # of the losses of the memories
RANGE_FRAMES = 128  # training frames from which the range of both parts of the score is taken


class VideoAE(Method):
    """Auto-encoder of clips.

    Args:
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        task: `predict` a frame from those before it, or `rebuild` it from itself.
        frames: Frames before it, as many as `dataset.layout.frames`; `rebuild` reads none.
        channels: Channels of the four levels, finest first, multiples of 16 for `shift`.
        shift: Temporal shift: `conv` at each level, `plain` once, or `none`.
        causal: Frames take features of earlier frames only, for use online.
        attention: Whether the decoder has residual channel attention.
        memory: Items of the memory at the coarsest level, at least 2.
        skip_memory: Items of the memories at the finer levels, coarsest first, at least 2; 0 leaves
            out the lateral of that level.
        compact_weight: Weight of the mean squared difference of queries and their items; None: 0.1
            for `predict`, 0.01 for `rebuild`.
        separate_weight: Weight of what keeps patterns apart; None: the same.
        dispersion: Keep mean patterns apart; false: MNAD's triplet loss of queries.
        entropy_weight: Weight of the entropy of reading, within `dispersion`.
        gradient_weight: Weight of the difference of the frames' gradients.
        error_weight: Share of the prediction error in the score, in [0, 1]; the rest is the
            distance to the memory. None: 0.6 for `predict`, 0.7 for `rebuild`.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: A value is unknown or out of range.
    """

    multiple = 8
    needs = frozenset({"frames"})
    ranges: Tensor

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        task: Literal["predict", "rebuild"] = "predict",
        frames: int = 4,
        channels: Sequence[int] = (64, 128, 256, 512),
        shift: Literal["conv", "plain", "none"] = "conv",
        causal: bool = False,
        attention: bool = True,
        memory: int = 10,
        skip_memory: Sequence[int] = (20, 20, 0),
        compact_weight: float | None = None,
        separate_weight: float | None = None,
        dispersion: bool = True,
        entropy_weight: float = 0.0,
        gradient_weight: float = 0.0,
        error_weight: float | None = None,
        smoothing: float = 4.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_choice("method", WEIGHTS, task=task)
        check_choice("method", ("conv", "plain", "none"), shift=shift)
        check_range("method", "[1, inf)", frames=frames, channels=channels)
        check_range("method", "[2, inf)", memory=memory)
        check_range("method", "[0, 1]", error_weight=error_weight)
        if len(channels) != 4 or len(skip_memory) != 3 or 1 in skip_memory or min(skip_memory) < 0:
            raise UserError(
                f"method.channels={list(channels)} must be four numbers, and skip_memory="
                f"{list(skip_memory)} three, each 0 or at least 2"
            )
        if shift == "plain" and channels[-1] % (16 * frames):
            raise UserError(
                f"method.channels={list(channels)}: for shift=plain the last must be a multiple of "
                f"{16 * frames}"
            )
        self.predicts = task == "predict"
        self.frames = frames
        weight = WEIGHTS[task]
        self.compact_weight = weight if compact_weight is None else compact_weight
        self.separate_weight = weight if separate_weight is None else separate_weight
        self.dispersion = dispersion
        self.entropy_weight = entropy_weight
        self.gradient_weight = gradient_weight
        error = (0.6 if self.predicts else 0.7) if error_weight is None else error_weight
        self.part_weights = (error, 1 - error)
        self.smoothing = smoothing
        self.network = ClipNetwork(
            frames if self.predicts else 1, channels, shift, causal, attention, memory, skip_memory
        )
        self.register_buffer("ranges", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # of both parts
        self._queries: list[Tensor] = []  # of this step, for the memories

    # ----------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean error of the frame, and the mean losses of the memories' queries."""
        return self.terms(batch)[0]

    def terms(self, batch: Batch) -> tuple[dict[str, Tensor], list[Recall]]:
        """Return the terms of the loss, and what each memory recalled."""
        target = 2 * batch["image"] - 1
        found, recalls = self.network(self.clip(batch["image"], batch.get("frames")))
        found = found.float()
        compact = torch.stack([r.distance.mean() / r.query.shape[1] for r in recalls]).mean()
        apart = [self.apart(r, m) for r, m in zip(recalls, self.memories(), strict=True)]
        terms = {
            "frame": (found - target).square().mean(),
            "compact": self.compact_weight * compact,
            "separate": self.separate_weight * torch.stack(apart).mean(),
        }
        if self.gradient_weight:
            pairs = zip(slopes(found), slopes(target), strict=True)
            away = torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()
            terms["gradient"] = self.gradient_weight * away
        return terms, recalls

    def apart(self, recall: Recall, memory: Memory) -> Tensor:
        """Return what keeps the patterns of a memory apart."""
        if not self.dispersion:
            return separation(recall, memory.items)
        apart = dispersion(recall)
        return apart + self.entropy_weight * entropy(recall) if self.entropy_weight else apart

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss, and note the queries that the memories follow after the step."""
        terms, recalls = self.terms(batch)
        self._queries = [recall.query.detach() for recall in recalls]
        return self.log_terms(terms, batch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Move the items after the weights, before a checkpoint is written; alike on all ranks."""
        super().optimizer_step(*args, **kwargs)
        for memory, queries in zip(self.memories(), self._queries, strict=True):
            items = self.all_gather(memory.updated(queries)).view(-1, *memory.items.shape)  # type: ignore[union-attr]
            memory.items.copy_(torch.nn.functional.normalize(items.mean(dim=0), dim=1))
        self._queries = []

    def memories(self) -> list[Memory]:
        """Return the memories that exist, coarsest first."""
        return [memory for memory in self.network.memories if isinstance(memory, Memory)]

    def clip(self, image: Tensor, frames: Tensor | None) -> Tensor:
        """Return what the network reads, (B, T, 3, H, W) in [-1, 1].

        An image without frames counts as one of a clip that stands still.

        Raises:
            UserError: The clip has another length, or its frames cannot be halved three times.
        """
        check_multiple(image.shape[-2:], self.multiple, "the stride of the coarsest level")
        if not self.predicts:
            return 2 * image[:, None] - 1
        if frames is None:
            frames = image[:, None].expand(-1, self.frames, -1, -1, -1)
        if frames.shape[1] != self.frames:
            raise UserError(
                f"method.frames={self.frames}, and the data set gives {frames.shape[1]} frames "
                "before each: set dataset.layout.frames to the same number"
            )
        return 2 * frames - 1

    # ------------------------------------------------------------------------------ scoring

    def calibrate(self) -> None:
        """Measure the range of both parts of the score on training frames."""
        batches = self.normal_batches("train", RANGE_FRAMES)
        parts = [self.judge(batch["image"], batch.get("frames")).parts for batch in batches]
        every = torch.cat(parts)
        self.ranges.copy_(torch.stack([every.amin(dim=0), every.amax(dim=0)], dim=1))

    def forward(self, image: Tensor, frames: Tensor | None = None) -> Prediction:
        """Score frames; without `frames` before them, as if nothing had moved."""
        anomaly_map, score, _ = self.judge(image, frames)
        return Prediction(anomaly_map, score)

    def judge(self, image: Tensor, frames: Tensor | None) -> FramePrediction:
        """Return the squared error at each pixel, the score, and its two parts.

        The parts are the negative peak signal-to-noise ratio in dB, and the mean squared distance
        of the coarsest queries to their items.
        """
        found, recalls = self.network(self.clip(image, frames))
        error = ((found + 1) / 2 - image).square().mean(dim=1, keepdim=True)
        noise = 10 * error.mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
        parts = torch.stack([noise, recalls[0].distance.mean(dim=(1, 2))], dim=1)
        low, high = self.ranges.unbind(dim=1)
        scaled = (parts - low) / (high - low).clamp(min=1e-8)
        score = (scaled * scaled.new_tensor(self.part_weights)).sum(dim=1)
        return FramePrediction(smooth(error, self.smoothing), score, parts)

    def predict_batch(self, batch: Batch) -> Prediction:
        """Score frames with those before them."""
        return self(batch["image"], batch.get("frames"))

    def test_step(self, batch: Batch, batch_idx: int) -> FramePrediction:  # type: ignore[override]
        """Score frames; the parts are for a normalisation within clips."""
        with torch.autocast(self.device.type, enabled=False):
            return self.judge(batch["image"], batch.get("frames"))


def slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the absolute differences of neighbours in (B, C, H, W), down and to the right."""
    return image.diff(dim=2).abs(), image.diff(dim=3).abs()
