"""What `selection=oracle` chooses weights by: for a comparison with a paper that chose so."""

from __future__ import annotations

import pytorch_lightning as pl

from anomaly_lit.types import UserError

CRITERION = "image_auroc+pixel_auroc"  # unless the method says another


def criterion_of(pl_module: pl.LightningModule, has_maps: bool) -> list[str]:
    """Return the metrics whose sum chooses the weights of `selection=oracle`.

    `oracle_criterion` of the method names them, joined by `+`, as the paper chose its weights; the
    sum of image and pixel AUROC where it says nothing. Without maps or masks those of images
    remain.

    Raises:
        UserError: None remains.
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
