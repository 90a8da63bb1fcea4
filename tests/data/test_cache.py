from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from anomaly_lit.data import HostCache, MVTecAD
from anomaly_lit.data.progress import in_threads
from anomaly_lit.types import UserError


def ready(root: Path, cache: HostCache | None) -> MVTecAD:
    datamodule = MVTecAD(str(root), image_size=32, cache=cache)
    datamodule.setup()
    return datamodule


def test_cached_batches_equal_decoded_ones(mvtec: Path) -> None:
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = [getattr(ready(mvtec, cache), part)() for cache in (None, HostCache())]
        for decoded, cached in zip(*loaders, strict=True):
            assert decoded.keys() == cached.keys()
            for key, value in decoded.items():
                same = torch.equal(value, cached[key]) if torch.is_tensor(value) else None
                assert same or value == cached[key]


def test_cached_images_are_not_decoded_again(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = ready(mvtec, HostCache())
    monkeypatch.setattr("anomaly_lit.data.batches.read_sample", None)
    assert len(list(datamodule.test_dataloader())) == 1


@pytest.mark.parametrize(("stage", "count"), [("validate", 2), ("test", 7 + 4), ("fit", 18 + 11)])
def test_a_stage_decodes_what_it_needs_and_fit_everything(
    mvtec: Path, stage: str, count: int
) -> None:
    cache = HostCache()  # counts masks as well
    MVTecAD(str(mvtec), image_size=32, cache=cache).setup(stage)
    assert len(cache) == count


def test_a_broken_test_image_is_found_before_training(mvtec: Path) -> None:
    path = mvtec / "bolt" / "test" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"test/good/001\.png: .*damaged"):
        MVTecAD(str(mvtec), image_size=32, cache=HostCache()).setup("fit")


def test_what_does_not_fit_is_said_and_decoded(
    mvtec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = HostCache(max_gb=10.5 * 32 * 32 * 3 / 1e9)
    with caplog.at_level("INFO"):
        datamodule = MVTecAD(str(mvtec), image_size=32, cache=cache)
        datamodule.setup("fit")
    assert len(cache) == 10
    assert "10 of 25 images fit into dataset.cache.max_gb" in caplog.text
    assert sum(len(batch["index"]) for batch in datamodule.train_dataloader()) == 16


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.cache\.max_gb=-1"):
        HostCache(-1)


def test_threads_keep_the_order_and_hand_errors_over() -> None:
    assert in_threads(lambda number: number**2, range(20), "squares") == [n**2 for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // number, [1, 0], "quotients")


def test_a_progress_bar_appears_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Recorder] = []
    monkeypatch.setattr("anomaly_lit.data.progress.PATIENCE", 0.05)
    monkeypatch.setattr("anomaly_lit.data.progress.Progress", lambda **_: Recorder(bars))
    in_threads(lambda _: None, range(4), "Reading quickly")
    assert bars == []
    in_threads(lambda _: time.sleep(0.1), range(8), "Reading slowly")
    assert [bar.done for bar in bars] == [8]


class Recorder:
    """Stands in for rich's progress bar."""

    def __init__(self, bars: list[Recorder]) -> None:
        bars.append(self)
        self.done = 0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def add_task(self, title: str, total: int) -> int:
        assert title == "Reading slowly"
        return total

    def update(self, task: int, completed: int) -> None:
        assert completed <= task
        self.done = completed
