"""What an evaluation keeps of its images: scores and statistics of maps, joined over all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from anomaly_lit.calibration import verdict
from anomaly_lit.metrics import PixelMetrics, SegmentationMetrics
from anomaly_lit.types import Batch, Prediction, UserError

PIXELS_PER_MAP = 4096  # sampled from each held-out map for the colours and the centre of metrics
KEPT = ("path", "category", "defect_type")  # of each sample


class Maps(Protocol):
    """Whatever takes the maps of an evaluation."""

    def add(self, batch: Batch, maps: Tensor) -> None:
        """Take the maps of one batch, (B, 1, H, W)."""


class OfCategory(NamedTuple):
    """A category's images from all ranks, in the order of the data set, on the CPU."""

    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) bool
    paths: list[str]


class Records:
    """Score, label and names of the images of one evaluation.

    Tensors stay on the device until the end, so that no step waits for it.

    Args:
        maps: Takes the maps as well; None if there are none, or if nobody reads them.
    """

    def __init__(self, maps: Maps | None = None) -> None:
        self.maps = maps
        self.samples: list[dict[str, Any]] = []
        self.score: list[Tensor] = []

    def add(self, batch: Batch, prediction: Prediction) -> None:
        """Take one batch."""
        self.score.append(prediction.score.detach().float())
        for row, label in enumerate(batch["label"].tolist()):
            self.samples.append({key: batch[key][row] for key in KEPT} | {"label": label})  # type: ignore[literal-required]
        maps: Tensor | None = prediction.anomaly_map
        if self.maps is not None and maps is not None:
            self.maps.add(batch, maps.detach())

    def joined(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return scores and samples of all ranks, on the CPU, in the order of the data set.

        Every rank has to call this, and every rank gets everything. What is computed from it must
        therefore not be summed or gathered over ranks again.
        """
        scores = torch.cat(self.score).tolist() if self.score else []
        parts = gathered((scores, self.samples))
        return (
            torch.tensor(in_order([part[0] for part in parts]), dtype=torch.float32),
            in_order([part[1] for part in parts]),
        )

    def by_category(self) -> dict[str, OfCategory]:
        """Return the images of each category; every rank has to call this."""
        scores, samples = self.joined()
        rows: dict[str, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            rows[sample["category"]].append(index)
        return {
            name: OfCategory(
                scores[index],
                torch.tensor([samples[i]["label"] for i in index], dtype=torch.bool),
                [samples[i]["path"] for i in index],
            )
            for name, index in rows.items()
        }

    def rows(self, threshold_of: Callable[[str], float]) -> list[dict[str, Any]]:
        """Return one row per image with its score and verdict; every rank has to call this."""
        scores, samples = self.joined()
        return [
            {**sample, "score": score, **verdict(score, threshold_of(sample["category"]))}
            for sample, score in zip(samples, scores.tolist(), strict=True)
        ]


class MapMetrics(NamedTuple):
    """The metrics of the maps of one category."""

    pixel: PixelMetrics
    segmentation: SegmentationMetrics | None  # None without a threshold

    def to(self, device: torch.device) -> MapMetrics:
        """Move the states."""
        for metric in self.metrics():
            metric.to(device)
        return self

    def metrics(self) -> list[Metric]:
        """Return the metrics that exist."""
        return [metric for metric in self if metric is not None]

    def compute(self) -> dict[str, float]:
        """Return all values; all ranks have to call this together."""
        return {
            key: float(value)
            for metric in self.metrics()
            for key, value in metric.compute().items()
        }


class ScoredMaps:
    """Metrics of maps against the true masks, by category.

    Args:
        new_metrics: Makes the metrics of a category.
        crop: Height and width of the centre crop that counts; None is the whole map.
        device: Where to put the metrics of a category if this rank sees none of its images.
    """

    def __init__(
        self,
        new_metrics: Callable[[str], MapMetrics],
        crop: tuple[int, int] | None,
        device: torch.device,
    ) -> None:
        self.new_metrics = new_metrics
        self.crop = crop
        self.device = device
        self.of: dict[str, MapMetrics] = {}

    def add(self, batch: Batch, maps: Tensor) -> None:
        """Take the maps of one batch with their masks."""
        by_category: dict[str, list[int]] = defaultdict(list)
        for row, category in enumerate(batch["category"]):
            by_category[category].append(row)
        for category, rows in by_category.items():
            if category not in self.of:
                self.of[category] = self.new_metrics(category).to(maps.device)
            own = middle(maps[rows], self.crop), middle(batch["gt_mask"][rows], self.crop)
            pixel, segmentation = self.of[category]
            pixel.update(*own, [batch["path"][row] for row in rows])
            if segmentation is not None:
                segmentation.update(*own)

    def take(self, category: str) -> MapMetrics:
        """Return the metrics of a category and forget them here.

        A rank that saw none of its images returns empty metrics, since all ranks compute together.
        """
        if category in self.of:
            return self.of.pop(category)
        return self.new_metrics(category).to(self.device)


class NormalPixels(NamedTuple):
    """What calibration reads of a category's held-out maps, from all ranks, on the CPU."""

    drawn: Tensor  # a sample of each map's pixels, for the range
    highest: Tensor  # the highest pixels, for the pixel threshold
    number: int  # pixels within the crop

    @classmethod
    def of(cls, parts: Sequence[NormalPixels]) -> NormalPixels:
        """Join the statistics of several parts."""
        return cls(
            torch.cat([part.drawn for part in parts]),
            torch.cat([part.highest for part in parts]),
            sum(part.number for part in parts),
        )


class NormalMaps:
    """Statistics of the maps of held-out normal images, by category.

    Only the highest pixels are kept, as many as can end up above the threshold. The threshold is
    therefore exact and needs little memory: 65,536 pixels x 400 images x 0.001 take 100 kB.

    Args:
        share: Share of pixels that exceed the pixel threshold, in (0, 1).
        images: Number of held-out images on all ranks together; None keeps all pixels.
        crop: Height and width of the centre crop that counts for the threshold; None is the whole
            map.
    """

    def __init__(self, share: float, images: int | None, crop: tuple[int, int] | None) -> None:
        self.share = share
        self.images = images
        self.crop = crop
        self.drawn: dict[str, list[Tensor]] = defaultdict(list)
        self.highest: dict[str, Tensor] = {}
        self.number: dict[str, int] = defaultdict(int)

    def add(self, batch: Batch, maps: Tensor) -> None:
        """Take the maps of one batch."""
        stride = max(1, maps[0].numel() // PIXELS_PER_MAP)
        cropped = middle(maps, self.crop).flatten(1).float()
        for row, category in enumerate(batch["category"]):
            self.drawn[category].append(maps[row].flatten()[::stride].float())
            self.number[category] += cropped.shape[1]
            held = self.highest.get(category, cropped[:0, 0])
            self.highest[category] = self._highest(torch.cat([held, cropped[row]]), cropped[row])

    def _highest(self, values: Tensor, one_map: Tensor) -> Tensor:
        if self.images is None:
            return values
        most = math.floor(self.share * self.images * one_map.numel()) + 1
        return values.topk(most).values if len(values) > most else values

    def by_category(self) -> dict[str, NormalPixels]:
        """Return the statistics of each category; every rank has to call this."""
        own = {
            name: NormalPixels(torch.cat(self.drawn[name]).cpu(), self.highest[name].cpu(), number)
            for name, number in self.number.items()
        }
        parts: dict[str, list[NormalPixels]] = defaultdict(list)
        for of_rank in gathered(own):
            for name, pixels in of_rank.items():
                parts[name].append(pixels)
        return {name: NormalPixels.of(of_category) for name, of_category in parts.items()}


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks, to every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


def middle(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Cut the centre of `size` (height, width) out of (B, 1, H, W).

    Raises:
        UserError: The maps are smaller than the crop.
    """
    if size is None:
        return maps
    height, width = maps.shape[-2:]
    if height < size[0] or width < size[1]:
        raise UserError(
            f"callbacks.evaluation.pixel_crop={list(size)} is larger than the maps, which are "
            f"[{height}, {width}]: make it smaller, or null to score whole maps"
        )
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return maps[..., top : top + size[0], left : left + size[1]]


def crop_of(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return height and width of a crop.

    Raises:
        UserError: They are not positive whole numbers.
    """
    if size is None:
        return None
    sides = list(size) if isinstance(size, Sequence) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(
            f"callbacks.evaluation.pixel_crop={size}: give one positive whole number, "
            "[height, width], or null"
        )
    return sides[0], sides[1]


def in_order(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Undo the sharding of `ShardSampler`: the first of each rank, then the second, ..."""
    missing = object()
    rows = zip_longest(*parts, fillvalue=missing)
    return [item for row in rows for item in row if item is not missing]
