"""anomalib's methods, in training and from a picture's file to a verdict.

Used by training.py and inference.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from data import peer as data_of_peer
from engines import reason
from torch import Tensor

TRAINED = {"fastflow_small": "Fastflow"}  # our method, and the same one in anomalib
PEERS = ("Fastflow", "Padim", "Stfpm")
LIMITS = {"_image_threshold": 0.5, "_pixel_threshold": 0.5,
          "image_min": 0.0, "image_max": 1.0, "pixel_min": 0.0, "pixel_max": 1.0}  # fmt: skip


def build(name: str, size: int, device: str) -> Any:
    """Return a method of anomalib on ResNet-18 with random weights, or why there is none.

    It gets anomalib's pre- and post-processor, and thresholds, so that no stage is left out.
    """
    if find_spec("anomalib") is None:
        return "anomalib is not installed here"
    from anomalib import models
    from anomalib.post_processing import PostProcessor

    create = timm.create_model

    def without_weights(*arguments: Any, **options: Any) -> Any:
        return create(*arguments, **{**options, "pretrained": False})

    kind = getattr(models, name)
    with patch("timm.create_model", without_weights):
        module = kind(
            backbone="resnet18",
            pre_processor=kind.configure_pre_processor((size, size)),
            post_processor=PostProcessor(),
            evaluator=False,
            visualizer=False,
        )
    for key, value in LIMITS.items():
        getattr(module.post_processor, key).fill_(value)
    if name == "Padim":  # statistics of noise: they do not change times
        module.model.train()
        with torch.no_grad():
            module.model(torch.rand(4, 3, size, size))
            module.model.fit()
    return module.to(device).eval()


def build_all(size: int, device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the methods that can be built, and why others cannot, by name."""
    modules, missing = {}, {}
    for name in PEERS:
        try:
            module = build(name, size, device)
        except Exception as error:  # another version of it
            module = reason(error)
        (missing if isinstance(module, str) else modules)[name] = module
    return modules, missing


def stages_of(module: Any, paths: Sequence[Path], device: str) -> dict[str, float]:
    """Return seconds an image of each stage and of the whole, as anomalib's inference goes."""
    from anomalib.data.utils import read_image

    def read() -> Tensor:
        pictures = [read_image(path, as_tensor=True) for path in paths]
        return torch.stack([torch.as_tensor(picture) for picture in pictures]).to(device)

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        times = [now()]
        raw = read()
        times.append(now())
        image = module.pre_processor(raw)
        times.append(now())
        prediction = module.model(image)
        times.append(now())
        module.post_processor(prediction)
        times.append(now())
        module(read())
        times.append(now())
    names = ("decode", "resize", "forward", "verdict", "whole")
    return {
        name: (end - start) / len(paths)
        for name, start, end in zip(names, times, times[1:], strict=False)
    }


def train(name: str, root: Path, batch: int, steps: int, clock: Any, **options: Any) -> str:
    """Train one of anomalib's methods on its own data module; return why it failed, or nothing.

    Its pre-processor and data module are part of the step, as they are in its engine; its metrics
    and pictures, which training does not use, are left out. `options` are the trainer's.
    """
    try:
        module = build(name, 256, "cpu")
        if isinstance(module, str):
            return module
        from lightning.pytorch import Trainer

        module.train()
        module.post_processor = None
        Trainer(callbacks=[clock], max_steps=steps, **options).fit(
            module, datamodule=data_of_peer(root, batch)
        )
    except Exception as error:  # another version of it
        return reason(error)
    return ""
