"""Schedules: functions of the share of training that is done.

A schedule maps a fraction in [0, 1] to a factor of the optimiser's learning rate, or to a weight of
a loss, so that a short run has the same shape as a long one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from anomaly_lit.types import UserError, check_range


class Cosine:
    """Rises linearly over `warmup`, then falls along half a cosine to `end`.

    Args:
        warmup: Share of training, in [0, 1).
        end: Factor at the end, in [0, 1].

    Raises:
        UserError: A value is out of range.
    """

    def __init__(self, warmup: float = 0.0, end: float = 0.0) -> None:
        if not (0 <= warmup < 1 and 0 <= end <= 1):
            raise UserError(f"schedule: warmup={warmup} must lie in [0, 1), end={end} in [0, 1]")
        self.warmup = warmup
        self.end = end

    def __call__(self, done: float) -> float:
        """Return the factor when a share `done` of training is over."""
        if done < self.warmup:
            return done / self.warmup
        fall = (min(done, 1.0) - self.warmup) / (1 - self.warmup)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * fall)) / 2


class Step:
    """Rises linearly over `warmup`, stays constant, then drops once or several times.

    Args:
        at: Share of training after which the rate drops, in [0, 1], or a list of one for each drop.
        factor: Factor of the rate at each drop.
        warmup: Share of training, at most the smallest of `at`.

    Raises:
        UserError: A share or the factor is out of range.
    """

    def __init__(
        self, at: float | Sequence[float] = 0.8, factor: float = 0.1, warmup: float = 0.0
    ) -> None:
        self.at = list(at) if isinstance(at, Sequence) else [at]
        if not all(0 <= warmup <= share <= 1 for share in self.at):
            raise UserError(f"schedule: at={at} must lie in [0, 1], warmup={warmup} in [0, at]")
        check_range("method.schedule", "[0, inf)", factor=factor)
        self.factor = factor
        self.warmup = warmup

    def __call__(self, done: float) -> float:
        """Return the factor when a share `done` of training is over."""
        if done < self.warmup:
            return done / self.warmup
        return self.factor ** sum(done >= share for share in self.at)


class Decay:
    """Drops several times by the same factor, at equal intervals.

    Args:
        factor: Factor of each drop.
        times: Number of parts of equal length; the first has the full rate.

    Raises:
        UserError: There is no part, or the factor is below 0.
    """

    def __init__(self, factor: float = 0.9, times: int = 10) -> None:
        if times < 1:
            raise UserError(f"schedule: times={times} must be at least 1")
        check_range("method.schedule", "[0, inf)", factor=factor)
        self.factor = factor
        self.times = times

    def __call__(self, done: float) -> float:
        """Return the factor when a share `done` of training is over."""
        return self.factor ** min(int(done * self.times), self.times - 1)


class Ramp:
    """Goes linearly from `first` to `last`, then stays there. It is for the weight of a loss.

    Args:
        over: Share of training until `last` is reached, in [0, 1]; 0 starts there.
        first: Value at the start.
        last: Value from `over` on.

    Raises:
        UserError: `over` is out of range.
    """

    def __init__(self, over: float = 0.1, first: float = 0.0, last: float = 1.0) -> None:
        check_range("schedule", "[0, 1]", over=over)
        self.over = over
        self.first = first
        self.last = last

    def __call__(self, done: float) -> float:
        """Return the value when a share `done` of training is over."""
        if done >= self.over:
            return self.last
        return self.first + (self.last - self.first) * done / self.over
