"""Seconds of a training step with and without caches, and of the trainable part alone.

    python benchmarks/training.py --output experiments/benchmarks/training.json
    python benchmarks/training.py --methods dsr_small --device gpu --precision bf16-mixed
    python benchmarks/training.py --methods uniad_small --backbone wide_resnet50_2
    python benchmarks/training.py --table experiments/benchmarks/training.json >> table.md

Every method trains on 1024 x 1024 PNG files, drawn by data.py, at 256 x 256, in the real trainer
without validation and logging:

- no cache: pictures are decoded, and features computed, in each step;
- image cache: `cache=host` without features;
- image + feature cache: `cache=host` as it is; or both from disk, opened by a later run;
- trainable part alone: one batch with its features and its synthetic anomalies, which the others
  draw in each step, given again and again;
- anomalib: its FastFlow beside ours, the same network, on its own data module, where installed.

A figure is the median time between two steps of a round; rounds measure everything in turns, and
ratios are taken within a round. "seconds before" is the time from building the data module to the
start of the first step. Backbones have random weights, which do not change the times.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from data import as_table, finish, make_pictures, spread
from peers import TRAINED
from peers import train as train_peer

from anomaly_lit.callbacks.run import FillFeatureCache, StepSeeds
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.files import environment
from anomaly_lit.runs.build import build

DEFAULTS = ["uniad_small", "fastflow_small", "ami_net_small"]
BASE = "no cache"
ALONE = "trainable part alone"
PEER = "anomalib"
VARIANTS = {
    BASE: ["cache=none"],
    "image cache": ["cache=host", "dataset.feature_cache=null"],
    "image + feature cache": ["cache=host"],
    "image + feature cache, disk": ["cache=disk"],
    ALONE: ["cache=host"],
}
WARM_UP = 3  # steps of a round that do not count


class Clock(pl.Callback):
    """Notes when training gets to its first batch and when each step has ended."""

    def __init__(self) -> None:
        self.began = self.first = 0.0
        self.ends: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Note the time of the first start."""
        self.began = self.began or self._now()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Note the end, once the device is done."""
        self.ends.append(self._now())

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self) -> float:
        """Return the median seconds between the ends of two steps."""
        ends = self.ends[WARM_UP:]
        return statistics.median(b - a for a, b in pairwise(ends))


class Again(pl.Callback):
    """Gives the first batch, with its features, in every later step."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the batch once its features are there, and use it in place of all others."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = module.transfer_batch_to_device(
            next(iter(datamodule.train_dataloader())), module.device, 0
        )
        whole = datamodule.with_features(batch)
        add = datamodule.corrupt if datamodule.synthesis is not None else lambda batch, step: batch
        prepared = add(whole, 0)
        datamodule.train_dataloader = lambda: Repeated(prepared)
        datamodule.on_after_batch_transfer = lambda batch, number: batch


class Repeated:
    """A loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * len(self))


def compose(
    method: str, root: Path, cache: list[str], batch: int, more: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings of a run; `more` overrides them."""
    from hydra import compose as compose_
    from hydra import initialize_config_dir

    overrides = [
        f"method={method}",
        "dataset=mvtec_ad",
        f"dataset.root={root}",
        "dataset.masks=none",
        "dataset.holdout=0",
        f"dataset.batch_size={batch}",
        "logger=none",
        "output_dir=/nowhere",
        *cache,
        *more,
    ]
    if cache == ["cache=disk"]:
        for part in ("cache", "feature_cache"):
            overrides.append(f"dataset.{part}.folder={root / 'cache'}")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose_("train", overrides=overrides))
    for node in config["method"].values():  # backbones and teachers
        if isinstance(node, dict) and "Backbone" in node.get("_target_", ""):
            node["weights"] = "random"
    return config


def quiet_options(device: str, precision: str) -> dict[str, Any]:
    """Return options of a trainer that only trains; the peer's trainer gets the same."""
    return {
        "accelerator": device,
        "devices": 1,
        "precision": precision,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def train(
    config: dict[str, Any],
    steps: int,
    device: str,
    precision: str,
    alone: bool,
    more: Sequence[pl.Callback] = (),
) -> Clock:
    """Train some steps from scratch; the clock's `began` and `first` count from the call."""
    pl.seed_everything(0, verbose=False)
    start = time.perf_counter()
    datamodule, method = build(config)
    clock = Clock()
    callbacks = [*more, FillFeatureCache(), *([Again()] if alone else []), StepSeeds(0), clock]
    options = quiet_options(device, precision)
    trainer = pl.Trainer(max_steps=steps, callbacks=callbacks, **options)
    trainer.fit(method, datamodule=datamodule)
    clock.began -= start
    clock.first = clock.ends[0] - start
    return clock


def measure(method: str, root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each variant of a method."""
    steps: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    before: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    more = [f"backbone={arguments.backbone}"] if arguments.backbone else []
    missing = ""
    for number in range(arguments.rounds + 1):  # the first fills the disk, and does not count
        for variant, cache in VARIANTS.items():
            config = compose(method, root, cache, arguments.batch, more)
            clock = train(
                config, arguments.steps, arguments.device, arguments.precision, variant == ALONE
            )
            if number:
                steps[variant].append(clock.step())
                before[variant].append(clock.began)
        if method in TRAINED and not more and not missing:
            start, clock = time.perf_counter(), Clock()
            options = quiet_options(arguments.device, arguments.precision)
            missing = train_peer(
                TRAINED[method], root, arguments.batch, arguments.steps, clock, **options
            )
            if number and not missing:
                steps.setdefault(PEER, []).append(clock.step())
                before.setdefault(PEER, []).append(clock.began - start)
        print(f"{method}: round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
    rows = []
    for variant, seconds in steps.items():
        faster = [a / b for a, b in zip(steps[BASE], seconds, strict=True)]
        over = [b / a for a, b in zip(steps[ALONE], seconds, strict=True)]
        rows.append(
            {
                "what": f"{method}, {variant}",
                "seconds a step": spread(seconds),
                f"times as fast as {BASE}": spread(faster),
                "times the trainable part": spread(over),
                "seconds before": spread(before[variant]),
            }
        )
    if missing:
        rows.append({"what": f"{method}, {PEER}", "missing": missing})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=DEFAULTS, help="options of conf/method")
    parser.add_argument("--backbone", help="in the place of a method's own")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result and stop")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="the trainer's accelerator: cpu or gpu")
    parser.add_argument("--precision", default="32-true", help="the trainer's")
    parser.add_argument("--quick", action="store_true", help="few images and steps: a trial")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a new one")
    arguments = parser.parse_args()
    if arguments.table:
        print(as_table(json.loads(arguments.table.read_text())))
        return
    if arguments.quick:
        arguments.images, arguments.steps, arguments.rounds = 8, WARM_UP + 3, 1
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(arguments.threads)
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_pictures(Path(folder), arguments.images)
        rows = [row for name in arguments.methods for row in measure(name, Path(folder), arguments)]
    result = {
        **environment(),
        "threads": arguments.threads,
        "load": load,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "batch": arguments.batch,
        "device": f"{arguments.device}, {arguments.precision}",
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    finish(result, arguments.output, "A training step at 256 x 256, from 1024 x 1024 PNG files")


if __name__ == "__main__":
    main()
