"""What a finished run records."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from anomaly_lit.files import environment, note, peak_memory_mb, tell, write_json
from anomaly_lit.reporting.read import SEEN
from anomaly_lit.reporting.terminal import print_results, results_text
from anomaly_lit.runs.code import code_digest
from anomaly_lit.runs.objective import ORACLE, PRUNED

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.pruning import Pruning
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.methods.base import Method
    from anomaly_lit.runs.fit import Run

COSTS = ("training_seconds", "test_seconds_per_image", "latency_seconds", "trainable_parameters")


SELECTIONS = {
    "last": "last step",
    "best": "lowest loss on held-out normal images",
    "synthetic": "best on held-out images with synthetic defects (image AUROC + pixel AP)",
    "oracle": "ORACLE: best image + pixel AUROC on the test set",
}


class Timings(NamedTuple):
    """How long the parts of a run took."""

    resumed: bool
    training_seconds: float
    training_cpu_seconds: float  # depends less on what else the machine does
    test_seconds: float = 0.0


def record(run: Run, timings: Timings, validation: dict[str, float]) -> dict[str, Any]:
    """Write a run's metrics to `metrics.json`, its costs to the loggers, and print the table."""
    facts = run.method.outcome()
    metrics = metrics_of(run, timings, validation)
    metrics |= {f"method/{name}": fact for name, fact in facts.items()}
    for logger in run.trainer.loggers:
        costs = {f"run/{key}": metrics[key] for key in COSTS}
        logger.log_metrics(costs, run.trainer.global_step)
        logger.save()
    if run.trainer.is_global_zero:
        write_json(run.directory / "metrics.json", metrics)
        print_results(metrics, run.directory)
        note(results_text(metrics))
        for name, fact in facts.items():
            tell(f"{name}: {fact}")
    return metrics


def metrics_of(run: Run, timings: Timings, validation: dict[str, float]) -> dict[str, Any]:
    """Return the content of `metrics.json`: results, how they came about, costs, versions."""
    method, datamodule = run.method, run.datamodule
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return {
        **tested(run.trainer, run.evaluation),
        **validation,
        "setting": "one-class" if len(datamodule.categories) == 1 else "multi-class",
        "selection": "; ".join([selection_of(run.config, method), *partly(run.config)]),
        "seed": run.config["seed"],
        "method": run.config["method"]["_target_"],
        "steps": run.trainer.global_step,
        "training_loss_falling": run.falling,
        "precision": str(run.trainer.precision),
        "resumed": timings.resumed,
        "training_seconds": timings.training_seconds,
        "training_cpu_seconds": timings.training_cpu_seconds,
        "test_seconds_per_image": timings.test_seconds / max(1, len(datamodule.test_samples)),
        "latency_seconds": latency(method, datamodule),
        **peak_memory_mb(),
        "trainable_parameters": trainable,
        "frozen_parameters": sum(p.numel() for p in method.parameters()) - trainable,
        "images/train": len(datamodule.train_samples),
        "images/holdout": len(datamodule.holdout_samples),
        "images/test": len(datamodule.test_samples),
        "images/seen": len(datamodule.seen_samples),
        "seen": seen_names(datamodule),
        "data_digest": datamodule.digest,
        "code_digest": code_digest(run.config),
        "threshold_fpr": run.evaluation.fpr,
        **environment(),
    }


def record_pruned(directory: Path, trainer: pl.Trainer, pruner: Pruning) -> dict[str, Any]:
    """Record that a study pruned the run; it is neither calibrated nor tested."""
    facts = {"step": pruner.step, pruner.metric: pruner.value}
    if trainer.is_global_zero:
        write_json(directory / PRUNED, facts)
        tell(f"pruned at step {pruner.step}: {pruner.metric}={pruner.value:.6g}")
    return facts


def selection_of(config: dict[str, Any], method: Method) -> str:
    """Return how the weights were chosen and what else used the test set, for tables."""
    seen = config["dataset"].get("seen", 0)
    learned = f"{SEEN}: learned from {seen} test images of each defect type, not tested on"
    metric = config.get("optimized_metric") or ""
    sweep = f"ORACLE: swept for {metric}" if metric.startswith(ORACLE) else ""
    texts = (SELECTIONS[config["selection"]], learned if seen else "", method.oracle, sweep)
    return "; ".join(text for text in texts if text)


def partly(config: dict[str, Any]) -> list[str]:
    """Return the note of a test that left images out, for tables; nothing if it took them all."""
    limit = config["trainer"].get("limit_test_batches")
    if limit is None or (isinstance(limit, float) and limit == 1):  # 1 is one batch, 1.0 are all
        return []
    return [f"PART of the test images: trainer.limit_test_batches={limit}"]


def seen_names(datamodule: AnomalyDataModule) -> str:
    """Return the names of the images that left the test set to be learned from, a line each."""
    return "\n".join(datamodule.name_of(sample.path) for sample in datamodule.seen_samples)


def latency(method: Method, datamodule: AnomalyDataModule) -> float:
    """Return the median seconds from a prepared image on the device to its map and score."""
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


def tested(trainer: pl.Trainer, evaluation: Evaluation) -> dict[str, float]:
    """Return everything from the last test, `test/...`: what the method logged, and the metrics."""
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:5] == "test/"}
    return logged | {f"test/{key}": value for key, value in evaluation.results.items()}
