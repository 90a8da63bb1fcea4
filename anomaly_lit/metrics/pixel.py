"""All pixel metrics from one pass over the anomaly maps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from anomaly_lit.metrics.functional import check_maps, limits_of
from anomaly_lit.metrics.ranking import (
    Estimate,
    Ranking,
    rank,
    ranking_aupimo,
    ranking_aupro,
    ranking_auroc,
    ranking_average_precision,
    ranking_curves,
    ranking_f1_max,
)
from anomaly_lit.metrics.regions import Regions, send
from anomaly_lit.metrics.streaming import ANOMALOUS, MOST_REGIONS, NORMAL, ROWS, Bins
from anomaly_lit.types import UserError

Engine = Literal["auto", "exact", "streaming"]
EXACT_PIXELS = 12_000_000  # 48 MB of scores: with up to a tenth anomalous, below 64 MB
UNRELIABLE = 1e-3
HELD = ("normal", "anomalous", "positive", "area", "image_area")


class PixelMetrics(Metric):
    """Pixel AUROC, AP, F1-max, AUPRO at several limits, mean AUPIMO and their curves.

    The engine `exact` keeps all scores as float32 and sorts them once. `streaming` counts them in
    bins that keep their order (`anomaly_lit.metrics.streaming`): it needs constant memory, its
    states are summed over processes, and every value comes with a bound on its error. `auto` is
    exact up to `exact_pixels` pixels; beyond, it moves what it holds into the bins. Processes are
    summed before this is decided, so that their number does not matter.

    Args:
        limits: false positive rates up to which AUPRO is integrated; 0.3 gives `pixel_aupro`, any
            other `pixel_aupro_<limit>`.
        engine: "auto", "exact" or "streaming".
        center: where the map scores of normal pixels concentrate, for example their median on
            held-out normal images. It sets where bins are fine, never what is measured. It is an
            argument because a value from the first batch would depend on how data is split over
            processes.
        exact_pixels: the largest number of pixels for which `auto` is exact.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    normal: list[Tensor]  # scores of images without defects
    anomalous: list[Tensor]  # scores of images with a defect
    positive: list[Tensor]  # scores of the anomalous pixels among them
    area: list[Tensor]  # float32 like the other lists, so that ranks without data can be gathered
    image_area: list[Tensor]
    histogram: Tensor
    pixels: Tensor
    regions: Tensor
    defective_images: Tensor
    unfinite_images: Tensor

    def __init__(
        self,
        limits: Sequence[float] = (0.3, 0.1, 0.05, 0.01),
        engine: Engine = "auto",
        center: float = 0.0,
        exact_pixels: int = EXACT_PIXELS,
    ) -> None:
        super().__init__()
        if engine not in get_args(Engine):
            raise UserError(f"there is no engine {engine!r}; choose one of {get_args(Engine)}")
        self.limits = limits_of(limits)
        self.engine = engine
        self.exact_pixels = exact_pixels
        for name in HELD:
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("pixels", "regions", "defective_images", "unfinite_images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.center = center
        self._forget()

    def _forget(self) -> None:
        self._held = 0  # pixels in the lists
        self._streaming = self.engine == "streaming"  # whether batches go to the bins
        self._names: list[str] = []  # of images whose check has not left the device yet
        self._finite: list[Tensor] = []

    @property
    def center(self) -> float:
        """The centre of the bins; it can be set until the first update."""
        return self._center

    @center.setter
    def center(self, center: float) -> None:
        if self._update_count:
            raise UserError("the centre is set after an update; set it before, or reset first")
        if not torch.tensor(center, dtype=torch.float32).isfinite():
            raise UserError(f"the centre is {center}; give a finite number")
        self._center = float(center)
        self.bins = Bins(center)
        self.add_state("histogram", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum")
        self._clear_histogram()

    def reset(self) -> None:
        """Forget all scores and free their memory."""
        super().reset()
        self._clear_histogram()
        self._forget()

    def _clear_histogram(self) -> None:
        """Set the histogram to one expanded zero, which takes no memory until the bins are used."""
        columns = 0 if self.engine == "exact" else self.bins.count
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.histogram = zero.expand(ROWS, columns)

    def update(
        self, anomaly_map: Tensor, gt_mask: Tensor, names: Sequence[str] | None = None
    ) -> None:
        """Add a batch.

        If masks are on the CPU, nothing here waits for a GPU (masks on a GPU cost one wait per
        batch). Maps on a GPU are checked for NaN and infinity in `compute`.

        Args:
            anomaly_map: (B, 1, H, W), unbounded, read as float32; larger is more anomalous.
            gt_mask: (B, 1, H, W) bool at the same resolution, true where anomalous.
            names: names of the B images for error messages, for example their paths.

        Raises:
            UserError: shapes or types do not fit, or a map holds NaN or infinity.
        """
        regions = check_maps(anomaly_map, gt_mask)
        if anomaly_map.device != self.pixels.device:
            raise UserError(
                f"the maps are on {anomaly_map.device}, the metric is on {self.pixels.device};"
                " move the metric with metric.to(device)"
            )
        scores = anomaly_map.detach().flatten(1).float()
        self._check_finite(scores, names)
        self._add(*_split(scores, regions))
        self.pixels += scores.numel()
        self.regions += regions.number
        self.defective_images += int(regions.defective.sum())

    def _check_finite(self, scores: Tensor, names: Sequence[str] | None) -> None:
        if names is not None and len(names) != len(scores):
            raise UserError(f"found {len(names)} names for {len(scores)} maps; give one for each")
        if scores.device.type != "cpu":
            self._check_later(scores, self._named(names, len(scores)))
        elif not scores.sum().isfinite() and not (finite := scores.isfinite().all(1)).all():
            _raise_unfinite(self._named(names, len(scores)), finite)

    def _named(self, names: Sequence[str] | None, count: int) -> Sequence[str]:
        batch = self._update_count - 1
        return names or [f"image {index} of batch {batch}" for index in range(count)]

    def _check_later(self, scores: Tensor, names: Sequence[str]) -> None:
        finite = scores.isfinite().all(1)
        self._names.extend(names)
        self._finite.append(finite)
        self.unfinite_images += (~finite).sum()

    def _add(self, *parts: Tensor) -> None:
        """Keep a batch, or count it in the bins; for the parts see `HELD`."""
        size = len(parts[0]) + len(parts[1])
        if self.engine == "auto" and self._held + size > self.exact_pixels:
            self._streaming = True
        if self._streaming:
            self._count(*parts)
            self._count_held()
            self._held = 0
            return
        self._held += size
        for name, part in zip(HELD, parts, strict=True):
            getattr(self, name).append(part.float())

    def _count(
        self, normal: Tensor, anomalous: Tensor, positive: Tensor, area: Tensor, image_area: Tensor
    ) -> None:
        if self.histogram.stride(0) == 0:
            with torch.inference_mode(False):  # later updates may run outside inference mode
                self.histogram = torch.zeros_like(
                    self.histogram, memory_format=torch.contiguous_format
                )
        self.bins.count_scores(self.histogram[NORMAL], normal)
        self.bins.count_scores(self.histogram[ANOMALOUS], anomalous)
        self.bins.count_anomalous(self.histogram, positive, area.long(), image_area.long())

    def _count_held(self) -> None:
        """Move what is held into the bins; after the sum over processes, what all of them held."""
        for parts in zip(*(_listed(getattr(self, name)) for name in HELD), strict=True):
            self._count(*parts)
        for name in HELD:
            setattr(self, name, [])

    def _rank(self) -> Ranking:
        """Return the ordering of all scores; if the bins are used, everything is moved there."""
        if self.unfinite_images:
            finite = [torch.ones(0, dtype=torch.bool), *(part.cpu() for part in self._finite)]
            _raise_unfinite(self._names, torch.cat(finite))
        regions, images = int(self.regions), int(self.defective_images)
        if regions > MOST_REGIONS:
            raise UserError(f"found {regions} regions; at most {MOST_REGIONS} can be weighed")
        within = self.engine == "auto" and int(self.pixels) <= self.exact_pixels
        if self.engine == "exact" or within:
            empty = torch.empty(0, device=self.device)
            held = [torch.cat([empty, *_listed(getattr(self, name))]) for name in HELD]
            normal, anomalous, positive, area, image_area = held
            return rank(anomalous, positive, normal, area, image_area, regions, images)
        self._count_held()
        return self.bins.rank(self.histogram, regions, images)

    def compute(self) -> dict[str, Tensor]:
        """Return all values, 0-d float64 tensors on the CPU; NaN if a class is missing.

        Returns:
            pixel_auroc, pixel_ap, pixel_f1max, pixel_f1max_threshold, pixel_aupro (limit 0.3),
            pixel_aupro_<limit>, pixel_aupimo, and with bins also <key>_bound for each except the
            threshold: the exact value is at most this far away.

        Raises:
            UserError: a map held NaN or infinity.
        """
        ranking = self._rank()
        f1, threshold = ranking_f1_max(ranking)
        estimates = {
            "pixel_auroc": ranking_auroc(ranking),
            "pixel_ap": ranking_average_precision(ranking),
            "pixel_f1max": f1,
            **{aupro_key(x): ranking_aupro(ranking, x) for x in self.limits},
            "pixel_aupimo": ranking_aupimo(ranking),
        }
        values = {name: estimate.value for name, estimate in estimates.items()}
        values["pixel_f1max_threshold"] = threshold
        if ranking.tied:
            return values
        _warn_unreliable(estimates)
        return values | {f"{name}_bound": estimate.bound for name, estimate in estimates.items()}

    def curves(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the curves behind the values, see `ranking_curves`; with bins, their corners."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return ranking_curves(self._rank())


def _split(scores: Tensor, regions: Regions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the parts of a batch, in the order of `HELD`."""
    device, images = scores.device, regions.defective
    normal = scores.index_select(0, send((~images).nonzero().squeeze(1), device)).flatten()
    anomalous = scores.index_select(0, send(images.nonzero().squeeze(1), device)).flatten()
    positive = scores.flatten().index_select(0, regions.position)
    return normal, anomalous, positive, regions.area, regions.image_area


def _listed(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Return a state as a list; it is a single tensor once processes are joined."""
    return [state] if isinstance(state, Tensor) else state


def _raise_unfinite(names: Sequence[str], finite: Tensor) -> None:
    bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    raise UserError(
        f"NaN or infinity (as float32) in the anomaly maps of: {shown or 'another process'};"
        " look for a division by zero or an overflow in the method, or use a wider precision"
    )


def _warn_unreliable(estimates: dict[str, Estimate]) -> None:
    bounds = {name: float(estimate.bound) for name, estimate in estimates.items()}
    wide = [f"{name} (+-{bound:.1g})" for name, bound in bounds.items() if bound > UNRELIABLE]
    if wide:
        warnings.warn(
            f"unreliable from the bins: {', '.join(wide)}; use engine='exact', or set the centre"
            " to the median map score of normal images",
            stacklevel=3,
        )


def aupro_key(limit: float) -> str:
    """Return the name of AUPRO at a limit; the usual 0.3 is left out of the name."""
    return "pixel_aupro" if limit == 0.3 else f"pixel_aupro_{limit:g}"
