"""Methods as their configuration files describe them, with small numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra import compose, initialize_config_dir
from pytorch_lightning.callbacks import Checkpoint
from torch.utils.data import DataLoader

from anomaly_lit.config.build import instantiate, nodes
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.methods import files
from anomaly_lit.types import Batch

TINY = Path(__file__).parent / "tiny"  # <method>.yaml: numbers that make a test fast, a.b inside a


def compose_published(name: str, image_size: int) -> dict[str, Any]:
    """The ``method`` node of ``method=NAME`` as it is."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        overrides = [f"method={name}", f"image_size={image_size}", "output_dir=unused"]
        return plain(compose("train", overrides))["method"]


def compose_method(name: str) -> dict[str, Any]:
    """The ``method`` node of ``method=NAME`` with its method's tiny numbers."""
    config = compose_published(name, 64)
    file = files()[config["_target_"].rpartition(".")[2]]
    tiny = yaml.safe_load((TINY / f"{file}.yaml").read_text()) or {}
    for key, value in tiny.items():
        *parents, last = key.split(".")
        part = reduce(getitem, parents, config)
        part[last] = part[last] | value if isinstance(value, dict) else value
    for _, node in nodes(config):
        if node["_target_"] == "anomaly_lit.nn.backbone.Backbone":
            shrink_backbone(node)
    return config


def shrink_backbone(node: Any) -> None:
    """Random weights, and ResNet-18 where it has the requested stages."""
    node["weights"] = "random"
    if max(node["out_indices"]) <= 4:
        for key in ("options", "mean", "std", "file_stem", "padding"):
            node.pop(key, None)
        node["name"] = "resnet18.tv_in1k"


@pytest.fixture(scope="session")
def small_method(tiny_teacher: Path) -> Callable[..., Any]:
    """Builds ``small_method(name, **changes)``, the same weights each time."""
    configs: dict[str, dict[str, Any]] = {}

    def build(name: str, **changes: Any) -> Any:
        if name not in configs:
            configs[name] = compose_method(name)
            if "teacher_weights" in configs[name]:
                configs[name]["teacher_weights"] = str(tiny_teacher)
        torch.manual_seed(0)
        method = instantiate(configs[name] | changes)
        method.setup("fit")
        return method

    return build


@pytest.fixture(scope="session")
def published_method() -> Callable[..., Any]:
    """Builds ``published_method(name, image_size)`` with the paper's numbers and no weights."""
    return lambda name, image_size: instantiate(compose_published(name, image_size))


class Repeated(pl.LightningDataModule):
    """One batch again and again, which is also all there is of normal images."""

    def __init__(self, batch: Any, steps: int) -> None:
        super().__init__()
        self.batch = batch
        self.steps = steps
        self.categories = list(dict.fromkeys(batch["category"]))
        self.num_workers = 0
        self.cache = None

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * self.steps, batch_size=None)

    def normal_batches(self, split: str, most: int) -> Iterator[Any]:
        yield self.batch

    def with_features(self, batch: Any) -> Any:
        return batch

    def corrupt(self, batch: Any, step: int = 0) -> Any:
        return batch


@pytest.fixture(scope="session")
def fit() -> Callable[..., pl.Trainer]:
    """Trains ``fit(method, batch, steps)`` on one batch; gives the trainer."""

    def train(
        method: Any,
        batch: Any,
        steps: int,
        precision: Any = "32-true",
        callbacks: Any = (),
        ckpt_path: Any = None,
    ) -> pl.Trainer:
        kept = any(isinstance(callback, Checkpoint) for callback in callbacks)
        trainer = pl.Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=steps,
            logger=False,
            enable_checkpointing=kept,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(method, datamodule=Repeated(batch, steps), ckpt_path=ckpt_path)
        return trainer

    return train


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Gives ``make_batch(count, height, width)`` of smooth images, with all optional keys."""

    def make(count: int = 2, height: int = 64, width: int = 64) -> Batch:
        generator = torch.Generator().manual_seed(count)
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        image = image.clamp(0, 1)
        corruption = torch.zeros(count, 1, height, width, dtype=torch.bool)
        corruption[..., 16:40, 24:48] = True
        return {
            "image": image,
            "corrupted": torch.where(corruption, 1 - image, image),
            "corruption": corruption,
            "prompt": image.roll(1, dims=0),
            "seen": torch.where(corruption, image.flip(1), image),
            "seen_mask": corruption,
            "frames": torch.stack([image.roll(-n, dims=3) for n in (4, 3, 2, 1)], dim=1),
            "index": torch.arange(count),
            "label": torch.zeros(count, dtype=torch.bool),
            "gt_mask": torch.zeros(count, 1, height, width, dtype=torch.bool),
            "category": ["bolt"] * count,
            "defect_type": ["good"] * count,
            "path": [str(Path(f"{number:03d}.png")) for number in range(count)],
        }

    return make
