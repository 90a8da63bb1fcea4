"""How maps should be brought to the image's size, without a test image.

    ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR python experiments/small/corners.py RUN ...

RUN is the folder of a trained run of a method with `align_corners` (Reverse Distillation, Dinomaly,
INP-Former). Its held-out images are scored as they are and with the defects
that `synthesis=mixed` draws, with aligned corners and as squares of pixels. The test images are
scored beside them and decide nothing. Image AUROC / pixel AP / AUPRO in per cent.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.inference.checkpoint import method_of, read_checkpoint
from anomaly_lit.metrics.functional import aupro, auroc, average_precision
from anomaly_lit.runs.build import build

MOST = 32  # held-out images
LEAST = 32  # images with drawn defects; a few held-out images are drawn on several times
Pairs = Iterable[tuple[Tensor, Tensor]]  # images (B, 3, H, W) and masks (B, 1, H, W)


def main(runs: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    for run in runs:
        checkpoint = read_checkpoint(newest(Path(run) / "checkpoints"))
        method = method_of(checkpoint).eval()
        datamodule, _ = build(checkpoint["anomaly_lit"]["config"], new=False)
        datamodule.setup("fit")
        held_out = [batch["image"] for batch in datamodule.normal_batches("holdout", MOST)]
        datamodule.setup("test")
        test = [(batch["image"], batch["gt_mask"]) for batch in datamodule.test_dataloader()]
        for name, pairs in (("drawn", list(drawn(held_out))), ("test", test)):
            for method.align_corners in (True, False):
                print(Path(run).name, name, method.align_corners, scores(method, pairs), flush=True)


def newest(folder: Path) -> Path:
    """Return the chosen step's weights, or else the last step's."""
    chosen = folder / "synthetic.ckpt"
    return chosen if chosen.exists() else folder / "last.ckpt"


def drawn(held_out: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield held-out images as they are, and then with defects."""
    yield from ((image, torch.zeros_like(image[:, :1])) for image in held_out)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        node = plain(compose("train", overrides=["synthesis=mixed"]))["dataset"]["synthesis"]
    synthesis, generator = instantiate(node), torch.Generator().manual_seed(0)
    for _ in range(-(-LEAST // sum(len(image) for image in held_out))):
        for image in held_out:
            yield synthesis(image, generator)[:2]


@torch.no_grad()
def scores(method: Any, pairs: Pairs) -> str:
    maps, masks, images = [], [], []
    for image, mask in pairs:
        anomaly_map, score = method(image)
        maps.append(anomaly_map)
        images.append(score)
        masks.append(mask.bool())
    anomaly_map, mask = torch.cat(maps).float(), torch.cat(masks)
    defective = mask.flatten(1).any(dim=1)
    found = (
        auroc(torch.cat(images), defective),
        average_precision(anomaly_map.flatten(), mask.flatten()),
        aupro(anomaly_map, mask),
    )
    return " / ".join(f"{100 * float(value):.1f}" for value in found)


if __name__ == "__main__":
    main(sys.argv[1:])
