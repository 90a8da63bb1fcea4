"""A trained method from a picture's file to its verdict, stage by stage. Used by inference.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anomaly_lit import Detector
from anomaly_lit.calibration import colour_range, outline_of
from anomaly_lit.callbacks import Evaluation
from anomaly_lit.callbacks.run import StepSeeds, WholeCheckpoint
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.data.images import read_image
from anomaly_lit.drawing.heat import overlay
from anomaly_lit.drawing.png import save_image
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.runs.build import build

STAGES = ("decode", "resize", "forward", "backbone", "head", "map", "verdict", "whole", "overlay")


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def timed(run: Callable[[Tensor], Any], image: Tensor) -> float:
    """Return the seconds of a call."""
    start = now()
    run(image)
    return now() - start


def trained(name: str, root: Path, folder: Path, size: int, settings: Sequence[str] = ()) -> Path:
    """Write a checkpoint of a method after one step, with thresholds from held-out images.

    Args:
        name: Option of conf/method.
        root: Folder of the images.
        folder: Where the checkpoint is written.
        size: Side of what the method sees.
        settings: More settings; they win over those that this function makes.
    """
    from hydra import compose, initialize_config_dir

    overrides = [f"method={name}", "dataset=mvtec_ad", f"dataset.root={root}", "cache=host",
                 "dataset.masks=none", "dataset.holdout=0.25", "dataset.batch_size=2",
                 "dataset.feature_cache=null", f"image_size={size}", "output_dir=none",
                 *settings]  # fmt: skip
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose("train", overrides=overrides))
    for node in config["method"].values():  # backbones and teachers
        if isinstance(node, dict) and "Backbone" in node.get("_target_", ""):
            node["weights"] = "random"
    pl.seed_everything(0, verbose=False)
    datamodule, method = build(config)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepSeeds(0), Evaluation(), WholeCheckpoint(config)],
    )
    trainer.fit(method, datamodule=datamodule)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder / f"{name}.ckpt"


class MapClock(TorchFunctionMode):
    """Adds up the seconds of operations on maps of one or two channels at the image's size."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        self.seconds = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and add its time if it takes or returns such a map."""
        start = now()
        result = func(*args, **(kwargs or {}))
        if any(self._is_map(value) for value in (*args, result)):
            self.seconds += now() - start
        return result

    def _is_map(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.ndim < 4:
            return False
        channels, height, width = value.shape[-3:]
        return channels <= 2 and height >= self.size[0] and width >= self.size[1]


@contextmanager
def backbone_clock(method: torch.nn.Module) -> Iterator[list[float]]:
    """Collect the seconds that backbones take."""
    seconds, starts, hooks = [], [], []
    for module in method.modules():
        if isinstance(module, Backbone):
            hooks.append(module.register_forward_pre_hook(lambda *_: starts.append(now())))
            hooks.append(
                module.register_forward_hook(lambda *_: seconds.append(now() - starts[-1]))
            )
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def as_batch(detector: Detector, pictures: Sequence[Any]) -> dict[str, Any]:
    """Return what a detector hands to its method."""
    pixels = np.stack([detector.resize.image(picture) for picture in pictures])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(detector.method.device)
    image = image.float().div(255).contiguous()
    return {"image": image, "category": [detector.categories[0]] * len(pictures)}


@torch.inference_mode()
def stages_of(detector: Detector, paths: Sequence[Path], folder: Path) -> dict[str, float]:
    """Return seconds an image of each stage and of the whole."""
    method: Any = detector.method
    times = [now()]
    pictures = [read_image(path) for path in paths]
    times.append(now())
    batch = as_batch(detector, pictures)
    times.append(now())
    method.score_batch(batch)
    times.append(now())
    with backbone_clock(method) as backbone:
        method.score_batch(batch)
    with MapClock(batch["image"].shape[-2:]) as maps:  # apart: it slows all operations
        method.score_batch(batch)
    start = now()
    findings = detector.predict(list(paths), batch_size=len(paths))
    whole, start = now() - start, now()
    limits = detector.calibration["all"]
    for finding in findings[:1]:
        low, high = colour_range(limits, finding.anomaly_map)
        outline = outline_of(finding.verdict, finding.anomaly_map, limits)
        shown = overlay(finding.image, finding.anomaly_map, low, high, outline)
        save_image(shown, folder / "overlay.png")
    seconds = {name: b - a for name, a, b in zip(STAGES, times, times[1:], strict=False)}
    seconds |= {"overlay": (now() - start) * len(paths), "whole": whole}
    seconds |= {"backbone": sum(backbone), "map": maps.seconds}
    seconds["head"] = seconds["forward"] - sum(backbone) - maps.seconds
    seconds["verdict"] = verdict_seconds(detector, findings)
    return {name: seconds[name] / len(paths) for name in STAGES}


def verdict_seconds(detector: Detector, findings: Sequence[Any]) -> float:
    """Return the time of resizing maps to the image and comparing scores."""
    small = np.zeros(detector.resize.size, np.float32)
    start = now()
    for finding in findings:
        detector.resize.restore(small, finding.image.shape[:2])
        assert finding.verdict == ("defect" if finding.score > finding.threshold else "good")
    return now() - start
