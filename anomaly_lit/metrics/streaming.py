"""Order scores in constant memory: count them in bins that keep their order.

A bin is found from the bits of a float32: read as an integer (negatives mirrored), they increase
with the number, so dropping the lower bits rounds to bins of constant relative width. Precision is
needed not for the score itself but for its distance from where scores concentrate. There are two
such anchors: the centre, fixed before evaluation (the median map score of normal images), and 1,
where probabilities saturate. A score is binned by its distance from the nearer anchor. Distances
from 2^-40 to 2^40 have 4096 + 32 bins in each doubling, all others 32, down to denormals and up to
the largest number: no range is assumed. Every step keeps the order, and so does rounding: scores of
different bins are always in their true order, while the order within a bin is unknown.

Counts and weights are integers. Their sums do not depend on the order of batches or processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_lit.metrics.ranking import Ranking

SATURATION = 1.0  # the second anchor
COARSE = 18  # bits dropped everywhere: 2^5 bins in each doubling
FINE = 11  # bits dropped inside the window: 2^12 bins in each doubling
WINDOW = ((127 - 40) << 23, (127 + 40) << 23)  # bits of the float32 2^-40 and 2^40
HIGHEST = 0x7F800000  # bits of infinity, where a large difference may land

NORMAL, ANOMALOUS, POSITIVE, REGION, IMAGE = range(5)  # rows of a histogram
ROWS = 5
UNIT = 2**40  # weight of one whole region or image, in fixed point
MOST_REGIONS = 2**22  # their weights sum to less than 2^63
CHUNK = 2**16  # scores counted at once on a CPU, so that they fit its cache


def _ordered(bits: Tensor) -> Tensor:
    """Map bits of float32 to int32 that increase with the number; this is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _code(distance: Tensor) -> Tensor:
    """Return an increasing int32 code of float32 distances; -0.0 and 0.0 have the same code."""
    key = _ordered((distance + 0.0).view(torch.int32))
    low, high = WINDOW
    code = key >> COARSE
    code += key.clamp(low, high) >> FINE
    code += key.clamp_(-high, -low) >> FINE
    return code


def _code_of(distance: float) -> int:
    return int(_code(torch.tensor([distance], dtype=torch.float32)))


class Bins:
    """The bins for one centre.

    Args:
        center: where the scores of normal pixels concentrate.
    """

    def __init__(self, center: float) -> None:
        center = float(torch.tensor(center, dtype=torch.float32))
        self.low, self.high = sorted((center, SATURATION))
        middle = torch.tensor((self.low + self.high) / 2, dtype=torch.float32)
        self.middle = float(middle)
        self.first = _code_of(-torch.inf)
        self.shift = _code_of(float(middle - self.low)) - _code_of(float(middle - self.high)) + 1
        self.count = _code_of(torch.inf) + self.shift - self.first + 1

    def of(self, scores: Tensor) -> Tensor:
        """Return the bin of each float32 score, int32 in [0, count); NaN has one too."""
        upper = scores >= self.middle
        code = _code(torch.where(upper, scores - self.high, scores - self.low))
        return code.add_(upper, alpha=self.shift).sub_(self.first).clamp_(0, self.count - 1)

    def lowest(self, bins: Tensor) -> Tensor:
        """Return the lowest float32 score of each bin, by bisection over all float32 numbers."""
        low = torch.full_like(bins, -HIGHEST - 1, dtype=torch.int64)
        high = torch.full_like(bins, HIGHEST, dtype=torch.int64)
        while (low < high).any():
            middle = (low + high) // 2
            reached = self.of(_ordered(middle.int()).view(torch.float32)) >= bins
            low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
        return _ordered(low.int()).view(torch.float32)

    def count_scores(self, row: Tensor, scores: Tensor) -> None:
        """Add float32 scores (N,) to a row of the histogram."""
        one = torch.ones((), dtype=torch.int64, device=row.device)
        size = CHUNK if scores.device.type == "cpu" else max(len(scores), 1)
        for part in scores.split(size):
            row.index_add_(0, self.of(part), one.expand(len(part)))

    def count_anomalous(
        self, histogram: Tensor, scores: Tensor, area: Tensor, image_area: Tensor
    ) -> None:
        """Add anomalous pixels (P,) with the sizes of their regions and their images' defects."""
        bins = self.of(scores)
        histogram[POSITIVE].index_add_(0, bins, torch.ones_like(area))
        histogram[REGION].index_add_(0, bins, (UNIT + area // 2) // area)
        histogram[IMAGE].index_add_(0, bins, (UNIT + image_area // 2) // image_area)

    def rank(self, histogram: Tensor, regions: int, images: int) -> Ranking:
        """Read the ranking from a histogram, (ROWS, count) int64.

        A weight in fixed point is off by at most half a unit, so that over the P anomalous pixels
        the mean overlap is off by at most P / (2 UNIT regions). This is the ranking's slack.
        """
        held = histogram[POSITIVE].nonzero().squeeze(1).flip(0)

        def with_and_above(row: int) -> tuple[Tensor, Tensor]:
            count = histogram[row]
            above = count.sum() - count.cumsum(0)[held]
            return (above + count[held]).cpu().double(), above.cpu().double()

        true, true_before = with_and_above(POSITIVE)
        normal, normal_before = with_and_above(NORMAL)
        anomalous, anomalous_before = with_and_above(ANOMALOUS)
        totals = histogram.sum(1).tolist()
        positives = totals[POSITIVE]
        regions, images = max(regions, 1), max(images, 1)
        return Ranking(
            threshold=self.lowest(held.cpu()).double(),
            true=true,
            false_before=anomalous_before - true_before + normal_before,
            false=anomalous - true + normal,
            overlap=(with_and_above(REGION)[0] / (UNIT * regions)).clamp(max=1),
            recall=(with_and_above(IMAGE)[0] / (UNIT * images)).clamp(max=1),
            normal_before=normal_before,
            normal=normal,
            positives=positives,
            negatives=totals[NORMAL] + totals[ANOMALOUS] - positives,
            normals=totals[NORMAL],
            tied=False,
            slack=(positives / (2 * UNIT * regions), positives / (2 * UNIT * images)),
        )
