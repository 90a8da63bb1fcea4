"""Metrics of one score per image, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from anomaly_lit.metrics import functional
from anomaly_lit.metrics.intervals import bootstrap_interval
from anomaly_lit.types import UserError


def image_metrics(
    scores: Tensor,
    labels: Tensor,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return all metrics of one score per image; see `ImageMetrics`.

    Args:
        scores: (N,) float, unbounded, of all images: nothing is gathered over processes here.
        labels: (N,) bool, true where anomalous.
        resamples: resamples of the bootstrap; 0 leaves the intervals out.
        confidence: share of the resamples inside the interval.
        seed: of the bootstrap only.
        names: names of the N images for error messages; None numbers them from 0.

    Returns:
        image_auroc, image_ap, image_f1max, image_f1max_threshold, and unless `resamples` is 0
        image_auroc_low, image_auroc_high, image_ap_low, image_ap_high: 0-d float64 tensors on the
        CPU, NaN where a class is missing.

    Raises:
        UserError: a score is NaN or infinite.
    """
    _check_finite(scores, names)
    f1max, threshold = functional.f1_max(scores, labels)
    values = {
        "image_auroc": functional.auroc(scores, labels),
        "image_ap": functional.average_precision(scores, labels),
        "image_f1max": f1max,
        "image_f1max_threshold": threshold,
    }
    if not resamples:
        return values
    intervals = bootstrap_interval(scores, labels, resamples, confidence, seed)
    for name, (low, high) in intervals.items():
        values |= {f"image_{name}_low": low, f"image_{name}_high": high}
    return values


def _check_finite(scores: Tensor, names: Sequence[str] | None) -> None:
    bad = (~scores.isfinite()).nonzero().squeeze(1).tolist()
    if bad:
        shown = ", ".join(str(index) if names is None else names[index] for index in bad[:5])
        raise UserError(f"{len(bad)} image scores are NaN or infinite, of images: {shown}")


class ImageMetrics(Metric):
    """Image AUROC, AP and F1-max, with 95 % bootstrap intervals of the first two.

    Scores are kept (8 bytes an image) and gathered from all processes; nothing waits for a GPU
    before `compute`. Intervals depend neither on the order of images nor on the processes. Give
    each process only its own images; if every process already has all of them, use `image_metrics`.

    Args:
        resamples: resamples of the bootstrap; 0 leaves the intervals out.
        confidence: share of the resamples inside the interval.
        seed: of the bootstrap only.

    Raises:
        UserError: resamples are negative, or the confidence is outside (0, 1).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    score: list[Tensor]
    anomalous: list[Tensor]  # float32 like the scores, so that ranks without data can be gathered

    def __init__(self, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> None:
        super().__init__()
        if resamples < 0 or not 0 < confidence < 1:
            raise UserError(
                f"found resamples={resamples} and confidence={confidence}; give resamples of 0 or"
                " more and a confidence between 0 and 1"
            )
        self.resamples = resamples
        self.confidence = confidence
        self.seed = seed
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("anomalous", [], dist_reduce_fx="cat")
        self._names: list[str] = []

    def reset(self) -> None:
        """Forget all scores."""
        super().reset()
        self._names = []

    def update(self, score: Tensor, label: Tensor, names: Sequence[str] | None = None) -> None:
        """Add a batch.

        Args:
            score: (B,) unbounded, read as float32; larger is more anomalous.
            label: (B,) bool, true where anomalous.
            names: names of the B images for error messages.

        Raises:
            UserError: shapes or types do not fit.
        """
        if score.shape != label.shape or score.ndim != 1 or label.dtype != torch.bool:
            raise UserError(
                f"found score {tuple(score.shape)} and label {tuple(label.shape)} of type"
                f" {label.dtype}; give both as (B,), the label boolean"
            )
        self.score.append(score.detach().float())
        self.anomalous.append(label.to(score.device).float())
        first = len(self._names)
        self._names += names or [f"number {first + index}" for index in range(len(score))]

    def _items(self) -> tuple[Tensor, Tensor]:
        """Return all scores and labels on the CPU."""
        scores, labels = (
            torch.cat([torch.empty(0), *(part.cpu() for part in _listed(state))])
            for state in (self.score, self.anomalous)
        )
        return scores, labels > 0

    def _known_names(self, scores: Tensor) -> list[str] | None:
        """Return the images' names; None if some are in other processes."""
        return self._names if len(self._names) == len(scores) else None

    def compute(self) -> dict[str, Tensor]:
        """Return all values: see `image_metrics`.

        Raises:
            UserError: a score is NaN or infinite.
        """
        scores, labels = self._items()
        return image_metrics(
            scores, labels, self.resamples, self.confidence, self.seed, self._known_names(scores)
        )

    def curves(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the curves "roc" (fpr, tpr) and "pr" (recall, precision)."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            scores, labels = self._items()
            _check_finite(scores, self._known_names(scores))
            return functional.item_curves(scores, labels)


def _listed(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Return a state as a list; it is a single tensor once processes are joined."""
    return [state] if isinstance(state, Tensor) else state
