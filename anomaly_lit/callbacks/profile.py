"""A table of where the time of a run goes, with advice on the part that takes longest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler
from rich.table import Table
from torch import nn

from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.reporting.terminal import print_table

# An action of Lightning belongs to the first part with a word that occurs in the action's name.
# "own layers" is what is left of a step without the parts inside it.
PARTS = {
    "features for the cache": ("FillFeatureCache",),
    "backbone": ("backbone",),
    "loss": ("method.loss",),
    "synthesis, cached features": ("on_after_batch_transfer",),
    "pictures": ("Outputs", "LossCurves", "TrainingPictures"),
    "checkpoints": ("save_checkpoint", "Checkpoint"),
    "metrics": ("Evaluation",),
    "images": ("dataloader", "_next", "transfer", "to_device", ".setup", "prepare_data"),
    "own layers": ("training_step", "validation_step", "test_step"),
    "backward": ("backward",),
    "optimizer": ("optimizer", "lr_scheduler", "gradient_clipping"),
}
REST = "logging, other"
STAGES = {
    "fit": "training with its validations",
    "validate": "validation",
    "test": "test",
    "predict": "prediction",
}
ADVICE = {
    "images": "reading images takes longest: try cache=host, or dataset.num_workers above 0",
    "backbone": "frozen features are computed in every step: cache=host keeps them if "
    "dataset.feature_cache.max_gb is large enough and the images fit",
    "features for the cache": "the features are computed only once: in a longer training their "
    "share falls",
    "synthesis, cached features": "corrupted images take longest: try a simpler synthesis, or a "
    "GPU, which makes them in batches",
    "metrics": "metrics take longest: validate less often, trainer.val_check_interval",
    "pictures": "figures take longest: set callbacks.outputs.max_images=0",
    "checkpoints": "checkpoints take longest: raise checkpoint.every_minutes",
    REST: "neither data nor network takes longest: try a larger dataset.batch_size",
}
COMPUTED = (
    "the network takes longest, as it should: a GPU, trainer.precision=bf16-mixed, a smaller "
    "image_size or a smaller method would help"
)


class Profile(pl.Callback):
    """Print a table after training and after the test: seconds and share of each part.

    Time spent in a nested action counts for the inner one only, so that the shares add up to 1. One
    exception: when a callback runs the network, that time counts for the callback. On a GPU each
    action waits for the device, so that the times are right, although the run becomes slower.
    """

    def __init__(self) -> None:
        self.clock = Clock()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the trainer's profiler, and also time the frozen networks and the loss."""
        if trainer.profiler is self.clock:  # type: ignore[attr-defined]
            return
        trainer.profiler = self.clock  # type: ignore[attr-defined]
        self.clock.setup(trainer.state.fn, trainer.global_rank)  # as the trainer did for its own
        for name, module in pl_module.named_modules():
            if isinstance(module, Backbone):
                self.clock.watch(module, f"backbone {name}")
        loss = getattr(pl_module, "loss", None)
        if isinstance(loss, nn.Module):
            self.clock.watch(loss, "method.loss")


class Clock(Profiler):
    """Add up the time of Lightning's actions by part, each without its nested actions."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by part
        self.running: list[tuple[str, float, float]] = []  # action, start, time of nested actions

    def setup(
        self, stage: str | None, local_rank: int | None = None, log_dir: str | None = None
    ) -> None:
        """Remember the stage: `fit`, `validate`, `test` or `predict`."""
        super().setup(str(getattr(stage, "value", stage)), local_rank, log_dir)

    def start(self, action_name: str) -> None:
        """Start an action, possibly inside another."""
        self.running.append((action_name, self._now(), 0.0))

    def stop(self, action_name: str) -> None:
        """End the innermost action."""
        if not self.running or self.running[-1][0] != action_name:
            return  # started before this was the trainer's profiler, or ended with an error
        _, start, inside = self.running.pop()
        whole = self._now() - start
        callback = next((a for a, _, _ in self.running if a.startswith("[Callback]")), None)
        self.seconds[part_of(callback or action_name)] += whole - inside
        if self.running:
            name, began, so_far = self.running[-1]
            self.running[-1] = (name, began, so_far + whole)

    @contextmanager
    def within(self, action_name: str) -> Iterator[None]:
        """Time the body of a `with` statement as one action."""
        self.start(action_name)
        try:
            yield
        finally:
            self.stop(action_name)

    def watch(self, module: nn.Module, action_name: str) -> None:
        """Time the calls of a module as an action."""
        forward: Callable[..., Any] = module.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.within(action_name):
                return forward(*args, **kwargs)

        module.forward = timed

    def describe(self) -> None:
        """Print the table of the stage that ended, and reset all times."""
        if self.seconds and self._local_rank in (None, 0):
            print_table(table_of(self.seconds, STAGES[str(self._stage)]))
            print(advice_on(self.seconds))
        self.seconds.clear()

    def _now(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def part_of(action: str) -> str:
    """Return the part that an action of Lightning belongs to."""
    for part, words in PARTS.items():
        if any(word in action for word in words):
            return part
    return REST


def table_of(seconds: Mapping[str, float], title: str) -> Table:
    """Return a table with a row per part, the longest first."""
    table = Table(title=f"Where the time goes: {title}", title_justify="left")
    table.add_column("part")
    for column in ("seconds", "share, %"):
        table.add_column(column, justify="right")
    total = sum(seconds.values())
    for part in sorted(seconds, key=lambda name: -seconds[name]):
        table.add_row(part, f"{seconds[part]:.2f}", f"{100 * seconds[part] / total:.1f}")
    return table


def advice_on(seconds: Mapping[str, float]) -> str:
    """Return a sentence on the part that takes longest."""
    longest = max(seconds, key=lambda part: seconds[part])
    share = 100 * seconds[longest] / sum(seconds.values())
    return f"{longest}, {share:.0f} %: {ADVICE.get(longest, COMPUTED)}"
