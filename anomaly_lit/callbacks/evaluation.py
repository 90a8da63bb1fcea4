"""Score every method the same way, on raw scores, and set thresholds from normal images alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from anomaly_lit.calibration import exceeds, limits_of, pixel_threshold, promise, threshold_at
from anomaly_lit.callbacks.records import (
    MapMetrics,
    NormalMaps,
    NormalPixels,
    OfCategory,
    Records,
    ScoredMaps,
    crop_of,
)
from anomaly_lit.callbacks.selection import (
    criterion_of,
    criterion_value,
    synthetic_criterion,
)
from anomaly_lit.metrics import PixelMetrics, SegmentationMetrics, image_metrics, item_curves
from anomaly_lit.types import Prediction, UserError, check_range


class Evaluation(pl.Callback):
    """Collect the predictions of an evaluation, score them per category, and take the mean.

    Validation sees held-out normal images. Their scores give each category the threshold that a
    share `fpr` of normal images exceeds, and their maps give it the pixel threshold that a share
    `pixel_fpr` of normal pixels exceeds. The checkpoint stores both, with what they can promise. A
    metric that needs both classes is undefined in validation, and NaN if a test set lacks one
    class. A method that scores images only (`localises = False`) has no pixel metric and no range
    of maps.

    Args:
        fpr: Share of normal images above the threshold, in (0, 1).
        aupro_limits: False-positive rates up to which the per-region overlap is integrated.
        engine: `exact`, `streaming` or `auto`; see `PixelMetrics`.
        pixel_fpr: Share of the pixels of held-out normal maps above the pixel threshold, in (0, 1).
            The threshold is the lowest pixel value of a category's maps that at most this share
            exceeds. It decides precision, recall, F1 and IoU of the segmentation, so that no test
            image tunes them.
        pixel_crop: Height and width of the centre crop that pixel metrics and the pixel threshold
            use, or one number for both, as in some papers; None uses whole maps.
        calibration: A stored calibration to start from.

    Attributes:
        calibration: Thresholds and the range of held-out maps, as plain data.
        results: Metrics of the last test, `<category>/<metric>` and the mean `<metric>`.
        rows: One per tested image: path, category, defect_type, label, score, threshold, verdict.
        curves: Curves of each category of the last test, as arrays by name; see
            `drawing.curves.save_curves`.

    Raises:
        UserError: A share is outside (0, 1), a limit is outside (0, 1], or a crop is not positive.
    """

    def __init__(
        self,
        fpr: float = 0.01,
        aupro_limits: Sequence[float] = (0.3,),
        engine: Literal["auto", "exact", "streaming"] = "auto",
        pixel_fpr: float = 0.001,
        pixel_crop: int | Sequence[int] | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        for name, share in {
            "threshold.fpr": fpr,
            "callbacks.evaluation.pixel_fpr": pixel_fpr,
        }.items():
            if not 0 < share < 1:
                raise UserError(f"{name}={share} must be between 0 and 1")
        check_range("callbacks.evaluation", "(0, 1]", aupro_limits=aupro_limits)
        self.fpr = fpr
        self.pixel_fpr = pixel_fpr
        self.pixel_crop = crop_of(pixel_crop)
        self.aupro_limits = tuple(aupro_limits)
        self.engine = engine
        self.calibration: dict[str, Any] = dict(calibration or {})
        self.results: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.curves: dict[str, dict[str, Any]] = {}
        self._records = Records()

    # ---------------------------------------------------------------- held-out normal images

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._split_of = _validation_names(trainer)
        self._normal_maps = None
        if _localises(pl_module):
            held_out = getattr(getattr(trainer, "datamodule", None), "holdout_samples", None)
            images = None if held_out is None else len(held_out)
            self._normal_maps = NormalMaps(self.pixel_fpr, images, self.pixel_crop)
        self._normal = Records(self._normal_maps)
        self._scored = {
            name: self._new_records(trainer, pl_module, name)
            for name in self._split_of
            if name != "holdout"
        }
        if "test" in self._scored:
            criterion_of(pl_module, self._scored["test"].maps is not None)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the predictions of one batch."""
        _check_map(pl_module, outputs)
        split = self._split_of[dataloader_idx]
        if split == "holdout":
            self._normal.add(batch, outputs)
            if "synthetic" in self._scored:  # its own images all have a defect
                self._scored["synthetic"].add(batch, outputs)
        else:
            self._scored[split].add(batch, outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate; if configured, score synthetic anomalies and, for the oracle, the test set."""
        if trainer.sanity_checking:
            return
        self.calibration = self._calibrate()
        results = {split: self._score(records) for split, records in self._scored.items()}
        synthetic = results.get("synthetic", {})
        if synthetic:
            synthetic["criterion"] = synthetic_criterion(synthetic)
        for name, value in synthetic.items():
            if name.count("/") == 0 and not name.endswith(("_low", "_high", "_threshold")):
                pl_module.log(f"val/synthetic_{name}", value)
        if "test" in results:
            names = criterion_of(pl_module, self._scored["test"].maps is not None)
            value = criterion_value(results["test"], names, pl_module)
            pl_module.log("oracle/criterion", value, prog_bar=True)

    def _calibrate(self) -> dict[str, Any]:
        images = self._normal.by_category()
        maps = {} if self._normal_maps is None else self._normal_maps.by_category()
        if not images:
            return {}
        every = torch.cat([own.scores for own in images.values()])
        all_maps = NormalPixels.of(list(maps.values())) if maps else None
        return {
            "fpr": self.fpr,
            "categories": {
                name: self._limits(own.scores, maps.get(name)) for name, own in images.items()
            },
            "all": self._limits(every, all_maps),
        }

    def _limits(self, scores: Tensor, pixels: NormalPixels | None) -> dict[str, Any]:
        threshold, rule = threshold_at(scores, self.fpr)
        limits = {
            "threshold": threshold,
            "rule": rule,
            "count": len(scores),
            "promise": promise(len(scores), self.fpr),
        }
        if pixels is None:
            return limits
        drawn = pixels.drawn.double().sort().values
        return limits | {
            "map_low": float(drawn[len(drawn) // 2]),
            "map_high": float(drawn[min(len(drawn) - 1, int(0.999 * len(drawn)))]),
            "map_median": float(drawn[len(drawn) // 2]),
            "pixel_fpr": self.pixel_fpr,
            "pixel_threshold": pixel_threshold(pixels.highest, pixels.number, self.pixel_fpr),
        }

    # ---------------------------------------------------------------- test images

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last test."""
        self.curves = {}
        self._records = self._new_records(trainer, pl_module, "test", self.calibration)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the predictions of one batch."""
        _check_map(pl_module, outputs)
        self._records.add(batch, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute and log every metric as `test/<category>/<metric>` and `test/<metric>`."""
        self.results = self._score(self._records, keep_curves=True)
        self.rows = self._records.rows(self.threshold_of)
        pl_module.log_dict({f"test/{key}": value for key, value in self.results.items()})

    def threshold_of(self, category: str) -> float:
        """Return the category's threshold; for an unknown category, that of all held-out images."""
        limits = self.limits_of(category)
        return float(limits["threshold"]) if limits else math.nan

    def limits_of(self, category: str) -> dict[str, Any]:
        """Return a category's calibration; for an unknown one, that of all images; {} if none."""
        return limits_of(self.calibration, category)

    def _new_records(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        split: str,
        thresholds: dict[str, Any] | None = None,
    ) -> Records:
        """Make the records of a split; they include maps if there are maps and true masks.

        Args:
            trainer: Its data module knows whether the test set has masks.
            pl_module: The method.
            split: `test`, or `synthetic`, whose masks are always known.
            thresholds: A calibration of the weights that are scored; None if there is none yet.
        """
        has_masks = getattr(getattr(trainer, "datamodule", None), "has_masks", True)
        if not _localises(pl_module) or (split == "test" and not has_masks):
            return Records()
        known = self.calibration  # for `new_metrics`, which a rank without images calls later

        def new_metrics(category: str) -> MapMetrics:
            center = limits_of(known, category).get("map_median", 0.0)
            threshold = limits_of(thresholds or {}, category).get("pixel_threshold", math.nan)
            return MapMetrics(
                PixelMetrics(self.aupro_limits, self.engine, center),
                None if math.isnan(threshold) else SegmentationMetrics(threshold),
            )

        return Records(ScoredMaps(new_metrics, self.pixel_crop, pl_module.device))

    def _score(self, records: Records, keep_curves: bool = False) -> dict[str, float]:
        per_category: dict[str, dict[str, float]] = {}
        for category, images in records.by_category().items():
            scores, labels, paths = images
            found = image_metrics(scores, labels, names=paths)
            values = {key: float(value) for key, value in found.items()}
            values |= self._at_threshold(category, images)
            curves = item_curves(scores, labels)
            if isinstance(records.maps, ScoredMaps):
                metrics = records.maps.take(category)
                values |= metrics.compute()
                curves["pro"] = metrics.pixel.curves()["pro"]
            per_category[category] = values
            if keep_curves:
                self.curves[category] = {
                    **{name: tuple(_array(axis) for axis in c) for name, c in curves.items()},
                    "scores": _array(scores),
                    "labels": _array(labels),
                    "threshold": self.threshold_of(category),
                    "values": values,
                }
        results = {
            f"{c}/{key}": v for c, values in per_category.items() for key, v in values.items()
        }
        return results | mean_over_categories(per_category)

    def _at_threshold(self, category: str, images: OfCategory) -> dict[str, float]:
        found = exceeds(images.scores, self.threshold_of(category))
        if not self.limits_of(category):
            return {}
        return {
            "false_positive_rate": float(found[~images.labels].double().mean()),
            "true_positive_rate": float(found[images.labels].double().mean()),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the calibration with the weights that it belongs to."""
        checkpoint.setdefault("anomaly_lit", {})["calibration"] = self.calibration

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the calibration."""
        self.calibration = checkpoint.get("anomaly_lit", {}).get("calibration", {})


def mean_over_categories(per_category: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the categories in which it is defined.

    Intervals and thresholds belong to one category; they are kept where there is only one.
    """
    names = dict.fromkeys(key for values in per_category.values() for key in values)
    means = {}
    for name in names:
        if len(per_category) > 1 and name.endswith(("_low", "_high", "_threshold")):
            continue
        values = [v[name] for v in per_category.values() if not math.isnan(v.get(name, math.nan))]
        means[name] = math.fsum(values) / len(values) if values else math.nan
    return means


def _validation_names(trainer: pl.Trainer) -> list[str]:
    """Return what each validation loader holds.

    Without our data module the first holds normal images and a second one, if any, test images.
    """
    names = getattr(getattr(trainer, "datamodule", None), "validation_names", None)
    if names is not None:
        return names()
    loaders = trainer.val_dataloaders
    return ["holdout", "test"] if isinstance(loaders, list) and len(loaders) > 1 else ["holdout"]


def _localises(pl_module: pl.LightningModule) -> bool:
    """Return whether a module gives maps; it does unless it says otherwise."""
    return bool(getattr(pl_module, "localises", True))


def _check_map(pl_module: pl.LightningModule, prediction: Prediction) -> None:
    """Raise if a method that scores images only gives a map, or one that localises gives none."""
    has_map: bool = prediction.anomaly_map is not None
    if has_map == _localises(pl_module):
        return
    name = type(pl_module).__name__
    found, right = ("a map", "True") if has_map else ("no map (anomaly_map=None)", "False")
    raise UserError(
        f"{name}.localises is {not has_map}, and {name}.forward gives {found}: set localises = "
        f"{right} in the class, or change what forward gives"
    )


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
