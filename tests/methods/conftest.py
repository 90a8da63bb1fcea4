"""Methods as their configuration files describe them, with small numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from anomaly_lit.config import config_dir, instantiate, nodes, plain
from anomaly_lit.types import Batch

NUMBERS = {"grid": 8, "dim": 32, "heads": 2, "depth": 1, "patch": 2, "smoothing": 1.0}


def compose_method(name: str) -> dict[str, Any]:
    """The ``method`` node of ``method=NAME``, small where the method has such a key."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"method={name}", "image_size=64", "output_dir=unused"])
    config = plain(cfg)["method"]
    config |= {key: value for key, value in NUMBERS.items() if key in config}
    for _, node in nodes(config):
        if node["_target_"] == "anomaly_lit.nn.backbone.Backbone":
            shrink_backbone(node)
    return config


def shrink_backbone(node: Any) -> None:
    """Random weights, and ResNet-18 where it has the requested stages."""
    node["weights"] = "random"
    if max(node["out_indices"]) <= 4:
        for key in ("options", "mean", "std", "file_stem"):
            node.pop(key, None)
        node["name"] = "resnet18.tv_in1k"


@pytest.fixture(scope="session")
def small_method() -> Callable[..., Any]:
    """Builds ``small_method(name, **changes)``, the same weights each time."""
    configs: dict[str, dict[str, Any]] = {}

    def build(name: str, **changes: Any) -> Any:
        if name not in configs:
            configs[name] = compose_method(name)
        torch.manual_seed(0)
        method = instantiate(configs[name] | changes)
        method.setup("fit")
        return method

    return build


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Gives ``make_batch(count, height, width)`` of smooth seeded images."""

    def make(count: int = 2, height: int = 64, width: int = 64) -> Batch:
        generator = torch.Generator().manual_seed(count)
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        return {
            "image": image.clamp(0, 1),
            "index": torch.arange(count),
            "label": torch.zeros(count, dtype=torch.bool),
            "gt_mask": torch.zeros(count, 1, height, width, dtype=torch.bool),
            "category": ["bolt"] * count,
            "defect_type": ["good"] * count,
            "path": [str(Path(f"{number:03d}.png")) for number in range(count)],
        }

    return make
