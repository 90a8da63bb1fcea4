"""Load a detector from a checkpoint, without Hydra, a model hub or the training machine's files."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anomaly_lit.calibration import limits_of, verdict
from anomaly_lit.data.images import Resize, as_rgb
from anomaly_lit.data.opening import MAX_PIXELS, open_picture, pages_of
from anomaly_lit.inference.checkpoint import geometry_of, method_of, read_checkpoint
from anomaly_lit.inference.openvino import OpenVINO, check_installed
from anomaly_lit.methods.base import Method
from anomaly_lit.types import Batch, Prediction, UserError

ALONE = (str, Path, bytes, io.IOBase, np.ndarray, Image.Image)  # one image, not several
Picture = str | Path | bytes | IO[bytes] | np.ndarray | Image.Image


class Finding(NamedTuple):
    """What a detector says about one image."""

    score: float
    threshold: float  # NaN without held-out images in training
    verdict: str  # good, defect, or unknown (no threshold, or no finite score)
    anomaly_map: np.ndarray | None  # (H, W) float32 at the image's own size; None without maps
    image: np.ndarray  # (H, W, 3) uint8, the image as it was read


class Detector:
    """A trained method with its input geometry and its thresholds.

    Args:
        method: The trained method.
        resize: Geometry of the method's input.
        calibration: Thresholds by category; empty if there were no held-out images.
        engine: What computes: `torch` or, on a CPU, `openvino`; see `load`.

    Raises:
        UserError: There is no such engine, or it is not installed.
    """

    def __init__(
        self,
        method: Method,
        resize: Resize,
        calibration: dict[str, Any],
        engine: Literal["torch", "openvino"] = "torch",
    ) -> None:
        if engine not in ("torch", "openvino"):
            raise UserError(f"there is no engine={engine}; choose torch or openvino")
        if engine == "openvino":
            check_installed()
        self.method = method.eval().requires_grad_(False)
        self.resize = resize
        self.calibration = calibration
        self.engine = engine
        self._compiled: dict[str, OpenVINO] = {}  # by category

    @property
    def categories(self) -> list[str]:
        """The categories that have a threshold of their own."""
        return list(self.calibration.get("categories", {}))

    @property
    def frames(self) -> int:
        """How many frames before an image the method reads; 0: it judges images alone."""
        return getattr(self.method, "frames", 0) if "frames" in self.method.needs else 0

    def to(self, device: str | torch.device) -> Detector:
        """Move the network.

        Raises:
            UserError: There is no such device, or the engine computes on a CPU only.
        """
        known = "give cpu, cuda or cuda:N, or null for a GPU if there is one"
        try:
            if torch.device(device).type == "meta":
                raise UserError(f"device=meta computes nothing: {known}")
        except RuntimeError as error:
            raise UserError(f"device={device} is no device of torch: {known}") from error
        if self.engine == "openvino" and torch.device(device).type != "cpu":
            raise UserError(f"engine=openvino computes on a CPU, not on device={device}")
        try:
            self.method.to(device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"device={device} cannot be used ({reason}): {known}") from error
        return self

    def predict(
        self,
        images: Picture | Sequence[Picture],
        category: str | None = None,
        batch_size: int = 16,
        max_pixels: int | None = MAX_PIXELS,
        frames: Sequence[Sequence[Picture]] | None = None,
    ) -> list[Finding]:
        """Score images of any size.

        Args:
            images: A list, or a single one, of these: paths, bytes or open files of images, Pillow
                images, (H, W, 3) uint8 arrays with channels red, green, blue. Of a file with
                several pages the first is judged, and a warning says so.
            category: Category whose threshold to use; None takes the only one, or else that of all
                together.
            batch_size: Images scored at once.
            max_pixels: Pixels of the largest file that is read; None sets no limit.
            frames: The frames before each image, in order of time, for a method that reads clips;
                None: such a method sees each image as a clip that stands still.

        Raises:
            UserError: An image cannot be read, the category is unknown, or the engine lacks
                something that the method needs.
        """
        if category is not None and category not in self.categories:
            known = ", ".join(self.categories) or "none"
            raise UserError(f"no threshold for category={category}; known: {known}")
        if category is None and len(self.categories) == 1:
            category = self.categories[0]
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        pictures = [images] if isinstance(images, ALONE) else list(images)
        findings: list[Finding] = []
        for start in range(0, len(pictures), batch_size):
            read = [
                _pixels(picture, max_pixels) for picture in pictures[start : start + batch_size]
            ]
            earlier = [
                [_pixels(picture, max_pixels) for picture in clip]
                for clip in (frames or [])[start : start + batch_size]
            ]
            findings += self._predict_batch(read, category, earlier)
        return findings

    def _tensor(self, pictures: list[np.ndarray]) -> Tensor:
        """Resize pictures and bring them to the device, (B, 3, H, W) in [0, 1]."""
        pixels = np.stack([self.resize.image(picture) for picture in pictures])
        image = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.method.device)
        return image.float().div(255).contiguous()

    def _predict_batch(
        self,
        pictures: list[np.ndarray],
        category: str | None,
        frames: list[list[np.ndarray]],
    ) -> list[Finding]:
        image, count = self._tensor(pictures), len(pictures)
        batch: Batch = {
            "image": image,
            "index": torch.arange(count),
            "label": torch.zeros(count, dtype=torch.bool),
            "gt_mask": torch.zeros(count, 1, *image.shape[-2:], dtype=torch.bool),
            "category": [category or ""] * count,
            "defect_type": [""] * count,
            "path": [""] * count,
        }
        if frames:
            batch["frames"] = torch.stack([self._tensor(clip) for clip in frames])
        prediction = self._score(batch)
        threshold = limits_of(self.calibration, category).get("threshold", math.nan)
        given = prediction.anomaly_map
        maps = [None] * count if given is None else [*given[:, 0].float().cpu().numpy()]
        return [
            Finding(
                score,
                threshold,
                verdict(score, threshold)["verdict"],
                None if map_ is None else self.resize.restore(map_, picture.shape[:2]),
                picture,
            )
            for score, map_, picture in zip(prediction.score.tolist(), maps, pictures, strict=True)
        ]

    def _score(self, batch: Batch) -> Prediction:
        """Score images of one category."""
        if self.engine == "torch":
            with torch.inference_mode():
                return self.method.score_batch(batch)
        image, category = batch["image"], batch["category"][0]
        if category not in self._compiled:
            self._compiled[category] = OpenVINO(self.method, category, image)
        return self._compiled[category](image)


def load(
    path: str | Path,
    device: str | None = None,
    trust: bool = False,
    engine: Literal["torch", "openvino"] = "torch",
) -> Detector:
    """Load a detector from a checkpoint that `anomaly-train` wrote.

    Args:
        path: The checkpoint.
        device: For example `cpu` or `cuda`; None takes a GPU if there is one.
        trust: Build any class that the checkpoint names, which may run any code; false allows only
            the classes of `anomaly_lit.config.trust`.
        engine: `torch`, or `openvino`, which is faster on a CPU but takes seconds to start
            and compares its first maps with torch's.

    Raises:
        UserError: The file is missing, damaged, not a checkpoint, or names code that is not
            allowed; or the engine is unknown, not installed, or not for this device.
    """
    checkpoint = read_checkpoint(path)
    entry = checkpoint["anomaly_lit"]
    method = method_of(checkpoint, trust)
    if not method.calibrated:
        warnings.warn(
            f"{path} was written in the middle of training, and its thresholds belong to earlier "
            "weights: take the checkpoint of a finished run",
            stacklevel=2,
        )
    gpu = torch.cuda.is_available() and engine == "torch"
    device = device or ("cuda" if gpu else "cpu")
    calibration = entry.get("calibration", {})
    detector = Detector(method, geometry_of(entry["config"]), calibration, engine)
    return detector.to(device)


def _first_page(file: str | Path | IO[bytes], max_pixels: int | None) -> np.ndarray:
    """Read a file's picture; warn if it has further pages, which nothing judges."""
    with open_picture(file, max_pixels) as opened:
        pages = pages_of(opened)
        opened.load()
        pixels = as_rgb(opened)
    if pages > 1:
        name = file if isinstance(file, str | Path) else "an image"
        warnings.warn(
            f"{name} has {pages} pages, and only the first is judged: give each page as a picture "
            "of its own",
            stacklevel=4,
        )
    return pixels


def _pixels(picture: Picture, max_pixels: int | None) -> np.ndarray:
    if isinstance(picture, bytes):
        picture = io.BytesIO(picture)
    if isinstance(picture, str | Path | io.IOBase):
        return _first_page(picture, max_pixels)
    if isinstance(picture, Image.Image):
        return as_rgb(picture)
    if not isinstance(picture, np.ndarray):
        raise UserError(
            f"a {type(picture).__name__} is not an image; give a path, bytes, an open file, a "
            "Pillow image or an array (H, W, 3) of uint8"
        )
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise UserError(
            f"an array of shape {picture.shape} and type {picture.dtype} is not an image; "
            "give (H, W, 3) uint8"
        )
    return picture
