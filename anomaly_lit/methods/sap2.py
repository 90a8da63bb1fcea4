"""SAP2 / CAP: adaptive projection of pretrained features (Gui et al., 2021, arXiv:2112.02597).

An image is compared with its nearest normal training images, by features of a frozen network. One
linear map projects the image and its neighbours; self-attention among the projected neighbours
mixes them to one vector, what a normal image like this one should be. The angle between the two is
the score. The map is trained to make this angle small. Mapping everything to one point would do
that best (collapse), so a constraint keeps what is projected close to what is given.

Whole images are scored (`localises` is false), as in the paper. With `maps=true` the head also
compares every position of the feature map with the nearest normal positions. That is our addition,
as is the number of its neighbours; the head is trained on whole images all the same, and the score
is that of the image.

Follows the paper's code. Differs from it:

- The attention that the code computes in the space of the given features is left out: neither the
  loss nor the score reads it.
- In training an image is left out of its neighbours by its number, not as the nearest one, which
  may be a duplicate.
- Where fewer training images than `neighbours` are left, all are taken, and the run says so.

Paper: Gui et al.: Constrained Adaptive Projection with Pretrained Features for Anomaly Detection.
IJCAI 2022, arXiv:2112.02597.
Status: works; measured small (experiments/small), and without its head (experiments/memory): image
AUROC 92.5 against 91.7 on toothbrush, 67.4 against 65.7 on solar cells. Not yet with the paper's
backbone.
Note: scores whole images; the authors' code has no licence: written from its description.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.files import tell
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import resize, smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.bank import Bank, coreset, nearest_rows, random_projection
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

RAW = 2  # neighbours of the score without the head, as in DN2
PROJECTED = 128  # values of a position when the coreset is chosen


class SAP2(Method):
    """Simple adaptive projection, constrained.

    Args:
        backbone: Frozen; its last map, averaged over positions, describes an image.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        neighbours: Number k of normal images that an image is compared with.
        constraint_weight: Weight (lambda) of the constraint; 0 leads to collapse.
        score: `adapted`: one minus the cosine between the projected image and the mixture of its
            neighbours; `raw`: the same to its two nearest neighbours, without the head, for
            comparison.
        maps: Also give an anomaly map, from every position of the backbone's last map.
        map_neighbours: Number of normal positions that a position is compared with.
        coreset_share: Share of the normal positions that are kept, in (0, 1].
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: A value is out of range or unknown.
    """

    localises = False

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        neighbours: int = 32,
        constraint_weight: float = 2.0,
        score: Literal["adapted", "raw"] = "adapted",
        maps: bool = False,
        map_neighbours: int = 9,
        coreset_share: float = 0.1,
        smoothing: float = 4.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", neighbours=neighbours, map_neighbours=map_neighbours)
        check_range("method", "[0, inf)", constraint_weight=constraint_weight, smoothing=smoothing)
        check_range("method", "(0, 1]", coreset_share=coreset_share)
        check_choice("method", ("adapted", "raw"), score=score)
        self.backbone = backbone
        self.neighbours = neighbours
        self.constraint_weight = constraint_weight
        self.score = score
        self.localises = maps
        self.map_neighbours = map_neighbours
        self.coreset_share = coreset_share
        self.smoothing = smoothing
        dim = backbone.channels[-1]
        self.head = AdaptiveProjection(dim)
        self.images = Bank(dim)  # row n is training image n
        self.positions = Bank(dim)  # empty without maps

    def learn(self) -> None:
        """Describe all training images and, for maps, choose positions."""
        indices, images, positions = [], [], []
        for batch in self.normal_batches("train", None):
            last = self.features(self.backbone, batch)[-1].float()
            indices.append(batch["index"])
            images.append(last.mean(dim=(2, 3)))
            if self.localises:
                positions.append(last.flatten(2).transpose(1, 2).flatten(0, 1))
        self.images.fill(torch.cat(images)[torch.cat(indices).argsort()])
        if self.neighbours >= len(self.images) and self.trainer.is_global_zero:
            tell(
                f"method.neighbours={self.neighbours}: there are {len(self.images)} training images"
                f", so each is compared with {len(self.images) - 1}"
            )
        if self.localises:
            self._choose(torch.cat(positions))

    def _choose(self, positions: Tensor) -> None:
        """Keep a coreset of (n, d) positions."""
        count = max(round(self.coreset_share * len(positions)), self.map_neighbours)
        generator = torch.Generator(positions.device).manual_seed(0)
        projected = random_projection(positions, PROJECTED, generator)
        self.positions.fill(positions[coreset(projected, count, title="Choosing positions")])

    # ------------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance to the mixture of neighbours, and the constraint."""
        given = self.features(self.backbone, batch)[-1].float().mean(dim=(2, 3))  # (B, d)
        near = self.near(given, batch["index"] if self.training else None)
        projected, expected = (part.float() for part in self.head(given, near))
        self.report({"cosine_between_images": mean_cosine(projected)})  # near 1 is collapse
        constraint = F.mse_loss(projected, given) + angle(projected, given).mean()
        return {
            "similarity": angle(projected, expected).mean(),
            "constraint": self.constraint_weight * constraint,
        }

    def near(self, given: Tensor, own: Tensor | None = None) -> Tensor:
        """Return the nearest training images of (B, d) features, (B, k, d), by their angle.

        Args:
            given: The features.
            own: (B,) numbers of training images, each left out of its own row.

        Raises:
            UserError: Fewer than two training images are known.
        """
        if len(self.images) < 2:
            raise UserError(
                f"SAP2 compares images with at least two training images and knows "
                f"{len(self.images)}: train first, load a checkpoint, or give more images"
            )
        most = min(self.neighbours, len(self.images) - 1)
        rows = nearest_by_angle(given, self.images.items, most + (own is not None))
        if own is not None:  # the others first, in their order
            others = (rows == own[:, None]).int().argsort(dim=1, stable=True)
            rows = rows.gather(1, others)[:, :most]
        return self.images.items[rows]

    # -------------------------------------------------------------------------------- scoring

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        last = self.backbone(image)[-1].float()
        given = last.mean(dim=(2, 3))
        near = self.near(given)
        if self.score == "raw":
            score = angle(given[:, None], near[:, :RAW]).mean(dim=1)
        else:
            score = angle(*self.head(given, near))
        return Prediction(self.map_of(last, image) if self.localises else None, score)

    def map_of(self, last: Tensor, image: Tensor) -> Tensor:
        """Return the map (B, 1, H, W) of (B, d, h, w) features."""
        given = last.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * h * w, d)
        rows = nearest_by_angle(given, self.positions.items, self.map_neighbours)
        found = angle(*self.head(given, self.positions.items[rows]))
        found = found.view(len(last), 1, *last.shape[-2:])
        return smooth(resize(found, image.shape[-2:]), self.smoothing)


class AdaptiveProjection(nn.Module):
    """Projects a vector and its neighbours, and mixes the neighbours by attention.

    Args:
        dim: Length d of a vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value, self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for part in (self.value, self.query, self.key):
            nn.init.xavier_uniform_(part.weight)

    def forward(self, given: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Project vectors (N, d), and mix their neighbours (N, k, d): (N, d) each.

        The order of the neighbours does not matter.
        """
        values = self.value(near)
        weights = self.query(values) @ self.key(values).transpose(1, 2)  # (N, k, k)
        attention = (weights / math.sqrt(near.shape[-1])).softmax(dim=-1)
        return self.value(given), (attention @ values + values).mean(dim=1)


def nearest_by_angle(queries: Tensor, items: Tensor, count: int) -> Tensor:
    """Return the rows of the items (n, d) with the smallest angle to each query (m, d)."""
    return nearest_rows(F.normalize(queries, dim=1), F.normalize(items, dim=1), count)


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Return one minus the cosine between vectors along the last axis, in [0, 2]."""
    return 1 - F.cosine_similarity(one, other, dim=-1)


def mean_cosine(vectors: Tensor) -> Tensor:
    """Return the mean cosine between different ones of (n, d) vectors; 0 for a single one."""
    count = len(vectors)
    total = F.normalize(vectors, dim=1).sum(dim=0).square().sum()
    return (total - count) / max(count * (count - 1), 1)
