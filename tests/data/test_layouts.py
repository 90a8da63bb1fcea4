from __future__ import annotations

import json
from pathlib import Path

import pytest

from anomaly_lit.data import AnomalyDataModule
from anomaly_lit.data.categories import no_training_images
from anomaly_lit.data.layouts.base import Layout
from anomaly_lit.data.layouts.btad import BTADLayout
from anomaly_lit.data.layouts.clips import ClipsLayout
from anomaly_lit.data.layouts.folder import FolderLayout
from anomaly_lit.data.layouts.ksdd2 import KolektorSDD2Layout
from anomaly_lit.data.layouts.mvtec_ad import MVTecADLayout
from anomaly_lit.data.layouts.ped2 import Ped2Layout
from anomaly_lit.data.layouts.real_iad import RealIADLayout
from anomaly_lit.data.layouts.visa import VisALayout, read_split
from anomaly_lit.folders import list_images
from anomaly_lit.types import UserError


def test_mvtec_masks_are_found_with_and_without_suffix(mvtec: Path) -> None:
    bolt, cloth = (MVTecADLayout().list_category(mvtec, name) for name in ("bolt", "cloth"))
    assert len(bolt.train) == 12
    kinds = [sample.defect_type for sample in bolt.test]
    assert kinds == ["bent", "bent", "good", "good", "scratch"]
    bent = bolt.test[0]
    assert bent.label
    assert Path(str(bent.mask_path)).name == "000_mask.png"
    assert Path(str(cloth.test[1].mask_path)).parts[-3:] == ("ground_truth", "hole", "000.png")
    assert not any(sample.label or sample.mask_path for sample in bolt.train)


def test_hidden_and_foreign_files_are_no_images(mvtec: Path) -> None:
    folder = mvtec / "bolt" / "train" / "good"
    (folder / "._000.png").write_bytes(b"resource fork")
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "000.txt").write_text("")
    (folder / "nested.png").mkdir()
    assert len(list_images(folder)) == 12
    assert list_images(folder / "absent") == []


def test_suffixes_in_capitals_are_images(mvtec: Path) -> None:
    folder = mvtec / "bolt" / "train" / "good"
    (folder / "000.png").rename(folder / "000.PNG")
    assert len(list_images(folder)) == 12


def test_btad_masks_are_matched_by_stem(btad: Path) -> None:
    train, test = BTADLayout().list_category(btad, "01")
    assert len(train) == 4
    assert [sample.defect_type for sample in test] == ["good", "ko"]
    assert Path(str(test[1].mask_path)).name == "0001.png"


def test_ksdd2_is_told_apart_by_its_masks(ksdd2: Path) -> None:
    layout = KolektorSDD2Layout()
    train, test = layout.list_category(ksdd2, "ksdd2")
    assert [len(train), layout.left_out] == [5, 1]
    assert [sample.label for sample in test] == [False, True]
    assert test[0].mask_path is None
    assert Path(str(test[1].mask_path)).name == "20001_GT.png"


def test_ksdd2_without_a_mask_is_an_error(ksdd2: Path) -> None:
    (ksdd2 / "train" / "10002_GT.png").unlink()
    with pytest.raises(UserError, match=r"10002_GT\.png: the mask"):
        KolektorSDD2Layout().list_category(ksdd2, "ksdd2")
    (ksdd2 / "train" / "10002_GT.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"10002_GT\.png: not an image"):
        KolektorSDD2Layout().list_category(ksdd2, "ksdd2")


def test_visa_follows_its_split_file(visa: Path) -> None:
    train, test = VisALayout().list_category(visa, "candle")
    assert [len(train), len(test)] == [4, 2]
    assert [sample.label for sample in test] == [False, True]
    assert Path(str(test[1].mask_path)).is_file()


def test_visa_without_split_file_says_what_to_set(visa: Path) -> None:
    (visa / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(UserError, match=r"1cls\.csv.*dataset\.root"):
        read_split(visa / "split_csv" / "1cls.csv")


def test_visa_with_other_columns_names_them(visa: Path) -> None:
    (visa / "split_csv" / "1cls.csv").write_text("object,image\n")
    with pytest.raises(UserError, match="label, mask, split"):
        read_split(visa / "split_csv" / "1cls.csv")


def test_real_iad_follows_its_split_file(real_iad: Path) -> None:
    layout = RealIADLayout()
    assert layout.find_categories(real_iad) == ["toy"]
    train, test = layout.list_category(real_iad, "toy")
    assert [sample.group for sample in train] == [f"OK/S{n:04d}" for n in (0, 0, 1, 1, 2, 2)]
    assert [sample.defect_type for sample in test] == ["good", "good", "HS", "good"]
    assert [sample.label for sample in test] == [False, False, True, False]
    assert [Path(sample.path).is_file() for sample in (*train, *test)] == [True] * 10
    masks = [sample.mask_path for sample in test]
    assert masks[:2] + masks[3:] == [None] * 3
    assert Path(str(masks[2])).is_file()


def test_real_iad_holds_out_whole_items(real_iad: Path) -> None:
    datamodule = AnomalyDataModule(str(real_iad), holdout=0.4, layout=RealIADLayout())
    datamodule.setup()
    held = [sample.group for sample in datamodule.holdout_samples]
    assert len(held) == 2
    assert len(set(held)) == 1
    assert held[0] not in {sample.group for sample in datamodule.train_samples}


def test_real_iad_without_a_right_split_file_says_what_to_set(real_iad: Path) -> None:
    layout, file = RealIADLayout(), real_iad / "realiad_jsons" / "realiad_jsons" / "toy.json"
    with pytest.raises(UserError, match=r"usb\.json is not a split file.*split_dir"):
        layout.list_category(real_iad, "usb")
    split = json.loads(file.read_text())
    file.write_text(json.dumps(split | {"train": split["test"]}))
    with pytest.raises(UserError, match=r"toy\.json trains on 1 anomalous images"):
        layout.list_category(real_iad, "toy")
    file.write_text('{"train": []}')
    with pytest.raises(UserError, match=r"toy\.json is not a split file.*'test'"):
        layout.list_category(real_iad, "toy")


def test_plain_folders_take_the_defect_type_from_the_first_sub_folder(plain: Path) -> None:
    layout = FolderLayout("good", "bad", mask_dir="masks")
    train, test = layout.list_category(plain, "p")
    assert len(train) == 10
    assert [sample.defect_type for sample in test] == ["chip", "stain"]
    masks = [Path(str(sample.mask_path)).relative_to(plain).as_posix() for sample in test]
    assert masks == ["masks/chip/b0.png", "masks/stain/b0.png"]


def test_plain_masks_may_lie_in_one_folder(plain: Path) -> None:
    (plain / "masks" / "chip" / "b0.png").rename(plain / "masks" / "b0_mask.png")
    (plain / "masks" / "stain" / "b0.png").unlink()
    layout = FolderLayout("good", "bad", mask_dir="masks")
    _, test = layout.list_category(plain, "p")
    assert {Path(str(sample.mask_path)).name for sample in test} == {"b0_mask.png"}


def test_plain_folder_without_sub_folders_names_the_defect_type(plain: Path) -> None:
    layout = FolderLayout("good", "bad/chip")
    _, test = layout.list_category(plain, "p")
    assert [(sample.defect_type, sample.mask_path) for sample in test] == [("chip", None)]


@pytest.mark.parametrize("name", ["a/b", "a\\b", "", " "])
def test_a_category_is_one_name(name: str) -> None:
    with pytest.raises(UserError, match=r"dataset\.category=.*without / and"):
        FolderLayout(category=name)
    with pytest.raises(UserError, match=r"dataset\.layout\.category=.*without / and"):
        ClipsLayout(category=name)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (FolderLayout(), "r/good; put images there or change dataset.normal_dir"),
        (ClipsLayout(), "r/training/frames; put images there or change dataset.layout.train_dir"),
        (Ped2Layout(), "r/Train; put images there"),
        (KolektorSDD2Layout(), "r/train; put images there"),
        (BTADLayout(), "r/01/train/ok; put images there or change dataset.categories"),
    ],
)
def test_where_training_images_are_missing_the_advice_names_a_key_of_the_set(
    layout: Layout, words: str
) -> None:
    assert no_training_images(layout, Path("r"), ["01"]) == [
        f"no normal training images in {words}"
    ]
