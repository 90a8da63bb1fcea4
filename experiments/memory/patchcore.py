"""PatchCore as the leading library has it, and one change at a time towards PNI's older preset.

    python experiments/memory/patchcore.py FOLDER CATEGORY [VARIANT ...]   # prints a table

FOLDER is in MVTec layout. VARIANT is a name of `VARIANTS`; default: all. They all see the
same features of ResNet-18 at 256 x 256.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.methods.pni.network import describe, describe_channels
from anomaly_lit.metrics.functional import auroc, average_precision
from anomaly_lit.nn.aggregate import smooth
from anomaly_lit.nn.bank import coreset, distances_to, nearest_rows, random_projection
from anomaly_lit.runs.build import build

GRID, BATCH, PROJECTION, NEIGHBOURS = (32, 32), 8, 64, 9
Maps = list[Tensor]


@dataclass(frozen=True)
class Settings:
    """How a bank is made and an image scored."""

    dim: int | None = None  # None: one value for each channel
    patch: int = 3
    ring: int = 0  # positions at each border that are left out
    drawn: int | None = None  # patches that the coreset is chosen from; None: all
    share_of_drawn: bool = False
    holdout: bool = False  # leave the images out that a run holds out
    weighted: bool = True  # PatchCore's weight of the image's score
    aligned: bool = False  # resize the map with aligned corners


LIBRARY = Settings()
BEFORE = Settings(256, 5, 2, 50_000, True, True, False, True)
VARIANTS = {
    "PatchCore": LIBRARY,
    "score without its weight": replace(LIBRARY, weighted=False),
    "a tenth of the images held out": replace(LIBRARY, holdout=True),
    "patches of 5 x 5": replace(LIBRARY, patch=5),
    "channels averaged to 256": replace(LIBRARY, dim=256),
    "border of 2 positions left out": replace(LIBRARY, ring=2),
    "1 % of 50,000 drawn": replace(LIBRARY, drawn=50_000, share_of_drawn=True),
    "1 % of all, chosen from 50,000": replace(LIBRARY, drawn=50_000),
    "map resized with aligned corners": replace(LIBRARY, aligned=True),
    "`pni_small` before, no conditions": BEFORE,
    "`pni_small` now, no conditions": replace(LIBRARY, drawn=50_000, holdout=True, weighted=False),
}


def main(root: str, category: str, *names: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    datamodule, method = built(root, category, 0.0)
    held, _ = built(root, category, 0.1)
    kept = {path for batch in held.normal_batches("train", None) for path in batch["path"]}
    batches = list(datamodule.normal_batches("train", None))
    mine = torch.tensor([path in kept for batch in batches for path in batch["path"]])
    train = features(method, batches)
    tested = list(datamodule.test_dataloader())
    test = features(method, tested)
    labels = torch.cat([batch["label"] for batch in tested])
    masks = torch.cat([batch["gt_mask"] for batch in tested]).flatten()
    print("| bank | vectors | image AUROC | pixel AP |\n| --- | --: | --: | --: |")
    for name in names or VARIANTS:
        settings = VARIANTS[name]
        bank = bank_of([m[mine] for m in train] if settings.holdout else train, settings)
        maps, scores = score(test, bank, settings)
        found = (auroc(scores, labels), average_precision(maps.flatten(), masks))
        cells = [f"{100 * float(value):.1f}" for value in found]
        print(f"| {name} | {len(bank)} | {cells[0]} | {cells[1]} |", flush=True)


def built(root: str, category: str, holdout: float) -> tuple[object, object]:
    overrides = [
        "method=pni_small", "dataset=mvtec_ad", f"dataset.root={root}", "output_dir=none",
        f"dataset.categories=[{category}]", f"dataset.holdout={holdout}",
    ]  # fmt: skip
    with initialize_config_dir(config_dir(), version_base="1.3"):
        datamodule, method = build(plain(compose("train", overrides)))
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    method.setup("fit")
    return datamodule, method


@torch.no_grad()
def features(method: object, batches: list) -> Maps:
    found = [method.backbone(batch["image"]) for batch in batches]
    return [torch.cat(maps) for maps in zip(*found, strict=True)]


def patches_of(maps: Maps, settings: Settings) -> list[Tensor]:
    """Return (B, rows, columns, dim) patches, batch by batch."""
    return [
        describe_channels(part, settings.patch, GRID)
        if settings.dim is None
        else describe(part, settings.patch, settings.dim, GRID)
        for part in zip(*(m.split(BATCH) for m in maps), strict=True)
    ]


def bank_of(maps: Maps, settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inside = slice(settings.ring, GRID[0] - settings.ring)
    found = [part[:, inside, inside].flatten(0, 2) for part in patches_of(maps, settings)]
    patches = torch.cat(found)
    count = math.ceil(0.01 * len(patches))
    if settings.drawn is not None and len(patches) > settings.drawn:
        patches = patches[torch.randperm(len(patches), generator=generator)[: settings.drawn]]
        if settings.share_of_drawn:
            count = math.ceil(0.01 * len(patches))
    return patches[coreset(random_projection(patches, PROJECTION, generator), count)]


def score(maps: Maps, bank: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return maps (B, 1, 256, 256) and scores (B,)."""
    found, scores = [], []
    for part in patches_of(maps, settings):
        queries = part.flatten(0, 2)
        rows = nearest_rows(queries, bank)
        gaps = distances_to(queries, bank, rows).view(len(part), 1, *GRID)
        if settings.ring:
            inside = slice(settings.ring, -settings.ring)
            gaps = F.pad(gaps[..., inside, inside], [settings.ring] * 4, mode="replicate")
        wide = F.interpolate(gaps, (256, 256), mode="bilinear", align_corners=settings.aligned)
        found.append(smooth(wide, 4.0))
        largest, place = gaps.flatten(1).max(dim=1)
        if settings.weighted:
            worst = torch.arange(len(part)) * math.prod(GRID) + place
            near = nearest_rows(bank[rows[worst, 0]], bank, NEIGHBOURS)
            away = distances_to(queries[worst], bank, near)
            largest = (1 - away.softmax(dim=1)[:, 0]) * largest
        scores.append(largest)
    return torch.cat(found), torch.cat(scores)


if __name__ == "__main__":
    main(*sys.argv[1:])
