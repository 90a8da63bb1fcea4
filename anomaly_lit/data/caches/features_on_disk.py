"""A cache of the features of frozen backbones on disk: computed once for all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomaly_lit.data.caches.disk import reading
from anomaly_lit.data.caches.features import BatchesOf, FeatureCache, Kept, Stored
from anomaly_lit.data.caches.locks import need_locks
from anomaly_lit.data.caches.memory import gather
from anomaly_lit.data.caches.segments import Column, Draft
from anomaly_lit.data.caches.store import Store, cache_folder, file_key
from anomaly_lit.data.images import Resize
from anomaly_lit.data.progress import watched
from anomaly_lit.types import Sample, UserError


class DiskFeatureCache(FeatureCache):
    """`FeatureCache` in files, shared by all processes of a machine and by later runs.

    Features are identified by the image (path, size, times of change, geometry), the backbone
    (network, stages, normalisation, a hash of its weights), and the precision, memory layout,
    device and library versions that computed them. A step reads them from memory-mapped files, or
    from the GPU if all of them take at most a quarter of its free memory. Either all images of a
    backbone are kept or none.

    Args:
        folder: Folder of the files; None: that in ANOMALY_LIT_CACHE, else ~/.cache/anomaly_lit.
        max_gb: Largest size of all features in the folder, those of other runs included, in GB
            (1e9 bytes). The least recently used ones that no process uses are removed first.
        dtype: As for `FeatureCache`.
    """

    def __init__(
        self, folder: str | None = None, max_gb: float = 100.0, dtype: Stored | None = None
    ) -> None:
        super().__init__(max_gb, dtype)
        need_locks()
        self.folder = cache_folder(folder)
        self._stores: list[Store] = []  # their files stay marked as in use

    @torch.no_grad()
    def fill(
        self,
        backbones: Mapping[str, nn.Module],
        samples: list[Sample],
        batches_of: BatchesOf,
        resize: Resize,
    ) -> None:
        """Compute what no run has computed yet, as far as the disk space allows.

        Args:
            backbones: Frozen networks by name; each returns a list of maps and has `identity()`.
            samples: The images.
            batches_of: Returns batches of given samples, in order, on the backbones' device.
            resize: Geometry of the images.

        Raises:
            UserError: A backbone has no `identity()`, or a value is too large for `dtype`.
        """
        if not backbones or not samples or len(self) == len(samples):
            return
        found: dict[str, tuple[Kept, torch.device]] = {}
        keys = [file_key(sample.path) for sample in samples]
        self._kept.clear()
        for name, backbone in backbones.items():
            probe = backbone(next(iter(batches_of(samples[:1])))["image"])
            store = self._store(name, backbone, probe, resize)
            store.fill(keys, self._writer(backbone, samples, batches_of), whole=True)
            if not all(key in store.places for key in keys):
                return
            self._stores.append(store)
            places = {s.path: store.places[key] for s, key in zip(samples, keys, strict=True)}
            stages = [store.column(number) for number in range(len(probe))]
            found[name] = (Kept([m.dtype for m in probe], stages, places), probe[0].device)
        needed = sum(c.row_bytes for store in self._stores for c in store.columns) * len(keys) / 1e9
        for name, (kept, device) in found.items():
            moved = self.on_device(needed, device)
            self._kept[name] = _moved(kept, device) if moved else kept

    def _store(
        self, name: str, backbone: nn.Module, maps: Sequence[Tensor], resize: Resize
    ) -> Store:
        identity: Any = getattr(backbone, "identity", None)
        if identity is None:
            raise UserError(
                f"the features of {name} ({type(backbone).__name__}) cannot be kept on disk: it "
                "has no identity(), which says what they depend on. Choose cache=host, or "
                "give it one like anomaly_lit.nn.backbone.Backbone's"
            )
        device = maps[0].device
        subject = {
            "what": "features",
            "images": reading(resize),
            "backbone": identity(),
            "given": [str(stage.dtype) for stage in maps],
            "precision": [
                torch.is_autocast_enabled(device.type),
                str(torch.get_autocast_dtype(device.type)),
                torch.get_float32_matmul_precision(),
            ],
            "computed": [
                torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                torch.__version__,
                timm.__version__,
            ],
        }
        if channels_innermost(backbone):
            subject["layout"] = "channels_last"  # which rounds differently
        columns = [Column(tuple(stage.shape[1:]), self.dtype or stage.dtype) for stage in maps]
        return Store(
            self.folder / "features", subject, columns, self.max_gb, "dataset.feature_cache"
        )

    def _writer(self, backbone: nn.Module, samples: list[Sample], batches_of: BatchesOf) -> Any:
        def write(draft: Draft, chosen: list[int]) -> list[str]:
            batches = batches_of([samples[position] for position in chosen])
            start = 0
            for batch in watched(
                batches, len(chosen), "Computing features", lambda b: len(b["path"])
            ):
                draft.put(start, [self.rounded(m).cpu() for m in backbone(batch["image"])])
                start += len(batch["path"])
            return []

        return write


def channels_innermost(module: nn.Module) -> bool:
    """Return whether weights of convolutions have that layout, as with `step.channels_last`."""
    return any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in module.parameters()
    )


def _moved(kept: Kept, device: torch.device, rows: int = 64) -> Kept:
    """Copy features to another device, a few rows at a time, as one block for each stage."""
    paths = list(kept.places)
    at = torch.tensor(list(kept.places.values()))
    stages = []
    for blocks in kept.stages:
        shape = (len(paths), *blocks[0].shape[1:])
        whole = torch.empty(shape, dtype=blocks[0].dtype, device=device)
        for first in range(0, len(paths), rows):
            whole[first : first + rows] = gather(blocks, at[first : first + rows])
        stages.append([whole])
    return Kept(kept.dtypes, stages, {path: (0, row) for row, path in enumerate(paths)})
