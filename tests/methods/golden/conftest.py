"""Golden values for the tests of this folder, and a backbone that gives the maps it was given."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

RULE = Path(__file__).parents[2] / "golden" / "rule.py"


@pytest.fixture(scope="session")
def rule() -> ModuleType:
    """The module `tests/golden/rule.py`."""
    spec = importlib.util.spec_from_file_location("golden_rule", RULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GivenMaps(nn.Module):
    """Stands for a frozen backbone: the same maps whatever the image.

    Args:
        maps: (B, C_i, h_i, w_i), finest first.
        strides: Pixels of the image per position of each.
    """

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int]) -> None:
        super().__init__()
        self.maps = list(maps)
        self.channels = [map_.shape[1] for map_ in maps]
        self.strides = list(strides)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.maps


@pytest.fixture(scope="session")
def given_maps(rule: Any) -> Callable[..., GivenMaps]:
    """Builds `given_maps(case, count, size, channels, strides)`: the maps of a golden case."""

    def build(
        case: str, count: int, size: Sequence[int], channels: Sequence[int], strides: Sequence[int]
    ) -> GivenMaps:
        maps = [
            rule.tensor(f"{case} map {number}", (count, c, size[0] // s, size[1] // s))
            for number, (c, s) in enumerate(zip(channels, strides, strict=True))
        ]
        return GivenMaps(maps, strides)

    return build


@pytest.fixture(scope="session")
def image_batch() -> Callable[..., dict[str, Any]]:
    """Builds `image_batch(count, size)`: a batch whose images nothing reads."""

    def build(count: int, size: Sequence[int]) -> dict[str, Any]:
        return {"image": torch.zeros(count, 3, *size), "category": ["bolt"] * count}

    return build
