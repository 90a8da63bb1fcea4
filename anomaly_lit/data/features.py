"""Keeping the features of frozen backbones, which are the same every time an image is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from anomaly_lit.data.cache import tell, watched
from anomaly_lit.types import Batch, UserError


class FeatureCache:
    """Maps of all training and held-out images, computed once, before the first step.

    Kept as the backbone gives them: a training step under bfloat16 reads bfloat16. On a GPU they
    lie there if they take at most a quarter of its free memory, else in main memory. All of them
    are kept or, where they need more than ``max_gb``, none; either is said.

    Args:
        max_gb: Largest main memory to use, in GB (1e9 bytes), for each process. Three stages of
            ResNet-18 at 256 x 256 take 0.0009 GB an image in bfloat16.
    """

    def __init__(self, max_gb: float = 4.0) -> None:
        if max_gb < 0:
            raise UserError(f"dataset.feature_cache.max_gb={max_gb}: give GB, at least 0")
        self.max_gb = max_gb
        self._rows: dict[str, int] = {}  # by the image's path
        self._maps: dict[str, list[Tensor]] = {}  # by backbone: (n, C, h, w) of each stage

    def __len__(self) -> int:
        """Count the images whose features are kept."""
        return len(self._rows)

    @torch.no_grad()
    def fill(
        self, backbones: Mapping[str, nn.Module], batches: Iterable[Batch], count: int
    ) -> None:
        """Compute what is not kept yet.

        Args:
            backbones: Frozen networks by name, each giving a list of maps.
            batches: The images, on the backbones' device.
            count: Images in all batches.
        """
        if not backbones or len(self) == count:
            return
        self._rows.clear()
        for batch in watched(batches, count, "Computing features", lambda b: len(b["path"])):
            start = len(self._rows)
            for name, backbone in backbones.items():
                maps = backbone(batch["image"])
                if not start and not self._reserve(name, maps, count, len(backbones)):
                    self._maps.clear()
                    return
                for kept, fresh in zip(self._maps[name], maps, strict=True):
                    kept[start : start + len(fresh)] = fresh
            self._rows |= {path: start + row for row, path in enumerate(batch["path"])}

    def get(self, paths: Sequence[str], device: torch.device) -> dict[str, list[Tensor]] | None:
        """Give the maps of some images by backbone, finest first; None if one is not kept."""
        rows = [self._rows.get(path, -1) for path in paths]
        if not self._maps or min(rows) < 0:
            return None
        index = torch.tensor(rows)
        return {
            name: [maps[index.to(maps.device)].to(device, non_blocking=True) for maps in stages]
            for name, stages in self._maps.items()
        }

    def _reserve(self, name: str, maps: Sequence[Tensor], count: int, backbones: int) -> bool:
        """Take the memory for all images; false where there is not enough."""
        needed = count * sum(stage[0].nbytes for stage in maps) / 1e9
        place = torch.device("cpu")
        if maps[0].is_cuda and 4e9 * needed * backbones <= torch.cuda.mem_get_info()[0]:
            place = maps[0].device
        elif needed * backbones > self.max_gb:
            tell(
                f"the features of {count} images take {needed * backbones:.1f} GB, more than "
                f"dataset.feature_cache.max_gb={self.max_gb:g}: computed in each step"
            )
            return False
        self._maps[name] = [
            torch.empty((count, *stage.shape[1:]), dtype=stage.dtype, device=place)
            for stage in maps
        ]
        return True
