"""What the scripts that run the authors' code share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rule import summary, tensor
from torch import Tensor, nn

UNIAD_MAPS = {"channels": (24, 32, 56, 160), "strides": (2, 4, 8, 16)}  # EfficientNet-B4


class Given(nn.Module):
    """Answers with the same value, whatever it is asked."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> Any:
        return self.value


def outputs(**named: Tensor) -> dict[str, Any]:
    """Summaries by name."""
    return {name: summary(output) for name, output in named.items()}


def maps(
    case: str, count: int, size: Sequence[int], channels: Sequence[int], strides: Sequence[int]
) -> list[Tensor]:
    """A backbone's maps of `count` images of a size, in float64."""
    return [
        tensor(f"{case} map {number}", (count, c, size[0] // s, size[1] // s)).double()
        for number, (c, s) in enumerate(zip(channels, strides, strict=True))
    ]


@contextlib.contextmanager
def drawn(function: str, *values: Any) -> Iterator[None]:
    """Makes a random function of torch give these values, one a call."""
    with mock.patch.object(torch, function, mock.Mock(side_effect=list(values))):
        yield


def attributes(**named: Any) -> Any:
    """What the authors' code reads as attributes and as keys."""

    class Attributes(SimpleNamespace):
        get = lambda self, key, default=None: getattr(self, key, default)  # noqa: E731

    return Attributes(**named)
