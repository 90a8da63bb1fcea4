"""Where time goes: parts within parts, and that the shares of a real run add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomaly_lit.callbacks.profile import ADVICE, COMPUTED, PARTS, Clock, advice_on, part_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """A clock that reads the given times one after the other."""

    def make(*times: float) -> Clock:
        clock, left = Clock(), iter(times)
        monkeypatch.setattr(clock, "_now", lambda: next(left))
        return clock

    return make


def test_time_within_time_counts_for_the_inner_part(clock: Callable[..., Clock]) -> None:
    watch = clock(0.0, 1.0, 4.0, 10.0)
    with watch.within("[Strategy]S.training_step"), watch.within("backbone teacher"):
        pass
    assert watch.seconds == {"backbone": 3.0, "own layers": 7.0}


def test_what_a_callback_asks_of_the_network_is_the_callback_s(
    clock: Callable[..., Clock],
) -> None:
    watch = clock(0.0, 1.0, 4.0, 10.0)
    with watch.within("[Callback]Outputs.on_test_end"), watch.within("backbone backbone"):
        pass
    assert watch.seconds == {"pictures": 10.0}


def test_an_action_that_began_before_the_clock_is_left_out(clock: Callable[..., Clock]) -> None:
    watch = clock()
    watch.stop("[Callback]Profile.setup")
    assert not watch.seconds


def test_every_part_has_a_sentence() -> None:
    computed = {"own layers", "backward", "optimizer", "loss"}
    assert set(PARTS) - computed <= set(ADVICE)
    assert advice_on({"images": 3.0, "backward": 1.0}).startswith("images, 75 %: reading images")
    assert advice_on({"backward": 3.0}) == f"backward, 100 %: {COMPUTED}"
    assert part_of("[LightningDataModule]Demo.setup") == "images"
    assert part_of("[Strategy]SingleDeviceStrategy.validation_step") == "own layers"
    assert part_of("run_training_epoch") == "logging, other"


def test_a_run_tells_where_its_time_went(
    run_here: Callable[..., Any], mvtec_folder: Path, tmp_path: Path
) -> None:
    outcome = run_here(
        "train", "debug=profile", "trainer.max_steps=2", "dataset=mvtec_ad",
        f"dataset.root={mvtec_folder}", "image_size=64", "cache=none", "method=uniad_small",
        "method.encoder_depth=1", "method.decoder_depth=1", "method.dim=32", "method.window=3",
        "method.backbone.weights=random", "trainer.accelerator=cpu",
        f"output_dir={tmp_path}/run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "training with its validations" in outcome.out
    table = outcome.out.split("Where the time goes: test")[1].split("Test images")[0]
    rows = [line.split("│") for line in table.splitlines() if line.count("│") == 4]
    shares = {row[1].strip(): float(row[3]) for row in rows}
    assert {"backbone", "own layers", "metrics", "pictures"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=1)
