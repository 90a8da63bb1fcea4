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
    """Stands for a frozen backbone: an image's first pixel is the number of its maps.

    Args:
        maps: (N, C_i, h_i, w_i) of all images, finest first.
        strides: Pixels of the image per position of each.
    """

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int]) -> None:
        super().__init__()
        self.maps = list(maps)
        self.channels = [map_.shape[1] for map_ in maps]
        self.strides = list(strides)

    def forward(self, image: Tensor) -> list[Tensor]:
        numbers = image[:, 0, 0, 0].long()
        return [map_[numbers] for map_ in self.maps]


@pytest.fixture(scope="session")
def given_maps(rule: Any) -> Callable[..., GivenMaps]:
    """Builds `given_maps(cases, count, size, channels, strides)`: `count` images of each case."""

    def build(
        cases: Sequence[str],
        count: int,
        size: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
    ) -> GivenMaps:
        maps = [
            torch.cat(
                [
                    rule.tensor(f"{case} map {number}", (count, c, size[0] // s, size[1] // s))
                    for case in cases
                ]
            )
            for number, (c, s) in enumerate(zip(channels, strides, strict=True))
        ]
        return GivenMaps(maps, strides)

    return build


@pytest.fixture(scope="session")
def numbered() -> Callable[..., Tensor]:
    """Builds `numbered(numbers, size)`: images that `GivenMaps` knows."""

    def build(numbers: Sequence[int], size: Sequence[int]) -> Tensor:
        return torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 3, *size)

    return build
