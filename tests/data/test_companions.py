"""Further images beside each image of a training batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anomaly_lit.data import BTAD, HostCache, MVTecAD, VisA
from anomaly_lit.data.batches import Images
from anomaly_lit.data.companions import Companion, Partner, Pool, Seen
from anomaly_lit.data.images import Resize, read_image, read_sample
from anomaly_lit.data.sampler import TrainBatches, WithSteps, mixed_seed
from anomaly_lit.types import Sample, UserError

SMALL: dict[str, Any] = {"image_size": 32, "batch_size": 2}


def samples(groups: str) -> list[Sample]:
    return [Sample(f"{i}.png", name, "good", False) for i, name in enumerate(groups)]


def pairs(stream: Companion, start: int = 0, seed: int = 3) -> list[list[tuple[int, int]]]:
    """Index and companion of every image of a pass that begins at batch `start`."""
    batches = WithSteps(TrainBatches(11, 2, seed, lambda: start))
    return [[(index, stream.draw(step, index)) for index, step in batch] for batch in batches]  # type: ignore[misc]


def partners(start: int = 0, groups: str = "aaaaabbbbbc", seed: int = 3) -> Any:
    return pairs(Partner("prompt", samples(groups), seed), start, seed)


def test_a_partner_is_drawn_from_the_list_of_the_others() -> None:
    """As defined, without building that list for each image: its cost grew with the category."""
    groups = "abacabbaaca"
    for step, batch in enumerate(partners(groups=groups)):
        for index, partner in batch:
            others = [i for i, g in enumerate(groups) if g == groups[index] and i != index]
            assert partner == others[mixed_seed(3, step, index) % len(others)]


def test_partners_are_others_of_the_category_and_resume_with_their_batches() -> None:
    sequence = partners(0) + partners(5) + partners(10)
    for index, partner in (pair for batch in sequence for pair in batch):
        assert "aaaaabbbbbc"[index] == "aaaaabbbbbc"[partner]
        assert index != partner or index == 10  # alone in its category
    assert partners(3) == sequence[3:8]
    assert partners(seed=4) != partners()
    drawn = {p for start in range(0, 100, 5) for b in partners(start) for i, p in b if i == 0}
    assert drawn == {1, 2, 3, 4}


def test_images_of_a_pool_come_equally_often_and_resume() -> None:
    stream = Pool("outlier", samples("xxxx"), 3)
    drawn = [stream.draw(step, index) for step in range(100) for index in range(11)]
    assert all(abs(drawn.count(row) / len(drawn) - 0.25) < 0.05 for row in range(4))
    whole = pairs(stream, 0) + pairs(stream, 5)
    assert pairs(stream, 3) == whole[3:8]


def test_two_pools_draw_independently() -> None:
    first, second = (Pool(name, samples("x" * 16), 3) for name in ("outlier", "seen"))
    draws = [[pool.draw(step, 0) for step in range(50)] for pool in (first, second)]
    same = sum(a == b for a, b in zip(*draws, strict=True))
    assert same < 15


def ready(root: Path, **arguments: Any) -> MVTecAD:
    datamodule = MVTecAD(str(root), **{**SMALL, **arguments})
    datamodule.setup()
    return datamodule


def test_an_outlier_is_a_picture_of_its_folder(mvtec: Path, outliers: Path) -> None:
    plain = ready(mvtec)
    datamodule = ready(mvtec, outlier_dir=str(outliers), needs={"outlier"})
    assert len(datamodule.outlier_samples) == 5
    for before, batch in zip(plain.train_dataloader(), datamodule.train_dataloader(), strict=True):
        assert torch.equal(before["image"], batch["image"])
        assert batch["outlier"].shape == batch["image"].shape
        for path, outlier in zip(batch["outlier_path"], batch["outlier"], strict=True):
            assert Path(path).is_relative_to(outliers)
            pixels = torch.from_numpy(datamodule.resize.image(read_image(path)))
            assert torch.equal((outlier * 255).round().byte().permute(1, 2, 0), pixels)


def test_outliers_resume_with_their_batches(mvtec: Path, outliers: Path) -> None:
    def drawn(position: int) -> list[list[str]]:
        datamodule = ready(mvtec, outlier_dir=str(outliers), needs={"outlier", "prompt"})
        datamodule._position = lambda: position  # type: ignore[method-assign]
        return [
            batch["outlier_path"] + batch["prompt_path"] for batch in datamodule.train_dataloader()
        ]

    assert drawn(0)[3:] == drawn(3)[: len(drawn(0)) - 3]


def test_outliers_belong_to_no_split(mvtec: Path, outliers: Path) -> None:
    plain, datamodule = ready(mvtec), ready(mvtec, outlier_dir=str(outliers))
    assert plain.counts() == datamodule.counts()
    assert plain.samples() == datamodule.samples()
    batch = next(iter(datamodule.train_dataloader()))
    assert "outlier" not in batch  # nobody needs them
    assert datamodule.digest != plain.digest


def test_a_broken_outlier_is_found_before_training(mvtec: Path, outliers: Path) -> None:
    (outliers / "more" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"more/0\.png: not an image"):
        ready(mvtec, outlier_dir=str(outliers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"needs": {"outlier"}}, "learns from outliers: set dataset.outlier_dir"),
        ({"needs": {"smell"}}, "needs smell in a batch.*corrupted, prompt, outlier, seen"),
    ],
)
def test_what_no_batch_can_hold_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MVTecAD("nowhere", **arguments)


def test_a_folder_without_outliers_is_refused(mvtec: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, found in (("empty", "holds no picture"), ("absent", "is not a folder")):
        with pytest.raises(UserError, match=rf"dataset\.outlier_dir=\S*{folder} {found}"):
            ready(mvtec, outlier_dir=str(tmp_path / folder))


# ------------------------------------------------------------------------------ real defects


def test_seen_defects_are_drawn_of_each_type_and_leave_the_test_set(mvtec: Path) -> None:
    plain, datamodule = ready(mvtec), ready(mvtec, seen=1)
    kinds = [(s.category, s.defect_type) for s in datamodule.seen_samples]
    assert sorted(kinds) == [("bolt", "bent"), ("bolt", "scratch"), ("cloth", "hole")]
    assert all(s.label and s.mask_path for s in datamodule.seen_samples)
    seen = set(datamodule.seen_samples)
    assert datamodule.test_samples == [s for s in plain.test_samples if s not in seen]
    assert datamodule.train_samples == plain.train_samples
    assert datamodule.digest != plain.digest
    counts = datamodule.counts()["bolt"]
    assert (counts["seen bent"], counts["test bent"]) == (1, 1)
    assert "test scratch" not in counts
    assert "seen bent 1" in datamodule.summary()
    assert ready(mvtec, seen=0).digest == plain.digest
    again = ready(mvtec, seen=1, categories=["bolt", "cloth"])
    assert again.seen_samples == datamodule.seen_samples
    others = {tuple(s.path for s in ready(mvtec, seen=1, seed=n).seen_samples) for n in range(8)}
    assert len(others) == 2  # of two bent ones; of the other types there is only one


@pytest.mark.parametrize("cache", [False, True])
def test_a_seen_defect_stands_beside_each_image_with_its_mask(mvtec: Path, cache: bool) -> None:
    kept = HostCache() if cache else None
    datamodule = ready(mvtec, seen=1, needs={"seen"}, cache=kept)
    known = {s.path: s for s in datamodule.seen_samples}
    drawn = set()
    for batch in datamodule.train_dataloader():
        assert batch["seen"].shape == batch["image"].shape
        assert batch["seen_mask"].shape == batch["gt_mask"].shape
        for row, path in enumerate(batch["seen_path"]):
            assert known[path].category == batch["category"][row]
            pixels, mask = read_sample(known[path], datamodule.resize)
            found = (batch["seen"][row] * 255).round().byte().permute(1, 2, 0)
            assert torch.equal(found, torch.from_numpy(pixels))
            assert torch.equal(batch["seen_mask"][row, 0], torch.from_numpy(mask))
            drawn.add(path)
    assert drawn == set(known)
    assert all("seen" not in batch for batch in datamodule.test_dataloader())
    assert all("seen" not in batch for batch in datamodule.val_dataloader())


def test_seen_defects_resume_with_their_batches(mvtec: Path) -> None:
    def drawn(position: int) -> list[list[str]]:
        datamodule = ready(mvtec, seen=1, needs={"seen"})
        datamodule._position = lambda: position  # type: ignore[method-assign]
        return [batch["seen_path"] for batch in datamodule.train_dataloader()]

    assert drawn(0)[3:] == drawn(3)[: len(drawn(0)) - 3]


def test_defects_of_a_category_come_equally_often() -> None:
    train, defects = samples("aab"), samples("aaab")
    stream = Seen(train, defects, 3)
    draws = [stream.draw(step, 1) for step in range(300)]
    assert {stream.draw(step, 2) for step in range(10)} == {3}
    assert all(abs(draws.count(row) / 300 - 1 / 3) < 0.1 for row in range(3))


def test_without_seen_defects_a_method_that_could_use_them_gets_none(mvtec: Path) -> None:
    datamodule = ready(mvtec, needs={"seen"})
    assert datamodule.seen_samples == []
    assert "seen" not in next(iter(datamodule.train_dataloader()))
    assert "seen" not in next(iter(ready(mvtec, seen=1).train_dataloader()))  # nobody needs them


def test_no_feature_of_a_seen_defect_is_kept(mvtec: Path) -> None:
    datamodule = ready(mvtec, seen=1, needs={"seen"})
    assert not set(datamodule.feature_samples()) & set(datamodule.seen_samples)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MVTecAD, {"seen": -1}, r"dataset\.seen=-1: .*at least 0"),
        (
            MVTecAD,
            {"seen": 1, "masks": "none"},
            "seen=1 draws defects with their masks.*masks=none",
        ),
        (VisA, {"seen": 1}, r"seen=1 .*each type, and VisA names no types: set dataset\.seen=0"),
        (BTAD, {"seen": 1}, "BTAD names no types"),
    ],
)
def test_seen_defects_that_no_data_set_can_have_are_refused(
    make: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make("nowhere", **arguments)


def test_more_seen_defects_than_there_are_is_refused(mvtec: Path) -> None:
    with pytest.raises(UserError, match=r"seen=2 .* and bolt has only 1 of scratch: lower it"):
        ready(mvtec, seen=2)
    with pytest.raises(UserError, match=r"seen=3 .* bolt has only 2 of bent, 1 of scratch"):
        ready(mvtec, seen=3)


def test_a_category_without_defects_is_refused(mvtec: Path) -> None:
    shutil.rmtree(mvtec / "cloth" / "test" / "hole")
    with pytest.raises(UserError, match=r"cloth has no anomalous test image: .*categories"):
        ready(mvtec, seen=1)


def test_seen_defects_without_masks_are_refused(mvtec: Path) -> None:
    for category in ("bolt", "cloth"):
        shutil.rmtree(mvtec / category / "ground_truth")
    with pytest.raises(UserError, match="of 4 anomalous test images have no mask"):
        ready(mvtec, seen=1)
    with pytest.raises(UserError, match="seen=1 draws defects with their masks, and there are no"):
        ready(mvtec, seen=1, masks="optional")


def test_a_broken_seen_defect_is_found_before_training(mvtec: Path) -> None:
    path = Path(ready(mvtec, seen=1).seen_samples[0].path)
    path.write_text("no picture")
    with pytest.raises(UserError, match=f"{path.name}: not an image"):
        ready(mvtec, seen=1)


class Neighbours(Companion):
    """The images before and after an image, as the frames of a clip would be."""

    def draw(self, step: int, index: int) -> tuple[int, ...]:
        last = len(self.samples) - 1
        return max(0, index - 1), min(last, index + 1)


def test_a_companion_may_be_several_images_with_masks(mvtec: Path) -> None:
    datamodule = ready(mvtec)
    split, resize = datamodule.test_samples, Resize(32)
    stream = Neighbours("frames", split, 0, masks=True)
    images = Images(split, resize, None, [stream])
    batch: Any = images.batch([(0, 9), (2, 9)])
    assert batch["frames"].shape == (2, 2, 3, 32, 32)
    assert batch["frames_mask"].shape == (2, 2, 1, 32, 32)
    expected = images.batch([0, 1, 1, 3])
    assert torch.equal(batch["frames"].flatten(0, 1), expected["image"])
    assert torch.equal(batch["frames_mask"].flatten(0, 1), expected["gt_mask"])
    assert batch["frames_path"] == expected["path"]
