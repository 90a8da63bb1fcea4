"""PNI: position and neighbourhood information (Bae, Lee, Kim, ICCV 2023, arXiv:2211.12634).

A bank of normal patch features, as in PatchCore, knows which patches exist, not where they belong.
PNI asks two more questions of each patch: which patches were seen at this position in training (a
histogram), and which patches fit those around it (a network). The distance to the nearest patch of
the bank that the answer allows is the anomaly score; the two scores are averaged.

    S = -log max over allowed c of gamma exp(-gamma d(x, c)) = gamma min d(x, c) - log gamma

Follows the paper and the behaviour of the published code, with these differences:

- In the code the network sees the patch that it has to guess, since the code leaves out the wrong
  vector of the window. Here it does not, unless `include_center` is set. The code also assigns the
  network's output to items by rank instead of index; here it goes by index.
- An item is allowed if its probability exceeds tau / (number of items). The most probable one
  always is; the code's rule for a patch without an allowed item is not known to us.
- The greedy coreset works on vectors projected to `projection` values, and chooses among at most
  `candidates` patches drawn at random, so that memory stays within bounds for thousands of images.
- Codes are the first `codes` items of the bank, or all of it if it is smaller.
- Each step draws about `patches` patches, equally many of each image of the batch; an epoch of the
  code visits every patch.
- The border of the map, spoilt by padding, repeats the values inside. The published second bank for
  the border is `border=true`: then banks, histogram and map cover all positions.
- With `dim=null` no channels are averaged: a feature vector is the mean of the patch in each
  channel of each map. The published length, 1024, is two thirds of the channels of its two maps.
- No ensemble of backbones. The refinement of the map is a method of its own, `pni_refine`.

Train one category at a time: positions of several would be mixed. With the paper's numbers the
network has 205.5 million parameters.

Paper: Bae, Lee, Kim: PNI: Industrial Anomaly Detection using Position and Neighborhood Information.
ICCV 2023, arXiv:2211.12634.
Status: works; measured small (experiments/small, experiments/memory), not yet at the paper's size.
Note: the authors' code has no licence; written from a description of the paper and its behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.pni.network import NeighbourNetwork, describe, describe_channels
from anomaly_lit.nn.aggregate import grid_of, smooth
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.bank import (
    BLOCK,
    Bank,
    Reservoir,
    coreset,
    distances_to,
    nearest_rows,
    partial_distances,
    random_projection,
)
from anomaly_lit.nn.ranks import ranks
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

CONDITIONS = ("neighbourhood", "position")


class PNI(Method):
    """Position and neighbourhood information.

    Args:
        backbone: Frozen; the paper takes stages 2 and 3 of WideResNet101-2.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        image_size: Height and width that the method sees (after `dataset.center_crop`), or one
            number for both.
        stride: Pixels per position of the map; divides the image.
        conditions: What decides which items are allowed: `neighbourhood`, `position` or both; empty
            allows all, which is the distance of PatchCore.
        dim: Length of a feature vector; None takes one value for each channel of the backbone.
        patch: Side of a patch, in positions of each stage, odd.
        share: Share of all training patches that the bank keeps, in (0, 1].
        candidates: Largest number of patches that the bank is chosen from, and its largest size;
            each takes 4 * `dim` bytes.
        projection: Length of a vector while the bank is chosen.
        codes: Number of codes that the network tells apart.
        reach: Positions that a neighbourhood reaches to each side.
        width: Width of the network's hidden layers.
        depth: Number of its linear layers.
        dropout: Share of its hidden values that is dropped.
        neighbour_dim: Length to which neighbours are projected for the network; None: not at all.
        include_center: Let the network see the patch itself, as the published code does, which
            leaves out another vector of the window instead.
        patches: Patches in a training step, those of all devices together; rounded so that each
            image gives equally many.
        temperature: Divides the network's logits when scoring.
        gamma: Decay of the density around an item, above 0.
        tau: Threshold of the probability, in units of 1 / (number of items); below 0 allows all.
        smoothing: Standard deviation of the Gaussian filter on the map, in pixels.
        border: Use positions whose patch reaches beyond the image.

    Raises:
        UserError: A number is out of range, or a condition is unknown.
    """

    inner: Tensor

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        image_size: int | Sequence[int] = 480,
        stride: int = 8,
        conditions: Sequence[str] = CONDITIONS,
        dim: int | None = 1024,
        patch: int = 5,
        share: float = 0.01,
        candidates: int = 1_000_000,
        projection: int = 128,
        codes: int = 2048,
        reach: int = 4,
        width: int = 2048,
        depth: int = 10,
        dropout: float = 0.5,
        neighbour_dim: int | None = None,
        include_center: bool = False,
        patches: int = 2048,
        temperature: float = 2.0,
        gamma: float = 0.99,
        tau: float = 0.5,
        smoothing: float = 8.0,
        border: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_choice("method", CONDITIONS, conditions=conditions)
        if len(set(conditions)) < len(conditions):
            raise UserError(f"method.conditions={list(conditions)}: name each at most once")
        if patch % 2 == 0:
            raise UserError(f"method.patch={patch} must be odd")
        check_range("method", "(0, 1]", share=share)
        check_range("method", "(0, inf)", gamma=gamma, temperature=temperature)
        check_range("method", "[0, inf)", smoothing=smoothing)
        check_range("method", "[0, 1)", dropout=dropout)
        check_range(
            "method", "[1, inf)", dim=dim, patch=patch, candidates=candidates, reach=reach,
            projection=projection, width=width, neighbour_dim=neighbour_dim,
        )  # fmt: skip
        check_range("method", "[2, inf)", codes=codes, depth=depth, patches=patches)
        self.backbone = backbone
        self.conditions = tuple(conditions)
        self.dim = sum(backbone.channels) if dim is None else dim
        self.averaged, self.patch = dim is not None, patch
        self.share, self.candidates, self.projection = share, candidates, projection
        self.codes, self.reach, self.patches = codes, reach, patches
        self.temperature, self.gamma, self.tau = temperature, gamma, tau
        self.smoothing = smoothing
        self.grid = grid_of(image_size, stride)
        self.ring = 0 if border else patch // 2  # positions at each border that are left out
        self.register_buffer("inner", inner_positions(self.grid, self.ring), persistent=False)
        self.bank = Bank(self.dim)  # (n, dim), in the order chosen: its first items are the codes
        self.parents = Bank(dtype=torch.long)  # (n,) the code nearest to each item
        self.histogram = Bank(*self.grid)  # (n, rows, columns), p(item | position)
        self.network: NeighbourNetwork | None = None
        if "neighbourhood" in conditions:
            self.network = NeighbourNetwork(
                self.dim, codes, reach, width, depth, dropout, neighbour_dim, include_center
            )

    def describe(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the features of all patches, (B, rows, columns, dim), from the backbone's maps."""
        if not self.averaged:
            return describe_channels(maps, self.patch, self.grid)
        return describe(maps, self.patch, self.dim, self.grid)

    # --------------------------------------------------------------- what normal images tell

    def learn(self) -> None:
        """Take the bank and the histogram from all training images."""
        self.build(
            lambda: (self.features(self.backbone, b) for b in self.normal_batches("train", None))
        )

    def build(self, stream: Callable[[], Iterable[Sequence[Tensor]]]) -> None:
        """Fill the bank, its parents and the histogram.

        Args:
            stream: Gives the backbone's maps of normal images, batch by batch; called twice.
        """
        generator = torch.Generator(self.inner.device).manual_seed(0)  # the same on every rank
        reservoir, seen = Reservoir(self.candidates, generator), 0
        for maps in stream():
            patches = self.describe(maps).flatten(1, 2)[:, self.inner].flatten(0, 1)
            seen += len(patches)
            reservoir.add(patches)
        drawn = reservoir.drawn()
        short = random_projection(drawn, self.projection, generator)
        rows = coreset(short, math.ceil(self.share * seen), title="bank of patches")
        self.bank.fill(drawn[rows])
        self.parents.fill(nearest_rows(self.bank.items, self.code_items())[:, 0])
        if "position" in self.conditions:
            self.histogram.fill(self.count_items(stream()))

    def code_items(self) -> Tensor:
        """Return the vectors of the codes, (at most `codes`, dim).

        Raises:
            UserError: The bank is empty.
        """
        self.check_learned()
        return self.bank.items[: self.codes]

    def check_learned(self) -> None:
        """Raise if the bank is empty."""
        if not len(self.bank):
            raise UserError("PNI's bank of patches is empty: train first, or load a checkpoint")

    def count_items(self, stream: Iterable[Sequence[Tensor]]) -> Tensor:
        """Return p(item | position), (n, rows, columns); sums to 1 at each position.

        Each training patch counts for its nearest item, at all positions that are within `reach`.
        """
        places = math.prod(self.grid)
        counts = torch.zeros(len(self.bank) * places, device=self.inner.device)
        for maps in stream:
            patches = self.describe(maps).flatten(1, 2)[:, self.inner]  # (B, inner, dim)
            item = nearest_rows(patches.flatten(0, 1), self.bank.items)[:, 0]
            cell = item * places + self.inner.repeat(len(patches))
            counts.index_add_(0, cell, torch.ones_like(cell, dtype=counts.dtype))
        window = 2 * self.reach + 1
        near = F.avg_pool2d(
            counts.view(-1, 1, *self.grid), window, 1, self.reach, divisor_override=1
        )[:, 0]
        return near / near.sum(dim=0)

    # ------------------------------------------------------------------------------ training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross entropy of the codes of some patches, guessed from their neighbours."""
        if self.network is None:
            return {}
        patches = self.describe(self.features(self.backbone, batch))  # (B, h, w, dim)
        index = self.draw_positions(len(patches))
        wanted = nearest_rows(patches.flatten(0, 2)[index], self.code_items())[:, 0]
        logits = self.network(patches, index)[:, : len(self.code_items())]
        return {"neighbourhood": F.cross_entropy(logits.float(), wanted)}

    def draw_positions(self, images: int) -> Tensor:
        """Draw positions (M,), as many of each image and counted through all.

        They are the same in every evaluation.
        """
        if self.training:
            generator = self.generator()
        else:
            generator = torch.Generator(self.inner.device).manual_seed(0)
        each = max(1, round(self.patches / (images * ranks())))
        draw = torch.randint(
            len(self.inner), (images, each), generator=generator, device=self.inner.device
        )
        first = math.prod(self.grid) * torch.arange(images, device=draw.device)[:, None]
        return (first + self.inner[draw]).flatten()

    # ------------------------------------------------------------------------------- scoring

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class. The score is the map's maximum before it is resized."""
        scores = self.score_patches(self.describe(self.backbone(image)))[:, None]
        if self.ring:
            inside = slice(self.ring, -self.ring)
            scores = F.pad(scores[..., inside, inside], [self.ring] * 4, mode="replicate")
        # a position covers a square of pixels, as where `describe` resizes the coarser maps
        wide = F.interpolate(scores, image.shape[-2:], mode="bilinear", align_corners=False)
        return Prediction(smooth(wide, self.smoothing), scores.amax(dim=(1, 2, 3)))

    def score_patches(self, patches: Tensor) -> Tensor:
        """Map (B, h, w, dim) features to scores (B, h, w); distances are computed in blocks."""
        self.check_learned()
        index = torch.arange(patches[..., 0].numel(), device=patches.device)
        size = max(min(BLOCK // len(self.bank), self.patches), 1)  # as many windows as in training
        blocks = index.split(size)
        return torch.cat([self.score_some(patches, b) for b in blocks]).view(patches.shape[:3])

    def score_some(self, patches: Tensor, index: Tensor) -> Tensor:
        """Return the scores (M,) of the patches at some positions, averaged over conditions."""
        queries, items = patches.flatten(0, 2)[index], self.bank.items
        gaps = partial_distances(queries, items)  # (M, n)
        scores = []
        for allowed in self.allowed_items(patches, index) or [torch.ones_like(gaps) > 0]:
            nearest = gaps.masked_fill(~allowed, torch.inf).argmin(dim=1, keepdim=True)
            distance = distances_to(queries, items, nearest)[:, 0]
            scores.append(self.gamma * distance - math.log(self.gamma))
        return torch.stack(scores).mean(dim=0)

    def allowed_items(self, patches: Tensor, index: Tensor) -> list[Tensor]:
        """Return, for each condition, which items each of M patches may be: (M, n) bool."""
        allowed = []
        if self.network is not None:
            logits = self.network(patches, index)[:, : len(self.code_items())]
            share = (logits / self.temperature).softmax(dim=1)
            allowed.append(self.likely(share)[:, self.parents.items])
        if "position" in self.conditions:
            place = index % math.prod(self.grid)
            allowed.append(self.likely(self.histogram.items.flatten(1)[:, place].T))
        return allowed

    def likely(self, share: Tensor) -> Tensor:
        """Mark probabilities above tau / (number of items), and the largest of each row."""
        return (share > self.tau / len(self.bank)) | (share == share.amax(dim=1, keepdim=True))


def inner_positions(grid: tuple[int, int], ring: int) -> Tensor:
    """Return the positions at least `ring` away from the border, counted row by row.

    Raises:
        UserError: There are none.
    """
    rows, columns = grid
    if min(grid) <= 2 * ring:
        raise UserError(
            f"method.patch={2 * ring + 1} leaves no position of a map of {rows} x {columns} that "
            "is free of padding: raise image_size, or set method.border=true"
        )
    places = torch.arange(rows * columns).view(rows, columns)
    return places[ring : rows - ring, ring : columns - ring].flatten()
