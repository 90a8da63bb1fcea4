"""A cache of the features of frozen backbones, which are the same whenever an image is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from anomaly_lit.data.caches.memory import Place, checked_gb, gather
from anomaly_lit.data.companions import FEATURES
from anomaly_lit.data.images import Resize
from anomaly_lit.data.progress import warn_once, watched
from anomaly_lit.types import Batch, Sample, UserError, check_choice

Stored = Literal["float16", "bfloat16"]
BatchesOf = Callable[[list[Sample]], Iterable[Batch]]


@dataclass
class Kept:
    """The cached features of one backbone: blocks of each stage, and where an image's rows are."""

    dtypes: list[torch.dtype]  # type of each stage as the backbone returns it
    stages: list[list[Tensor]]  # by stage: blocks (n, C, h, w)
    places: dict[str, Place] = field(default_factory=dict)  # by the image's path


class FeatureCache:
    """Features of all training and held-out images, computed once before the first step.

    They keep the type that the backbone returns: a training step under bfloat16 reads bfloat16.
    They are kept on the GPU if they take at most a quarter of its free memory, else in main memory.
    Either all of them are kept or, if they need more than `max_gb`, none; a message says which.

    Args:
        max_gb: Largest main memory to use, in GB (1e9 bytes), for each process. Three stages of
            ResNet-18 at 256 x 256 take 0.0009 GB an image in bfloat16.
        dtype: Type to keep them in, `float16` or `bfloat16`: half the size of float32, with values
            rounded to 11 or 8 bits (by at most 0.05 % or 0.4 %). Training reads the rounded values
            in the backbone's type; scoring never does. None rounds nothing.
    """

    def __init__(self, max_gb: float = 4.0, dtype: Stored | None = None) -> None:
        self.max_gb = checked_gb(max_gb, "dataset.feature_cache")
        check_choice("dataset.feature_cache", get_args(Stored), dtype=dtype)
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._kept: dict[str, Kept] = {}  # by attribute path of the backbone

    def __len__(self) -> int:
        """Return the number of images whose features are in the cache."""
        return min((len(kept.places) for kept in self._kept.values()), default=0)

    @torch.no_grad()
    def fill(
        self,
        backbones: Mapping[str, nn.Module],
        samples: list[Sample],
        batches_of: BatchesOf,
        resize: Resize,
    ) -> None:
        """Compute the features that are not in the cache yet.

        Args:
            backbones: Frozen networks by name; each returns a list of maps.
            samples: The images.
            batches_of: Returns batches of given samples, in order, on the backbones' device.
            resize: Geometry of the images.

        Raises:
            UserError: A value is too large for `dtype`.
        """
        if not backbones or len(self) == len(samples):
            return
        self._kept.clear()
        start, count = 0, len(samples)
        batches = batches_of(samples)
        for batch in watched(batches, count, "Computing features", lambda b: len(b["path"])):
            for name, backbone in backbones.items():
                maps = backbone(batch["image"])
                if not start and not self._reserve(name, maps, count, len(backbones)):
                    self._kept.clear()
                    return
                kept = self._kept[name]
                for blocks, fresh in zip(kept.stages, maps, strict=True):
                    blocks[0][start : start + len(fresh)] = self.rounded(fresh)
                kept.places |= {path: (0, start + row) for row, path in enumerate(batch["path"])}
            start += len(batch["path"])

    def get(self, paths: Sequence[str], device: torch.device) -> dict[str, list[Tensor]] | None:
        """Return the maps of some images by backbone, finest first; None if any is missing."""
        found: dict[str, list[Tensor]] = {}
        for name, kept in self._kept.items():
            places = [kept.places.get(path) for path in paths]
            if None in places:
                return None
            rows = torch.tensor(places)
            found[name] = [
                gather(blocks, rows).to(device, non_blocking=True).to(dtype)
                for blocks, dtype in zip(kept.stages, kept.dtypes, strict=True)
            ]
        return found or None

    def rounded(self, values: Tensor) -> Tensor:
        """Convert maps to the type in which they are kept.

        Raises:
            UserError: A value is too large for that type.
        """
        if self.dtype is None:
            return values
        rounded = values.to(self.dtype)
        if rounded.isinf().any() and not values.isinf().any():
            raise UserError(
                f"features up to {float(values.abs().max()):g} do not fit float16 (at most 65504): "
                "set dataset.feature_cache.dtype=bfloat16 or null"
            )
        return rounded

    def on_device(self, needed: float, device: torch.device) -> bool:
        """Return whether features belong on the device: at most a quarter of a GPU's free memory.

        Args:
            needed: Size of the features of all backbones, in GB (1e9 bytes).
            device: Device of the backbones.
        """
        return device.type == "cuda" and 4e9 * needed <= torch.cuda.mem_get_info(device)[0]

    def _reserve(self, name: str, maps: Sequence[Tensor], count: int, backbones: int) -> bool:
        """Allocate memory for all images; return false if there is not enough."""
        dtypes = [self.dtype or stage.dtype for stage in maps]
        sizes = [stage[0].numel() * t.itemsize for stage, t in zip(maps, dtypes, strict=True)]
        needed = backbones * count * sum(sizes) / 1e9
        place = torch.device("cpu")
        if self.on_device(needed, maps[0].device):
            place = maps[0].device
        elif needed > self.max_gb:
            warn_once(
                f"the features of {count} images take {needed:.1f} GB, more than "
                f"dataset.feature_cache.max_gb={self.max_gb:g}: computed in each step"
            )
            return False
        blocks = [
            [torch.empty((count, *stage.shape[1:]), dtype=dtype, device=place)]
            for stage, dtype in zip(maps, dtypes, strict=True)
        ]
        self._kept[name] = Kept([stage.dtype for stage in maps], blocks)
        return True


def add_features(batch: Batch, cache: FeatureCache) -> Batch:
    """Return a batch with what a cache holds of its images and of their companions."""
    values: dict[str, Any] = {**batch}
    for images, key in FEATURES.items():
        paths = values.get("path" if images == "image" else f"{images}_path")
        maps = paths and cache.get(paths, batch["image"].device)
        values |= {key: maps} if maps else {}
    return cast(Batch, values)
