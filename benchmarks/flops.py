"""How many operations a training step takes for one image, and GPU hours that follow.

    python benchmarks/flops.py

Builds the published networks with random weights and counts multiplications and additions of matrix
products and convolutions: those of the frozen backbone (its features may be cached), and those of
the trained parts forward and backward; EfficientAD's teacher is counted with the latter. The hours
are those of training alone, all categories together, and an estimate: at `SPEED`, and no step
faster than the host lets it be. No GPU is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain

SPEED = 30e12  # operations a second in float32, about half of an H100's; an A100 has 19.5 at most
HOST = 0.03  # seconds that launching a step takes at least; the others' steps are longer
SETS = {"MVTec AD": (3_629, 15), "VisA": (8_659, 12), "Real-IAD": (36_465, 30)}  # train, categories
SETTINGS = {
    "dinomaly": ["image_size=392", "method.backbone.weights=random"],
    "inp_former": ["image_size=392", "method.backbone.weights=random"],
    "reverse_distillation": ["image_size=256", "method.backbone.weights=random"],
    "efficient_ad": ["image_size=256", "method.penalty=true"],
}
MEDIUM = ["method.pdn=medium", "method.width=256"]  # EfficientAD-M


def main() -> None:
    """Print a line for each method."""
    for name, overrides in SETTINGS.items():
        report(name, name, overrides)
    report("efficient_ad", "efficient_ad, medium", [*SETTINGS["efficient_ad"], *MEDIUM])


def report(name: str, title: str, overrides: list[str]) -> None:
    """Print what an image costs, and the hours."""
    frozen, trained = operations(name, overrides)
    seconds = (frozen + trained) / SPEED
    if name == "efficient_ad":  # a step is one image
        seconds = max(seconds, HOST)
    hours = [f"{of} {images_read(name, of) * seconds / 3600:.1f}" for of in SETS]
    print(f"{title}: {frozen / 1e9:.0f} + {trained / 1e9:.0f} GFLOP; hours: {', '.join(hours)}")


def images_read(name: str, of: str) -> int:
    """Return how many images the published training reads: steps x batch, or epochs x images."""
    images, categories = SETS[of]
    if name == "dinomaly":
        return 16 * (50_000 if of == "Real-IAD" else 10_000)
    return 70_000 * categories if name == "efficient_ad" else 200 * images


def operations(name: str, overrides: list[str]) -> tuple[float, float]:
    """Return what an image costs in the frozen backbone and in the trained parts."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose("train", [f"method={name}", "output_dir=unused", *overrides]))
    method: Any = instantiate(config["method"])
    image = torch.rand(1, 3, config["image_size"], config["image_size"])
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        features = method.backbone(image) if hasattr(method, "backbone") else None
    method.features = lambda *_, **__: features  # as if they were cached
    with FlopCounterMode(display=False) as trained:
        losses = method.losses({"image": image, "outlier": image})
        torch.stack(list(losses.values())).sum().backward()
    return frozen.get_total_flops(), trained.get_total_flops()


if __name__ == "__main__":
    main()
