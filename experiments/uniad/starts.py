"""How the attention of UniAD and OneNIP starts: as published, or each layer on its own.

    ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR python experiments/uniad/starts.py uniad onenip

Published: queries, keys and values start with smaller weights, equal in all layers, and so do the
learned queries of UniAD's decoder. Apart: each projection is drawn for itself by Xavier's rule.
Everything else is the same: the small preset, its data, order, noise and schedule. The numbers are
means over the steps named; no test image is read.
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from anomaly_lit.callbacks.run import FillFeatureCache, StepSeeds
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.nn.attention import Attention
from anomaly_lit.nn.transformer import init_linear
from anomaly_lit.runs.build import build, default_precision

STEPS, SEEDS, SPANS = 100, (0, 1), ((20, 30), (50, 60), (90, 100))


def main(methods: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    shown = ", ".join(f"steps {first + 1} to {last}" for first, last in SPANS)
    print(f"training loss of {shown}, and the loss of held-out images at the end")
    for method in methods:
        for seed in SEEDS:
            for start in ("published", "apart"):
                losses, held_out = train(method, start, seed)
                means = [statistics.mean(losses[first:last]) for first, last in SPANS]
                values = ", ".join(f"{value:.5f}" for value in [*means, held_out])
                print(f"{method}, seed {seed}, {start}: {values}", flush=True)


def train(method: str, start: str, seed: int) -> tuple[list[float], float]:
    """Return the training loss of every step, and that of held-out images after the last."""

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            found.append(float(outputs["loss"]))

    found: list[float] = []
    pl.seed_everything(seed, verbose=False)
    datamodule, network = build(composed(method, seed))
    if start == "apart":
        start_apart(network)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        precision=default_precision("cpu"),
        callbacks=[FillFeatureCache(), StepSeeds(seed), Losses()],
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, datamodule=datamodule)
    return found, float(trainer.callback_metrics["val/loss"])


def start_apart(network: nn.Module) -> None:
    """Draw every attention anew, and the queries that decoder layers learn."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.apply(init_linear)
        query = getattr(module, "query", None)
        if isinstance(query, nn.Parameter):
            nn.init.normal_(query)


def composed(method: str, seed: int) -> dict[str, Any]:
    overrides = [
        f"method={method}_small",
        "dataset=mvtec_ad",
        "dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial",
        "dataset.categories=[toothbrush]",
        f"seed={seed}",
        "output_dir=none",
    ]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return plain(compose("train", overrides=overrides))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or ["uniad", "onenip"])
