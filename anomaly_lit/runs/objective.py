"""What a sweep optimises: metrics of normal images and pseudo-anomalies, not of the test set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anomaly_lit.types import UserError

PRUNED = "pruned.json"  # in the folder of a run that its study pruned
ORACLE = "oracle/"  # prefix of a metric of the test set, which must be asked for explicitly
HIGHER_IS_BETTER = ("auroc", "ap", "f1max", "aupro", "aupimo")


def check_objective(config: Mapping[str, Any]) -> None:
    """Raise, before any training, if the objective uses the test set or no run would log it.

    Args:
        config: The composed configuration of a run.

    Raises:
        UserError: `optimized_metric` is of the test set without saying so, or needs other data.
    """
    name = config.get("optimized_metric")
    if name is None or name.startswith(ORACLE):
        return
    data = config["dataset"]
    if name.startswith("test/"):
        raise UserError(
            f"optimized_metric={name} would choose by the test set: choose by held-out normal "
            "images (val/loss) or pseudo-anomalies (val/synthetic_pixel_ap), or, for comparison "
            f"only, write {name.replace('test/', ORACLE, 1)}"
        )
    if not name.startswith("val/"):
        raise UserError(
            f"optimized_metric={name}: it is val/loss, val/synthetic_<metric> such as "
            "val/synthetic_pixel_ap, or, for comparison only, oracle/<metric> of the test set"
        )
    if not data.get("holdout", 1):
        raise UserError(f"optimized_metric={name} needs held-out images: set dataset.holdout=0.2")
    if name.startswith("val/synthetic_") and not data.get("validate_on_synthesis"):
        raise UserError(
            f"optimized_metric={name} needs pseudo-anomalies: dataset.validate_on_synthesis=true "
            "and, where the method brings none, a synthesis such as synthesis=mixed"
        )


def direction_of(metric: str) -> str:
    """Return `minimize` or `maximize`, by the metric's name.

    Raises:
        UserError: The name does not say which.
    """
    if metric.endswith("loss"):
        return "minimize"
    words = metric.rpartition("/")[2].split("_")
    if any(word in HIGHER_IS_BETTER for word in words):
        return "maximize"
    raise UserError(
        f"is a high or a low {metric} good? Set hydra.sweeper.direction=maximize or minimize"
    )


def objective(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> float | None:
    """Return the value that a sweeper optimises; NaN if the metric is undefined for this run.

    Args:
        config: The composed configuration of the run.
        metrics: Its results.

    Raises:
        UserError: `optimized_metric` is not one of the metrics.
    """
    name = config.get("optimized_metric")
    if name is None:
        return None
    key = f"test/{name.removeprefix(ORACLE)}" if name.startswith(ORACLE) else name
    if key not in metrics:
        own = [k for k in metrics if k.startswith("val/")]
        oracle = [k for k in metrics if k.startswith("test/") and k.count("/") == 1]
        known = ", ".join([*own, *(k.replace("test/", ORACLE, 1) for k in oracle)])
        raise UserError(f"optimized_metric={name} is not a metric of this run; known: {known}")
    return math.nan if metrics[key] is None else float(metrics[key])
