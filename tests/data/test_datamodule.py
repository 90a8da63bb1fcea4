from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from anomaly_lit.data import BTAD, AnomalyDataModule, Folder, HostCache, KolektorSDD2, MVTecAD, VisA
from anomaly_lit.data.datamodule import Images
from anomaly_lit.types import UserError

SMALL = {"image_size": 32, "batch_size": 4, "eval_batch_size": 4}


def ready(root: Path, **arguments: object) -> MVTecAD:
    datamodule = MVTecAD(str(root), **{**SMALL, **arguments})  # type: ignore[arg-type]
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def paths(samples: list) -> list[str]:
    return [sample.path for sample in samples]


def test_all_categories_make_one_data_set(mvtec: Path) -> None:
    datamodule = ready(mvtec)
    assert datamodule.categories == ["bolt", "cloth"]
    assert datamodule.counts() == {
        "bolt": {"train": 11, "holdout": 1, "test bent": 2, "test good": 2, "test scratch": 1},
        "cloth": {"train": 5, "holdout": 1, "test good": 1, "test hole": 1},
    }
    assert datamodule.has_masks
    assert "bolt: train 11" in str(datamodule)


@pytest.mark.parametrize("categories", ["bolt", ["bolt"]])
def test_one_category_may_be_chosen(mvtec: Path, categories: str | list[str]) -> None:
    datamodule = ready(mvtec, categories=categories)
    assert datamodule.categories == ["bolt"]
    assert {sample.category for sample in datamodule.samples()} == {"bolt"}


def test_a_category_named_twice_is_refused(mvtec: Path) -> None:
    with pytest.raises(UserError, match="name each category once"):
        ready(mvtec, categories=["bolt", "bolt"])


def test_training_batches_are_typed_and_in_range(mvtec: Path) -> None:
    loader = ready(mvtec).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    for batch in batches:
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["image"].dtype == torch.float32
        assert batch["image"].is_contiguous()
        assert 0 <= batch["image"].min() < batch["image"].max() <= 1
        assert batch["gt_mask"].shape == (4, 1, 32, 32)
        assert batch["label"].dtype == batch["gt_mask"].dtype == torch.bool
        assert not batch["label"].any()
        assert not batch["gt_mask"].any()
        assert len(batch["category"]) == len(batch["path"]) == len(batch["defect_type"]) == 4


def test_batch_holds_the_pixels_of_the_file(mvtec: Path) -> None:
    datamodule = ready(mvtec, image_size=64)
    batch = next(iter(datamodule.test_dataloader()))
    pixels = np.asarray(Image.open(batch["path"][0]))
    image = (batch["image"][0] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image, pixels)
    assert datamodule.test_samples[int(batch["index"][0])].path == batch["path"][0]


def test_test_batches_carry_the_truth(mvtec: Path) -> None:
    datamodule = ready(mvtec)
    seen: list[int] = []
    for batch in datamodule.test_dataloader():
        seen += batch["index"].tolist()
        marked = batch["gt_mask"].flatten(1).any(dim=1)
        assert torch.equal(marked, batch["label"])
        assert [kind != "good" for kind in batch["defect_type"]] == batch["label"].tolist()
    assert seen == list(range(len(datamodule.test_samples)))


def test_held_out_images_are_never_trained_on(mvtec: Path) -> None:
    datamodule = ready(mvtec, holdout=0.5)
    train, held = paths(datamodule.train_samples), paths(datamodule.holdout_samples)
    assert [len(train), len(held)] == [9, 9]
    assert not set(train) & set(held)
    shown = [path for batch in datamodule.val_dataloader() for path in batch["path"]]
    assert shown == held


def test_holdout_of_zero_holds_nothing_out(mvtec: Path) -> None:
    datamodule = ready(mvtec, holdout=0)
    assert len(datamodule.train_samples) == 18
    assert list(datamodule.val_dataloader()) == []
    assert [note.split(":")[0] for note in datamodule.without_holdout()] == datamodule.categories


def test_a_single_training_image_is_not_held_out(mvtec: Path) -> None:
    for path in sorted((mvtec / "cloth" / "train" / "good").iterdir())[1:]:
        path.unlink()
    datamodule = ready(mvtec, categories="cloth")
    assert [len(datamodule.train_samples), len(datamodule.holdout_samples)] == [1, 0]


def test_splits_follow_the_seed_and_not_the_place(mvtec: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mvtec, tmp_path / "elsewhere")
    first, again, moved = (ready(root, holdout=0.4) for root in (mvtec, mvtec, copy))
    other = ready(mvtec, holdout=0.4, seed=1)
    assert paths(first.holdout_samples) == paths(again.holdout_samples)
    assert paths(first.holdout_samples) != paths(other.holdout_samples)
    assert first.digest == again.digest == moved.digest != other.digest


def test_digest_follows_the_content(mvtec: Path) -> None:
    before = ready(mvtec).digest
    path = mvtec / "bolt" / "train" / "good" / "000.png"
    shutil.copy(mvtec / "bolt" / "train" / "good" / "001.png", path)
    assert ready(mvtec).digest != before


def test_the_split_of_a_category_ignores_the_others(mvtec: Path) -> None:
    alone = ready(mvtec, categories="cloth").holdout_samples
    together = [sample for sample in ready(mvtec).holdout_samples if sample.category == "cloth"]
    assert alone == together


def test_shots_are_drawn_for_each_category_beside_the_holdout(mvtec: Path) -> None:
    datamodule = ready(mvtec, shots=2)
    counts = datamodule.counts()
    assert [counts[name]["train"] for name in ("bolt", "cloth")] == [2, 2]
    assert [counts[name]["holdout"] for name in ("bolt", "cloth")] == [1, 1]
    full = ready(mvtec)
    assert set(datamodule.train_samples) < set(full.train_samples)
    assert datamodule.holdout_samples == full.holdout_samples


def test_balanced_categories_come_equally_often(mvtec: Path) -> None:
    datamodule = ready(mvtec, balanced=True, batch_size=1)
    drawn = []
    for step in range(0, 40 * 16, 16):
        datamodule._position = lambda step=step: step  # type: ignore[method-assign]
        drawn += [batch["category"][0] for batch in datamodule.train_dataloader()]
    assert drawn.count("cloth") / len(drawn) == pytest.approx(0.5, abs=0.08)


def test_a_batch_larger_than_the_split_shrinks(mvtec: Path) -> None:
    batches = list(ready(mvtec, categories="cloth", batch_size=64).train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [5]


def test_every_training_image_comes_once_in_a_pass(mvtec: Path) -> None:
    datamodule = ready(mvtec, batch_size=2)
    drawn = [index for batch in datamodule.train_dataloader() for index in batch["index"].tolist()]
    assert sorted(drawn) == list(range(16))


def test_setup_twice_reads_nothing_again(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = ready(mvtec, cache=HostCache())
    monkeypatch.setattr(datamodule.layout, "list_category", None, raising=False)
    monkeypatch.setattr("anomaly_lit.data.caches.memory.read_sample", None)
    for stage in ("fit", "validate", "test", None):
        datamodule.setup(stage)


def test_constructor_touches_no_disk() -> None:
    MVTecAD("/nowhere")
    with pytest.raises(UserError, match=r"dataset\.root=/nowhere is not a folder"):
        MVTecAD("/nowhere").setup()


def test_root_has_to_be_set() -> None:
    with pytest.raises(UserError, match=r"dataset\.root is not set.*dataset\.root=DIR"):
        MVTecAD(None).setup()


def test_unknown_category_lists_what_exists(mvtec: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.categories: no screw.*bolt, cloth"):
        ready(mvtec, categories=["bolt", "screw"])


def test_root_of_a_category_gets_the_right_command(mvtec: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root=\S*mvtec dataset\.categories=\[bolt\]"):
        ready(mvtec / "bolt")


def test_category_without_training_images_names_its_folder(mvtec: Path) -> None:
    shutil.rmtree(mvtec / "cloth" / "train")
    (mvtec / "cloth" / "train" / "good").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no normal training images in .*cloth/train/good"):
        ready(mvtec)


def test_testing_needs_no_training_images(mvtec: Path) -> None:
    shutil.rmtree(mvtec / "cloth" / "train")
    datamodule = MVTecAD(str(mvtec), categories="cloth")
    datamodule.setup("test")
    assert len(datamodule.test_samples) == 2
    with pytest.raises(UserError, match="no normal training images"):
        datamodule.setup("fit")


def test_missing_mask_names_the_image_and_the_way_out(mvtec: Path) -> None:
    (mvtec / "bolt" / "ground_truth" / "bent" / "001_mask.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 .*bent/001\.png.*dataset\.masks=none"):
        ready(mvtec)


def test_without_masks_there_is_no_truth_for_pixel_metrics(mvtec: Path) -> None:
    shutil.rmtree(mvtec / "bolt" / "ground_truth")
    datamodule = ready(mvtec, masks="none")
    assert not datamodule.has_masks
    assert not any(batch["gt_mask"].any() for batch in datamodule.test_dataloader())
    assert any("pixel metrics are left out" in note for note in datamodule.notes())


def test_mask_of_another_size_names_both_files_and_sizes(mvtec: Path) -> None:
    Image.new("L", (32, 48)).save(mvtec / "bolt" / "ground_truth" / "bent" / "000_mask.png")
    with pytest.raises(UserError, match=r"bent/000_mask\.png: .*32x48.*bent/000\.png is 64x64"):
        ready(mvtec)


@pytest.mark.parametrize("cached", [False, True])
def test_all_unreadable_files_are_listed_at_once(mvtec: Path, cached: bool) -> None:
    good = mvtec / "bolt" / "train" / "good"
    for name in ("003.png", "007.png"):
        (good / name).write_text("no picture")
    with pytest.raises(UserError, match=r"(?s)2 problems.*003\.png: not an.*007\.png: not an"):
        ready(mvtec, cache=HostCache() if cached else None)


def test_long_lists_of_problems_are_cut_and_counted(mvtec: Path) -> None:
    for path in (mvtec / "bolt" / "train" / "good").iterdir():
        path.write_text("no picture")
    with pytest.raises(UserError, match=r"(?s)12 problems.*and 2 more"):
        ready(mvtec)


def test_truncated_image_is_found_before_training_with_a_cache_and_while_reading_without(
    mvtec: Path,
) -> None:
    path = mvtec / "bolt" / "train" / "good" / "003.png"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"003\.png: .*damaged"):
        ready(mvtec, cache=HostCache())
    with pytest.raises(UserError, match=r"003\.png: .*damaged"):
        list(ready(mvtec, batch_size=1, holdout=0).train_dataloader())


def test_missing_kinds_of_test_images_are_noted(mvtec: Path) -> None:
    for kind in ("bent", "scratch"):
        shutil.rmtree(mvtec / "bolt" / "test" / kind)
        shutil.rmtree(mvtec / "bolt" / "ground_truth" / kind)
    notes = ready(mvtec, categories="bolt").notes()
    assert len(notes) == 1
    assert "bolt: no anomalous test image" in notes[0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"holdout": 1.0}, "dataset.holdout=1.0: it must be at least 0 and less than 1"),
        ({"batch_size": 0}, "dataset.batch_size=0: it must be a whole number of at least 1"),
        ({"shots": 0}, "dataset.shots=0"),
        ({"masks": "maybe"}, "dataset.masks=maybe"),
    ],
)
def test_wrong_values_name_the_setting(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(UserError, match=name):
        MVTecAD("/nowhere", **arguments)  # type: ignore[arg-type]


def test_btad_and_visa_are_read(btad: Path, visa: Path) -> None:
    for kind, root, categories in ((BTAD, btad, ["01", "02"]), (VisA, visa, ["candle"])):
        datamodule = kind(str(root), image_size=32, batch_size=2)
        datamodule.setup()
        assert datamodule.categories == categories
        truth = torch.cat([batch["gt_mask"] for batch in datamodule.test_dataloader()])
        assert truth.flatten(1).any(dim=1).sum() == len(categories)
        assert next(iter(datamodule.train_dataloader()))["image"].shape == (2, 3, 32, 32)


def test_ksdd2_is_read_and_says_what_is_left_out(ksdd2: Path) -> None:
    datamodule = KolektorSDD2(str(ksdd2), image_size=32, batch_size=2)
    datamodule.setup()
    assert datamodule.counts() == {
        "ksdd2": {"train": 4, "holdout": 1, "test good": 1, "test defect": 1}
    }
    assert any("1 defective images of train are left out" in note for note in datamodule.notes())


def folder(root: Path, **arguments: object) -> Folder:
    datamodule = Folder(str(root), **{**SMALL, **arguments})  # type: ignore[arg-type]
    datamodule.setup()
    return datamodule


def test_folder_keeps_a_stated_share_for_testing(plain: Path) -> None:
    datamodule = folder(plain, abnormal_dir="bad", mask_dir="masks")
    assert datamodule.counts() == {
        "product": {"train": 7, "holdout": 1, "test good": 2, "test chip": 1, "test stain": 1}
    }
    assert datamodule.has_masks
    assert any("2 images of good are kept" in note for note in datamodule.notes())
    names = [set(paths(split)) for split in (datamodule.train_samples, datamodule.test_samples)]
    assert not names[0] & names[1]


def test_folder_with_normal_test_images_keeps_none_back(plain: Path) -> None:
    shutil.copytree(plain / "good", plain / "more")
    datamodule = folder(plain, normal_test_dir="more", abnormal_dir="bad")
    assert len(datamodule.train_samples) + len(datamodule.holdout_samples) == 10
    assert not datamodule.has_masks
    assert not any("kept" in note for note in datamodule.notes())


def test_folder_of_normal_images_alone_can_be_trained_on(plain: Path) -> None:
    datamodule = folder(plain)
    assert any("no anomalous test image" in note for note in datamodule.notes())
    assert next(iter(datamodule.train_dataloader()))["image"].shape == (4, 3, 32, 32)


def test_folder_with_some_masks_names_those_without(plain: Path) -> None:
    (plain / "masks" / "chip" / "b0.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 .*bad/chip/b0\.png"):
        folder(plain, abnormal_dir="bad", mask_dir="masks")


def test_folder_names_every_absent_folder(plain: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)dataset\.normal_dir=ok.*dataset\.mask_dir=truth"):
        folder(plain, normal_dir="ok", mask_dir="truth")


@pytest.mark.parametrize(
    ("arguments", "inner", "outer"),
    [
        ({"normal_dir": ".", "abnormal_dir": "bad"}, "abnormal_dir", "normal_dir"),
        ({"abnormal_dir": "bad", "mask_dir": "bad/chip"}, "mask_dir", "abnormal_dir"),
        ({"normal_test_dir": "good"}, "normal_test_dir", "normal_dir"),
    ],
)
def test_folders_inside_each_other_are_refused(
    plain: Path, arguments: dict[str, str], inner: str, outer: str
) -> None:
    with pytest.raises(UserError, match=rf"dataset\.{inner} lies in dataset\.{outer}"):
        folder(plain, **arguments)


class Inverted(nn.Module):
    """A synthesis that inverts a random share of the pixels."""

    def forward(
        self, image: Tensor, generator: torch.Generator, category: list[str]
    ) -> tuple[Tensor, Tensor]:
        assert len(category) == len(image)
        corruption = torch.rand(image[:, :1].shape, generator=generator) < 0.2
        return torch.where(corruption, 1 - image, image), corruption


class Recorder(pl.LightningModule):
    """Learns nothing and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, dict]] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.seen.append(("train", batch))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(("val", batch))

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.seen.append(("test", batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(datamodule: AnomalyDataModule, epochs: int = 2) -> list[tuple[str, dict]]:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Recorder()
    trainer.fit(module, datamodule)
    trainer.test(module, datamodule, verbose=False)
    return module.seen


def test_lightning_trains_validates_and_tests_on_it(mvtec: Path) -> None:
    seen = fit(MVTecAD(str(mvtec), **SMALL))  # type: ignore[arg-type]
    names = [name for name, _ in seen]
    assert [names.count(name) for name in ("train", "val", "test")] == [8, 2, 2]
    drawn = [batch["index"] for name, batch in seen if name == "train"]
    first, second = torch.cat(drawn[:4]), torch.cat(drawn[4:])
    assert not torch.equal(first, second)  # another pass, another order
    assert torch.equal(first.sort().values, second.sort().values)
    assert all("corrupted" not in batch for _, batch in seen)


def test_the_oracle_validates_on_the_test_images_too(mvtec: Path) -> None:
    datamodule = ready(mvtec, validate_on_test=True)
    held_out, test = datamodule.val_dataloader()
    assert [len(held_out.dataset), len(test.dataset)] == [2, 7]


def test_summary_names_the_licence_of_a_public_set(visa: Path) -> None:
    datamodule = VisA(str(visa))
    datamodule.setup()
    assert "licence: VisA is CC BY 4.0" in datamodule.summary()


def test_synthesis_changes_only_where_it_says_and_repeats_with_the_seed(mvtec: Path) -> None:
    def run(seed: int) -> list[tuple[str, dict]]:
        return fit(MVTecAD(str(mvtec), **SMALL, seed=seed, synthesis=Inverted()))  # type: ignore[arg-type]

    first, again, other = run(0), run(0), run(1)
    for name, batch in first:
        assert ("corrupted" in batch) == (name != "test")
        if name != "test":
            same = (batch["corrupted"] == batch["image"]) | batch["corruption"]
            assert same.all()
    drawn, repeated, different = (
        [batch["corruption"] for name, batch in seen if name == "train"]
        for seen in (first, again, other)
    )
    assert all(map(torch.equal, drawn, repeated))
    assert not any(map(torch.equal, drawn, different))
    assert not torch.equal(drawn[0], drawn[4])  # the next pass differs
    validations = [batch["corruption"] for name, batch in first if name == "val"]
    assert torch.equal(validations[0], validations[1])  # and a validation does not


def test_validation_on_synthesis_gives_held_out_images_with_defects(mvtec: Path) -> None:
    changes = {"synthesis": Inverted(), "validate_on_synthesis": True}
    seen = fit(MVTecAD(str(mvtec), **SMALL, **changes), epochs=1)  # type: ignore[arg-type]
    clean, synthetic = (batch for name, batch in seen if name == "val")
    assert clean["path"] == synthetic["path"]
    assert torch.equal(synthetic["image"], clean["corrupted"])
    assert torch.equal(synthetic["gt_mask"], clean["corruption"])
    assert synthetic["label"].all()
    assert not clean["label"].any()


def test_a_prompt_is_another_training_image_of_the_category(mvtec: Path) -> None:
    plain = list(ready(mvtec).train_dataloader())
    assert "prompt" not in plain[0]
    datamodule = ready(mvtec, needs={"prompt"})
    batches = list(datamodule.train_dataloader())
    images = {torch.cat([b["index"] for b in batches])[i].item(): image
              for i, image in enumerate(torch.cat([b["image"] for b in batches]))}  # fmt: skip
    for before, batch in zip(plain, batches, strict=True):
        assert torch.equal(before["image"], batch["image"])  # the same images in the same order
        for index, prompt, category in zip(
            batch["index"].tolist(), batch["prompt"], batch["category"], strict=True
        ):
            partners = [other for other, image in images.items() if torch.equal(image, prompt)]
            assert partners != [index]
            named = {datamodule.train_samples[other].category for other in partners}
            assert named <= {category}


def test_statistics_are_taken_of_images_spread_over_a_split(mvtec: Path) -> None:
    datamodule = ready(mvtec)
    whole = [i for batch in datamodule.normal_batches("train", 256) for i in batch["index"]]
    assert whole == list(range(len(datamodule.train_samples)))
    few = next(datamodule.normal_batches("train", 4))
    assert sorted(few["category"]) == sorted(2 * datamodule.categories)
    for index, path in zip(few["index"].tolist(), few["path"], strict=True):
        assert datamodule.train_samples[index].path == path
    assert few["index"].tolist() != list(range(4))


def test_statistics_may_be_taken_of_all_images(mvtec: Path) -> None:
    datamodule = ready(mvtec, holdout=0.4)
    for split, samples in (
        ("train", datamodule.train_samples),
        ("holdout", datamodule.holdout_samples),
    ):
        batches = list(datamodule.normal_batches(split, None))
        assert [path for batch in batches for path in batch["path"]] == paths(samples)
        assert [i for batch in batches for i in batch["index"].tolist()] == [*range(len(samples))]


def test_a_split_can_be_sent_to_another_process(mvtec: Path) -> None:
    plain = ready(mvtec)
    images = pickle.loads(pickle.dumps(Images(plain.test_samples, plain.resize, None)))
    assert len(images) == len(plain.test_samples)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_worker_processes_give_the_same_batches(mvtec: Path, cached: bool) -> None:
    alone = ready(mvtec)
    helped = ready(mvtec, num_workers=1, cache=HostCache() if cached else None)
    loaders = [datamodule.test_dataloader() for datamodule in (alone, helped)]
    loaders[1].multiprocessing_context = "spawn"
    for expected, batch in zip(*loaders, strict=True):
        assert torch.equal(expected["image"], batch["image"])
        assert torch.equal(expected["gt_mask"], batch["gt_mask"])


@pytest.mark.real_data
def test_real_mvtec_layout_is_read() -> None:
    folder = os.environ.get("ANOMALY_LIT_DATA")
    if not folder:
        pytest.skip("ANOMALY_LIT_DATA does not name a folder")
    datamodule = ready(Path(folder) / "industrial", image_size=64, eval_batch_size=32)
    counts = datamodule.counts()
    assert counts["toothbrush"] == {
        "train": 43,
        "holdout": 5,
        "test defective": 30,
        "test good": 12,
    }
    assert sum(counts["ksdd"].values()) == 383
    for batch in datamodule.test_dataloader():
        marked = batch["gt_mask"].flatten(1).any(dim=1)
        assert torch.equal(marked, batch["label"])  # not one defect vanishes at 64 x 64
