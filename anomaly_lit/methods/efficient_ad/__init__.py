"""EfficientAD: a student and an auto-encoder that follow a teacher (WACV 2024, arXiv:2303.14535).

A small distilled network, the teacher, describes each patch of an image. A student of the same
architecture learns the teacher's answer on normal images; only its largest errors count, so that it
does not learn to follow the teacher where it need not. An auto-encoder learns the teacher's answer
too; its bottleneck of 64 numbers lets through only what is usual in the image as a whole. The
second half of the student's channels learns the auto-encoder's answer, with all its blur.

The local map is the distance between teacher and student, the global one that between auto-encoder
and the student's second half. Each is scaled by two quantiles of held-out normal images, and their
mean is the anomaly map. The authors published no code; this follows the published
re-implementation. Differs from it:

- The teacher is a file that `method=pdn_teacher` wrote; without one nothing is trained.
- Maps lack four positions at each border of the image. They are filled with the nearest value; the
  code fills them with 0, which is more than most normal pixels have.
- Images for the penalty are seen whole, as the data set gives them; the code takes the middle of
  images of twice the side.
- The bottleneck is a single position at any `image_size`.

One model is meant for one category, and batches of one image: the largest errors are those of the
whole batch, on several devices those of all their batches. Quantiles need held-out images. Without
`penalty` no image of anything else is seen, and a run says so: the student is then not kept from
following the teacher everywhere.

**Patents** of MVTec in Japan (JP394418688) and Europe (EP 4145401 A1) may cover the method: have
this checked before commercial use.

Paper: Batzner, Heckler, König: EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level
Latencies. WACV 2024, arXiv:2303.14535.
Status: works; measured small (experiments/small): `efficient_ad_small` with its penalty at
128 x 128, 1000 steps of 4, upon a teacher of 648 textures and solar cells, gave mean image AUROC
87.2, pixel AP 32.0 and AUPRO 58.1 on four categories, behind PaDiM (89.7, 37.0, 76.7). Not yet at
the paper's size. One image takes 0.94 s on one thread of a CPU at the paper's size, and 0.02 s on
two in the small preset.
Note: needs a teacher, a run of `method=pdn_teacher`; written from a description of the published
re-implementation (Apache-2.0). **Patents** of MVTec (JP394418688, EP 4145401 A1) may cover the
method: have this checked before commercial use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.files import tell
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.efficient_ad.network import Autoencoder
from anomaly_lit.nn.pdn import LOST, PDN, Kind, channel_statistics, load_teacher
from anomaly_lit.nn.ranks import all_ranks, mean_of_marked, ranks
from anomaly_lit.synthesis.augment import change_one_colour, turn_grey
from anomaly_lit.types import Batch, Prediction, UserError, check_range

KEY = "method.teacher_weights"
LEAST = 1e-6  # least standard deviation of a channel that tells anything


class EfficientAD(Method):
    """EfficientAD.

    Args:
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        image_size: Height and width of the images, or one number for both; multiples of 32, at
            least 64.
        teacher_weights: File that a run of `method=pdn_teacher` wrote; `pdn`, `width` and
            `channels` must be those of that run.
        pdn: `small` or `medium`: the kind of teacher and student.
        width: Channels of their first convolution; the paper takes 128 or 256.
        channels: Channels of the teacher's map; the student's has twice as many.
        latent: Numbers of the auto-encoder's bottleneck, even.
        dropout: Share of the decoder's values that is dropped in training.
        hard_quantile: Quantile of a batch's squared errors, in [0, 1); the student learns from
            errors that are not below it.
        penalty: Whether the student also learns to answer 0 on images of something else, those of
            `dataset.outlier_dir`.
        penalty_grey: Chance that such an image turns grey.
        jitter: Largest relative change of brightness, contrast or saturation of the images that the
            auto-encoder sees in training.
        stae_detach: Whether the loss between student and auto-encoder trains the student only.
        map_quantiles: Two quantiles, rising, of the maps of held-out images; they become 0 and 0.1.

    Raises:
        UserError: A number is out of range.
    """

    multiple = 32
    needs_holdout = True
    needs_by_setting: Mapping[str, str] = {"outlier": "method.penalty=true"}
    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        image_size: int | Sequence[int] = 256,
        teacher_weights: str | None = None,
        pdn: Kind = "small",
        width: int = 128,
        channels: int = 384,
        latent: int = 64,
        dropout: float = 0.2,
        hard_quantile: float = 0.999,
        penalty: bool = False,
        penalty_grey: float = 0.3,
        jitter: float = 0.2,
        stae_detach: bool = False,
        map_quantiles: Sequence[float] = (0.9, 0.995),
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[0, 1)", hard_quantile=hard_quantile, dropout=dropout, jitter=jitter)
        check_range("method", "[0, 1]", penalty_grey=penalty_grey, map_quantiles=map_quantiles)
        if len(map_quantiles) != 2 or map_quantiles[0] >= map_quantiles[1]:
            raise UserError(f"method.map_quantiles={list(map_quantiles)}: give two, rising")
        self.teacher_weights = teacher_weights
        self.hard_quantile = hard_quantile
        self.penalty = penalty
        self.penalty_grey = penalty_grey
        self.jitter = jitter
        self.stae_detach = stae_detach
        self.map_quantiles = list(map_quantiles)
        self.needs = frozenset({"outlier"} if penalty else ())
        self.teacher = PDN(pdn, width, channels).requires_grad_(False)
        self.student = PDN(pdn, width, 2 * channels)
        self.autoencoder = Autoencoder(image_size, latent, channels, dropout)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.register_buffer("low", torch.zeros(1, 2, 1, 1))  # of the local and the global map
        self.register_buffer("high", torch.ones(1, 2, 1, 1))

    # ---------------------------------------------------------------------- before the start

    def check(self) -> None:
        """Read the teacher."""
        self.load_teacher()

    def learn(self) -> None:
        """Load the teacher, and take mean and standard deviation of its channels.

        Raises:
            UserError: There is no teacher, or a channel of it is constant.
        """
        facts = self.load_teacher()
        if self.trainer.is_global_zero:
            self.tell_of(facts)
        batches = self.normal_batches("train", None)
        mean, std = channel_statistics(self.teacher(batch["image"]) for batch in batches)
        constant = int((std < LEAST).sum())
        if constant:
            raise UserError(
                f"{KEY}={self.teacher_weights}: {constant} of {std.shape[1]} channels of the "
                "teacher are constant on the training images: distil another teacher"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)

    def load_teacher(self) -> dict[str, str]:
        """Read the teacher and return where it comes from.

        Raises:
            UserError: There is none, or it does not fit.
        """
        if self.teacher_weights is None:
            raise UserError(
                f"{KEY} is not set, and a random teacher teaches nothing: distil one from a folder "
                "of many different images with anomaly-train experiment=pdn_teacher "
                f"dataset.root=IMAGES {self.sizes()} output_dir=TEACHER (for a CPU see "
                f"conf/experiment/pdn_teacher.yaml), and set {KEY}=TEACHER/teacher.safetensors"
            )
        return load_teacher(self.teacher_weights, self.teacher, KEY)

    def tell_of(self, facts: Mapping[str, str]) -> None:
        """Print where the teacher comes from, and what is missing without the penalty."""
        tell(
            f"teacher: distilled from {facts['backbone']} in {facts['steps']} steps on "
            f"{facts['images']} images; error on held-out images "
            f"{float(facts['held_out_error']):.3f}"
        )
        if not self.penalty:
            tell(
                "no penalty: the student sees no images of other things; for the paper's "
                "training set method.penalty=true dataset.outlier_dir=DIR"
            )

    def sizes(self) -> str:
        """Name the settings that the teacher must share."""
        return " ".join(f"method.{name}={value}" for name, value in self.teacher.sizes.items())

    # ------------------------------------------------------------------------------ training

    def describe(self, image: Tensor) -> Tensor:
        """Return the teacher's normalised answer, (B, C, h, w), in float32."""
        with torch.no_grad():
            return (self.teacher(image).float() - self.mean) / self.std

    def follow(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's answers to the teacher and to the auto-encoder, (B, C, h, w)."""
        local, whole = self.student(image).float().chunk(2, dim=1)
        return local, whole

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the student and of the auto-encoder.

        A validation has no images of other things, and leaves the colours as they are.
        """
        image = batch["image"]
        local, _ = self.follow(image)
        terms = {"hard": hard_mean((self.describe(image) - local).square(), self.hard_quantile)}
        if self.penalty and "outlier" in batch:
            terms["penalty"] = self.follow(self.some_grey(batch["outlier"]))[0].square().mean()
        if self.training:
            with torch.autocast(image.device.type, enabled=False):
                image = change_one_colour(image, self.jitter, self.generator())
        rebuilt = self.autoencoder(image).float()
        terms["autoencoder"] = F.mse_loss(rebuilt, self.describe(image))
        target = rebuilt.detach() if self.stae_detach else rebuilt
        terms["student"] = F.mse_loss(self.follow(image)[1], target)
        return terms

    def some_grey(self, image: Tensor) -> Tensor:
        """Turn some of the images grey."""
        draw = torch.rand(len(image), 1, 1, 1, generator=self.generator(), device=image.device)
        return torch.where(draw < self.penalty_grey, turn_grey(image), image)

    # ------------------------------------------------------------------------------- scoring

    def distances(self, image: Tensor) -> Tensor:
        """Return the local and the global map, (B, 2, h, w)."""
        local, whole = self.follow(image)
        pairs = (self.describe(image), local), (self.autoencoder(image).float(), whole)
        maps = [(one - other).square().mean(dim=1) for one, other in pairs]
        return torch.stack(maps, dim=1)

    def calibrate(self) -> None:
        """Take the quantiles of each map over all pixels of all held-out images."""
        maps = [self.distances(batch["image"]) for batch in self.normal_batches("holdout", None)]
        values = torch.cat([map_.transpose(0, 1).flatten(1) for map_ in maps], dim=1)  # (2, N)
        ends = quantiles(values, self.map_quantiles)
        self.low.copy_(ends[:, 0].view_as(self.low))
        self.high.copy_(ends[:, 1].view_as(self.high))

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        spread = (self.high - self.low).clamp(min=1e-12)  # 0 where held-out maps are constant
        scaled = 0.1 * (self.distances(image) - self.low) / spread
        mean = F.pad(scaled.mean(dim=1, keepdim=True), [LOST] * 4, mode="replicate")
        anomaly_map = F.interpolate(mean, image.shape[-2:], mode="bilinear")  # (B, 1, H, W)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


def hard_mean(values: Tensor, quantile: float) -> Tensor:
    """Return the mean of all values that are not below their quantile.

    On several ranks these are the values of all; see `mean_of_marked`.

    Args:
        values: Any number of values, of any shape.
        quantile: In [0, 1); if it falls between two values, the larger one is the limit.
    """
    flat = values.flatten()
    everywhere = ranks() * len(flat)
    count = everywhere - math.ceil(quantile * (everywhere - 1))
    largest = all_ranks(flat.detach().topk(min(count, len(flat))).values)
    return mean_of_marked(flat, flat >= largest.topk(count).values[-1])


def quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Return quantiles of each row, linear between values; torch's takes at most 2^24 values.

    Args:
        values: (R, N) float.
        shares: Q numbers in [0, 1].

    Returns:
        (R, Q).
    """
    rising = values.sort(dim=1).values
    places = [share * (values.shape[1] - 1) for share in shares]
    below = [math.floor(place) for place in places]
    above = [math.ceil(place) for place in places]
    weight = rising.new_tensor([place - low for place, low in zip(places, below, strict=True)])
    return torch.lerp(rising[:, below], rising[:, above], weight)
