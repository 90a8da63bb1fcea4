from __future__ import annotations

import pytest
import torch

from anomaly_lit.metrics import PixelMetrics, functional
from anomaly_lit.types import UserError

LIMITS = {0.3: "pixel_aupro", 0.1: "pixel_aupro_0.1", 0.05: "pixel_aupro_0.05"}


def maps_and_masks(seed: int = 0, images: int = 7, size: int = 32, tied: bool = False):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(images, 1, size, size, generator=generator) < 0.05
    masks[::3] = False
    maps = torch.randn(masks.shape, generator=generator) + 1.5 * masks
    return (maps.mul(2).round() if tied else maps), masks


def run(metric: PixelMetrics, maps, masks, batch: int = 3) -> dict[str, torch.Tensor]:
    for part, mask in zip(maps.split(batch), masks.split(batch), strict=True):
        metric.update(part, mask)
    return metric.compute()


@pytest.mark.parametrize("tied", [False, True])
def test_the_exact_engine_gives_the_values_of_the_functions(tied: bool) -> None:
    maps, masks = maps_and_masks(tied=tied)
    values = run(PixelMetrics(tuple(LIMITS), engine="exact"), maps, masks)
    assert abs(values["pixel_auroc"] - functional.auroc(maps, masks)) < 1e-12
    assert abs(values["pixel_ap"] - functional.average_precision(maps, masks)) < 1e-12
    f1, threshold = functional.f1_max(maps, masks)
    assert abs(values["pixel_f1max"] - f1) < 1e-12
    assert values["pixel_f1max_threshold"] == threshold
    for limit, key in LIMITS.items():
        assert abs(values[key] - functional.aupro(maps, masks, limit)) < 1e-12
    assert not any(key.endswith("_bound") for key in values)


@pytest.mark.parametrize("engine", ["exact", "streaming"])
@pytest.mark.parametrize("batch", [1, 7])
def test_batches_do_not_matter(engine: str, batch: int) -> None:
    maps, masks = maps_and_masks()
    first = run(PixelMetrics(engine=engine), maps, masks, 2)
    second = run(PixelMetrics(engine=engine), maps, masks, batch)
    for key, value in first.items():
        assert torch.equal(value, second[key]) or (value.isnan() and second[key].isnan()), key


@pytest.mark.parametrize("engine", ["exact", "streaming"])
def test_one_class_is_undefined_and_never_zero(engine: str) -> None:
    maps, masks = maps_and_masks()
    for mask in (torch.zeros_like(masks), torch.ones_like(masks)):
        metric = PixelMetrics(engine=engine)
        assert all(value.isnan() for value in run(metric, maps, mask).values())
        assert all(len(part) == 0 for pair in metric.curves().values() for part in pair)
        metric.reset()
        assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize("engine", ["exact", "streaming"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_map_names_its_image(engine: str, bad: float) -> None:
    maps, masks = maps_and_masks()
    maps[2, 0, 5, 5] = bad
    with pytest.raises(UserError, match=r"maps of: c\.png;"):
        PixelMetrics(engine=engine).update(
            maps[:4], masks[:4], ["a.png", "b.png", "c.png", "d.png"]
        )


def test_user_mistakes_are_named() -> None:
    maps, masks = maps_and_masks()
    with pytest.raises(UserError, match="resolution"):
        PixelMetrics().update(maps[:, 0], masks[:, 0])
    with pytest.raises(UserError, match="boolean"):
        PixelMetrics().update(maps, masks.float())
    with pytest.raises(UserError, match="1 names for 7 maps"):
        PixelMetrics().update(maps, masks, ["a"])
    with pytest.raises(UserError, match="no engine 'fast'"):
        PixelMetrics(engine="fast")
    with pytest.raises(UserError, match="limit is 0"):
        PixelMetrics(limits=[0])
    with pytest.raises(UserError, match="centre is nan"):
        PixelMetrics(center=torch.nan)
    metric = PixelMetrics()
    metric.center = 3.0
    metric.update(maps, masks)
    with pytest.raises(UserError, match="after an update"):
        metric.center = 4.0
    metric.reset()
    metric.center = 4.0


def test_maps_with_huge_sums_are_finite() -> None:
    maps, masks = maps_and_masks()
    values = run(PixelMetrics(engine="exact"), maps * 1e37, masks)
    assert abs(values["pixel_auroc"] - functional.auroc(maps, masks)) < 1e-6


@pytest.mark.parametrize("options", [{"engine": "exact"}, {"exact_pixels": 3000}])
def test_values_may_be_read_between_updates(options: dict) -> None:
    maps, masks = maps_and_masks()
    expected = run(PixelMetrics(**options), maps, masks)
    metric, forward = PixelMetrics(**options), PixelMetrics(**options)
    for part, mask in zip(maps.split(2), masks.split(2), strict=True):
        metric.update(part, mask)
        metric.compute()
        metric.curves()
        forward(part, mask)  # torchmetrics: values of the batch, then joined with the state
    for found in (metric.compute(), forward.compute(), metric.clone().compute()):
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=0, atol=1e-12, equal_nan=True), key


def test_an_unnamed_bad_map_is_told_by_its_place() -> None:
    maps, masks = maps_and_masks()
    metric = PixelMetrics()
    metric.update(maps, masks)
    with pytest.raises(UserError, match="image 2 of batch 1"):
        metric.update(torch.where(torch.arange(7).view(7, 1, 1, 1) == 2, torch.nan, maps), masks)


def test_images_of_several_sizes_are_pooled() -> None:
    small, large = maps_and_masks(1), maps_and_masks(2, size=48)
    metric = PixelMetrics(engine="exact")
    metric.update(*small)
    metric.update(*large)
    scores, labels = (
        torch.cat([a.flatten(), b.flatten()]) for a, b in zip(small, large, strict=True)
    )
    assert abs(metric.compute()["pixel_auroc"] - functional.auroc(scores, labels)) < 1e-12


def test_a_check_left_for_later_names_the_image_when_values_are_computed() -> None:
    """What maps on a GPU go through, without one."""
    maps, masks = maps_and_masks()
    metric = PixelMetrics()
    for first in (0, 3):
        metric.update(maps[first : first + 3], masks[first : first + 3])
        part = maps[first : first + 3].flatten(1).clone()
        part[1, 7] = torch.nan if first else 0.0
        metric._check_later(part, [f"{first + index}.png" for index in range(3)])
    with pytest.raises(UserError, match=r"maps of: 4\.png;"):
        metric.compute()
    metric.reset()
    metric.update(maps, masks)
    metric.compute()


def test_a_metric_goes_on_outside_of_inference_mode() -> None:
    maps, masks = maps_and_masks()
    metric = PixelMetrics(engine="streaming")
    with torch.inference_mode():
        metric.update(maps[:3], masks[:3])
    metric.update(maps[3:], masks[3:])
    expected = run(PixelMetrics(engine="streaming"), maps, masks)
    assert metric.compute()["pixel_auroc"] == expected["pixel_auroc"]
