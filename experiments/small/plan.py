"""Which runs the sweep of run.sh consists of, and how many steps each has.

    python experiments/small/plan.py measure [METHOD ...]  # writes conf/experiment/small_*.yaml
    python experiments/small/plan.py longer METHOD ...      # writes conf/experiment/long_*.yaml
    python experiments/small/plan.py full METHOD ...        # writes conf/experiment/full_*.yaml
    python experiments/small/plan.py list                  # the options of `experiment`, in order
    python experiments/small/plan.py few FOLDER            # 20 test images of each category, and
                                                           # images for EfficientAD's teacher

The methods are those with a `_small` preset that read single images. The preset is taken as it is;
`SETTINGS` names what it needs besides. Methods without a pretrained backbone see images of 128 x
128, which gives them four times the steps; all others of 256 x 256, or what `SETTINGS` says.

A run has as many steps as `SECONDS` of one core allow, by the mean CPU time of a step on the first
category, batches of 8 and features in the cache, and rounded down to a number of `ROUND` times a
power of ten. Whatever a method does before its first step (a bank, k-means) is not counted. No test
image is looked at, and nothing else is chosen. `long_*` have `TIMES` times as many. `full_*` have
as many as `FULL` seconds of one core allow, or as `LIMITS` says. Those of Reverse Distillation and
EfficientAD, and what is run at another size or on another backbone, are written by hand.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

SECONDS = 60
TIMES = 3
FULL = 360
ROUND = (1, 1.5, 2, 3, 5, 7)
TRIAL, WARM_UP = 8, 2  # steps that are measured; the first ones do not count
LOGGED = 50  # losses a run notes at most, which tell whether it was still falling
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
METHODS = ROOT / "conf" / "method"
OPTIONS = HERE / "conf" / "experiment"
CATEGORIES = {  # in the order of the sweep
    "toothbrush": "industrial",
    "magnetic_tile": "industrial",
    "ball_screw": "surface",
    "hazelnut_toy": "industrial",
    "ksdd": "industrial",
}
FEW = 10  # normal test images, and as many with defects, of methods that take seconds an image
VIT = {"/backbone": "vit_small_patch14_dinov2_imgfocus", "image_size": 224}
NO_BACKBONE = 128  # side of the images
SETTINGS: dict[str, dict[str, Any]] = {
    "dinomaly": VIT,
    "inp_former": VIT,
    "paedid": {"dataset.root": "${oc.env:ANOMALY_LIT_FEW}"},
    "rstpm": {"step.channels_last": True},  # a step takes 0.75 times as long
    "sgsf": {"step.channels_last": True},  # a step takes 0.6 times as long
    "pni_refine": {
        "method.pni_weights": "${oc.env:ANOMALY_LIT_SMALL}/${hydra:runtime.choices.dataset}"
        "_small_pni/checkpoints/last.ckpt"
    },
}
# Seconds of one core, of `full_*`: enough for the 500 steps that a run has by default at least.
LIMITS = {"dinomaly": 480, "inp_former": 480}
LEFT_OUT = ("pdn_teacher", "efficient_ad")  # distils a teacher and judges nothing; needs that one
# the network beneath is trained by another run; for its time a new one will do
WHILE_MEASURED = {
    "pni_refine": ["method.pni_weights=null", "method.pni.conditions=[position]"],
    "paedid": ["dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial"],
}


def main(arguments: list[str]) -> None:
    """Run a command."""
    command, names = arguments[0], arguments[1:]
    if command == "measure":
        for name in names or methods():
            write_option(name, step_seconds(name))
    elif command == "longer":
        for name in names:
            write_longer(name)
    elif command == "full":
        for name in names:
            write_option(name, step_seconds(name), LIMITS.get(name, FULL), "full")
    elif command == "list":
        print(",".join(f"small_{name}" for name in methods() if option_of(name).exists()))
    elif command == "few":
        for category, folder in CATEGORIES.items():
            data = Path(os.environ["ANOMALY_LIT_DATA"]).resolve()
            link_few(data / folder / category, Path(names[0]))
        link_teacher(data, Path(names[0]) / "teacher")
    else:
        sys.exit(__doc__)


def methods() -> list[str]:
    """Return the methods that read single images, those without older results first."""
    from anomaly_lit.config.build import import_target

    found = []
    for file in sorted(METHODS.glob("*_small.yaml")):
        name = file.stem.removesuffix("_small")
        needs = import_target(preset(name)["method"]["_target_"]).needs
        if name not in LEFT_OUT and "frames" not in needs:
            found.append(name)
    return sorted(found, key=lambda name: ((HERE.parent / name / "results.csv").exists(), name))


def preset(name: str) -> dict[str, Any]:
    """Return what the file of a method says."""
    import yaml

    return yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8"))


def settings_of(name: str) -> dict[str, Any]:
    """Return what a run sets besides the preset."""
    has_backbone = any("/backbone" in key for entry in preset(name)["defaults"]
                       if isinstance(entry, dict) for key in entry)  # fmt: skip
    return ({} if has_backbone else {"image_size": NO_BACKBONE}) | SETTINGS.get(name, {})


def option_of(name: str) -> Path:
    return OPTIONS / f"small_{name}.yaml"


# ------------------------------------------------------------------------------------- measuring


def step_seconds(name: str) -> float:
    """Return the mean CPU seconds of a step on the first category, without what precedes it."""
    import pytorch_lightning as pl

    from anomaly_lit.callbacks.run import FillFeatureCache, StepSeeds
    from anomaly_lit.config.build import instantiate
    from anomaly_lit.runs.build import build, default_precision

    class Clock(pl.Callback):
        """Notes the CPU time at the end of each step."""

        def on_train_batch_end(self, *arguments: Any) -> None:
            times.append(time.process_time())

    warnings.simplefilter("ignore")
    logging.disable()
    times: list[float] = []
    config = composed(name)
    datamodule, method = build(config)
    trainer = pl.Trainer(
        max_steps=TRIAL,
        accelerator="cpu",
        precision=default_precision("cpu"),
        callbacks=[instantiate(config["step"]), FillFeatureCache(), StepSeeds(0), Clock()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=datamodule)
    spent = [after - before for before, after in pairwise(times)][WARM_UP - 1 :]
    return sum(spent) / len(spent)


def composed(name: str) -> dict[str, Any]:
    """Return the settings of a short run on the first category."""
    from hydra import compose, initialize_config_dir

    from anomaly_lit.config.hydra import config_dir, plain

    category, folder = next(iter(CATEGORIES.items()))
    own = [
        f"{key.removeprefix('/')}={value}"
        for key, value in settings_of(name).items()
        if not str(value).startswith("$")
    ]
    overrides = [
        f"method={name}_small",
        "dataset=mvtec_ad",
        "dataset.root=${oc.env:ANOMALY_LIT_DATA}/" + folder,
        f"dataset.categories=[{category}]",
        "output_dir=none",
        *own,
        *WHILE_MEASURED.get(name, []),
    ]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return plain(compose("train", overrides=overrides))


def steps_in(seconds: float, per_step: float) -> int:
    """Return how many steps there is time for, rounded down to a number of `ROUND`.

    >>> steps_in(60, 0.33), steps_in(60, 0.004), steps_in(60, 100)
    (150, 15000, 1)
    """
    most = max(seconds / per_step, 1.0)
    power = 10 ** math.floor(math.log10(most))
    return max(1, int(max(first for first in ROUND if first * power <= most) * power))


def write_option(name: str, per_step: float, limit: int = SECONDS, kind: str = "small") -> None:
    """Write the option of `experiment` that runs a method for as many steps as a limit allows."""
    import yaml

    steps = steps_in(limit, per_step)
    overrides: list[dict[str, str]] = [{"override /method": f"{name}_small"}]
    every = max(1, steps // LOGGED)
    trainer = {"max_steps": steps, "val_check_interval": steps, "log_every_n_steps": every}
    values: dict[str, Any] = {"trainer": trainer}
    for key, value in settings_of(name).items():
        if key.startswith("/"):
            overrides.append({f"override {key}": value})
        else:
            section, _, last = key.rpartition(".")
            values |= {section: {last: value}} if section else {last: value}
    text = yaml.safe_dump({"defaults": overrides, **values}, sort_keys=False)
    head = (
        "# @package _global_\n"
        f"# Written by experiments/small/plan.py: {per_step:.3g} s of one core a step, so {steps} "
        f"in {limit} s.\n"
    )
    (OPTIONS / f"{kind}_{name}.yaml").write_text(head + text, encoding="utf-8")
    print(f"{name}: {per_step:.3g} s a step, {steps} steps", flush=True)


def write_longer(name: str) -> None:
    """Write the option of `experiment` that runs a method `TIMES` times as long."""
    import yaml

    steps = TIMES * steps_of(f"small_{name}")
    every = max(1, steps // LOGGED)
    trainer = {"max_steps": steps, "val_check_interval": steps, "log_every_n_steps": every}
    text = yaml.safe_dump({"defaults": [f"small_{name}"], "trainer": trainer}, sort_keys=False)
    head = f"# @package _global_\n# Written by experiments/small/plan.py: {TIMES} minutes.\n"
    (OPTIONS / f"long_{name}.yaml").write_text(head + text, encoding="utf-8")


def steps_of(option: str) -> int:
    """Return the steps that an option names, or else the one that it builds on."""
    import yaml

    values = yaml.safe_load((OPTIONS / f"{option}.yaml").read_text(encoding="utf-8"))
    if "trainer" in values:
        return int(values["trainer"]["max_steps"])
    return steps_of(values["defaults"][0])


# ------------------------------------------------------------------------------ few test images


def link_few(category: Path, folder: Path) -> None:
    """Link a category with `FEW` normal and `FEW` defective test images, evenly spread."""
    own = folder / category.name
    if own.exists():
        return
    (own / "train").mkdir(parents=True)
    (own / "train" / "good").symlink_to(category / "train" / "good")
    good = sorted((category / "test" / "good").iterdir())
    bad = sorted(f for kind in (category / "test").iterdir() if kind.name != "good"
                 for f in kind.iterdir())  # fmt: skip
    for image in [*spread(good), *spread(bad)]:
        link(own, category, image)
        if image.parent.name != "good":
            mask = f"{image.stem}_mask.png"
            link(own, category, category / "ground_truth" / image.parent.name / mask)


def link_teacher(data: Path, own: Path) -> None:
    """Link the images that EfficientAD's teacher learns from: none of a category of the sweep."""
    if own.exists():
        return
    own.mkdir(parents=True)
    (own / "textures").symlink_to(data / "textures")
    for cells in sorted((data / "cells").glob("*/train/good")):
        (own / cells.parents[1].name).symlink_to(cells)


def link(own: Path, category: Path, file: Path) -> None:
    place = own / file.relative_to(category)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file)


def spread(files: list[Path]) -> list[Path]:
    """Return `FEW` files at equal distances."""
    count = min(FEW, len(files))
    return [files[number * len(files) // count] for number in range(count)]


if __name__ == "__main__":
    main(sys.argv[1:])
