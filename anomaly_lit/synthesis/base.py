"""The base class of all recipes, and a mixture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.types import UserError, check_range


class Synthesis(nn.Module):
    """Base class of all recipes; a subclass implements `propose`.

    A call with a batch of images and a generator on the same device returns corrupted copies and
    masks of what was changed. All randomness comes from the generator. Outside the mask every
    pixel equals the image's, bit for bit.

    Args:
        probability: Share of images that are corrupted, in [0, 1].
        foreground: Corrupt only what differs from the colour of the image's border. Meant for
            objects on a plain background; a texture has no foreground.
        allow_empty: Accept that a recipe leaves an image unchanged. Otherwise a small disc of such
            an image is inverted, so that every chosen image is corrupted.

    Raises:
        UserError: The probability is out of range.
    """

    def __init__(
        self, probability: float = 1.0, foreground: bool = False, allow_empty: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise UserError(f"dataset.synthesis: probability={probability} must lie in [0, 1]")
        self.probability = probability
        self.foreground = foreground
        self.allow_empty = allow_empty

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Return changed images, and masks of the pixels to take from them.

        Args:
            image: (B, 3, H, W) float32 in [0, 1].
            generator: Source of all randomness.
            category: Category of each image, if known.

        Returns:
            (B, 3, H, W) float32, of which only the pixels inside the mask are used, and the mask,
            (B, 1, H, W) bool.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Corrupt images.

        Args:
            image: (B, 3, H, W) float in [0, 1].
            generator: Generator on the image's device.
            category: Category of each image, for recipes that copy from another image.

        Returns:
            `corrupted` (B, 3, H, W) in [0, 1], and `corruption` (B, 1, H, W) bool.
        """
        with torch.autocast(image.device.type, enabled=False):
            plain = image.float()
            source, corruption = self.propose(plain, generator, category)
            ground = foreground_of(plain) if self.foreground else torch.ones_like(corruption)
            corruption = corruption & ground
            if not self.allow_empty:
                disc = random_disc(ground, generator)
                empty = ~corruption.flatten(1).any(dim=1).view(-1, 1, 1, 1)
                source = torch.where(empty, 1 - plain, source)
                corruption = torch.where(empty, disc, corruption)
            corruption = corruption & (uniform(image, generator) < self.probability)
            return torch.where(corruption, source.clamp(0, 1).to(image.dtype), image), corruption


class Mixed(Synthesis):
    """Corrupt each image by one of several recipes.

    Args:
        recipes: Recipes by name, each with its own probability and options.
        weights: Weight of each recipe in the draw, by the same names.
        probability: Share of images that get a recipe at all.

    Raises:
        UserError: The names differ, a weight is negative, or all weights are 0.
    """

    def __init__(
        self,
        recipes: Mapping[str, Synthesis],
        weights: Mapping[str, float],
        probability: float = 1.0,
    ) -> None:
        super().__init__(probability, allow_empty=True)
        check_range("dataset.synthesis.weights", "[0, inf)", **weights)
        if set(recipes) != set(weights) or not any(weight > 0 for weight in weights.values()):
            raise UserError(
                f"dataset.synthesis.recipes names {', '.join(sorted(recipes)) or 'nothing'}, "
                f"dataset.synthesis.weights {', '.join(sorted(weights)) or 'nothing'}: use the "
                "same names in both, and at least one weight above 0"
            )
        self.recipes = nn.ModuleDict(recipes)
        total = sum(weights.values())
        self.shares = [weights[name] / total for name in recipes]

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Run each recipe on the images drawn for it; on a GPU, on all images.

        Selecting images on a GPU would make the CPU wait for it.
        """
        bounds = torch.tensor(self.shares[:-1], device=image.device).cumsum(dim=0)
        number = torch.bucketize(uniform(image, generator).flatten(), bounds, right=True)
        corrupted, corruption = image, torch.zeros_like(image[:, :1], dtype=torch.bool)
        for own, recipe in enumerate(self.recipes.values()):
            mine = number == own
            if not mine.is_cpu:
                source, changed = recipe(image, generator, category)
                corrupted = torch.where(mine.view(-1, 1, 1, 1), source, corrupted)
                corruption = torch.where(mine.view(-1, 1, 1, 1), changed, corruption)
            elif mine.any():
                rows = mine.nonzero()[:, 0]
                names = None if category is None else [category[row] for row in rows.tolist()]
                source, changed = recipe(image[rows], generator, names)
                corrupted = corrupted.index_copy(0, rows, source)
                corruption = corruption.index_copy(0, rows, changed)
        return corrupted, corruption


def check_pairs(interval: str, **pairs: Sequence[float] | None) -> None:
    """Refuse ranges that are not a smallest and a largest number in an interval; None passes.

    Raises:
        UserError: Names the range.
    """
    for name, pair in pairs.items():
        if pair is not None and (len(pair) != 2 or not pair[0] <= pair[1]):
            raise UserError(
                f"dataset.synthesis: {name}={list(pair)} must rise: give the smallest and "
                f"the largest number, in {interval}"
            )
    check_range("dataset.synthesis", interval, **pairs)


def uniform(
    image: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draw (B, 1, 1, 1) numbers, one per image of a batch, uniform in [low, high)."""
    draw = torch.rand(len(image), 1, 1, 1, generator=generator, device=image.device)
    return low + (high - low) * draw


def random_disc(ground: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a disc in each image, centred on a foreground pixel and clipped to the foreground.

    Its radius is a sixteenth of the image's shorter side.

    Args:
        ground: (B, 1, H, W) bool, the foreground; true somewhere in each image.
        generator: Draws the centres.

    Returns:
        (B, 1, H, W) bool.
    """
    height, width = ground.shape[-2:]
    count = ground.flatten(1).cumsum(dim=1, dtype=torch.int32)
    draw = torch.rand(len(ground), 1, generator=generator, device=ground.device)
    wanted = (draw * count[:, -1:]).int() + 1
    centre = torch.searchsorted(count, wanted).view(-1, 1, 1, 1)  # first pixel with that count
    rows, columns = pixel_grid(height, width, ground.device)
    row, column = centre // width, centre % width
    radius = max(min(height, width) / 16, 1.0)
    return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2) & ground


def pixel_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row numbers (H, 1) and column numbers (1, W), as floats."""
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None]
    return rows, torch.arange(width, device=device, dtype=torch.float32)[None, :]


def foreground_of(image: Tensor) -> Tensor:
    """Mark what differs from the median colour of an image's border.

    Otsu's threshold on the difference, then a morphological closing.

    Args:
        image: (B, 3, H, W) float32 in [0, 1].

    Returns:
        (B, 1, H, W) bool; all true where nothing differs.
    """
    edges = [image[:, :, 0], image[:, :, -1], image[:, :, :, 0], image[:, :, :, -1]]
    border = torch.cat(edges, dim=2).median(dim=2).values[..., None, None]
    distance = (image - border).abs().mean(dim=1, keepdim=True)
    ground = (distance > otsu(distance)).float()
    side = max(min(image.shape[-2:]) // 32, 1) * 2 + 1
    grown = F.max_pool2d(ground, side, stride=1, padding=side // 2)
    closed = -F.max_pool2d(-grown, side, stride=1, padding=side // 2) > 0.5
    return closed | ~closed.flatten(1).any(dim=1).view(-1, 1, 1, 1)


def otsu(values: Tensor, bins: int = 64) -> Tensor:
    """Return the threshold that best splits each image's values into two narrow classes.

    Args:
        values: (B, 1, H, W) float32, at least 0.
        bins: Number of histogram bins between 0 and the largest value.

    Returns:
        (B, 1, 1, 1) float32.
    """
    flat = values.flatten(1)
    greatest = flat.amax(dim=1, keepdim=True).clamp(min=1e-6)
    place = (flat / greatest * (bins - 1)).long()
    count = torch.zeros(len(flat), bins, device=flat.device)
    count.scatter_add_(1, place, torch.ones_like(flat))
    level = torch.arange(bins, device=flat.device, dtype=torch.float32)
    below, mass = count.cumsum(dim=1), (count * level).cumsum(dim=1)
    above = below[:, -1:] - below
    gap = mass / below.clamp(min=1) - (mass[:, -1:] - mass) / above.clamp(min=1)
    apart = below * above * gap.square()
    best = (apart >= apart.amax(dim=1, keepdim=True)).float()  # several if bins are empty
    middle = (best * (level + 0.5)).sum(dim=1, keepdim=True) / best.sum(dim=1, keepdim=True)
    return (middle / (bins - 1) * greatest).view(-1, 1, 1, 1)
