"""The rule behind the golden values: how weights and inputs are made, and how outputs are compared.

Golden values are outputs of the authors' own networks. Both sides, ours and theirs, are filled by
this rule and need no file: a tensor follows from its name in the authors' code and its shape.
`make.py` runs the authors' code and writes `<method>.json`; the tests run ours and compare. None of
the authors' code is part of this repository.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
SAMPLES = 24  # values kept of an output
TOLERANCE = 2e-5  # of an output's root mean square; ours is float32, the golden value float64


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform values in [-1, 1), float64, that depend on the name and the number of values.

    NumPy guarantees that the stream of `RandomState` never changes.
    """
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return generator.uniform(-1, 1, math.prod(shape)).reshape(tuple(shape))


def tensor(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """An input: `draw` times `scale`, in float32."""
    return torch.from_numpy(draw(name, shape) * scale).to(torch.float32)


def parameter(name: str, shape: Sequence[int], scales: Mapping[str, float]) -> Tensor:
    """A weight or buffer, in float32.

    Weights of two or more dimensions keep the scale of what passes them, those of one dimension
    (normalisation) and variances lie around 1, biases and means around 0.

    Args:
        name: In the authors' state dict.
        shape: There.
        scales: Factors for names that match a regular expression; the first match counts.
    """
    values = draw(name, shape)
    if name.endswith(("bias", "running_mean")):
        values = 0.2 * values
    elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        values = 1 + 0.5 * values
    elif name.endswith("weight"):
        values = values * math.sqrt(3 * shape[0] / math.prod(shape))
    factor = next((scale for part, scale in scales.items() if re.search(part, name)), 1.0)
    return torch.from_numpy(values * factor).to(torch.float32)


@torch.no_grad()
def fill(module: nn.Module, scales: Mapping[str, float] | None = None, prefix: str = "") -> None:
    """Fills the authors' network, which has the authors' names; fixed position codes stay."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not name.endswith("pos_embed"):
            value.copy_(parameter(prefix + name, value.shape, scales or {}))


@torch.no_grad()
def fill_ours(
    module: nn.Module, names: Mapping[str, str], scales: Mapping[str, float] | None = None
) -> None:
    """Fills our network with the same weights.

    Args:
        module: Ours.
        names: Regular expressions for whole names in our state dict, and what they are in the
            authors'; the first match counts. `name[0/3]` is the first of three equal parts along
            the first dimension, and an empty name leaves a tensor as it is.
        scales: See `parameter`.

    Raises:
        KeyError: A tensor of ours has no name in the table.
    """
    for ours, value in module.state_dict().items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        found = ((re.fullmatch(pattern, ours), theirs) for pattern, theirs in names.items())
        match, theirs = next(((m, t) for m, t in found if m), (None, ""))
        if match is None:
            raise KeyError(f"{ours} has no name in the table of names")
        name = match.expand(theirs)
        if not name:
            continue
        part = re.fullmatch(r"(.*)\[(\d)/(\d)\]", name)
        if part is None:
            value.copy_(parameter(name, value.shape, scales or {}).view_as(value))
        else:
            name, index, count = part[1], int(part[2]), int(part[3])
            whole = parameter(name, (count * value.shape[0], *value.shape[1:]), scales or {})
            value.copy_(whole.chunk(count)[index])


def positions(count: int) -> np.ndarray:
    """Where an output of `count` values is sampled: spread by the golden section."""
    if count <= SAMPLES:
        return np.arange(count)
    return np.unique((np.arange(1, SAMPLES + 1) * 0.6180339887498949 % 1 * count).astype(np.int64))


def summary(output: Tensor) -> dict[str, Any]:
    """Shape, sum, norm and samples of an output, as plain data."""
    values = output.detach().double().flatten().numpy()
    return {
        "shape": list(output.shape),
        "sum": float(f"{values.sum():.10g}"),
        "norm": float(f"{np.linalg.norm(values):.10g}"),
        "values": [float(f"{value:.9g}") for value in values[positions(len(values))]],
    }


def difference(output: Tensor, expected: Mapping[str, Any]) -> float:
    """Greatest difference from a summary, relative to the output's root mean square.

    Of the samples, of the mean and of the root mean square itself.

    Raises:
        AssertionError: The shapes differ, or a value is not finite.
    """
    assert list(output.shape) == expected["shape"]
    values = output.detach().double().flatten().numpy()
    assert np.isfinite(values).all()
    scale = max(expected["norm"] / math.sqrt(len(values)), 1e-30)
    samples = np.abs(values[positions(len(values))] - np.array(expected["values"])).max()
    mean = abs(values.sum() - expected["sum"]) / len(values)
    norm = abs(np.linalg.norm(values) - expected["norm"]) / math.sqrt(len(values))
    return float(max(samples, mean, norm) / scale)


class Golden:
    """The golden values of one method.

    Args:
        method: Name of the file, `<method>.json`.
    """

    def __init__(self, method: str) -> None:
        self.data: dict[str, Any] = json.loads((FOLDER / f"{method}.json").read_text())

    def scales(self, case: str) -> dict[str, float]:
        """Factors of a case's weights; see `parameter`."""
        return self.data["cases"][case].get("scales", {})

    def number(self, case: str, name: str) -> float:
        """A number of a case, such as a standard deviation at the start of training."""
        return self.data["cases"][case]["numbers"][name]

    def check(self, case: str, tolerance: float | None = None, **outputs: Tensor) -> None:
        """Compares outputs of ours by name.

        Args:
            case: Key of the file.
            tolerance: Of each output's root mean square; None is the file's.
            outputs: By the names in the file.

        Raises:
            AssertionError: An output differs; all that do are named.
        """
        expected = self.data["cases"][case]["outputs"]
        tolerance = self.data["tolerance"] if tolerance is None else tolerance
        found = {name: difference(output, expected[name]) for name, output in outputs.items()}
        wrong = {name: value for name, value in found.items() if not value <= tolerance}
        assert not wrong, f"{case}: relative differences {wrong}, tolerance {tolerance}"
