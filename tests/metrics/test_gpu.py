from __future__ import annotations

import pytest
import torch

from anomaly_lit.metrics import PixelMetrics
from anomaly_lit.types import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def maps_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 1, 64, 64, generator=generator) < 0.05
    masks[::3] = False
    return torch.randn(masks.shape, generator=generator) + masks, masks


@pytest.mark.parametrize("engine", ["exact", "streaming"])
@pytest.mark.parametrize("masks_on", ["cpu", "cuda"])
def test_a_gpu_gives_the_values_of_a_cpu(engine: str, masks_on: str) -> None:
    maps, masks = maps_and_masks()
    values = []
    for device in ("cpu", "cuda"):
        metric = PixelMetrics(engine=engine).to(device)
        metric.update(maps.to(device), masks.to(masks_on))
        values.append(metric.compute())
    for key, value in values[0].items():
        assert torch.allclose(value, values[1][key], rtol=0, atol=1e-12, equal_nan=True), key


@pytest.mark.parametrize("engine", ["exact", "streaming"])
def test_an_update_does_not_wait_for_the_gpu(engine: str) -> None:
    maps, masks = maps_and_masks()
    metric, maps = PixelMetrics(engine=engine).to("cuda"), maps.cuda()
    metric.update(maps, masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(maps, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_map_is_named_when_values_are_computed() -> None:
    maps, masks = maps_and_masks()
    maps[4, 0, 0, 0] = torch.nan
    metric = PixelMetrics().to("cuda")
    metric.update(maps.cuda(), masks, [f"{index}.png" for index in range(6)])
    with pytest.raises(UserError, match=r"maps of: 4\.png;"):
        metric.compute()
