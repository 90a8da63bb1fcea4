"""Stages of training that follow each other in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

from torch import nn

from anomaly_lit.types import UserError


class Stages(nn.Module):
    """Named stages, each with its share of training.

        self.stages = Stages({"latent": 0.25, "detection": 0.75}, self.start_stage)
        name, within = self.stages.enter(self.done)  # in training_step
        name, within = self.stages.at(0.5)           # anywhere

    The state dict records which stages have started, so that a resumed run starts none twice.

    Args:
        shares: Share of each stage, in order. They are divided by their sum; stages with share 0
            are left out.
        start: Called once with the name of each stage when `enter` first reaches it, even if the
            stage is skipped because it is shorter than a step.

    Raises:
        UserError: A share is negative, or none is above 0.
    """

    def __init__(
        self, shares: Mapping[str, float], start: Callable[[str], None] | None = None
    ) -> None:
        super().__init__()
        if not shares or min(shares.values()) < 0 or max(shares.values()) <= 0:
            raise UserError(f"shares of training {dict(shares)}: none may be negative, nor all 0")
        self.names = [name for name, share in shares.items() if share > 0]
        ends = list(accumulate(shares[name] for name in self.names))
        self.ends = [end / ends[-1] for end in ends]  # the last is 1
        self.started = 0  # stages that `enter` has reached
        self._start = start

    def at(self, done: float) -> tuple[str, float]:
        """Return the stage at a share of training, and how much of it is done, in [0, 1]."""
        number = sum(done >= end for end in self.ends[:-1])
        first = self.ends[number - 1] if number else 0.0
        return self.names[number], min((done - first) / (self.ends[number] - first), 1.0)

    def enter(self, done: float) -> tuple[str, float]:
        """Return the same as `at`, after calling `start` for stages that begin here."""
        name, within = self.at(done)
        while self.started <= self.names.index(name):
            self.started += 1
            if self._start is not None:
                self._start(self.names[self.started - 1])
        return name, within

    def get_extra_state(self) -> dict[str, int]:
        """Return how many stages have started."""
        return {"started": self.started}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what `get_extra_state` returned."""
        self.started = state["started"]
