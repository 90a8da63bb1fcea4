from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import measure

from anomaly_lit.metrics import label_regions
from anomaly_lit.metrics.regions import Regions, _find_on_device, _label_on_device, find_regions


def masks_of(kind: str) -> torch.Tensor:
    mask = torch.zeros(3, 1, 33, 40, dtype=torch.bool)
    if kind == "random":
        return torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    if kind == "snake":  # one thin region that fills the image
        mask[1, 0, ::2] = True
        mask[1, 0, 1::4, -1] = True
        mask[1, 0, 3::4, 0] = True
    if kind == "border":
        mask[0, 0, 0], mask[1, 0, :, -1], mask[2, 0, -1, -1] = True, True, True
    if kind == "diagonal":
        mask[2, 0, :33, :33] = torch.eye(33, dtype=torch.bool)
    return mask


KINDS = ["random", "snake", "border", "diagonal", "empty"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [label_regions, _label_on_device])
def test_regions_are_the_8_connected_components_of_each_image(kind: str, label) -> None:
    masks = masks_of(kind)
    labels = label(masks)
    seen: set[int] = set()
    for mask, found in zip(masks[:, 0], labels[:, 0], strict=True):
        expected = measure.label(mask.numpy(), connectivity=2)
        pairs = set(zip(expected.ravel().tolist(), found.flatten().tolist(), strict=True))
        inside = {pair for pair in pairs if pair[0]}
        assert len(inside) == expected.max() == len({pair[1] for pair in inside})
        assert not seen & {pair[1] for pair in inside}
        seen |= {pair[1] for pair in inside}
        assert all(pair[1] == 0 for pair in pairs - inside)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_find_regions_agree(kind: str) -> None:
    masks = masks_of(kind)
    found, other = find_regions(masks), _find_on_device(masks)
    assert found.number == other.number
    for name in Regions._fields[:4]:
        assert torch.equal(getattr(found, name), getattr(other, name)), name


def test_every_anomalous_pixel_knows_the_size_of_its_region() -> None:
    masks = masks_of("random")
    regions = find_regions(masks)
    assert torch.equal(regions.position, masks.flatten().nonzero().squeeze(1))
    assert float((1 / regions.area.double()).sum()) == pytest.approx(regions.number)
    assert float((1 / regions.image_area.double()).sum()) == pytest.approx(3)
    assert torch.equal(regions.defective, masks.flatten(1).any(1))
    labels = measure.label(masks[0, 0].numpy(), connectivity=2)
    first = regions.area[: int(masks[0].sum())]
    np.testing.assert_array_equal(first, np.bincount(labels.ravel())[labels[labels > 0]])


def test_an_empty_batch_has_no_regions() -> None:
    regions = find_regions(torch.zeros(0, 1, 4, 4, dtype=torch.bool))
    assert regions.number == 0
    assert len(regions.position) == 0
