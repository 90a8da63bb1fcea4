"""OpenVINO in place of torch, for scoring on a CPU."""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from torch import Tensor, nn

from anomaly_lit.methods.base import Method
from anomaly_lit.types import Batch, Prediction, UserError

NEEDED = ("openvino", "onnx", "onnxscript")
FURTHEST = 1e-3  # largest difference, as a share of a map's range; thresholds are no finer


class OpenVINO:
    """A trained method's scoring, compiled for the CPU in float32.

    Compiling takes about 5 to 10 seconds and holds for images of one size and category. Images are
    then scored one at a time, which is as fast as in batches (`experiments/benchmarks`, inference).

    Args:
        method: On the CPU, in evaluation mode.
        category: Category of the images.
        image: (B, 3, H, W) float32 in [0, 1]. Results for the first image and for seven variants of
            it are compared with torch's.

    Raises:
        UserError: The method cannot be exported, or OpenVINO's maps and scores differ from torch's
            by more than 0.1 % of their range, or are NaN.
    """

    def __init__(self, method: Method, category: str, image: Tensor) -> None:
        if not method.localises:
            raise UserError(
                f"engine=openvino needs anomaly maps to compare with torch's, and "
                f"{type(method).__name__} scores images alone: use engine=torch"
            )
        if method.optimises:
            raise UserError(
                f"engine=openvino needs a fixed computation, and {type(method).__name__} solves an "
                "optimisation problem for each image: use engine=torch"
            )
        if "frames" in method.needs:
            raise UserError(
                f"engine=openvino judges images alone, and {type(method).__name__} reads the "
                "frames before an image: use engine=torch"
            )
        scoring = Scoring(method, category)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "scoring.onnx"
            export(scoring, image[:1], file)
            self._model = compiled(file, torch.get_num_threads())
        shown = probes(image[:1])
        with torch.no_grad():
            self._compare(scoring(shown), self(shown))

    def __call__(self, image: Tensor) -> Prediction:
        """Map (B, 3, H, W) float32 in [0, 1] to maps and scores, like `Method.score_batch`."""
        found: list[Any] = [self._model(one[None]) for one in image.numpy()]
        maps, scores = (
            torch.from_numpy(np.concatenate([each[i] for each in found])) for i in (0, 1)
        )
        return Prediction(maps, scores)

    def _compare(self, expected: tuple[Tensor, Tensor], found: Prediction) -> None:
        span = expected[0].amax(dim=(1, 2, 3)) - expected[0].amin(dim=(1, 2, 3))
        assert found.anomaly_map is not None
        away = (found.anomaly_map - expected[0]).abs().amax(dim=(1, 2, 3))
        span = span.clamp(min=1e-12)  # for a flat map
        scores = (found.score - expected[1]).abs() / torch.maximum(span, expected[1].abs())
        worst = float(torch.maximum(away / span, scores).max())
        if not worst <= FURTHEST:  # also true for NaN
            raise UserError(
                f"engine=openvino gives maps or scores that differ from torch's by {worst:.2%} of "
                f"their range, where {FURTHEST:.2%} is allowed: thresholds taken in training would "
                "not hold. This method scores with engine=torch only"
            )


def probes(image: Tensor) -> Tensor:
    """Return the four flips of (1, 3, H, W), as they are and at two thirds brightness: (8, ...)."""
    flips = [image, image.flip(2), image.flip(3), image.flip(2, 3)]
    return torch.cat([*flips, *(flip / 1.5 for flip in flips)])


class Scoring(nn.Module):
    """A method as a network that takes and gives tensors only, for images of one category."""

    def __init__(self, method: Method, category: str) -> None:
        super().__init__()
        self.method = method
        self.category = category

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, H, W) to the maps (B, 1, H, W) and the scores (B,), float32."""
        batch: Batch = {"image": image, "category": [self.category] * len(image)}  # type: ignore[typeddict-item]
        anomaly_map, score = self.method.predict_batch(batch)
        assert anomaly_map is not None
        return anomaly_map.float(), score.float()


def export(scoring: Scoring, image: Tensor, file: Path) -> None:
    """Write an ONNX file for images of one shape.

    Raises:
        UserError: The method does something that ONNX cannot express.
    """
    heard = logging.root.manager.disable
    logging.disable(logging.ERROR)  # exporters log hundreds of lines
    try:
        with torch.no_grad(), warnings.catch_warnings(), fixed_positions(scoring, image):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(scoring, (image.clone(),), dynamo=True, verbose=False)
            assert program is not None
            program.save(file)
    except Exception as error:  # exporters raise many kinds
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        name = type(scoring.method).__name__
        raise UserError(
            f"{name} cannot be exported for engine=openvino: {reason}. Use engine=torch"
        ) from error
    finally:
        logging.disable(heard)


@contextmanager
def fixed_positions(scoring: Scoring, image: Tensor) -> Iterator[None]:
    """Make vision transformers reuse the resized position embeddings of one forward pass.

    timm resizes them with anti-aliasing in every forward pass. OpenVINO 2026.4 reads that flag and
    ignores it, which changed Dinomaly's maps on DINOv2 by 14 % of their range.
    """
    resizing = "resample_abs_pos_embed"
    modules = [timm.models.vision_transformer, timm.models.deit, timm.models.eva]
    resize = getattr(modules[0], resizing)
    kept: list[Tensor] = []

    def note(*args: Any, **options: Any) -> Tensor:
        kept.append(resize(*args, **options))
        return kept[-1]

    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, resizing, note))
        scoring(image)
    again = itertools.cycle(kept)

    def recall(*args: Any, **options: Any) -> Tensor:
        return next(again)

    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, resizing, recall))
        yield


def compiled(file: Path, threads: int) -> Any:
    """Return OpenVINO's model of an ONNX file: called with an array, it gives the output arrays."""
    core = silent_openvino().Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # by default it may choose bfloat16
        "PERFORMANCE_HINT": "LATENCY",  # one request at a time
    }
    return core.compile_model(core.read_model(file), "CPU", settings)


def silent_openvino() -> ModuleType:
    """Import OpenVINO without `openvino_telemetry`, which would report the import to a server."""
    unseen = "openvino_telemetry"
    hidden = unseen not in sys.modules
    if hidden:
        sys.modules[unseen] = None  # type: ignore[assignment]  # its import fails
    try:
        return importlib.import_module("openvino")
    finally:
        if hidden:
            del sys.modules[unseen]


def check_installed() -> None:
    """Check that the packages of the engine are installed.

    Raises:
        UserError: A package is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"engine=openvino needs {', '.join(missing)}: pip install 'anomaly-lit[openvino]'"
        )
