"""Build the parts of a run from its configuration: data, method, trainer, loggers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_lit.config.build import instantiate, nodes
from anomaly_lit.config.hydra import message_of
from anomaly_lit.files import without_secrets
from anomaly_lit.runs.checks import check_parts, check_validates
from anomaly_lit.runs.length import given_length, steps_follow_data, steps_for
from anomaly_lit.runs.ranks import is_first_process
from anomaly_lit.types import UserError, no_holdout

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.pruning import Pruning
    from anomaly_lit.callbacks.stopping import StopSignals
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.methods.base import Method
    from anomaly_lit.runs.storage import Start


def find_all_weights(config: dict[str, Any]) -> None:
    """Look for the weights of every backbone before anything slow is imported."""
    from anomaly_lit.nn.weights import find_weights

    for path, node in nodes(config["method"], "method"):
        if node["_target_"] == "anomaly_lit.nn.backbone.Backbone" and "name" in node:
            weights = node.get("weights", "pretrained")
            if isinstance(weights, str):
                find_weights(node["name"], weights, node.get("file_stem"), f"{path}.weights")


def build(config: dict[str, Any], new: bool = True) -> tuple[AnomalyDataModule, Method]:
    """Build and check the data module, and build the method with its backbones' weights.

    Args:
        config: The composed and validated configuration as plain data.
        new: Whether the run starts; one that goes on has what it read from files.
    """
    check_trainer(config["trainer"])
    method = instantiate(config["method"], "method")
    datamodule = build_data(config, method)
    check_parts(config, datamodule, method)
    if new:
        method.check()
    if is_first_process():
        datamodule.prepare_data()
    datamodule.check_apart(config["output_dir"])
    datamodule.setup("fit")
    selection = config["selection"]
    if not datamodule.holdout_samples and selection in ("best", "synthetic"):
        raise no_holdout(f"selection={selection}")
    method.setup("fit")
    return datamodule, method


def check_trainer(settings: dict[str, Any]) -> None:
    """Refuse, before anything is read, what Lightning would refuse later.

    Raises:
        UserError: The trainer has no such device, precision, strategy or profiler.
    """
    from anomaly_lit.runs.failures import quiet

    quiet()
    bare = {key: value for key, value in settings.items() if key not in ("callbacks", "plugins")}
    bare |= {"logger": False, "_partial_": True, **given_length(settings)}
    made_by(instantiate(bare, "trainer"), settings)


def made_by(make: Callable[[], pl.Trainer], settings: Mapping[str, Any]) -> pl.Trainer:
    """Return the trainer that a function makes from settings.

    Raises:
        UserError: Lightning refuses them.
    """
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    accelerator, devices = settings.get("accelerator", "auto"), settings.get("devices", "auto")
    most = max(16, os.cpu_count() or 1)
    count = int(devices) if str(devices).isdecimal() else 0
    if count > most and device_type(accelerator) == "cpu":
        raise UserError(
            f"trainer.devices={devices} starts as many processes, and this machine has "
            f"{os.cpu_count()} processors: lower it"
        )
    try:
        return make()
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        about = ("accelerator", "devices", "num_nodes", "strategy", "precision", "profiler")
        named = [k for k in about if k in settings and k in text.lower()] or about[:2]
        given = ", ".join(f"trainer.{key}={settings.get(key, 'auto')}" for key in named)
        raise UserError(f"{given} cannot be: {text}") from error


def build_data(config: dict[str, Any], method: Method) -> AnomalyDataModule:
    """Build the data module with what the method, the selection and the step require."""
    step = instantiate(config["step"], "step")
    extras = {
        "needs": sorted(method.needs),
        "validate_on_test": config["selection"] == "oracle",
        **({"validate_on_synthesis": True} if config["selection"] == "synthetic" else {}),
        **step.feeding(device_type(config["trainer"].get("accelerator", "auto"))),
    }
    return instantiate({**config["dataset"], **extras}, "dataset")


def build_trainer(
    config: dict[str, Any],
    directory: Path,
    datamodule: AnomalyDataModule,
    signals: StopSignals,
    pruner: Pruning | None = None,
    start: Start | None = None,
) -> tuple[pl.Trainer, Evaluation]:
    """Return the trainer with the callbacks of every run and those of the configuration."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    from anomaly_lit.callbacks.clips import ClipScores
    from anomaly_lit.callbacks.dashboard import Dashboard
    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.progress import progress_bar
    from anomaly_lit.callbacks.run import (
        FillFeatureCache,
        RanksAgree,
        ResumeCheckpoint,
        StepSeeds,
        StopAtNaN,
        WholeCheckpoint,
    )
    from anomaly_lit.callbacks.stopping import replace_observer
    from anomaly_lit.callbacks.training import LossCurves
    from anomaly_lit.runs.storage import WholeFiles

    folder, data_digest = str(directory / "checkpoints"), datamodule.digest
    named = config["callbacks"] or {}
    callbacks = [instantiate(node, f"callbacks.{name}") for name, node in named.items()]
    evaluation = next((c for c in callbacks if isinstance(c, Evaluation)), None)
    if evaluation is None:
        raise UserError(
            "callbacks: none is an anomaly_lit.callbacks.Evaluation, which every run needs"
        )
    callbacks += [
        signals,
        RanksAgree(config, data_digest),
        instantiate(config["step"]),
        FillFeatureCache(),
        StepSeeds(config["seed"]),
        StopAtNaN(),
        WholeCheckpoint(without_secrets(config), data_digest),
        LossCurves(str(directory)),
        ClipScores(str(directory)),
        progress_bar(),
    ]
    criterion = {
        "best": ("val/loss", "min"),
        "synthetic": ("val/synthetic_criterion", "max"),
        "oracle": ("oracle/criterion", "max"),
    }
    if config["selection"] in criterion:
        monitor, mode = criterion[config["selection"]]
        callbacks.append(
            ModelCheckpoint(
                folder,
                filename=config["selection"],
                monitor=monitor,
                mode=mode,
                enable_version_counter=False,
            )
        )
    callbacks.append(ResumeCheckpoint(folder, **config["checkpoint"], signals=signals))
    if pruner is not None:
        callbacks.append(pruner)
    replace_observer()
    callbacks.append(Dashboard(str(directory), f"{folder}/{config['selection']}.ckpt"))
    given = config["trainer"]
    settings = {"default_root_dir": str(directory), **given, **given_length(given)}
    plugins = instantiate(settings.pop("plugins", None), "trainer.plugins") or []
    plugins = [*(plugins if isinstance(plugins, list) else [plugins]), WholeFiles(start)]
    if settings.get("precision") is None:
        settings["precision"] = default_precision(settings.get("accelerator", "auto"))
    make = instantiate({**settings, "_partial_": True})
    trainer = made_by(partial(make, callbacks=callbacks, logger=False, plugins=plugins), settings)
    if steps_follow_data(given):
        trainer.fit_loop.epoch_loop.max_steps = steps_for(trainer, datamodule)
    if config["selection"] in criterion:
        check_validates(config, trainer.max_steps)
    trainer.loggers = build_loggers(config, data_digest)
    return trainer, evaluation


def build_loggers(config: dict[str, Any], data_digest: str) -> list[Any]:
    """Return the loggers, opened before any training, with the configuration written to each.

    Raises:
        UserError: A logger's package is missing, or its service refuses or does not respond.
    """
    from anomaly_lit.files import environment
    from anomaly_lit.loggers import describe, remedy

    facts = {"data_digest": data_digest, **environment()}
    loggers = []
    for name, node in (config["logger"] or {}).items():
        try:
            logger = instantiate(node)
            describe(logger, without_secrets(config), facts)
        except Exception as error:
            raise UserError(
                f"logger={name} cannot start: {message_of(error)}. Remedy: {remedy(name, error)}"
            ) from error
        loggers.append(logger)
    return loggers


def device_type(accelerator: str) -> str:
    """Return the type of device that training will use, such as `cpu` or `cuda`."""
    import torch

    if accelerator in ("auto", "gpu"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return accelerator


def default_precision(accelerator: str) -> str:
    """Return bf16 if the device supports it natively, else float32."""
    import torch

    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    native = any(
        getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")
    )
    return "bf16-mixed" if native and accelerator in ("auto", "cpu") else "32-true"
