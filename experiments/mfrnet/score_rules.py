r"""Which map and which rule should give MFRNet's image score, without a test image.

    ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR \
      python experiments/mfrnet/score_rules.py toothbrush magnetic_tile

Trains the small preset on two thirds of a category's normal training images. The others are scored
as they are and with synthetic defects, recipe by recipe. The table shows the image AUROC of normal
against corrupted images, in per cent: for each map and rule, by recipe (means over the categories),
by category (means over the recipes), and the mean of all. The best mean is the choice.
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from anomaly_lit.callbacks.run import FillFeatureCache, StepSeeds
from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.methods.mfrnet import MFRNet
from anomaly_lit.metrics import auroc
from anomaly_lit.nn.aggregate import resize, smooth
from anomaly_lit.runs.build import build, default_precision

STEPS = 100
HELD_OUT = 1 / 3
MOST = 32  # held-out images
LEAST = 48  # corrupted images of each recipe; small categories are corrupted several times
RECIPES = ("cutpaste", "nsa", "draem", "smudge")


def top(share: float) -> Callable[[Tensor], Tensor]:
    """Return a rule: the mean of the highest values, a share of all."""

    def rule(values: Tensor) -> Tensor:
        count = max(round(share * values.shape[1]), 1)
        return values.topk(count, dim=1).values.mean(dim=1)

    return rule


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda values: values.amax(dim=1),
    "top 0.1 %": top(0.001),
    "top 1 %": top(0.01),
    "top 5 %": top(0.05),
    "mean": lambda values: values.mean(dim=1),
    "std": lambda values: values.std(dim=1, unbiased=False),
}
Scores = dict[tuple[str, str], Tensor]  # by map and rule


def main(categories: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    found: dict[tuple[str, str, str, str], float] = {}
    for category in categories:
        method, images = trained(category)
        normal = scores(method, images)
        for recipe in RECIPES:
            corrupted = scores(method, corrupt(recipe, images))
            for key, values in normal.items():
                found[(*key, recipe, category)] = separation(values, corrupted[key])
    print(table(found, categories))


def trained(category: str) -> tuple[MFRNet, Tensor]:
    """Return the trained method, and the held-out images (N, 3, H, W)."""
    pl.seed_everything(0, verbose=False)
    datamodule, method = build(composed(category))
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        precision=default_precision("cpu"),
        callbacks=[FillFeatureCache(), StepSeeds(0)],
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=datamodule)
    held_out = [batch["image"] for batch in datamodule.normal_batches("holdout", MOST)]
    assert isinstance(method, MFRNet)
    return method.eval(), torch.cat(held_out)


def composed(category: str, synthesis: str = "none") -> dict[str, Any]:
    overrides = [
        "method=mfrnet_small",
        "dataset=mvtec_ad",
        "dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial",
        f"dataset.categories=[{category}]",
        f"dataset.holdout={HELD_OUT}",
        f"synthesis={synthesis}",
        "output_dir=none",
    ]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return plain(compose("train", overrides=overrides))


def corrupt(recipe: str, images: Tensor) -> Tensor:
    """Return corrupted copies, at least `LEAST` and the same number of every image."""
    node = composed("toothbrush", recipe)["dataset"]["synthesis"]
    synthesis = instantiate({**node, "probability": 1.0, "allow_empty": False})
    generator = torch.Generator().manual_seed(0)
    rounds = -(-LEAST // len(images))
    return torch.cat([synthesis(images, generator)[0] for _ in range(rounds)])


@torch.no_grad()
def scores(method: MFRNet, images: Tensor) -> Scores:
    """Score images by every map and rule."""
    parts: list[dict[str, Tensor]] = [maps(method, batch) for batch in images.split(8)]
    whole = {name: torch.cat([part[name] for part in parts]).flatten(1) for name in parts[0]}
    return {(m, r): rule(values) for m, values in whole.items() for r, rule in RULES.items()}


def maps(method: MFRNet, image: Tensor) -> dict[str, Tensor]:
    """Return the maps that a score may come from, each (B, 1, H, W), at the images' size."""
    scaled = method.differences(image) / method.spread.view(2, 1, 1, 1)  # (passes, 2, B, h, w)
    pixel, structure = scaled.unbind(1)
    found = {
        "pixel": pixel,
        "structure": structure,
        "sum": pixel + structure,
        "product": pixel * structure,
    }
    size = image.shape[-2:]
    return {
        name: smooth(resize(values.mean(dim=0)[:, None], size), method.smoothing)
        for name, values in found.items()
    }


def separation(normal: Tensor, corrupted: Tensor) -> float:
    """Return the AUROC in per cent."""
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(corrupted))]).bool()
    return 100 * float(auroc(torch.cat([normal, corrupted]), labels))


def table(found: dict[tuple[str, str, str, str], float], categories: list[str]) -> str:
    lines = [["map", "rule", *RECIPES, *categories, "mean"]]
    lines.append(["---"] * 2 + ["--:"] * (len(lines[0]) - 2))
    for name, rule in dict.fromkeys(key[:2] for key in found):
        own = {key[2:]: value for key, value in found.items() if key[:2] == (name, rule)}
        by_recipe = [[v for (r, _), v in own.items() if r == recipe] for recipe in RECIPES]
        by_category = [[v for (_, c), v in own.items() if c == cat] for cat in categories]
        groups = [*by_recipe, *by_category, list(own.values())]
        lines.append([name, rule, *(f"{statistics.mean(group):.1f}" for group in groups)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or ["toothbrush", "magnetic_tile"])
