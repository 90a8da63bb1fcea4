"""NLN: nearest latent neighbours (Mesarcik et al., Array 2022, arXiv:2111.06150).

An auto-encoder often rebuilds an anomaly well. So an image is not compared with its own
reconstruction, but with those of its nearest training images in the space of codes: they contain
nothing but what is normal. The distance to these neighbours counts as well. Training is that of the
auto-encoder; neighbours enter only when images are scored. Any `nn.latent.LatentAutoencoder` can
be passed in, trained in one of five ways: plain, variational, adversarial, residual, consistent.

Large images are cut into patches. Each has a code, an error and a distance of its own; the map
shows them in place, and the worst patch gives the image's score.

Differs from the published code:

- Errors and distances are scaled by quantiles of held-out normal images. The code scales them by
  the smallest and largest value of the whole test set, and chooses the number of neighbours and
  the weight of the distance by the AUROC of the test set.
- The bank holds codes alone; neighbours are rebuilt when they are needed. It holds the patches of
  the grid, without their crops and rotations.
- Random crops are drawn anew in every step, anywhere in the image.
- Images have three channels, also where they are grey.
- The variational auto-encoder of the small network reads its 32 values from the code, the
  published one from the map before it.
- The consistent one compares codes by their squared difference; the published cross entropy is
  meant for values in [0, 1], which codes are not.
- Transposed 2 x 2 convolutions of the small network pad on the other side, which moves what they
  see by a pixel.
- Neighbours within a radius, an option of the code, are left out.

Paper: Mesarcik et al.: Improving Novelty Detection Using the Reconstructions of Nearest Neighbours.
Array 14, 2022, arXiv:2111.06150.
Status: works; measured small (experiments/small), and beside its own reconstruction
(experiments/memory): image AUROC 88.6 against 55.0 on toothbrush, 50.9 against 53.9 on solar cells.
Not yet at the paper's size.
Note: the authors' code is MIT; written from its description.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.nln.variants import VARIANTS
from anomaly_lit.nn.bank import Bank
from anomaly_lit.nn.latent import LatentAutoencoder
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

QUANTILES = (0.01, 0.99)  # of held-out images; they are scaled to 0 and 1


class NLN(Method):
    """Nearest latent neighbours.

    Args:
        autoencoder: Maps patches to codes and back. Images are multiples of its patch; where they
            are as large as a patch, images are scored as a whole.
        optimizer: Builds an optimiser; each phase of a training step has its own.
        schedule: Factor of the learning rates over training.
        gradient_clip: Largest norm of the gradients; for `plain` and `variational` only.
        variant: How the auto-encoder is trained: `plain`, `variational`, `adversarial` (codes look
            like normal noise), `residual` (errors are measured between a discriminator's
            features), `consistent` (GANomaly: errors are measured between codes).
        rates: Learning rates by phase: `reconstruct` and, where the variant has them,
            `discriminate`, `fool` and `encode`. Phases not named keep the published rate.
        neighbours: Number k of neighbours.
        alpha: Weight of the latent distance in the score, in [0, 1]; the error has 1 - alpha.
        distance: `mean` or `max` of the distances to the neighbours.
        error: What an image is compared with: the reconstructions of its `neighbours`, or its `own`
            (a usual auto-encoder, for comparison, which ignores alpha).
        crops: Random crops for each patch of the grid, in training.
        rotation: Chance that a crop is turned, by 90, 180 or 270 degrees.

    Raises:
        UserError: A value is out of range or unknown.
    """

    limits: Tensor

    def __init__(
        self,
        autoencoder: LatentAutoencoder,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        variant: Literal["plain", "variational", "adversarial", "residual", "consistent"] = "plain",
        rates: Mapping[str, float] | None = None,
        neighbours: int = 5,
        alpha: float = 0.4,
        distance: Literal["mean", "max"] = "max",
        error: Literal["neighbours", "own"] = "neighbours",
        crops: int = 1,
        rotation: float = 0.5,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_choice("method", VARIANTS, variant=variant)
        check_choice("method", ("mean", "max"), distance=distance)
        check_choice("method", ("neighbours", "own"), error=error)
        check_range("method", "[1, inf)", neighbours=neighbours)
        check_range("method", "[0, inf)", crops=crops)
        check_range("method", "[0, 1]", alpha=alpha, rotation=rotation)
        self.model = VARIANTS[variant](autoencoder)
        self.phases = list(self.model.phases())
        self.rates = dict(rates or {})
        if not set(self.rates) <= set(self.phases):
            raise UserError(
                f"method.rates names {', '.join(self.rates)}, but the phases of variant={variant} "
                f"are {', '.join(self.phases)}"
            )
        self.automatic_optimization = len(self.phases) == 1
        self.patch = self.multiple = autoencoder.patch
        self.neighbours = neighbours
        self.alpha = alpha
        self.distance = distance
        self.error = error
        self.crops = crops
        self.rotation = rotation
        self.bank = Bank(autoencoder.latent)
        # rows: errors of pixels, errors of patches, distances; columns: what is scaled to 0 and 1
        self.register_buffer("limits", torch.tensor([[0.0, 1.0]] * 3))

    # ------------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the auto-encoder's own phase."""
        return self.model.losses("reconstruct", self.patches(batch["image"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Take a step in each phase; all see the same patches."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        patches = self.patches(batch["image"])
        first, *others = self.optimizers()
        loss = self.log_terms(self.model.losses("reconstruct", patches), batch)
        assert loss is not None
        self.descend(first, loss)
        for phase, optimizer in zip(self.phases[1:], others, strict=True):
            terms = self.model.losses(phase, patches)
            self.report(terms)
            self.descend(optimizer, torch.stack(list(terms.values())).sum())
        return loss

    def configure_optimizers(self) -> Any:
        """Return an optimiser for each phase."""
        optimizers = []
        for name, phase in self.model.phases().items():
            group: dict[str, Any] = {"params": [p for m in phase.parts for p in m.parameters()]}
            rate = self.rates.get(name, phase.rate)
            optimizers.append(self.optimizer([group if rate is None else group | {"lr": rate}]))
        return [self.scheduled(optimizer) for optimizer in optimizers]

    def patches(self, image: Tensor) -> Tensor:
        """Return the patches of images, (N, 3, p, p); in training with random crops besides."""
        patches = cut(image, self.patch)
        if not self.training or not self.crops:
            return patches
        crops = random_crops(image, self.patch, self.crops * len(patches) // len(image))
        return torch.cat([patches, turned(crops, self.rotation)])

    # -------------------------------------------------------------------------------- scoring

    def calibrate(self) -> None:
        """Fill the bank, and take the limits of errors and distances from held-out images.

        If nothing is held out, the limits come from training images, each compared without itself.
        """
        batches = self.normal_batches("train", None)
        codes = [self.model.encode(cut(batch["image"], self.patch)) for batch in batches]
        self.bank.fill(torch.cat(codes))
        found = [self.compare(batch["image"]) for batch in self.normal_batches("holdout")] or [
            self.compare(batch["image"], skip=1) for batch in self.normal_batches("train")
        ]
        for row, values in enumerate(zip(*found, strict=True)):
            joined = torch.cat([value.flatten() for value in values])
            self.limits[row] = torch.stack([quantile(joined, share) for share in QUANTILES])

    def compare(self, image: Tensor, skip: int = 0) -> Comparison:
        """Compare images, patch by patch, with what normal ones look like.

        Args:
            image: (B, 3, H, W) in [0, 1].
            skip: Nearest neighbours to leave out; 1 for images that are in the bank themselves.
        """
        patches = cut(image, self.patch)
        codes = self.model.encode(patches)
        distances, rows = (
            found[:, skip:] for found in self.bank.nearest(codes, self.neighbours + skip)
        )
        near = codes[:, None] if self.error == "own" else self.bank.items[rows]
        rebuilt = self.model.decode(near.flatten(0, 1)).unflatten(0, near.shape[:2])
        return Comparison(
            (patches[:, None] - rebuilt).abs().mean(dim=(1, 2)),
            self.model.error(patches, codes, near, rebuilt).float(),
            distances.mean(dim=1) if self.distance == "mean" else distances.amax(dim=1),
        )

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        low, span = self.limits[:, 0], self.limits[:, 1] - self.limits[:, 0]
        scaled = zip(self.compare(image), low, span.clamp(min=1e-12), strict=True)
        pixel, patch, distance = ((value - least) / width for value, least, width in scaled)
        alpha = 0.0 if self.error == "own" else self.alpha
        maps = (1 - alpha) * pixel + alpha * distance[:, None, None]  # (N, p, p)
        score = (1 - alpha) * patch + alpha * distance  # (N,)
        return Prediction(
            join(maps[:, None], image.shape[-2:]), score.view(len(image), -1).amax(dim=1)
        )


class Comparison(NamedTuple):
    """How N patches differ from what normal ones look like."""

    pixel: Tensor  # (N, p, p), mean over channels and neighbours
    patch: Tensor  # (N,)
    distance: Tensor  # (N,), to the neighbours


def cut(image: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B * rows * columns, C, patch, patch), row by row.

    Raises:
        UserError: The sides of the images are no multiples of the patch.
    """
    height, width = image.shape[-2:]
    if height % patch or width % patch:
        raise UserError(
            f"images of {height} x {width} cannot be cut into patches of {patch}: set image_size "
            "to multiples of method.autoencoder.patch"
        )
    tiles = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, rows, p, columns, p)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join(patches: Tensor, size: torch.Size) -> Tensor:
    """Put the patches of `cut` together, (B, C, *size)."""
    side = patches.shape[-1]
    tiles = patches.unflatten(0, (-1, size[0] // side, size[1] // side))
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def random_crops(image: Tensor, patch: int, count: int) -> Tensor:
    """Return `count` random crops of each image, (B * count, C, patch, patch)."""
    number = len(image) * count
    places = torch.arange(patch, device=image.device)
    rows, columns = (
        torch.randint(side - patch + 1, (number,), device=image.device)[:, None] + places
        for side in image.shape[-2:]
    )
    owner = torch.arange(number, device=image.device) // count
    crops = image[owner[:, None, None], :, rows[:, :, None], columns[:, None]]  # (N, p, p, C)
    return crops.permute(0, 3, 1, 2)


def turned(patches: Tensor, chance: float) -> Tensor:
    """Turn square patches by 90, 180 or 270 degrees, each with some chance."""
    number, device = len(patches), patches.device
    turns = torch.randint(1, 4, (number,), device=device)
    turns = torch.where(torch.rand(number, device=device) < chance, turns, 0)
    every = torch.stack([patches.rot90(turn, (2, 3)) for turn in range(4)])
    return every[turns, torch.arange(number, device=device)]


def quantile(values: Tensor, share: float) -> Tensor:
    """Return the smallest of (n,) values that at least a share of them does not exceed."""
    return values.kthvalue(max(1, round(share * len(values)))).values
