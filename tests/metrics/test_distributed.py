"""Two processes with unlike shares of the images give the result of one, to the last bit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from anomaly_lit.metrics import ImageMetrics, PixelMetrics

SHARES = [[0, 1, 2, 3, 6], [4, 5]]  # seven images: 5 and 2


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
        "auto_beyond": PixelMetrics(exact_pixels=6 * pixels),  # neither process alone is beyond
        "auto_far_beyond": PixelMetrics(exact_pixels=3 * pixels),  # one process is, one is not
    }


def evaluate(indices: list[int]) -> dict[str, dict[str, torch.Tensor]]:
    maps, masks = images()
    values = {}
    for name, metric in metrics().items():
        for index in indices:
            metric.update(maps[index : index + 1], masks[index : index + 1])
        values[name] = metric.compute()
        values[f"{name}_curves"] = metric.curves()
        metric.reset()
    image = ImageMetrics(resamples=50)
    if indices != SHARES[1]:  # one process holds no image at all
        image.update(maps.amax((1, 2, 3)), masks.flatten(1).any(1))
    values["image"] = image.compute()
    return values


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = evaluate(SHARES[rank])
    with open(f"{folder}/{rank}.pkl", "wb") as file:
        pickle.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:unreliable")
def test_two_processes_equal_one_to_the_last_bit(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    expected = evaluate(list(range(7)))
    for rank in range(2):
        found = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
        assert found.keys() == expected.keys()
        for part, values in expected.items():
            exact = "exact" in part
            for name, value in values.items():
                pairs = (
                    zip(value, found[part][name], strict=True)
                    if "curves" in part
                    else [(value, found[part][name])]
                )
                for one, two in pairs:
                    tolerance = 1e-12 if exact else 0  # region weights are floats there
                    assert torch.allclose(one, two, rtol=0, atol=tolerance, equal_nan=True), (
                        part,
                        name,
                    )
