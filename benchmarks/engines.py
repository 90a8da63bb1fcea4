"""Ways to run a trained method's scoring: image to (map, score). Used by inference.py."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from anomaly_lit import load
from anomaly_lit.callbacks.step import lay_out
from anomaly_lit.inference.openvino import Scoring, compiled, export
from anomaly_lit.types import UserError

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, 3, H, W) to (B, 1, H, W) and (B,)
EAGER = "eager"


class MissingError(Exception):
    """A variant cannot be measured; the message says why in one line."""


class Engines:
    """Builds the variants of one checkpoint.

    Args:
        checkpoint: Checkpoint of a trained method.
        folder: Where exported files are written.
        device: `cpu` or `cuda`.
        threads: Number of threads of every engine.
    """

    def __init__(self, checkpoint: Path, folder: Path, device: str, threads: int) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self.device, self.threads = device, threads
        self._exported: dict[tuple[int, ...], tuple[Path, float] | str] = {}

    def prepare(self, name: str, image: Tensor) -> tuple[Run, float]:
        """Return a variant that has run once on images of this shape, and the seconds it took.

        Raises:
            MissingError: It cannot be built here.
        """
        start = time.perf_counter()
        try:
            run, before = VARIANTS[name](self, image)
            with torch.inference_mode():
                run(image)
        except MissingError:
            raise
        except Exception as error:  # whatever a compiler or an exporter raises is the result
            raise MissingError(reason(error)) from error
        return run, before + time.perf_counter() - start

    def scoring(self) -> Scoring:
        """Read the method again, for its first category."""
        detector = load(self.checkpoint, self.device)
        return Scoring(detector.method, (detector.categories or [""])[0]).eval()

    def eager(self, image: Tensor) -> tuple[Run, float]:
        """PyTorch without any change."""
        return self.scoring(), 0.0

    def channels_last(self, image: Tensor) -> tuple[Run, float]:
        """Weights and images with channels as the innermost axis in memory."""
        scoring = self.scoring()
        lay_out(scoring, torch.channels_last)
        return lambda given: scoring(given.contiguous(memory_format=torch.channels_last)), 0.0

    def bfloat16(self, image: Tensor) -> tuple[Run, float]:
        """bfloat16 by autocast; what a method computes in float32 on purpose stays so."""
        scoring = self.scoring()

        def run(given: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device, torch.bfloat16):
                return scoring(given)

        return run, 0.0

    def compiled(self, image: Tensor) -> tuple[Run, float]:
        """torch.compile of backbone, head and map as one graph, for this shape."""
        torch.compiler.reset()
        return torch.compile(self.scoring(), fullgraph=True, dynamic=False), 0.0

    def onnxruntime(self, image: Tensor) -> tuple[Run, float]:
        """ONNX Runtime on the CPU."""
        file, seconds = self._export(image, "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(given: Tensor) -> tuple[Tensor, Tensor]:
            anomaly_map, score = session.run(None, {name: given.numpy()})
            return torch.from_numpy(anomaly_map), torch.from_numpy(score)

        return run, seconds

    def openvino(self, image: Tensor) -> tuple[Run, float]:
        """OpenVINO on the CPU, in float32."""
        file, seconds = self._export(image, "openvino")
        model = compiled(file, self.threads)

        def run(given: Tensor) -> tuple[Tensor, Tensor]:
            found = model(given.numpy())
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])

        return run, seconds

    def _export(self, image: Tensor, engine: str) -> tuple[Path, float]:
        """Return the ONNX file for this shape, written once, and the seconds of its export."""
        missing = [name for name in (engine, "onnx", "onnxscript") if find_spec(name) is None]
        if missing:
            raise MissingError(f"{', '.join(missing)} not installed here")
        if self.device != "cpu":
            raise MissingError("measured on the CPU only")
        shape = tuple(image.shape)
        if shape not in self._exported:
            self._exported[shape] = self._written(image)
        found = self._exported[shape]
        if isinstance(found, str):
            raise MissingError(found)
        return found

    def _written(self, image: Tensor) -> tuple[Path, float] | str:
        start = time.perf_counter()
        file = self.folder / f"{self.checkpoint.stem}_{len(image)}.onnx"
        try:
            export(self.scoring(), image, file)
        except UserError as error:
            return reason(error)
        return file, time.perf_counter() - start


VARIANTS: dict[str, Callable[[Engines, Tensor], tuple[Run, float]]] = {
    EAGER: Engines.eager,
    "channels_last": Engines.channels_last,
    "bfloat16": Engines.bfloat16,
    "compile": Engines.compiled,
    "onnxruntime": Engines.onnxruntime,
    "openvino": Engines.openvino,
}


def reason(error: BaseException, most: int = 160) -> str:
    """Return the first line of the root cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip() or type(error).__name__
    line = text.splitlines()[0].replace("|", "/")
    return f"{type(error).__name__}: {line[:most]}"


def furthest(own: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> float:
    """Return the largest distance of a map from eager's, over its range; NaN stays NaN."""
    expected = own[0].flatten(1)
    spans = expected.amax(1) - expected.amin(1)
    off = (given[0].flatten(1) - expected).abs().amax(1)
    return float((off / spans.clamp(min=1e-12)).max())
