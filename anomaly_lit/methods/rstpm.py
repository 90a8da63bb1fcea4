"""RSTPM: a second, reconstructing student (Yamada and Hotta, 2021, arXiv:2111.15376).

It extends STPM, student-teacher feature pyramid matching (Wang et al., BMVC 2021,
arXiv:2103.04257). Two students learn from two frozen teachers, on normal images only. The first
student sees the image and learns to predict the first teacher's maps. The second sees only the
first teacher's last map, a bottleneck with no room for the unexpected, and must predict the second
teacher's maps from coarse to fine; attention computed from the second teacher gates what it passes
on to finer stages. Each student gives three maps of 1 - cosine between it and its teacher. The two
maps of each scale are added, and the three sums are multiplied: this is the anomaly map.

The authors published no code, so this follows the text and an unofficial implementation.
Differences:

- The gate is (1 + a) x at both stages (`attention=residual`); the unofficial code has a x at the
  coarsest.
- The second student's learning rate rises over the first hundredth of training, and its gradient is
  clipped: with its transposed convolutions a rate of 0.4 is fragile.
- `width` makes the second student narrower, with a 1 x 1 convolution to the teacher's channels.
- The scale of the loss belongs to the learning rate of 0.4. STPM's official code takes the squared
  distance of unit vectors, 2 (1 - cosine), and averages over the batch: `loss_scale=2`.
  Re-implementations take half of it and sum over the batch (`loss_scale=32` at their batch of 32).
- The first student starts as torchvision's networks do, with all weights of its batch
  normalisations at 1; timm's would start the last ones of each block at 0.
- The discriminative network of the follow-up paper (arXiv:2210.07548) is not part of it.

Without a second teacher (`second_teacher=null`) this is STPM: the first pair alone.

With ResNet-18 and ResNet-50 the students have 2.8 and 101 million parameters.

Paper: Yamada, Hotta: Reconstruction Student with Attention for Student-Teacher Pyramid Matching.
arXiv:2111.15376.
Status: works; measured small (experiments/rstpm), not yet with the paper's teachers.
Note: no code by the authors; `backbone@method.teacher=` and `backbone@method.second_teacher=`
choose its two teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import check_multiple, smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range


class RSTPM(Method):
    """Student-teacher pyramid matching with a reconstructing second student.

    Args:
        teacher: Frozen; its last stage feeds the second student, the others are matched.
        second_teacher: Frozen; every stage is matched. Its strides are those of the first teacher's
            matched stages. None leaves the second pair out (STPM).
        optimizer: Builds the optimiser of both students.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of all gradients together.
        loss_scale: Factor of the loss, which is the mean of 1 - cosine over images and positions,
            summed over the stages.
        attention: The gate on a map x: `residual`: (1 + a) x; `mul`: a x; `none`: x.
        width: Channels inside the second student, divided by those of the second teacher.
        second_warmup: Share of training over which the second student's rate rises to its full
            value.
        second_clip: Largest norm of the second student's gradients; None does not clip.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: The teachers' strides do not fit each other.
    """

    def __init__(
        self,
        teacher: Backbone,
        second_teacher: Backbone | None,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        loss_scale: float = 2.0,
        attention: Literal["residual", "mul", "none"] = "residual",
        width: float = 1.0,
        second_warmup: float = 0.01,
        second_clip: float | None = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range(
            "method", "(0, inf)", width=width, loss_scale=loss_scale, second_clip=second_clip
        )
        check_range("method", "[0, 1]", second_warmup=second_warmup)
        check_range("method", "[0, inf)", smoothing=smoothing)
        check_choice("method", ("residual", "mul", "none"), attention=attention)
        if second_teacher is not None:
            check_strides(teacher, second_teacher)
            self.multiple = teacher.strides[-1]  # the second student doubles its map
        self.teacher = teacher
        self.second_teacher = second_teacher
        self.loss_scale = loss_scale
        self.second_warmup = second_warmup
        self.second_clip = second_clip
        self.smoothing = smoothing
        self.student = Student(teacher)
        self.second_student: ReconstructionStudent | None = None
        if second_teacher is not None:
            self.second_student = ReconstructionStudent(
                teacher.channels[-1], second_teacher.channels, width, attention
            )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `first` and `second`: a pair's mean 1 - cosine, summed over stages and scaled."""
        self.check_size(batch["image"])
        first = self.features(self.teacher, batch, "teacher")
        pairs = {"first": (first[:-1], self.student(batch["image"]))}
        if self.second_teacher is not None and self.second_student is not None:
            second = self.features(self.second_teacher, batch, "second_teacher")
            pairs["second"] = (second, self.second_student(first[-1], second))
        return {
            name: self.loss_scale
            * torch.stack([distance(t, s).mean() for t, s in zip(*pair, strict=True)]).sum()
            for name, pair in pairs.items()
        }

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        self.check_size(image)
        first = self.teacher(image)
        pairs = [zip(first[:-1], self.student(image), strict=True)]
        if self.second_teacher is not None and self.second_student is not None:
            second = self.second_teacher(image)
            pairs.append(zip(second, self.second_student(first[-1], second), strict=True))
        maps = [[at_size(distance(t, s), image.shape[-2:]) for t, s in pair] for pair in pairs]
        by_scale = [torch.stack(level).sum(dim=0) for level in zip(*maps, strict=True)]
        anomaly_map = smooth(torch.stack(by_scale).prod(dim=0), self.smoothing)  # (B, 1, H, W)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))

    def check_size(self, image: Tensor) -> None:
        """Refuse images whose coarsest map does not come back to the size of the others."""
        check_multiple(image.shape[-2:], self.multiple, "the stride of the teacher's coarsest map")

    def configure_optimizers(self) -> Any:
        """Return one optimiser; the second student's rate has a warm-up of its own."""
        students: list[Any] = [self.student, self.second_student]
        optimizer = self.optimizer([{"params": list(s.parameters())} for s in students if s])
        step = 1 / self.trainer.estimated_stepping_batches
        schedule = self.schedule or (lambda done: 1.0)
        warmup = max(self.second_warmup, step)
        rising = lambda done: schedule(done) * min((done + step) / warmup, 1.0)  # noqa: E731
        return self.scheduled(optimizer, [schedule, rising][: len(optimizer.param_groups)])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the second student's gradients, then all as the base class does."""
        if self.second_clip is not None and self.second_student is not None:
            nn.utils.clip_grad_norm_(self.second_student.parameters(), self.second_clip)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class Student(nn.Module):
    """The teacher's architecture with random weights, up to the last stage that is matched.

    Args:
        teacher: Gives the architecture and the normalisation of the input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, teacher: Backbone) -> None:
        super().__init__()
        self.network: Any = timm.create_model(
            teacher.name.split(".")[0],
            features_only=True,
            out_indices=teacher.out_indices[:-1],
            **teacher.options,
        )
        for module in self.network.modules():  # timm starts some at 0, torchvision none
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        self.register_buffer("mean", teacher.mean.clone(), persistent=False)
        self.register_buffer("std", teacher.std.clone(), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) in [0, 1] to the maps of all of the teacher's stages but the last."""
        return list(self.network((image - self.mean) / self.std))


class ReconstructionStudent(nn.Module):
    """Predicts the second teacher's maps from the first teacher's last map, coarse to fine.

    Args:
        bottleneck: Channels of the map it sees.
        channels: Channels of the predicted maps, finest first.
        width: See `RSTPM`.
        attention: See `RSTPM`.
    """

    def __init__(
        self, bottleneck: int, channels: Sequence[int], width: float, attention: str
    ) -> None:
        super().__init__()
        coarse_first = list(reversed(channels))
        inner = [max(int(width * count), 1) for count in coarse_first]
        self.residual = attention == "residual"
        self.stem = nn.Sequential(
            nn.Conv2d(bottleneck, inner[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(inner[0]),
            nn.ReLU(),
            BasicBlock(inner[0]),
        )
        before = [inner[0], *inner[:-1]]
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(given, made, 3, 2, padding=1, output_padding=1, bias=False),
                nn.BatchNorm2d(made),
                nn.Identity() if number == len(inner) - 1 else nn.ReLU(),
            )
            for number, (given, made) in enumerate(zip(before, inner, strict=True))
        )
        self.layers = nn.ModuleList(
            nn.Sequential(BasicBlock(count, project=number > 0), BasicBlock(count))
            for number, count in enumerate(inner)
        )
        self.adapters = nn.ModuleList(
            nn.Identity() if own == wanted else nn.Conv2d(own, wanted, 1)
            for own, wanted in zip(inner, coarse_first, strict=True)
        )
        gated = coarse_first[:-1] if attention != "none" else []
        self.gates = nn.ModuleList(SpatialAttention(count) for count in gated)

    def forward(self, bottleneck: Tensor, teacher: Sequence[Tensor]) -> list[Tensor]:
        """Return maps in the order and shapes of `teacher`, each taken before its gate.

        Args:
            bottleneck: (B, C, h, w).
            teacher: The second teacher's maps, finest first; used for the gates only.
        """
        maps = []
        x = self.stem(bottleneck)
        for number, (up, layer, adapter) in enumerate(
            zip(self.ups, self.layers, self.adapters, strict=True)
        ):
            x = layer(up(x))
            maps.append(adapter(x))
            if number < len(self.gates):
                gate = self.gates[number](teacher[-1 - number])
                x = x * (1 + gate) if self.residual else x * gate
        return maps[::-1]


class SpatialAttention(nn.Sequential):
    """A gate in (0, 1) for each position of a (B, C, h, w) map: (B, 1, h, w).

    Args:
        channels: Channels C of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 1),
            nn.Sigmoid(),
        )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation around a shortcut (ResNet).

    Args:
        channels: Channels in and out.
        project: Whether the shortcut is a 1 x 1 convolution with batch normalisation.
    """

    def __init__(self, channels: int, project: bool = False) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if project:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        return F.relu(self.shortcut(x) + self.body(x))


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return 1 - cosine of channel vectors, half their squared distance if normed: (B, 1, h, w)."""
    return 1 - F.cosine_similarity(teacher.float(), student.float(), dim=1)[:, None]


def at_size(map_: Tensor, size: Sequence[int]) -> Tensor:
    """Map (B, 1, h, w) to (B, 1, *size), bilinear."""
    return F.interpolate(map_, (size[0], size[1]), mode="bilinear")


def check_strides(teacher: Backbone, second_teacher: Backbone) -> None:
    """Raise `UserError` unless strides double and both teachers share those to be matched."""
    first, second = teacher.strides, second_teacher.strides
    doubling = all(2 * fine == coarse for fine, coarse in pairwise(first))
    if len(first) < 2 or first[:-1] != second or not doubling:
        raise UserError(
            f"the first teacher's stages have strides {first}, the second's {second}: all of the "
            "first but the last (each twice the one before) must be those of the second; set "
            "method.teacher.out_indices and method.second_teacher.out_indices"
        )
