"""Refuse parts of a run that do not fit each other, before any image is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anomaly_lit.types import UserError, no_holdout

if TYPE_CHECKING:
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.methods.base import Method


def check_parts(config: dict[str, Any], datamodule: AnomalyDataModule, method: Method) -> None:
    """Check the method's optimiser, its images, their size and split, the crop of pixel metrics.

    Raises:
        UserError: Two parts do not fit.
    """
    from anomaly_lit.nn.optimising import check_optimizer

    check_optimizer(method.optimizer)
    for check in (check_synthesis, check_companions, check_size, check_holdout):
        check(datamodule, method)
    check_crop(datamodule, config)


def check_synthesis(datamodule: AnomalyDataModule, method: Method) -> None:
    """Raise if corrupted images are made but not read, or needed but not made.

    Raises:
        UserError: What the method reads differs from what the data module makes.
    """
    name, needed = type(method).__name__, "corrupted" in method.needs
    if needed and datamodule.synthesis is None:
        raise UserError(
            f"{name} learns from corrupted images: set synthesis to draem, or to any option other "
            "than none"
        )
    if datamodule.synthesis is None and datamodule.validate_on_synthesis:
        raise UserError(
            "to validate on synthetic defects (selection=synthetic, or "
            "dataset.validate_on_synthesis=true) needs a synthesis: set synthesis=draem"
        )
    if datamodule.synthesis is not None and not needed and not datamodule.validate_on_synthesis:
        raise UserError(
            f"{name} does not learn from corrupted images: set synthesis=none, or "
            "dataset.validate_on_synthesis=true to validate on them"
        )


def check_companions(datamodule: AnomalyDataModule, method: Method) -> None:
    """Refuse companions (prompts, outliers) or real defects that the method would never read.

    Raises:
        UserError: `dataset.<name>_dir` or `dataset.seen` is set, and the method does not need it.
    """
    from anomaly_lit.data.companions import NAMES

    for name in NAMES:
        folder = getattr(datamodule, f"{name}_dir", None)
        if folder is not None and name not in method.needs:
            setting = method.needs_by_setting.get(name)
            raise UserError(
                f"dataset.{name}_dir={folder}: {type(method).__name__} reads no {name} images; set "
                f"dataset.{name}_dir=null{f', or {setting} to read them' if setting else ''}"
            )
    if datamodule.seen and "seen" not in method.needs:
        raise UserError(
            f"dataset.seen={datamodule.seen}: {type(method).__name__} does not learn from real "
            "defects; set dataset.seen=0"
        )


def check_size(datamodule: AnomalyDataModule, method: Method) -> None:
    """Refuse images of a size that the method's network does not take.

    Raises:
        UserError: A side is no multiple of `method.multiple`.
    """
    from anomaly_lit.nn.aggregate import check_multiple

    name = type(method).__name__
    check_multiple(datamodule.resize.size, method.multiple, f"which {name} needs")


def check_holdout(datamodule: AnomalyDataModule, method: Method) -> None:
    """Refuse a method that cannot do without held-out images where none will be held out.

    Raises:
        UserError: `dataset.holdout` is 0.
    """
    if method.needs_holdout and not datamodule.holdout:
        raise no_holdout(type(method).__name__)


def check_crop(datamodule: AnomalyDataModule, config: dict[str, Any]) -> None:
    """Refuse a crop for pixel metrics that is larger than the images, before anything is trained.

    Raises:
        UserError: It is larger, or is not made of positive whole numbers.
    """
    import torch

    from anomaly_lit.callbacks.records import crop_of, middle

    crop = config["callbacks"].get("evaluation", {}).get("pixel_crop")
    middle(torch.empty(1, 1, *datamodule.resize.size), crop_of(crop))


def check_validates(config: dict[str, Any], steps: int) -> None:
    """Raise if weights are to be chosen by validations but there would be none.

    Args:
        config: The run's configuration.
        steps: Steps of training; -1 where something else ends it.

    Raises:
        UserError: Training ends before the first validation.
    """
    settings = config["trainer"]
    interval = settings.get("val_check_interval")
    counts_steps = settings.get("check_val_every_n_epoch", 1) is None and isinstance(interval, int)
    if counts_steps and 0 <= steps < interval:
        raise UserError(
            f"selection={config['selection']} needs a validation, and trainer.val_check_interval="
            f"{interval} is more than trainer.max_steps={steps}: lower the former"
        )
