"""What a run says before it starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from anomaly_lit.runs.plan import plan_of


@pytest.mark.parametrize(
    ("images", "ranks", "words"),
    [
        (1, 1, "4 steps of 1 image (4 passes over the training images)"),
        (6, 2, "4 steps of 3 images (4 passes over the training images)"),
        (8, 1, "4 steps of 4 images (2 passes over the training images)"),
    ],
)
def test_steps_are_of_batches_that_the_images_fill(images: int, ranks: int, words: str) -> None:
    trainer: Any = SimpleNamespace(
        max_steps=4, max_epochs=-1, accumulate_grad_batches=1, world_size=ranks,
        precision="32-true", strategy=SimpleNamespace(root_device=SimpleNamespace(type="cuda")),
    )  # fmt: skip
    data: Any = SimpleNamespace(
        batch_size=4, train_samples=range(images), train_dataloader=lambda: [0]
    )
    method: Any = nn.Linear(1, 1)
    assert words in list(plan_of(trainer, method, data))[-1]
