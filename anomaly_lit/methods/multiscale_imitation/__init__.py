"""Multi-scale imitation: separate students on two pyramids, and a search for those that matter.

A frozen teacher sees the image at several sizes (image pyramid) and gives maps of several levels
(feature pyramid). Each level has a student of its own. On normal images it learns to make the
teacher's map of its level from the teacher's map of the level before. A scale and a level together
are a module; its map is the distance between teacher and imitation. Then the students are frozen,
and gradient descent finds one weight per module on a side task: the weighted sum of the maps must
show synthetic defects. Modules with little weight are left out, and a scale without modules is not
computed.

Only the abstracts were at hand. They fix the separate students, both pyramids and the search by
gradient descent with one weight per block. Everything else is ours:

- Level 1 has the same resolution and width before and after, so its student could copy its input:
  it begins with a bottleneck of 16 channels.
- Scaled images have sides that are multiples of the teacher's largest stride; otherwise maps of
  different levels would not align.
- The synthetic defects are those of `synthesis=general`, on half of the images (`defects`),
  less the fifth of them that this recipe leaves as they are.
- The search is the last stage of training (`shares`), so that an interrupted one goes on where it
  was. For the same reason checkpoints keep the students that were left out; they are not run.
- The module with the largest weight is always kept. While students learn, all count alike.

`metrics.json` names the modules that were kept, and gives parameters and multiply-adds before and
after, and how well both find synthetic defects in held-out normal images. The test set is not used
for this: `anomaly-test ckpt_path=FILE +method.modules=all` scores it with all modules, which then
count alike.

The students have 0.16, 0.68 and 2.72 million parameters with ResNet-18.

Paper: Ye, Zhou: Chinese Journal of Stereology and Image Analysis, 2021(4), 413-420; the same
abstract: Hu, Lai: Multi-scale Feature Imitation for Unsupervised Anomaly Localization,
arXiv:2212.05786.
Status: works; measured small (experiments/small), three minutes on each of three categories: behind
PatchCore or PaDiM by image AUROC, and a search of 26 steps saves 2 to 15 % of the multiply-adds.
One older run with 88 saved 31 % (toothbrush at 128 x 128, commit d8aec7a, image AUROC 98.3, without
a search 96.7). Not yet at the experiment's size.
Note: no code was published and its text was not at hand: only the idea is the paper's; networks,
losses and the search's task are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.multiscale_imitation.network import (
    ChainedStudent,
    SeparateStudents,
    at_scale,
    distance,
    inputs_of,
)
from anomaly_lit.methods.multiscale_imitation.search import (
    Fusion,
    balanced_bce,
    check_shares,
    compare,
    defects_in_some,
    told,
)
from anomaly_lit.nn.aggregate import smooth, top_mean
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.ranks import copy_first
from anomaly_lit.nn.stages import Stages
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

STAGES = ("students", "search")
NORMAL_IMAGES = 64  # that give the mean of each module's map


class MultiscaleImitation(Method):
    """Multi-scale feature imitation with a search for the importance of modules.

    Args:
        backbone: The frozen teacher. Its first stage is only an input, each further one a level.
        optimizer: Builds the optimiser.
        schedule: Factor of the students' learning rate over their stage.
        gradient_clip: Largest norm of the gradients.
        scales: Factors of the image's size, each once.
        student: `separate`: a network for each level, from the teacher's map before it. `chained`:
            one network from the image, as in STPM.
        share_scales: Whether all scales have the same students; otherwise each has its own.
        depth: Residual blocks of a separate student.
        bottleneck: Channels of the first layer of a separate student whose level has the same
            resolution as the one before; None leaves this layer out.
        search: `synthetic`: by gradient descent on synthetic defects. `normal_only`: weights are
            the inverse variances of the maps on normal images. `none`: all modules count alike.
        shares: Shares of training of the students and of the search; the second counts only for
            `search=synthetic`.
        defects: Share of the images that the search takes with what the recipe has drawn on them.
        entropy_weight: Weight of the entropy of the modules' weights, which favours few modules.
        search_rate: Learning rate of the search.
        keep: A module is kept if its weight exceeds this share of the weight that it would have if
            all counted alike, in [0, 1).
        modules: `kept`, or `all` with equal weights, to compare.
        fusion: How maps are combined: `weighted_sum`, or `product` over the levels of a scale and
            sum over the scales.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.
        score: `max` of the map, or `top`: the mean of its top 0.1 %.

    Raises:
        UserError: A number is out of range, a name is unknown, or the teacher has a single stage.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        scales: Sequence[float] = (1.0, 0.75, 0.5),
        student: Literal["separate", "chained"] = "separate",
        share_scales: bool = True,
        depth: int = 2,
        bottleneck: int | None = 16,
        search: Literal["synthetic", "normal_only", "none"] = "synthetic",
        shares: Sequence[float] = (12, 5),
        defects: float = 0.5,
        entropy_weight: float = 0.01,
        search_rate: float = 0.05,
        keep: float = 0.5,
        modules: Literal["kept", "all"] = "kept",
        fusion: Literal["weighted_sum", "product"] = "weighted_sum",
        smoothing: float = 4.0,
        score: Literal["max", "top"] = "max",
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", depth=depth, bottleneck=bottleneck)
        check_range("method", "(0, inf)", scales=scales, search_rate=search_rate)
        check_range("method", "[0, inf)", entropy_weight=entropy_weight, smoothing=smoothing)
        check_range("method", "(0, 1]", defects=defects)
        check_range("method", "[0, 1)", keep=keep)
        check_choice("method", ("separate", "chained"), student=student)
        check_choice("method", ("synthetic", "normal_only", "none"), search=search)
        check_choice("method", ("kept", "all"), modules=modules)
        check_choice("method", ("weighted_sum", "product"), fusion=fusion)
        check_choice("method", ("max", "top"), score=score)
        check_shares(shares, search == "synthetic")
        if len(set(scales)) < len(scales):
            raise UserError(f"method.scales={list(scales)}: give each scale once")
        if len(backbone.channels) < 2:
            raise UserError(
                f"method.backbone.out_indices={list(backbone.out_indices)}: give at least two "
                "stages; the first is the input of the first student"
            )
        self.backbone = backbone
        self.scales = list(scales)
        self.search = search
        self.defects = defects
        self.entropy_weight = entropy_weight
        self.search_rate = search_rate
        self.modules_used = modules
        self.product = fusion == "product"
        self.smoothing = smoothing
        self.score = score
        self.needs = frozenset({"corrupted"} if search == "synthetic" else ())
        self.leaves_unused = search == "synthetic"  # each stage leaves those of the other
        self.stages = Stages(
            {"students": shares[0], "search": shares[1] if search == "synthetic" else 0},
            self.start_stage,
        )
        self.levels = len(backbone.channels) - 1
        self.students = nn.ModuleList(
            ChainedStudent(backbone)
            if student == "chained"
            else SeparateStudents(backbone, depth, bottleneck)
            for _ in (scales[:1] if share_scales else scales)
        )
        self.fusion = Fusion(len(scales) * self.levels, keep)
        self.fusion.requires_grad_(search == "synthetic")

    # ----------------------------------------------------------------------------- the modules

    @property
    def names(self) -> list[str]:
        """Names of the modules, in order of their numbers: by scale, the finest level first."""
        return [f"x{scale:g} level {n + 1}" for scale in self.scales for n in range(self.levels)]

    @property
    def every(self) -> list[int]:
        """Numbers of all modules."""
        return list(range(len(self.scales) * self.levels))

    def distances(self, image: Tensor, chosen: Sequence[int]) -> dict[int, Tensor]:
        """Return the maps of chosen modules, (B, 1, h, w) in [0, 2], by number.

        Args:
            image: (B, 3, H, W) in [0, 1].
            chosen: Numbers of modules; a scale of which none is chosen is not computed.
        """
        strides = self.backbone.strides
        maps: dict[int, Tensor] = {}
        for place, scale in enumerate(self.scales):
            first = place * self.levels
            levels = [n - first for n in chosen if first <= n < first + self.levels]
            if not levels:
                continue
            seen = at_scale(image, scale, strides[-1])
            features = self.backbone(seen)
            students = self.students[min(place, len(self.students) - 1)]
            inputs = inputs_of(features, strides[1] // strides[0])
            for level, imitation in students(seen, inputs, levels).items():
                maps[first + level] = distance(features[1 + level], imitation)
        return maps

    # -------------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the current stage's terms; in evaluation all, so that values can be compared."""
        stage, _ = self.stages.at(self.done)
        terms: dict[str, Tensor] = {}
        if stage == "students" or not self.training:
            terms |= self.imitation_losses(batch)
        if stage == "search" or (not self.training and "search" in self.stages.names):
            terms |= self.search_losses(batch)
        return terms

    def imitation_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean distance of each level, summed over the scales."""
        maps = self.distances(batch["image"], self.every)
        means = torch.stack([maps[n].mean() for n in self.every]).view(-1, self.levels).sum(dim=0)
        return {f"level_{number + 1}": mean for number, mean in enumerate(means)}

    def search_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the side task, which train nothing but `fusion`."""
        image, truth = defects_in_some(
            batch["image"], batch["corrupted"], batch["corruption"], self.defects, self.generator()
        )
        with self._evaluating():  # students keep their running statistics
            maps = self.distances(image, self.every)
        fused = self.fusion.weighted_sum(maps, image.shape[-2:], self.fusion.alpha.softmax(0))
        return {
            "detection": balanced_bce(self.fusion.logits(fused), truth),
            "entropy": self.entropy_weight * self.fusion.entropy(),
        }

    def start_stage(self, name: str) -> None:
        """Put the maps of the frozen students on one scale when the search begins."""
        if name == "search":
            with self._evaluating(), torch.autocast(self.device.type, enabled=False):
                self.measure()
            copy_first(self.fusion)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin stages of training where they are due."""
        super().on_train_batch_start(batch, batch_idx)
        self.stages.enter(self.done)

    def training_backbones(self) -> dict[str, Backbone]:
        """Return none: a cache holds neither images of several scales nor corrupted ones."""
        return {}

    def configure_optimizers(self) -> Any:
        """Return one optimiser; the search has its own rate, constant and without decay."""
        groups: list[Any] = [{"params": list(self.students.parameters())}]
        if "search" in self.stages.names:
            own = {"lr": self.search_rate, "weight_decay": 0.0}
            groups.append({"params": list(self.fusion.parameters()), **own})
        return self.scheduled(
            self.optimizer(groups), [self.students_rate, lambda done: 1.0][: len(groups)]
        )

    def students_rate(self, done: float) -> float:
        """Return the factor of the students' learning rate at a share of training."""
        stage, within = self.stages.at(done)
        return self.schedule(within) if self.schedule and stage == "students" else 1.0

    # --------------------------------------------------------------------------------- scoring

    def normal_images(self) -> tuple[str, list[Batch]]:
        """Return normal images, held-out ones if there are any, and words for which they are."""
        held = [*self.normal_batches("holdout", NORMAL_IMAGES)]
        if held:
            return "held out", held
        return "trained on", [*self.normal_batches("train", NORMAL_IMAGES)]

    def measure(self) -> Tensor:
        """Take the mean of each module's map on normal images.

        Returns:
            The variance of each map after division by its mean.
        """
        maps = [self.distances(batch["image"], self.every) for batch in self.normal_images()[1]]
        values = [torch.cat([found[n].flatten() for found in maps]) for n in self.every]
        mean = torch.stack([value.mean() for value in values]).clamp(min=1e-8)
        self.fusion.mean.copy_(mean)
        return torch.stack([value.var() for value in values]) / mean.square()

    def calibrate(self) -> None:
        """Take the maps' means, and decide which modules are kept."""
        variance = self.measure()
        if self.search == "normal_only":
            inverse = 1 / variance.clamp(min=1e-8)
            self.fusion.settle(inverse / inverse.sum())
        else:  # without a search alpha is 0: all alike
            self.fusion.settle(self.fusion.alpha.softmax(0))

    def chosen(self) -> tuple[list[int], Tensor]:
        """Return the modules that score, and the weights of all."""
        if self.modules_used == "kept":
            return self.fusion.kept, self.fusion.weights
        return self.every, torch.full_like(self.fusion.weights, 1 / len(self.every))

    def fused(self, image: Tensor, chosen: Sequence[int], weights: Tensor) -> Tensor:
        """Return the anomaly map of chosen modules, (B, 1, H, W)."""
        maps, size = self.distances(image, chosen), image.shape[-2:]
        if self.product:
            joined = self.fusion.product(maps, size, self.levels)
        else:
            joined = self.fusion.weighted_sum(maps, size, weights)
        return smooth(joined, self.smoothing)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        anomaly_map = self.fused(image, *self.chosen())
        if self.score == "max":
            return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))
        return Prediction(anomaly_map, top_mean(anomaly_map, 0.001))

    # ------------------------------------------------------------------------------- reporting

    def outcome(self) -> dict[str, Any]:
        """Return what the search found, and cost and accuracy before and after it."""
        if self.search == "none":
            return {}
        names = [self.names[n] for n in self.fusion.kept]
        weights = self.fusion.weights
        arms = {
            "before": (self.every, torch.full_like(weights, 1 / len(weights))),
            "after": (self.fusion.kept, weights),
        }
        with self._evaluating(), torch.autocast(self.device.type, enabled=False):
            split, batches = self.normal_images()
            compared = compare(self.fused, arms, batches)
        return {
            "modules": len(self.every),
            "modules_kept": told(names, weights[self.fusion.kept].tolist()),
            **compared,
            "compared_on": f"synthetic defects in normal images ({split})",
        }
