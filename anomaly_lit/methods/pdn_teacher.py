"""PDN teacher: the distilled network that EfficientAD starts from (arXiv:2303.14535).

A small network, which sees patches of 33 x 33 pixels, learns to describe an image as a large
pretrained network does. The large one sees the image at twice the size. Each position of its maps
is described as in PatchCore: its 3 x 3 neighbours are averaged to a fixed number of values per
stage, and the stages are joined and averaged again. Each value is brought to mean 0 and standard
deviation 1, so a network that always gives the same answer has an error of 1.

At every validation the network is written to a file that also says where it comes from: backbone
and digest of its weights, digest of the images, steps, error on held-out images, commit.
`method=efficient_ad` reads it. A teacher is trained once and serves all categories. It should have
seen many different images: the paper takes those of ImageNet. A few hundred make a weak teacher,
which the error on held-out images shows. Never take images on which EfficientAD will be tested.

Follows the published re-implementation. Differs from it:

- Any backbone teaches. Stages with fewer than 1024 values are not averaged.
- A fixed share of each batch turns grey, where the re-implementation draws for each image. The
  features of the others can thus come from the cache. For this reason images are not cropped at
  random either.
- A score compares the small network with the large one, so that a run can be tested like others.

Paper: Batzner, Heckler, König: EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level
Latencies. WACV 2024, arXiv:2303.14535.
Status: works; measured small (experiments/small): EfficientNet-Lite0 taught `pdn_teacher_small` on
648 textures and solar cells at 256 x 256 for 1500 steps of 16: error 0.493 on 72 held-out images.
Not yet at the paper's size.
Note: a run of its own, once, before EfficientAD; its maps only show where the imitation fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.files import code_commit, tell
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import resize, shrink
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.pdn import PDN, Kind, channel_statistics, write_teacher
from anomaly_lit.synthesis.augment import turn_grey
from anomaly_lit.types import Batch, Prediction, UserError, check_range

FEW = 10_000  # images; with fewer, a run says that its teacher is weak


class PDNTeacher(Method):
    """Distillation of a patch description network.

    Args:
        backbone: The large network; the paper takes the second and third stage of
            WideResNet-101.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        pdn: `small` or `medium`.
        width: Channels of its first convolution; the paper takes 128 or 256.
        channels: Number of values that describe a position.
        pooled: Largest number of values that describe a position in one stage.
        grey: Share of each batch that turns grey; the number of images is rounded up.
        statistics: Largest number of images from which mean and standard deviation are taken.
        teacher_file: Where the small network is written; None writes no file.

    Raises:
        UserError: A number is out of range, or the backbone gives fewer than `channels` values.
    """

    multiple = 8
    needs_holdout = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        pdn: Kind = "small",
        width: int = 128,
        channels: int = 384,
        pooled: int = 1024,
        grey: float = 0.1,
        statistics: int = 10_000,
        teacher_file: str | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", pooled=pooled, statistics=statistics)
        check_range("method", "[0, 1]", grey=grey)
        given = sum(min(pooled, 9 * own) for own in backbone.channels)
        if given < channels:
            raise UserError(
                f"method.channels={channels} is more than the {given} values that "
                f"{backbone.name} gives: lower it, or ask for more stages "
                "(method.backbone.out_indices)"
            )
        self.backbone = backbone
        for number, kernel in enumerate(description_kernels(backbone.channels, pooled, channels)):
            self.register_buffer(f"kernel_{number}", kernel, persistent=False)
        self.grey = grey
        self.statistics = statistics
        self.teacher_file = teacher_file
        self.steps = 0
        self.teacher = PDN(pdn, width, channels, padding=True)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def learn(self) -> None:
        """Take mean and standard deviation of each value, and say if images are few."""
        count = 0

        def values() -> Iterator[Tensor]:
            nonlocal count
            for batch in self.normal_batches("train", self.statistics):
                count += len(batch["image"])
                yield self.describe(self.features(self.backbone, batch), batch["image"])

        mean, std = channel_statistics(values())
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))  # 0 where a value never changes
        if count < FEW and self.trainer.is_global_zero:
            tell(
                f"the teacher learns from {count} images: this is a weak teacher, which describes "
                "other things badly; the paper's learned from the 1.28 million of ImageNet"
            )

    def describe(self, maps: Sequence[Tensor], image: Tensor) -> Tensor:
        """Describe each position of the small network's map, (B, channels, H / 8, W / 8)."""
        grid = (image.shape[-2] // 8, image.shape[-1] // 8)
        with torch.autocast(image.device.type, enabled=False):
            values = [
                F.interpolate(F.conv2d(stage.float(), kernel, padding=1), grid, mode="bilinear")
                for stage, kernel in zip(maps, self.kernels(), strict=True)
            ]
            return torch.stack(values).sum(dim=0)

    def kernels(self) -> list[Tensor]:
        """Return the convolution that describes each stage."""
        return [self.get_buffer(f"kernel_{n}") for n in range(len(self.backbone.channels))]

    def errors(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Return the squared errors of the small network, (B, channels, H / 8, W / 8)."""
        target = (self.describe(maps, image) - self.mean) / self.std
        half = shrink(image, (image.shape[-2] // 2, image.shape[-1] // 2))
        return (self.teacher(half).float() - target).square()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared error; in training, some of the images turn grey."""
        image, maps = batch["image"], self.features(self.backbone, batch)
        count = math.ceil(self.grey * len(image)) if self.training else 0
        if count:
            grey = turn_grey(image[:count])
            image = torch.cat([grey, image[count:]])
            pairs = zip(self.backbone(grey), maps, strict=True)
            maps = [torch.cat([fresh, own[count:]]) for fresh, own in pairs]
        return {"imitation": self.errors(image, maps).mean()}

    def calibrate(self) -> None:
        """Write the small network, with its error on held-out images."""
        if self.teacher_file is None:
            return
        images = (batch["image"] for batch in self.normal_batches("holdout", None))
        errors = torch.cat([self.errors(i, self.backbone(i)).mean(dim=(1, 2, 3)) for i in images])
        error = float(errors.mean())
        if self.trainer.is_global_zero:
            write_teacher(self.teacher_file, self.teacher, self.facts(error))
            tell(
                f"{self.teacher_file}: error {error:.4f} on {len(errors)} held-out images, where "
                "a constant answer has 1"
            )

    def on_validation_start(self) -> None:
        """Calibrate, which writes the file anew: weights may have come from a checkpoint."""
        self.calibrated = False
        super().on_validation_start()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Count the steps of these weights, which are those of the file."""
        self.steps = self.trainer.global_step

    def get_extra_state(self) -> dict[str, Any]:
        """Return which hooks have run, and the steps of these weights."""
        return super().get_extra_state() | {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        super().set_extra_state(state)
        self.steps = state.get("steps", self.steps)

    def facts(self, error: float) -> dict[str, str]:
        """Say where the small network comes from.

        Args:
            error: Mean squared error on held-out images.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        own = self.backbone.identity()
        facts = {
            "backbone": f"{self.backbone.name} {own['out_indices']}",
            "backbone_weights": own["weights"],
            "images": len(data.train_samples),
            "images_digest": data.digest,
            "image_size": list(data.resize.size),
            "steps": self.steps,
            "held_out_error": error,
            "held_out_images": len(data.holdout_samples),
            "commit": code_commit(),
        }
        return {key: str(value) for key, value in facts.items()}

    def forward(self, image: Tensor) -> Prediction:
        """Score images by where the small network fails to imitate the large one."""
        error = self.errors(image, self.backbone(image)).mean(dim=1, keepdim=True)
        anomaly_map = resize(error, image.shape[-2:])  # (B, 1, H, W)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


def description_kernels(channels: Sequence[int], pooled: int, count: int) -> list[Tensor]:
    """Return PatchCore's description of a position as one fixed convolution for each stage.

    A stage's 3 x 3 neighbours, channel by channel, are averaged to at most `pooled` values; the
    values of all stages together are averaged to `count`. Both are sums with fixed weights, so one
    convolution can do both.

    Args:
        channels: Channels C of each stage, finest first.
        pooled: Largest number of values of one stage.
        count: Number of values that describe a position.

    Returns:
        Kernels (count, C, 3, 3), whose results are added.
    """
    stages = [averaging(9 * own, min(pooled, 9 * own)) for own in channels]
    joined = averaging(sum(map(len, stages)), count).split([*map(len, stages)], dim=1)
    return [(part @ own).view(count, -1, 3, 3) for part, own in zip(joined, stages, strict=True)]


def averaging(given: int, made: int) -> Tensor:
    """Return a matrix (made, given) that averages neighbouring values."""
    return F.adaptive_avg_pool1d(torch.eye(given), made).T
