"""How `selection=synthetic` and `selection=oracle` choose weights.

The oracle is for comparison with papers that chose by the test set.
"""

from __future__ import annotations

import pytorch_lightning as pl

from anomaly_lit.types import UserError

CRITERION = "image_auroc+pixel_auroc"  # unless the method names another


def synthetic_criterion(results: dict[str, float]) -> float:
    """Return image AUROC plus pixel AP; without maps image AUROC alone.

    Args:
        results: Metrics of held-out images as they are and with synthetic defects.
    """
    return results["image_auroc"] + results.get("pixel_ap", 0.0)


def criterion_of(pl_module: pl.LightningModule, has_maps: bool) -> list[str]:
    """Return the metrics whose sum chooses the weights of `selection=oracle`.

    The method's `oracle_criterion` names them, joined by `+`, as its paper chose weights; the
    default is the sum of image and pixel AUROC. Without maps or masks only the image metrics
    remain.

    Raises:
        UserError: No metric remains.
    """
    name = type(pl_module).__name__
    asked = getattr(pl_module, "oracle_criterion", None) or CRITERION
    names = [part.strip() for part in asked.split("+")]
    left = [part for part in names if has_maps or not part.startswith("pixel_")]
    if not left:
        raise UserError(
            f"selection=oracle chooses the weights of {name} by {asked}, and there is no pixel "
            "metric without masks: add masks to the test set, or set selection to last"
        )
    return left


def criterion_value(
    results: dict[str, float], names: list[str], pl_module: pl.LightningModule
) -> float:
    """Return the sum of the named metrics.

    Raises:
        UserError: There is no metric of that name.
    """
    unknown = [name for name in names if name not in results]
    if unknown:
        known = ", ".join(name for name in results if "/" not in name)
        raise UserError(
            f"{type(pl_module).__name__}.oracle_criterion names {', '.join(unknown)}, and the "
            f"metrics are {known}: choose among these, joined by +"
        )
    return sum(results[name] for name in names)
