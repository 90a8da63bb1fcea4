"""Scores of a test of clips: within each clip, over all frames, and over time."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from anomaly_lit.callbacks.records import gathered, in_order
from anomaly_lit.drawing.timeline import Timeline, save_timeline
from anomaly_lit.files import printable, replace_file, tell
from anomaly_lit.metrics import auroc


class ClipScores(pl.Callback):
    """Score the frames of clips as papers on video do; without clips it does nothing.

    Within each clip the scores, or each part of them (`FramePrediction`), are scaled to [0, 1].
    This needs the whole clip. `test/frame_auroc` is the AUROC of all frames together.
    `test/clip_auroc` is the mean AUROC of the clips that have both normal and anomalous frames; the
    others are printed and counted as `test/clips_undefined`. `test/image_auroc` of `Evaluation`
    takes the scores as they are, as one has to while a clip is still running.

    Args:
        directory: Where `clips.csv`, `frames.csv` and `timeline.png` are written.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.timelines: list[Timeline] = []
        self._parts: list[Tensor] = []

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last test."""
        self._parts = []
        self.timelines = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the scores of one batch."""
        if has_clips(trainer):
            parts = getattr(outputs, "parts", outputs.score[:, None])
            self._parts.append(parts.detach().float())

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute, log and write everything; every rank has to call this."""
        if not has_clips(trainer):
            return
        samples = trainer.datamodule.test_samples  # type: ignore[attr-defined]
        own = torch.cat(self._parts).tolist() if self._parts else []
        parts = torch.tensor(in_order(gathered(own))).view(len(samples), -1).double()
        weights = torch.tensor(getattr(pl_module, "part_weights", (1.0,)), dtype=torch.float64)
        self.timelines = timelines(samples, parts, weights)
        values = summary(self.timelines)
        pl_module.log_dict({f"test/{name}": value for name, value in values.items()})
        if trainer.is_global_zero:
            self.write(samples)

    def write(self, samples: Any) -> None:
        """Write the tables and the picture, and say which clips have no value."""
        undefined = [line.name for line in self.timelines if math.isnan(line.auroc)]
        if undefined:
            tell(
                f"{len(undefined)} of {len(self.timelines)} clips have frames of one kind only, so "
                f"their AUROC is undefined and left out of test/clip_auroc: {', '.join(undefined)}"
            )
        with replace_file(self.directory / "clips.csv", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["clip", "frames", "anomalous", "auroc"])
            for line in self.timelines:
                value = None if math.isnan(line.auroc) else line.auroc
                assert line.labels is not None
                name, anomalous = printable(line.name), int(line.labels.sum())
                writer.writerow([name, len(line.scores), anomalous, value])
        with replace_file(self.directory / "frames.csv", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "clip", "label", "score_in_clip"])
            scores = np.concatenate([line.scores for line in self.timelines])
            for sample, score in zip(by_clip(samples), scores.tolist(), strict=True):
                names = printable(sample.path), printable(sample.group)
                writer.writerow([*names, int(sample.label), score])
        save_timeline(self.directory / "timeline.png", self.timelines)


def has_clips(trainer: pl.Trainer) -> bool:
    """Return whether the images of a test are frames of clips."""
    layout = getattr(getattr(trainer, "datamodule", None), "layout", None)
    return bool(getattr(layout, "frames", 0))


def by_clip(samples: Any) -> list[Any]:
    """Return samples clip by clip, in the order in which clips first appear."""
    rows: dict[str, list[Any]] = {}
    for sample in samples:
        rows.setdefault(sample.group, []).append(sample)
    return [sample for own in rows.values() for sample in own]


def timelines(samples: Any, parts: Tensor, weights: Tensor) -> list[Timeline]:
    """Return the scores of each clip.

    Args:
        samples: N frames, in order.
        parts: (N, K), the parts of the scores, which are scaled to [0, 1] within each clip.
        weights: (K,), the weight of each part in the sum.
    """
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(sample.group, []).append(row)
    found = []
    for name, own in rows.items():
        values = parts[own]
        low, high = values.amin(dim=0), values.amax(dim=0)
        scores = ((values - low) / (high - low).clamp(min=1e-12)) @ weights
        labels = torch.tensor([samples[row].label for row in own])
        value = float(auroc(scores, labels)) if labels.any() and not labels.all() else math.nan
        found.append(Timeline(name, scores.numpy(), labels.numpy(), value))
    return found


def summary(lines: list[Timeline]) -> dict[str, float]:
    """Return the metrics over all clips; NaN where one is undefined."""
    scores = torch.from_numpy(np.concatenate([line.scores for line in lines]))
    labels = torch.from_numpy(np.concatenate([line.labels for line in lines]))
    defined = [line.auroc for line in lines if not math.isnan(line.auroc)]
    both = bool(labels.any()) and not bool(labels.all())
    return {
        "frame_auroc": float(auroc(scores, labels)) if both else math.nan,
        "clip_auroc": math.fsum(defined) / len(defined) if defined else math.nan,
        "clips": float(len(lines)),
        "clips_undefined": float(len(lines) - len(defined)),
    }
