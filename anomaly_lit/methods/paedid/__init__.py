"""PAEDID: patch auto-encoder based deep image decomposition (Mou et al., 2022, arXiv:2203.14457).

Training: an auto-encoder of small patches learns the normal background. Test: each image is
decomposed into a background that the auto-encoder knows, a defect that covers few pixels and is
smooth, and noise, by solving an optimisation problem. What has moved into the defect no longer
draws the background towards it, so that the defect keeps its contour.

Only the abstract was at hand: the auto-encoder, the energy, its weights and the solver are ours.

- The prior is a plug-in: each iteration draws the background towards the reconstruction of the
  image without its defect. For a projection this is the best background, and the same as drawing it
  towards its own reconstruction. An auto-encoder is none, above all after a short training: every
  further pass through it blurs, the background ran away from the image, and the defect was
  everywhere.
- If `sparsity` or `smoothness` is null, it is 2.5 or 1.5 standard deviations of the noise, which is
  what the auto-encoder fails to rebuild of held-out normal images. Lower weights find larger and
  fainter defects. Where more than 1 % of the pixels of normal images would be defects, as what is
  left has structure, such as blurred edges, the deviation counts as larger.
- A `sparsity` that follows from the noise is higher where normal images vary more, such as along
  the edges of a part, and lower elsewhere: a grid of 8 x 8 places.
- An image is not done before the prior has its full weight, with which fainter defects show.
- `solver=residual` is the comparison that only subtracts the reconstruction.
- Left out: a search for the background among the auto-encoder's codes by gradients, priors of
  low rank or by splines, and features of a frozen network as patches.

Scoring takes as long as several dozen passes through the auto-encoder. When it ends depends on the
image, so the method cannot be exported. The test reports the defect region itself as
`test/decomposition_iou` and others, next to the metrics of the map.

Paper: Mou, Cao, Bai, Huang, Shi, Shan: PAEDID: Patch Autoencoder Based Deep Image Decomposition
For Pixel-level Defective Region Segmentation. arXiv:2203.14457.
Status: works on drawn defects, in the mean of 15 textures ahead of a residual and of a low rank
where the defects are faint (experiments/paedid); measured small (experiments/small), three minutes
on magnetic_tile and ksdd: of real defects it finds next to nothing there. Not yet at the
experiment's size.
Note: no code was published and its text was not at hand: network, energy and solver are ours;
the docstring says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryJaccardIndex,
    BinaryPrecision,
    BinaryRecall,
)

from anomaly_lit.losses import ssim_map
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.paedid.network import PatchAutoencoder
from anomaly_lit.methods.paedid.solver import Decomposition, decompose, defect_in
from anomaly_lit.nn.regions import opened
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

TIE_BREAKER = 1e-3  # weight of the residual in the map: the defect alone is 0 at most pixels
NOISE_IMAGES = 64  # held-out images from which the noise is measured
DEVIATIONS = {"sparsity": 2.5, "smoothness": 1.5}  # of the noise, where a weight is not set
MOST_NORMAL = 0.01  # share of the pixels of normal images that may be defects
PLACES = 8  # rows and columns of places that each have their noise


class PAEDID(Method):
    """Patch auto-encoder based deep image decomposition.

    Args:
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        patch: Side of a patch, in pixels, a multiple of 8.
        stride: Pixels from one patch to the next; less is finer and slower.
        channels: Channels of the patch auto-encoder's three stages, finest first.
        latent: Numbers that describe a patch; the most important choice. Take the smallest whose
            `val/loss` is near that of 128.
        positions: Whether the decoder is told where a patch lies, for aligned objects.
        noise: Standard deviation of the noise on training images, in [0, 1].
        ssim_weight: Weight of the structural dissimilarity in training.
        solver: `decomposition`, or `residual`, the distance to the reconstruction.
        sparsity: Weight of the defect's size, in units of brightness; None: 2.5 deviations of the
            noise at its place.
        smoothness: Weight of the defect's total variation; None: 1.5 deviations of the noise.
        prior_weight: Weight of the prior in the first iteration.
        prior_growth: Factor of that weight in each further iteration.
        prior_most: Largest weight of the prior.
        iterations: Largest number of iterations.
        tolerance: Relative change of the defect at which an image is done.
        region: Top, left, bottom and right of where a defect may be, as shares of the image; None:
            everywhere.
        least_region: Smallest region of the segmentation, in pixels.

    Raises:
        UserError: A value is unknown or out of range.
    """

    optimises = True
    noise_std: Tensor
    noise_places: Tensor

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        patch: int = 32,
        stride: int = 8,
        channels: Sequence[int] = (32, 64, 128),
        latent: int = 64,
        positions: bool = False,
        noise: float = 0.02,
        ssim_weight: float = 0.1,
        solver: Literal["decomposition", "residual"] = "decomposition",
        sparsity: float | None = 0.05,
        smoothness: float | None = 0.03,
        prior_weight: float = 1.0,
        prior_growth: float = 1.1,
        prior_most: float = 10.0,
        iterations: int = 30,
        tolerance: float = 1e-3,
        region: Sequence[float] | None = None,
        least_region: int = 10,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_choice("method", ("decomposition", "residual"), solver=solver)
        check_range("method", "[1, inf)", iterations=iterations)
        check_range("method", "[0, inf)", sparsity=sparsity, smoothness=smoothness)
        check_range("method", "[0, inf)", prior_weight=prior_weight)
        if region is not None and not is_region(region):
            raise UserError(
                f"method.region={list(region)}: give top, left, bottom and right as shares in "
                "[0, 1], such as [0.1, 0.1, 0.9, 0.9]"
            )
        self.autoencoder = PatchAutoencoder(patch, stride, channels, latent, positions)
        self.noise = noise
        self.ssim_weight = ssim_weight
        self.solver = solver
        self.sparsity = sparsity
        self.smoothness = smoothness
        self.prior_weight = prior_weight
        self.prior_growth = prior_growth
        self.prior_most = prior_most
        self.iterations = iterations
        self.tolerance = tolerance
        self.region = region
        self.least_region = least_region
        self.register_buffer("noise_std", torch.full((), torch.nan))
        self.register_buffer("noise_places", torch.ones(1, 1, PLACES, PLACES))
        self.segmentation = MetricCollection(
            {
                "precision": BinaryPrecision(),
                "recall": BinaryRecall(),
                "f1": BinaryF1Score(),
                "iou": BinaryJaccardIndex(),
            },
            prefix="test/decomposition_",
        )

    # ----------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the errors of patches and of blended images rebuilt from noisy ones."""
        image = batch["image"]
        noisy = image + self.noise * torch.randn_like(image) if self.training else image
        rebuilt, patches = self.autoencoder(noisy)
        terms = {
            "patches": F.mse_loss(patches, self.autoencoder.unfold(image)),
            "image": F.mse_loss(rebuilt, image),
        }
        if self.ssim_weight:
            terms["ssim"] = self.ssim_weight * (1 - ssim_map(rebuilt, image).mean())
        return terms

    def calibrate(self) -> None:
        """Measure the noise: what the prior leaves of held-out normal images."""
        batches = self.normal_batches("holdout", NOISE_IMAGES)
        residuals = [b["image"] - self.prior(b["image"]) for b in batches]
        if residuals:
            self.measure(torch.cat(residuals))

    def measure(self, residual: Tensor) -> None:
        """Take the noise, and how strong it is at each place, from a residual (N, 3, H, W)."""
        self.noise_places.copy_(places_of(residual))
        self.noise_std.copy_(deviation(residual, spread(self.noise_places, residual)))

    # ------------------------------------------------------------------------------ scoring

    def prior(self, image: Tensor) -> Tensor:
        """Bring (B, 3, H, W) near to a normal image."""
        return self.autoencoder(image)[0]

    def decompose(self, image: Tensor) -> Decomposition:
        """Split images into background, defect and noise."""
        if self.solver == "residual":
            background = self.prior(image)
            none = torch.zeros(len(image), dtype=torch.long, device=image.device)
            return Decomposition(background, image - background, none)
        return decompose(
            image,
            self.prior,
            self.sparsity_in(image),
            self.weight_of("smoothness"),
            self.prior_weight,
            self.prior_growth,
            self.prior_most,
            self.iterations,
            self.tolerance,
            self.allowed(image),
        )

    def weight_of(self, name: str) -> float:
        """Return a weight of the energy: as set, or else from the measured noise.

        Raises:
            UserError: It is not set, and the noise is not known.
        """
        value = getattr(self, name)
        if value is not None:
            return value
        noise = float(self.noise_std)
        if noise != noise:
            raise UserError(
                f"method.{name} is null, so it follows from held-out images, and none is held out: "
                f"set dataset.holdout above 0, or method.{name}=0.05"
            )
        return DEVIATIONS[name] * noise

    def sparsity_in(self, image: Tensor) -> float | Tensor:
        """Return the weight of the defect's size, (1, 1, H, W) if it follows from the noise."""
        weight = self.weight_of("sparsity")
        return weight if self.sparsity is not None else weight * spread(self.noise_places, image)

    def allowed(self, image: Tensor) -> Tensor | None:
        """Return where a defect may be, (1, 1, H, W) bool; None: everywhere."""
        if self.region is None:
            return None
        height, width = image.shape[-2:]
        top, left, bottom, right = self.region
        inside = torch.zeros(1, 1, height, width, dtype=torch.bool, device=image.device)
        rows = slice(round(top * height), round(bottom * height))
        inside[..., rows, round(left * width) : round(right * width)] = True
        return inside

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        return self.judge(image, self.decompose(image))

    def judge(self, image: Tensor, parts: Decomposition) -> Prediction:
        """Return the defect's strength at each pixel, and the mean of the highest 0.5 % of it."""
        residual = (image - parts.background).norm(dim=1, keepdim=True)
        anomaly_map = parts.defect.norm(dim=1, keepdim=True) + TIE_BREAKER * residual
        flat = anomaly_map.flatten(1)  # (B, H * W)
        highest = flat.topk(max(1, flat.shape[1] // 200), dim=1).values
        return Prediction(anomaly_map, highest.mean(dim=1))

    def segment(self, defect: Tensor) -> Tensor:
        """Mark where (B, 3, H, W) is not 0, after a 3 x 3 opening, without small regions."""
        return opened(defect.norm(dim=1, keepdim=True) > 0, self.least_region)

    def test_step(self, batch: Batch, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Predict; count pixels of the defect region, and iterations as `test/iterations`."""
        with torch.autocast(self.device.type, enabled=False):
            parts = self.decompose(batch["image"])
            prediction = self.judge(batch["image"], parts)
        self.log("test/iterations", parts.iterations.float().mean(), batch_size=len(batch["image"]))
        known = ~batch["label"] | batch["gt_mask"].flatten(1).any(dim=1)  # masks may be missing
        if self.solver == "decomposition" and known.any():
            found = self.segment(parts.defect)[known]
            self.segmentation.update(found.flatten().int(), batch["gt_mask"][known].flatten().int())
            self.log_dict(self.segmentation, on_step=False, on_epoch=True)
        return prediction


def places_of(residual: Tensor) -> Tensor:
    """Return how strong a residual of normal images is at each place, relative to all of it.

    Args:
        residual: (N, 3, H, W), the images less their reconstructions.

    Returns:
        (1, 1, PLACES, PLACES), with a mean square of 1.
    """
    energy = residual.square().mean(dim=(0, 1), keepdim=True)
    places = F.adaptive_avg_pool2d(energy, PLACES)
    return (places / places.mean().clamp(min=1e-12)).sqrt()


def spread(places: Tensor, image: Tensor) -> Tensor:
    """Bring values of places, (1, 1, n, n), to the size of images (B, 3, H, W)."""
    return F.interpolate(places, image.shape[-2:], mode="bilinear", align_corners=False)


def deviation(residual: Tensor, places: float | Tensor = 1.0) -> Tensor:
    """Return the standard deviation of the noise that a residual of normal images is.

    It is raised in steps of 10 % until the weights that follow from it leave a defect at no more
    than 1 % of the pixels.

    Args:
        residual: (N, 3, H, W), the images less their reconstructions.
        places: Factor of the sparsity, (1, 1, H, W) if it differs by place.
    """
    noise = residual.square().mean().sqrt()
    while noise.isfinite() and share_of_defects(residual, noise, places) > MOST_NORMAL:
        noise = 1.1 * noise
    return noise


def share_of_defects(residual: Tensor, noise: Tensor, places: float | Tensor) -> float:
    """Return at how many pixels the weights that follow from the noise leave a defect."""
    sparsity, smoothness = DEVIATIONS["sparsity"] * noise * places, DEVIATIONS["smoothness"] * noise
    return float((defect_in(residual, sparsity, smoothness) != 0).any(dim=1).float().mean())


def is_region(values: Sequence[float]) -> bool:
    """Whether these are top, left, bottom and right of a region within [0, 1]."""
    if len(values) != 4:
        return False
    top, left, bottom, right = values
    return 0 <= top < bottom <= 1 and 0 <= left < right <= 1
