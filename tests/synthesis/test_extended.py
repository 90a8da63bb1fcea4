"""Real defects, changed and pasted on normal images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.synthesis import extended
from anomaly_lit.synthesis.extended import BENDS, COLOURS, extend, extent, paste, rolled


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def defects(count: int = 4, height: int = 32, width: int = 48) -> tuple[Tensor, Tensor]:
    """Images with an L of other colours, and its mask."""
    image = torch.rand(count, 3, height, width, generator=draw(1))
    mask = torch.zeros(count, 1, height, width, dtype=torch.bool)
    mask[..., 8:20, 10:16] = True
    mask[..., 16:20, 10:30] = True
    return image, mask


def flat(mask: Tensor) -> Tensor:
    """Where all 3 x 3 neighbours of a mask are alike."""
    values = F.pad(mask.float(), (1, 1, 1, 1), mode="replicate")
    return F.max_pool2d(values, 3, 1) == -F.max_pool2d(-values, 3, 1)


@pytest.mark.parametrize("bend", BENDS)
def test_image_and_mask_bend_alike(bend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of a mask, bent, is the bent mask, except for a pixel along its border."""
    monkeypatch.setattr(extended, "BENDS", (bend,))
    monkeypatch.setattr(extended, "COLOURS", ())
    _, mask = defects(16)
    image, bent = extend(mask.float().expand(-1, 3, -1, -1), mask, 1, draw())
    inside = flat(bent).expand_as(image)
    inner = torch.zeros_like(inside)
    inner[..., 2:-2, 2:-2] = True  # an image is continued beyond its border, a mask is not
    wrong = (image - bent.float()).abs() > 0.5
    assert not (wrong & inside & inner).any()
    assert bent.any()
    assert not torch.equal(bent, mask)


def test_colours_leave_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extended, "BENDS", ())
    image, mask = defects()
    changed, kept = extend(image, mask, len(COLOURS), draw())
    assert torch.equal(kept, mask)
    assert (changed - image).abs().flatten(1).mean(dim=1).min() > 0.01
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_without_changes_all_stays() -> None:
    image, mask = defects()
    same, kept = extend(image, mask, 0, draw())
    torch.testing.assert_close(same, image, rtol=0, atol=1e-5)
    assert torch.equal(kept, mask)


def test_the_same_generator_gives_the_same_defects() -> None:
    image, mask = defects()
    (one, first), (other, second) = (extend(image, mask, 3, draw(5)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(first, second)
    assert not torch.equal(one, extend(image, mask, 3, draw(6))[0])


def test_a_quarter_turn_of_a_square_moves_pixels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extended, "BENDS", (extended.quarter_turn,))
    monkeypatch.setattr(extended, "COLOURS", ())
    image, mask = defects(12, 32, 32)
    turned, bent = extend(image, mask, 1, draw())
    found = set()
    for row in range(12):
        for quarters in (1, 2, 3):
            if torch.equal(bent[row], mask[row].rot90(quarters, (1, 2))):
                expected = image[row].rot90(quarters, (1, 2))
                torch.testing.assert_close(turned[row], expected, rtol=0, atol=1e-4)
                found.add(quarters)
    assert found == {1, 2, 3}


def test_a_defect_on_the_ground_stays_in_its_place() -> None:
    defect, mask = defects()
    normal = torch.rand(defect.shape, generator=draw(2))
    pasted, where = paste(normal, defect, mask, torch.ones_like(mask), draw())
    assert torch.equal(where, mask)
    assert torch.equal(pasted, torch.where(mask, defect, normal))


def test_two_thirds_on_the_ground_are_not_enough_to_stay() -> None:
    defect = torch.rand(1, 3, 8, 12)
    mask, ground = torch.zeros(2, 1, 1, 8, 12, dtype=torch.bool)
    mask[..., 2, 2:8] = True  # six pixels
    ground[..., 2, 2:6] = True  # of which four lie on the ground
    ground[..., 5, :] = True
    _, where = paste(defect, defect, mask, ground, draw())
    assert not torch.equal(where, mask)
    ground[..., 2, 6] = True
    _, where = paste(defect, defect, mask, ground, draw())
    assert torch.equal(where, mask)


def test_another_defect_moves_as_a_whole_onto_the_ground() -> None:
    defect, mask = defects(64)
    normal = torch.rand(defect.shape, generator=draw(2))
    ground = torch.zeros_like(mask)
    ground[..., 24:, 32:] = True
    pasted, where = paste(normal, defect, mask, ground, draw())
    assert torch.equal(where.flatten(1).sum(1), mask.flatten(1).sum(1))
    assert torch.equal(torch.where(where, normal, pasted), normal)
    places = set()
    for row in range(64):
        (top, bottom), (left, right) = ([int(n) for n in pair] for pair in box(where[row]))
        assert bool(ground[row, 0, (top + bottom) // 2, (left + right) // 2])
        assert torch.equal(
            pasted[row][:, where[row, 0]], defect[row][:, mask[row, 0]]
        )  # the same pixels in the same order
        places.add((top, left))
    assert len(places) > 10


def box(mask: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
    return (rows.min(), rows.max()), (columns.min(), columns.max())


def test_a_defect_that_fits_nowhere_stays() -> None:
    defect, mask = defects()
    ground = torch.zeros_like(mask)
    ground[..., 0, 0] = True  # the middle cannot lie in a corner
    _, where = paste(defect, defect, mask, ground, draw())
    assert torch.equal(where, mask)


def test_extent_and_roll_by_hand() -> None:
    first, last = extent(torch.tensor([[[False, True, True, False]], [[False] * 4]]))
    assert first.flatten().tolist() == [1, 0]
    assert last.flatten().tolist() == [2, 3]
    image = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4)
    found = rolled(image, torch.tensor([1, 0]), torch.tensor([0, -2]))
    assert torch.equal(found[0], image[0].roll(1, 1))
    assert torch.equal(found[1], image[1].roll(-2, 2))
