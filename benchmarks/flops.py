"""How many operations a training step takes for one image, and GPU hours that follow.

    python benchmarks/flops.py

Builds the published networks with random weights and counts multiplications and additions of matrix
products and convolutions: those of the frozen backbone (its features may be cached), and those of
the trained parts forward and backward. The hours are an estimate at `SPEED`; no GPU is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain

SPEED = 30e12  # operations a second, in float32 without TF32 on an A100 or H100
IMAGES = {"MVTec AD": 3_629, "VisA": 8_659, "Real-IAD": 36_465}  # for training, all categories
SIDES = {"dinomaly": 392, "inp_former": 392, "reverse_distillation": 256}
TRAINING = {  # images that training reads, of a data set with so many
    "dinomaly": lambda images: 16 * (50_000 if images == IMAGES["Real-IAD"] else 10_000),
    "inp_former": lambda images: 200 * images,
    "reverse_distillation": lambda images: 200 * images,
}


def main() -> None:
    """Print a line for each method."""
    for name, side in SIDES.items():
        frozen, trained = operations(name, side)
        hours = {of: (frozen + trained) * TRAINING[name](count) / SPEED / 3600
                 for of, count in IMAGES.items()}  # fmt: skip
        told = ", ".join(f"{of} {value:.1f}" for of, value in hours.items())
        print(f"{name}: {frozen / 1e9:.0f} + {trained / 1e9:.0f} GFLOP an image; hours: {told}")


def operations(name: str, side: int) -> tuple[float, float]:
    """Return what an image costs in the frozen backbone and in the trained parts."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        overrides = [f"method={name}", f"image_size={side}", "output_dir=unused"]
        config = plain(compose("train", [*overrides, "method.backbone.weights=random"]))["method"]
    method: Any = instantiate(config)
    image = torch.rand(1, 3, side, side)
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        features = method.backbone(image)
    method.features = lambda *_, **__: features  # as if they were cached
    with FlopCounterMode(display=False) as trained:
        torch.stack(list(method.losses({"image": image}).values())).sum().backward()
    return frozen.get_total_flops(), trained.get_total_flops()


if __name__ == "__main__":
    main()
