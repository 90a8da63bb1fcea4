"""``anomaly-train``: trains, calibrates and tests one method on one data set."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.build import instantiate, nodes
from anomaly_lit.config.hydra import message_of, output_folder, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.runs.code import code_digest
from anomaly_lit.runs.folder import (
    check_same_data,
    is_current,
    put_aside,
    read_metrics,
    state_of,
)
from anomaly_lit.runs.objective import ORACLE, PRUNED, check_objective, objective
from anomaly_lit.runs.ranks import check_launcher, check_tasks, is_first_process, join_tasks
from anomaly_lit.types import Stopped, UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.pruning import Pruning
    from anomaly_lit.callbacks.stopping import StopSignals
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.methods.base import Method

COSTS = ("training_seconds", "test_seconds_per_image", "latency_seconds", "trainable_parameters")
SELECTIONS = {
    "last": "last step",
    "best": "lowest loss on held-out normal images",
    "oracle": "ORACLE: best image + pixel AUROC on the test set",
}


def main() -> None:
    """Entry point of the command."""
    run_command(train, "train")


def train(cfg: DictConfig) -> float | None:
    """Runs what the configuration describes, or goes on where an earlier run of it stopped.

    Returns:
        The metric that ``optimized_metric`` names, for a sweeper; None without one.
    """
    directory = output_folder()
    cfg.output_dir = str(directory)  # and with it what refers to it, also in a job of a sweep
    config = plain(cfg)
    pruning, when_changed = config.pop("pruning"), config.pop("when_changed")
    check_objective(config)
    join_tasks()
    check_tasks(config["trainer"].get("devices"), config["trainer"].get("num_nodes", 1))
    state = state_of(directory, config)
    if state == "finished" and not is_current(directory, config, when_changed):
        put_aside(directory)
        state = "new"
    if state == "finished":
        metrics = read_metrics(directory)
        print_results(metrics, directory)
        print("already finished; choose another output_dir to train again")
        return objective(config, metrics)
    if state == "new":
        find_all_weights(config)
    metrics = run(config, directory, state, pruning)
    return objective(config, metrics)


def find_all_weights(config: dict[str, Any]) -> None:
    """Looks for the weights of every backbone before anything heavy is imported."""
    from anomaly_lit.nn.weights import find_weights

    for path, node in nodes(config["method"], "method"):
        if node["_target_"] == "anomaly_lit.nn.backbone.Backbone" and "name" in node:
            weights = node.get("weights", "pretrained")
            if isinstance(weights, str):
                find_weights(node["name"], weights, node.get("file_stem"), f"{path}.weights")


def run(
    config: dict[str, Any], directory: Path, state: str, pruning: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains, calibrates, tests and writes the results; ``pruning`` describes a ``Pruning``.

    Raises:
        UserError: The configuration does not fit the code, or the data cannot be used.
    """
    from anomaly_lit.callbacks.stopping import StopSignals

    quiet()
    validate(config)
    with StopSignals() as signals, failures_told():
        return run_until_stopped(config, directory, state, signals, pruning)


def run_until_stopped(
    config: dict[str, Any],
    directory: Path,
    state: str,
    signals: StopSignals,
    pruning: dict[str, Any] | None,
) -> dict[str, Any]:
    """What ``run`` does, while signals are noted."""
    import pytorch_lightning as pl

    from anomaly_lit.callbacks.step import compile_error
    from anomaly_lit.callbacks.stopping import end_ranks
    from anomaly_lit.files import replace_file

    pl.seed_everything(config["seed"], workers=True, verbose=False)
    datamodule, method = build(config)
    if state == "unfinished":
        check_same_data(datamodule, directory / "checkpoints" / "last.ckpt")
    if is_first_process():
        import yaml

        with replace_file(directory / "config.yaml", encoding="utf-8") as file:
            yaml.safe_dump(config, file, sort_keys=False)
        (directory / PRUNED).unlink(missing_ok=True)
    pruner = instantiate(pruning) if pruning else None
    trainer, evaluation = build_trainer(config, directory, datamodule.digest, signals, pruner)
    check_launcher(trainer)
    if trainer.is_global_zero:
        print_plan(trainer, method, datamodule, directory, state)
    try:
        return fit_and_test(
            config, directory, trainer, evaluation, method, datamodule, signals, pruner
        )
    except SystemExit as end:  # how Lightning answers Ctrl-C
        raise KeyboardInterrupt from end
    except BaseException as error:
        lost = end_ranks(trainer, error)
        if lost:
            raise UserError(lost) from error
        uncompiled = compile_error(error)
        if uncompiled:
            raise UserError(uncompiled) from error
        if isinstance(error, RuntimeError) and out_of_memory(error):
            batch = config["dataset"].get("batch_size")
            raise UserError(
                f"out of memory: lower dataset.batch_size (now {batch}) or image_size (now "
                f"{config['image_size']}); the same command with another output_dir starts anew"
            ) from error
        raise
    finally:
        finish_loggers(trainer, sys.exception())


@contextmanager
def failures_told() -> Iterator[None]:
    """Has one of several ranks say what failed and end at once.

    Python's own way out waits for connections to ranks that are gone, at times for ever.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank:
        from anomaly_lit.callbacks.stopping import die_with_parent

        die_with_parent()
    try:
        yield
    except Stopped:
        if rank:
            sys.exit(0)  # the first rank tells, and any other code would count as this one's death
        raise
    except Exception as error:
        if "LOCAL_RANK" not in os.environ:  # which Lightning sets for the first rank, too
            raise
        who = f"rank {rank}: " if rank else ""
        print(f"error: {who}{message_of(error)}", file=sys.stderr)
        if not isinstance(error, UserError):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def build(config: dict[str, Any]) -> tuple[AnomalyDataModule, Method]:
    """The data module, checked, and the method, with its backbones' weights."""
    datamodule = instantiate(config["dataset"])
    if is_first_process():
        datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.validate_on_test = config["selection"] == "oracle"
    if not datamodule.holdout_samples and config["selection"] == "best":
        raise UserError("selection=best needs held-out images: set dataset.holdout above 0")
    method = instantiate(config["method"])
    check_synthesis(datamodule, method)
    datamodule.with_prompts = "prompt" in method.needs
    method.setup("fit")
    return datamodule, method


def check_synthesis(datamodule: AnomalyDataModule, method: Method) -> None:
    """Refuses corrupted images that nobody reads, and a method that lacks them.

    Raises:
        UserError: What the method reads and what the data module makes do not fit.
    """
    name, needed = type(method).__name__, "corrupted" in method.needs
    if needed and datamodule.synthesis is None:
        raise UserError(
            f"{name} learns from corrupted images: choose synthesis=draem or another but none"
        )
    if datamodule.synthesis is None and datamodule.validate_on_synthesis:
        raise UserError("dataset.validate_on_synthesis=true needs a synthesis: synthesis=draem")
    if datamodule.synthesis is not None and not needed and not datamodule.validate_on_synthesis:
        raise UserError(
            f"{name} does not learn from corrupted images: synthesis=none, or "
            "dataset.validate_on_synthesis=true to validate on them"
        )


def build_trainer(
    config: dict[str, Any],
    directory: Path,
    data_digest: str,
    signals: StopSignals,
    pruner: Pruning | None = None,
) -> tuple[pl.Trainer, Evaluation]:
    """The trainer with the callbacks that every run has and those of the configuration."""
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from anomaly_lit.callbacks.dashboard import Dashboard
    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.outputs import LossCurves
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

    folder = str(directory / "checkpoints")
    named = config["callbacks"] or {}
    callbacks = [instantiate(node) for node in named.values()]
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
        WholeCheckpoint(config, data_digest),
        LossCurves(str(directory)),
        progress_bar(),
    ]
    criterion = {"best": ("val/loss", "min"), "oracle": ("oracle/criterion", "max")}
    if config["selection"] in criterion:
        monitor, mode = criterion[config["selection"]]
        check_validates(config)
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
    loggers = build_loggers(config, data_digest)
    callbacks.append(Dashboard(str(directory), f"{folder}/{config['selection']}.ckpt"))
    settings = {"default_root_dir": str(directory), **config["trainer"]}
    if settings.get("precision") is None:
        settings["precision"] = default_precision(settings.get("accelerator", "auto"))
    make = instantiate({**settings, "_partial_": True})
    try:
        return make(callbacks=callbacks, logger=loggers or False), evaluation
    except (MisconfigurationException, ImportError, ValueError) as error:  # no such device, ...
        raise UserError(f"trainer: {error}") from error


def check_validates(config: dict[str, Any]) -> None:
    """Refuses a choice among validations where none would take place.

    Raises:
        UserError: Training ends before the first validation.
    """
    settings = config["trainer"]
    steps, interval = settings.get("max_steps", -1), settings.get("val_check_interval")
    counts_steps = settings.get("check_val_every_n_epoch", 1) is None and isinstance(interval, int)
    if counts_steps and 0 <= steps < interval:
        raise UserError(
            f"selection={config['selection']} needs a validation, and trainer.val_check_interval="
            f"{interval} is more than trainer.max_steps={steps}: lower the former"
        )


def build_loggers(config: dict[str, Any], data_digest: str) -> list[Any]:
    """The loggers, opened before hours are spent, with the configuration written to each.

    Raises:
        UserError: A logger's package is missing, or its service refuses or does not answer.
    """
    from anomaly_lit.files import environment
    from anomaly_lit.loggers import describe

    facts = {"data_digest": data_digest, **environment()}
    loggers = []
    for name, node in (config["logger"] or {}).items():
        try:
            logger = instantiate(node)
            describe(logger, config, facts)
        except Exception as error:
            raise UserError(
                f"logger={name} does not start: {message_of(error)}. Use "
                "logger=csv or logger=wandb_offline, run `wandb login`, or install "
                "anomaly-lit[loggers] for tensorboard and mlflow"
            ) from error
        loggers.append(logger)
    return loggers


def fit_and_test(
    config: dict[str, Any],
    directory: Path,
    trainer: pl.Trainer,
    evaluation: Evaluation,
    method: Method,
    datamodule: AnomalyDataModule,
    signals: StopSignals,
    pruner: Pruning | None = None,
) -> dict[str, Any]:
    """Fits from the last checkpoint, calibrates the chosen weights, saves them and tests them."""
    from anomaly_lit.files import environment, peak_memory_mb, write_json

    last = directory / "checkpoints" / "last.ckpt"
    start, cpu_start = time.perf_counter(), time.process_time()
    resumed = last.is_file()
    trainer.fit(method, datamodule=datamodule, ckpt_path=str(last) if resumed else None)
    training_time = time.perf_counter() - start
    training_cpu_time = time.process_time() - cpu_start  # tells more on a busy machine
    if pruner is not None and pruner.step:
        signals.leave()
        return pruned(directory, trainer, pruner)
    chosen = directory / "checkpoints" / f"{config['selection']}.ckpt"
    if chosen != last:
        trainer.save_checkpoint(last)
        take_weights(method, chosen)
    validation: dict[str, float] = {}
    if datamodule.holdout_samples:
        trainer.validate(method, datamodule=datamodule, verbose=False)
        validation = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
    trainer.save_checkpoint(chosen)
    signals.leave()
    start = time.perf_counter()
    trainer.test(method, datamodule=datamodule, verbose=False)
    testing_time = time.perf_counter() - start
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    metrics: dict[str, Any] = {
        **tested(trainer, evaluation),
        **validation,
        "setting": "one-class" if len(datamodule.categories) == 1 else "multi-class",
        "selection": selection_of(config, method),
        "seed": config["seed"],
        "method": config["method"]["_target_"],
        "steps": trainer.global_step,
        "precision": str(trainer.precision),
        "resumed": resumed,
        "training_seconds": training_time,
        "training_cpu_seconds": training_cpu_time,
        "test_seconds_per_image": testing_time / max(1, len(datamodule.test_samples)),
        "latency_seconds": latency(method, datamodule),
        **peak_memory_mb(),
        "trainable_parameters": trainable,
        "frozen_parameters": sum(p.numel() for p in method.parameters()) - trainable,
        "images/train": len(datamodule.train_samples),
        "images/holdout": len(datamodule.holdout_samples),
        "images/test": len(datamodule.test_samples),
        "data_digest": datamodule.digest,
        "code_digest": code_digest(config),
        "threshold_fpr": evaluation.fpr,
        **environment(),
    }
    for logger in trainer.loggers:
        logger.log_metrics({f"run/{key}": metrics[key] for key in COSTS}, trainer.global_step)
        logger.save()
    if trainer.is_global_zero:
        write_json(directory / "metrics.json", metrics)
        print_results(metrics, directory)
    return metrics


def pruned(directory: Path, trainer: pl.Trainer, pruner: Pruning) -> dict[str, Any]:
    """Notes that a study gave the run up; it is neither calibrated nor tested."""
    from anomaly_lit.files import write_json

    facts = {"step": pruner.step, pruner.metric: pruner.value}
    if trainer.is_global_zero:
        write_json(directory / PRUNED, facts)
        print(f"pruned at step {pruner.step}: {pruner.metric}={pruner.value:.6g}", flush=True)
    return facts


def selection_of(config: dict[str, Any], method: Method) -> str:
    """How the weights were chosen, and what else was taken from the test set, for tables."""
    metric = config.get("optimized_metric") or ""
    sweep = f"ORACLE: swept for {metric}" if metric.startswith(ORACLE) else ""
    texts = (SELECTIONS[config["selection"]], method.oracle, sweep)
    return "; ".join(text for text in texts if text)


def latency(method: Method, datamodule: AnomalyDataModule) -> float:
    """Median time from one prepared image on the device to its map and score, in seconds."""
    import torch

    image = torch.rand(1, 3, *datamodule.resize.size, device=method.device)
    batch: Any = {"image": image, "index": torch.zeros(1, dtype=torch.long), "label": [False],
                  "category": [datamodule.categories[0]], "path": [""]}  # fmt: skip
    times = []
    method.eval()
    with torch.inference_mode():
        for _ in range(7):
            start = time.perf_counter()
            float(method.score_batch(batch).score)  # waits for the device
            times.append(time.perf_counter() - start)
    return sorted(times[2:])[2]


def take_weights(method: Method, checkpoint: Path) -> None:
    """Loads the weights of another step into the method."""
    from anomaly_lit.inference.checkpoint import read_checkpoint

    method.load_state_dict(read_checkpoint(checkpoint)["state_dict"])


def default_precision(accelerator: str) -> str:
    """bf16 where the device multiplies it natively, else float32."""
    import torch

    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    native = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return "bf16-mixed" if native and accelerator in ("auto", "cpu") else "32-true"


def print_plan(
    trainer: pl.Trainer,
    method: Method,
    datamodule: AnomalyDataModule,
    directory: Path,
    state: str,
) -> None:
    """What is about to happen: data, parameters, memory, time."""
    from anomaly_lit.runs.plan import plan_of

    print(datamodule.summary())
    for line in plan_of(trainer, method, datamodule):
        print(line)
    print(f"{'Resuming in' if state == 'unfinished' else 'Writing to'} {directory}", flush=True)


def tested(trainer: pl.Trainer, evaluation: Evaluation) -> dict[str, float]:
    """Everything of the last test, ``test/...``: what a method logged itself, and the metrics."""
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:5] == "test/"}
    return logged | {f"test/{key}": value for key, value in evaluation.results.items()}


def print_results(metrics: dict[str, Any], directory: Path) -> None:
    """The table of results and where the files are."""
    from anomaly_lit.reporting.terminal import print_table, results_table

    results = {
        key.removeprefix("test/"): math.nan if value is None else value
        for key, value in metrics.items()
        if key.startswith("test/")
    }
    print_table(results_table(results, metrics["selection"]))
    print(f"Pictures: {directory / 'images'}")
    print(f"Numbers:  {directory / 'metrics.json'}, {directory / 'predictions.csv'}")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device or the machine had no memory left."""
    import torch

    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in texts)


def finish_loggers(trainer: pl.Trainer, error: BaseException | None) -> None:
    """Closes the runs in services, with what became of them."""
    from anomaly_lit.loggers import finish

    for logger in trainer.loggers:
        finish(logger, int(error is not None), isinstance(error, Stopped))


def quiet() -> None:
    """Keeps Lightning's hints and known harmless warnings out of the way."""
    import logging
    import warnings

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*treespec.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*dataloader is not resumable.*",
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*sync_dist=True.*",  # all ranks compute the metrics of all images
    ):
        warnings.filterwarnings("ignore", text)


if __name__ == "__main__":
    main()
