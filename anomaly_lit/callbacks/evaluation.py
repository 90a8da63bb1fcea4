"""Scores every method the same way, on raw scores, and calibrates thresholds without defects."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from anomaly_lit.calibration import limits_of, threshold_at, verdict
from anomaly_lit.metrics import ImageMetrics, PixelMetrics
from anomaly_lit.types import Batch, Prediction, UserError

PIXELS_PER_MAP = 4096  # drawn from each held-out map to place the colours and the metrics' centre


class Evaluation(pl.Callback):
    """Collects predictions of an evaluation, scores them per category, and takes the mean.

    Validation sees held-out normal images. From their scores each category gets the threshold
    that lets ``fpr`` of normal images pass as defects; it is stored in the checkpoint. A metric
    that needs both classes is undefined there, and NaN wherever a test set lacks one class.

    Args:
        fpr: Share of normal images above the threshold, in (0, 1).
        aupro_limits: False-positive rates up to which the per-region overlap is integrated.
        engine: ``exact``, ``streaming`` or ``auto``, see ``PixelMetrics``.

    Attributes:
        calibration: Thresholds and the range of held-out maps, as plain data.
        results: Metrics of the last test, ``<category>/<metric>`` and the mean ``<metric>``.
        rows: One per tested image: path, category, defect_type, label, score, threshold, verdict.
        curves: Curves of each category, see `drawing.curves.save_curves`.
    """

    def __init__(
        self,
        fpr: float = 0.01,
        aupro_limits: Sequence[float] = (0.3,),
        engine: Literal["auto", "exact", "streaming"] = "auto",
    ) -> None:
        if not 0 < fpr < 1:
            raise UserError(f"threshold.fpr={fpr}: give a share between 0 and 1")
        self.fpr = fpr
        self.aupro_limits = tuple(aupro_limits)
        self.engine = engine
        self.calibration: dict[str, Any] = {}
        self.results: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.curves: dict[str, dict[str, Any]] = {}
        self._records = Records()

    # ---------------------------------------------------------------- held-out normal images

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the last validation."""
        self._split_of = _validation_names(trainer)
        self._normal = Records()
        self._scored = {
            name: Records(self._new_pixel_metrics) for name in self._split_of if name != "holdout"
        }

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the predictions of one batch."""
        split = self._split_of[dataloader_idx]
        if split == "holdout":
            self._normal.add(batch, outputs)
            if "synthetic" in self._scored:  # where every synthetic image has a defect
                self._scored["synthetic"].add(batch, outputs)
        else:
            self._scored[split].add(batch, outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrates; scores synthetic anomalies and, for the oracle, the test set, where asked."""
        if trainer.sanity_checking:
            return
        self.calibration = self._calibrate(self._normal)
        results = {split: self._score(records) for split, records in self._scored.items()}
        for name, value in results.get("synthetic", {}).items():
            if name.count("/") == 0 and not name.endswith(("_low", "_high", "_threshold")):
                pl_module.log(f"val/synthetic_{name}", value)
        if "test" in results:
            test = results["test"]
            value = test.get("image_auroc", math.nan) + test.get("pixel_auroc", 0.0)
            pl_module.log("oracle/criterion", value, prog_bar=True)

    def _calibrate(self, normal: Records) -> dict[str, Any]:
        if not normal.score:
            return {}
        scores, samples = normal.gathered()
        pooled = torch.cat(list(scores.values())), torch.cat(list(samples.values()))
        return {
            "fpr": self.fpr,
            "categories": {name: self._limits(scores[name], samples[name]) for name in scores},
            "all": self._limits(*pooled),
        }

    def _limits(self, scores: Tensor, pixels: Tensor) -> dict[str, float | int | str]:
        pixels = pixels.double().sort().values
        threshold, rule = threshold_at(scores, self.fpr)
        return {
            "threshold": threshold,
            "rule": rule,
            "count": len(scores),
            "map_low": float(pixels[len(pixels) // 2]),
            "map_high": float(pixels[min(len(pixels) - 1, int(0.999 * len(pixels)))]),
            "map_median": float(pixels[len(pixels) // 2]),
        }

    # ---------------------------------------------------------------- test images

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the last test."""
        has_masks = getattr(getattr(trainer, "datamodule", None), "has_masks", True)
        self._records = Records(self._new_pixel_metrics if has_masks else None)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the predictions of one batch."""
        self._records.add(batch, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes and logs every metric as ``test/<category>/<metric>`` and ``test/<metric>``."""
        self.results = self._score(self._records, keep_curves=True)
        self.rows = self._records.rows(self.threshold_of)
        pl_module.log_dict({f"test/{key}": value for key, value in self.results.items()})

    def threshold_of(self, category: str) -> float:
        """The category's threshold; that of all held-out images together for an unknown one."""
        limits = self.limits_of(category)
        return float(limits["threshold"]) if limits else math.nan

    def limits_of(self, category: str) -> dict[str, Any]:
        """Calibration of a category, of all together if unknown, empty without held-out images."""
        return limits_of(self.calibration, category)

    def _new_pixel_metrics(self, category: str) -> PixelMetrics:
        center = self.limits_of(category).get("map_median", 0.0)
        return PixelMetrics(self.aupro_limits, self.engine, center)

    def _score(self, records: Records, keep_curves: bool = False) -> dict[str, float]:
        scores, labels = records.gathered_labels()
        per_category: dict[str, dict[str, float]] = {}
        for category in scores:
            metrics = ImageMetrics()
            metrics.update(scores[category], labels[category])
            values = {key: float(value) for key, value in metrics.compute().items()}
            values |= self._at_threshold(category, scores[category], labels[category])
            pixel = records.take_pixel_metrics(category)
            curves = metrics.curves()
            if pixel is not None:
                pixel_values = {key: float(value) for key, value in pixel.compute().items()}
                values |= pixel_values
                curves["pro"] = pixel.curves()["pro"]
            per_category[category] = values
            if keep_curves:
                self.curves[category] = {
                    **{name: tuple(_array(axis) for axis in c) for name, c in curves.items()},
                    "scores": _array(scores[category]),
                    "labels": _array(labels[category]),
                    "threshold": self.threshold_of(category),
                    "values": values,
                }
        results = {
            f"{c}/{key}": v for c, values in per_category.items() for key, v in values.items()
        }
        return results | mean_over_categories(per_category)

    def _at_threshold(self, category: str, scores: Tensor, labels: Tensor) -> dict[str, float]:
        found = scores > self.threshold_of(category)
        if not self.limits_of(category):
            return {}
        return {
            "false_positive_rate": float(found[~labels].double().mean()),
            "true_positive_rate": float(found[labels].double().mean()),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores the calibration with the weights that it belongs to."""
        checkpoint.setdefault("anomaly_lit", {})["calibration"] = self.calibration

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores it."""
        self.calibration = checkpoint.get("anomaly_lit", {}).get("calibration", {})


class Records:
    """What is kept of the images of one evaluation: scores, and statistics of maps.

    Tensors stay on the device until the end, so that no step waits for it.

    Args:
        new_pixel_metrics: Makes the pixel metrics of a category; None keeps pixel samples.
    """

    def __init__(self, new_pixel_metrics: Callable[[str], PixelMetrics] | None = None) -> None:
        self.new_pixel_metrics = new_pixel_metrics
        self.pixel: dict[str, PixelMetrics] = {}
        self.samples: list[dict[str, Any]] = []
        self.score: list[Tensor] = []
        self.pixels: list[Tensor] = []

    def add(self, batch: Batch, prediction: Prediction) -> None:
        """Takes one batch."""
        self.score.append(prediction.score.detach().float())
        keys = ("path", "category", "defect_type")
        labels = batch["label"].tolist()
        for row, label in enumerate(labels):
            self.samples.append({key: batch[key][row] for key in keys} | {"label": label})  # type: ignore[literal-required]
        maps = prediction.anomaly_map.detach()
        if self.new_pixel_metrics is None:
            stride = max(1, maps[0].numel() // PIXELS_PER_MAP)
            self.pixels += list(maps.flatten(1)[:, ::stride].float())
            return
        by_category: dict[str, list[int]] = defaultdict(list)
        for row, category in enumerate(batch["category"]):
            by_category[category].append(row)
        for category, rows in by_category.items():
            if category not in self.pixel:
                self.pixel[category] = self.new_pixel_metrics(category).to(maps.device)
            names = [batch["path"][row] for row in rows]
            self.pixel[category].update(maps[rows], batch["gt_mask"][rows], names)

    def take_pixel_metrics(self, category: str) -> PixelMetrics | None:
        """The pixel metrics of a category, which are forgotten here; None without truth.

        A rank that saw none of the category has empty ones, since all ranks compute together.
        """
        if self.new_pixel_metrics is None:
            return None
        return self.pixel.pop(category, None) or self.new_pixel_metrics(category)

    def _joined(self) -> tuple[Tensor, list[dict[str, Any]], list[Tensor]]:
        """Scores, samples and pixels of all ranks, on the CPU, in the order of the data set."""
        scores = torch.cat(self.score).cpu() if self.score else torch.zeros(0)
        pixels = [pixel.cpu() for pixel in self.pixels]
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return scores, self.samples, pixels
        world = torch.distributed.get_world_size()
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, (scores, self.samples, pixels))
        samples = _interleaved([part[1] for part in parts])
        return (
            torch.stack(_interleaved([list(part[0]) for part in parts])) if samples else scores,
            samples,
            _interleaved([part[2] for part in parts]),
        )

    def gathered(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per category: scores (n,) and pixels of the maps."""
        scores, samples, pixels = self._joined()
        rows = _rows_by_category(samples)
        return (
            {name: scores[index] for name, index in rows.items()},
            {name: torch.cat([pixels[i] for i in index]) for name, index in rows.items()},
        )

    def gathered_labels(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per category: scores (n,) and labels (n,)."""
        scores, samples, _ = self._joined()
        labels = torch.tensor([sample["label"] for sample in samples], dtype=torch.bool)
        rows = _rows_by_category(samples)
        return (
            {name: scores[index] for name, index in rows.items()},
            {name: labels[index] for name, index in rows.items()},
        )

    def rows(self, threshold_of: Callable[[str], float]) -> list[dict[str, Any]]:
        """One row per image with its score and verdict."""
        scores, samples, _ = self._joined()
        return [
            {**sample, "score": score, **verdict(score, threshold_of(sample["category"]))}
            for sample, score in zip(samples, scores.tolist(), strict=True)
        ]


def mean_over_categories(per_category: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the categories in which it is defined.

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
    """What the data loaders of a validation hold; without our data module: normals, then a test."""
    names = getattr(getattr(trainer, "datamodule", None), "validation_names", None)
    if names is not None:
        return names()
    loaders = trainer.val_dataloaders
    return ["holdout", "test"] if isinstance(loaders, list) and len(loaders) > 1 else ["holdout"]


def _rows_by_category(samples: list[dict[str, Any]]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        rows[sample["category"]].append(index)
    return dict(rows)


def _interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Undoes the sharding of ``ShardSampler``: the first of each rank, then the second, ..."""
    missing = object()
    rows = zip_longest(*parts, fillvalue=missing)
    return [item for row in rows for item in row if item is not missing]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
