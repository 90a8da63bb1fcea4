"""Two and four processes with unlike shares of the images give the result of one."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from anomaly_lit.callbacks import Evaluation
from anomaly_lit.metrics import ImageMetrics, PixelMetrics, SegmentationMetrics, streaming
from anomaly_lit.types import Prediction

SHARES = {2: [[0, 1, 2, 3, 6], [4, 5]], 4: [[0, 1, 2], [], [3, 6, 4], [5]]}  # of seven images
IMAGES = {"bolt": 18, "cloth": 4, "nut": 1}  # of a test; 23 in all, which no number divides
ENGINES = ("exact", "streaming")


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(7, 1, 24, 24, generator=generator) < 0.1
    masks[::3] = False
    return torch.randn(masks.shape, generator=generator) + masks, masks


def metrics() -> dict[str, PixelMetrics]:
    pixels = 24 * 24
    return {
        "streaming": PixelMetrics(engine="streaming", center=0.1),
        "exact": PixelMetrics(engine="exact"),
        "auto_exact": PixelMetrics(exact_pixels=7 * pixels),
        "auto_beyond": PixelMetrics(exact_pixels=6 * pixels),  # no process alone is beyond
        "auto_far_beyond": PixelMetrics(exact_pixels=3 * pixels),  # of two processes one is
    }


def scored(indices: list[int]) -> dict[str, Any]:
    """Give the values of all metrics over these images and those of the other processes."""
    maps, masks = images()
    values: dict[str, Any] = {}
    for name, metric in metrics().items():
        for index in indices:
            metric.update(maps[index : index + 1], masks[index : index + 1])
        values[name] = metric.compute()
        if name in ENGINES:
            values[f"{name}_curves"] = metric.curves()
        metric.reset()
    image, segmentation = ImageMetrics(resamples=50), SegmentationMetrics(0.5)
    if indices:
        image.update(maps[indices].amax((1, 2, 3)), masks[indices].flatten(1).any(1))
        segmentation.update(maps[indices], masks[indices])
    values["image"], values["image_curves"] = image.compute(), image.curves()
    values["segmentation"] = segmentation.compute()
    return values


class Module(SimpleNamespace):
    """What an evaluation reads of a method, and what it logs."""

    def __init__(self) -> None:
        super().__init__(device=torch.device("cpu"), logged={})

    def log(self, name: str, value: float, **_: object) -> None:
        self.logged[name] = value

    def log_dict(self, values: dict[str, float]) -> None:
        self.logged |= values


def batch_of(numbers: list[int], category: list[str], normal: bool) -> dict[str, Any]:
    """Give images by their numbers in the data set; every third one of a test is normal."""
    masks = torch.zeros(len(numbers), 1, 16, 16, dtype=torch.bool)
    maps = torch.empty(len(numbers), 1, 16, 16)
    for row, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(number + 1000 * normal)
        maps[row] = torch.rand(1, 16, 16, generator=generator)
        masks[row, :, 4:9, 5:12] = not normal and number % 3 > 0
    label = masks.flatten(1).any(1)
    return {
        "map": maps + 0.4 * masks,
        "gt_mask": masks,
        "label": label,
        "category": category,
        "defect_type": ["scratch" if defect else "good" for defect in label.tolist()],
        "path": [f"{number}.png" for number in numbers],
    }


def evaluated(rank: int, world: int, engine: str) -> dict[str, Any]:
    """Validate, with the test images as the oracle has them, and test; images as they are dealt."""
    evaluation, module = Evaluation(fpr=0.2, engine=engine, pixel_fpr=0.02), Module()  # type: ignore[arg-type]
    names = [name for name, count in IMAGES.items() for _ in range(count)]
    held_out = ["bolt"] * 5 + ["cloth"] * 2
    data = SimpleNamespace(
        has_masks=True, validation_names=lambda: ["holdout", "test"], holdout_samples=held_out
    )
    trainer = SimpleNamespace(datamodule=data, sanity_checking=False)

    def feed(hook: Any, categories: list[str], normal: bool, *extra: int) -> None:
        own = list(range(len(categories)))[rank::world]  # as ShardSampler deals them
        for number, rows in enumerate(own[start : start + 2] for start in range(0, len(own), 2)):
            batch = batch_of(rows, [categories[row] for row in rows], normal)
            scores = batch["map"][:, 0, 0, 0] + 0.2 * batch["label"]
            prediction = Prediction(batch["map"], scores)
            hook(trainer, module, prediction, batch, number, *extra)

    evaluation.on_validation_epoch_start(trainer, module)  # type: ignore[arg-type]
    feed(evaluation.on_validation_batch_end, held_out, True, 0)
    feed(evaluation.on_validation_batch_end, names, False, 1)
    evaluation.on_validation_epoch_end(trainer, module)  # type: ignore[arg-type]
    evaluation.on_test_epoch_start(trainer, module)  # type: ignore[arg-type]
    feed(evaluation.on_test_batch_end, names, False)
    evaluation.on_test_epoch_end(trainer, module)  # type: ignore[arg-type]
    return {
        "calibration": evaluation.calibration,
        "results": evaluation.results,
        "logged": module.logged,
        "rows": evaluation.rows,
        "curves": evaluation.curves,
    }


def everything(rank: int, world: int) -> dict[str, Any]:
    indices = list(range(7)) if world == 1 else SHARES[world][rank]
    found = scored(indices)
    with mock.patch.object(streaming, "FINE", 16):  # fewer bins, which are sent faster
        return found | {engine: evaluated(rank, world, engine) for engine in ENGINES}


def worker(rank: int, folder: str) -> None:
    """Work with four processes, and then, on the first two, with two."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "unreliable")
    for world in (4, 2):
        if rank >= world:
            continue
        store = f"file://{folder}/store{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        with open(f"{folder}/{world}_{rank}.pkl", "wb") as file:
            pickle.dump(everything(rank, world), file)
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process found, by number of processes and rank."""
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(path),), nprocs=4)
    return path


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unreliable")
        return everything(0, 1)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Give every number of a nested result by its path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found |= leaves(part, f"{path}/{name}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one_to_the_last_bit(
    world: int, folder: Path, alone: dict[str, Any]
) -> None:
    expected = leaves(alone)
    for rank in range(world):
        found = leaves(pickle.loads((folder / f"{world}_{rank}.pkl").read_bytes()))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if value is None or isinstance(value, str | bool):
                assert found[name] == value, name
                continue
            one, other = (torch.as_tensor(number).double() for number in (value, found[name]))
            assert one.shape == other.shape, name
            tolerance = 1e-12 if "exact" in name else 0  # region weights are floats there
            assert torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True), name


def test_what_was_compared_holds_all_metrics_and_limits(alone: dict[str, Any]) -> None:
    for engine in ENGINES:
        found = alone[engine]
        for name in ("image_auroc_low", "image_ap_high", "image_f1max_threshold", "pixel_aupro"):
            assert f"bolt/{name}" in found["results"]
        assert 0 < found["results"]["segmentation_f1"] < 1
        assert found["results"]["bolt/image_auroc_low"] < found["results"]["bolt/image_auroc"] < 1
        assert "oracle/criterion" in found["logged"]
        assert {"threshold", "pixel_threshold", "map_high", "promise"} <= set(
            found["calibration"]["categories"]["cloth"]
        )
