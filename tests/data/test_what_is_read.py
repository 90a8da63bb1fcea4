"""What lies in the folders of a data set is read, or said to be passed over or wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_lit.commands.data import check_data, show
from anomaly_lit.data import BTAD, AnomalyDataModule, Folder, MVTecAD
from anomaly_lit.data.inspect import inspect_data
from anomaly_lit.data.sampler import batch_seed
from anomaly_lit.types import UserError

Write = Callable[..., Path]


def said_by_the_check(datamodule: AnomalyDataModule) -> str:
    report = inspect_data(datamodule)
    return "\n".join("\n".join([found.text, *found.paths]) for found in report.findings)


def folder(root: Path, **options: object) -> Folder:
    return Folder(str(root), image_size=32, **options)  # type: ignore[arg-type]


def test_training_sees_linked_folders_and_every_suffix(plain: Path, write_image: Write) -> None:
    for number, suffix in enumerate(("jfif", "jpe", "jp2", "tga", "pbm")):
        write_image(plain / "elsewhere" / f"b{number}.{suffix}")
    (plain / "good" / "batch_2").symlink_to(plain / "elsewhere")
    (plain / "good" / "loop").symlink_to(plain / "good")
    datamodule = folder(plain)
    datamodule.setup()
    assert len(datamodule.samples()) == 15


def test_what_was_passed_over_is_counted_in_training_and_in_the_check(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(plain).setup()
    assert "passed over" not in caplog.text
    for name in ("a0.txt", "a1.txt", "._a0.png", "Thumbs.db"):
        (plain / "good" / name).write_bytes(b"x")
    (plain / "good" / ".ipynb_checkpoints").mkdir()
    (plain / "beside.txt").write_bytes(b"x")  # in no folder that is read
    expected = "5 files were passed over: 2 .txt, 1 .db, 1 hidden, 1 hidden folder"
    folder(plain).setup()
    assert expected in caplog.text
    assert expected in said_by_the_check(folder(plain))


@pytest.mark.parametrize("kind", ["mvtec", "btad"])
def test_pictures_below_a_folder_that_is_read_flat_are_told(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    root = request.getfixturevalue(kind)
    source, good, make = {
        "mvtec": ("000.png", "bolt/train/good", MVTecAD),
        "btad": ("0000.bmp", "01/train/ok", BTAD),
    }[kind]
    (root / good / "more").mkdir()
    shutil.copy(root / good / source, root / good / "more" / source)
    make(str(root), image_size=32).setup()
    assert "1 file was passed over: 1 unused picture" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows names files in Unicode")
def test_names_that_are_no_utf_8_are_read_and_told(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    before = folder(plain)
    before.setup()
    for place in ("good", "bad/chip"):
        shutil.copy(plain / "good" / "a0.png", plain / place / odd)
    datamodule = folder(plain, abnormal_dir="bad")
    datamodule.setup()
    assert datamodule.digest not in ("", before.digest)
    assert sum(sample.path.endswith(odd) for sample in datamodule.samples()) == 2
    assert batch_seed(0, 0, [odd]) != batch_seed(0, 0, ["caf.png"])
    (plain / "good" / os.fsdecode(b"\xff.png")).write_text("no picture")
    report = check_data(folder(plain), tmp_path / "report")
    show(report, tmp_path / "report")
    assert "\\xff.png: not an image" in capsys.readouterr().out
    assert "\\\\xff.png" in (tmp_path / "report" / "report.json").read_text("utf-8")


@pytest.mark.skipif(os.name == "nt", reason="Windows names files in Unicode")
def test_a_category_whose_name_is_no_utf_8_is_refused(mvtec: Path) -> None:
    (mvtec / "bolt").rename(mvtec / os.fsdecode(b"bolt\xff"))
    with pytest.raises(UserError, match=r"bolt\\xff: the name is not UTF-8; rename the folder"):
        MVTecAD(str(mvtec), image_size=32).setup()


def test_the_files_beside_a_public_set_are_no_news(
    mvtec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (mvtec / "bolt" / "license.txt").write_text("")
    MVTecAD(str(mvtec), image_size=32).setup()
    assert "passed over" not in caplog.text


def test_a_folder_of_good_parts_among_the_abnormal_is_refused(
    plain: Path, write_image: Write
) -> None:
    for name in ("good", "bent"):
        write_image(plain / "test" / name / "c.png")
    with pytest.raises(
        UserError,
        match=r"abnormal_dir=test holds test/good, .*set dataset\.normal_test_dir=test/good to",
    ):
        folder(plain, abnormal_dir="test").setup()
    datamodule = folder(plain, abnormal_dir="test", normal_test_dir="test/good")
    datamodule.setup()
    found = [(sample.defect_type, sample.label) for sample in datamodule.test_samples]
    assert found == [("good", False), ("bent", True)]


def test_a_kind_of_defect_called_ok_is_refused(mvtec: Path, write_image: Write) -> None:
    write_image(mvtec / "bolt" / "test" / "OK" / "000.png")
    with pytest.raises(UserError, match=r"test/OK: its name says .* rename it"):
        MVTecAD(str(mvtec), image_size=32, masks="optional").setup()


def test_a_folder_of_masks_of_which_none_fits_is_an_error(plain: Path) -> None:
    for mask in [*(plain / "masks").rglob("*.png")]:
        mask.rename(mask.with_name(f"{mask.stem}_truth.png"))
    datamodule = folder(plain, abnormal_dir="bad", mask_dir="masks")
    expected = r"have no mask \(.*masks/<place of the image>/<stem>_mask\.png or <stem>\.png\)"
    with pytest.raises(UserError, match=expected):
        datamodule.setup()
    assert "have no mask" in said_by_the_check(datamodule)
    folder(plain, abnormal_dir="bad", mask_dir="masks", masks="none").setup()


def test_the_check_says_that_there_will_be_no_threshold(plain: Path) -> None:
    for path in sorted((plain / "good").glob("*.png"))[1:]:
        path.unlink()
    said = said_by_the_check(folder(plain, test_share=0.0))
    assert "product: none of its 1 normal training images is held out" in said


def test_one_mask_for_two_pictures_is_an_error_that_names_both(plain: Path) -> None:
    shutil.move(plain / "masks" / "chip" / "b0.png", plain / "masks" / "b0.png")
    shutil.rmtree(plain / "masks" / "stain")
    datamodule = folder(plain, abnormal_dir="bad", mask_dir="masks")
    with pytest.raises(
        UserError, match=r"masks/b0\.png is .*bad/chip/b0\.png and of .*bad/stain/b0"
    ):
        datamodule.setup()
    assert "is the mask of" in said_by_the_check(datamodule)


def test_one_mask_for_a_stem_with_two_suffixes_is_an_error(mvtec: Path, write_image: Write) -> None:
    write_image(mvtec / "bolt" / "test" / "bent" / "000.jpg")
    with pytest.raises(UserError, match=r"000_mask\.png is .*000\.jpg and of .*000\.png"):
        MVTecAD(str(mvtec), image_size=32).setup()


def test_two_masks_of_one_name_are_an_error(mvtec: Path, write_mask: Write) -> None:
    write_mask(mvtec / "bolt" / "ground_truth" / "bent" / "000_mask.bmp")
    with pytest.raises(UserError, match=r"000_mask\.bmp and .*png are masks with the same name"):
        MVTecAD(str(mvtec), image_size=32).setup()


def turned(path: Path, size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize(
    ("orientation", "size", "marked", "fits"),
    [
        (1, (64, 64), (64, 64), True),
        (6, (64, 64), (64, 64), False),  # a square does not tell
        (3, (48, 64), (48, 64), False),  # nor does half a turn
        (2, (48, 64), (48, 64), False),
        (6, (48, 64), (48, 64), False),  # drawn as it is stored
        (6, (48, 64), (64, 48), True),  # drawn as it is shown
    ],
)
def test_a_turned_picture_with_an_unturned_mask_is_found(
    mvtec: Path, write_mask: Write, orientation: int, size: tuple[int, int],
    marked: tuple[int, int], fits: bool, suffix: str,
) -> None:  # fmt: skip
    bolt = mvtec / "bolt"
    (bolt / "test" / "scratch" / "000.png").unlink()
    turned(bolt / "test" / "scratch" / f"000.{suffix}", size, orientation)
    write_mask(bolt / "ground_truth" / "scratch" / "000_mask.png", marked)
    datamodule = MVTecAD(str(mvtec), image_size=32)
    if fits:
        datamodule.setup()
        assert inspect_data(MVTecAD(str(mvtec), image_size=32)).ok
        return
    text = rf"000\.{suffix} has EXIF orientation {orientation} and its mask .* has 1 .*both upright"
    with pytest.raises(UserError, match=text):
        datamodule.setup()
    assert not inspect_data(MVTecAD(str(mvtec), image_size=32)).ok


def test_a_mask_that_is_turned_with_its_picture_fits(mvtec: Path) -> None:
    bolt = mvtec / "bolt"
    turned(bolt / "test" / "scratch" / "000.png", (48, 64), 6)
    turned(bolt / "ground_truth" / "scratch" / "000_mask.png", (48, 64), 6)
    MVTecAD(str(mvtec), image_size=32).setup()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("inverted", "1 of 4 masks mark more than half"),
        ("jpeg", "1 of 4 masks are in a lossy format"),
        ("empty", "1 of 4 masks mark nothing"),
        ("soft", "1 of 4 masks have many faint values"),
    ],
)
def test_training_questions_masks_in_words(
    mvtec: Path, kind: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    MVTecAD(str(mvtec), image_size=32).setup()
    assert "masks" not in caplog.text
    place = mvtec / "bolt" / "ground_truth" / "bent"
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:30] = 255
    if kind == "soft":
        mask[10:30, 10:30] = np.arange(1, 201, 10)
    picture = Image.fromarray({"inverted": 255 - mask, "empty": 0 * mask}.get(kind, mask))
    name = "000_mask.jpg" if kind == "jpeg" else "000_mask.png"
    (place / "000_mask.png").unlink()
    picture.save(place / name)
    MVTecAD(str(mvtec), image_size=32).setup()
    assert text in caplog.text
    assert f"{place / name} (" in caplog.text
    assert name in said_by_the_check(MVTecAD(str(mvtec), image_size=32))


def test_results_are_not_written_among_the_images(plain: Path, mvtec: Path, outliers: Path) -> None:
    options = {"abnormal_dir": "bad", "mask_dir": "masks", "outlier_dir": str(outliers)}
    own = folder(plain, **options)
    for place in (plain / "good", plain / "bad" / "run", plain / "masks", outliers / "more"):
        with pytest.raises(UserError, match=r"output_dir=.* lies in .*choose another output_dir"):
            own.check_apart(place)
    own.check_apart(plain / "run")
    fixed = MVTecAD(str(mvtec), categories=["bolt"], image_size=32)
    with pytest.raises(UserError, match="lies in"):
        fixed.check_apart(mvtec / "bolt" / "test" / "run")
    for place in (mvtec / "bolt" / "run", mvtec / "cloth" / "test", mvtec.parent):
        fixed.check_apart(place)


def test_earlier_results_among_the_images_are_no_images(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = folder(plain)
    before.setup()
    shutil.copy(plain / "good" / "a0.png", plain / "good" / "sample_grid.png")
    (plain / "good" / "report.json").write_text("{}")
    after = folder(plain)
    after.setup()
    assert after.digest == before.digest
    assert "1 file was passed over: 1 earlier result" in caplog.text


def test_files_with_several_pages_are_told_once_in_training_and_in_the_check(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, *others = [Image.new("RGB", (64, 64), (number, 9, 9)) for number in range(3)]
    for name in ("m0.tif", "m1.tif"):
        first.save(plain / "bad" / "chip" / name, save_all=True, append_images=others)
    folder(plain, abnormal_dir="bad").setup()
    told = [line for line in caplog.messages if "pages" in line]
    assert len(told) == 1
    assert told[0].startswith("2 files have several pages or frames, of which only the first is")
    assert "m0.tif (3 pages) and 1 more" in told[0]
    said = said_by_the_check(folder(plain, abnormal_dir="bad"))
    assert "2 files have several pages" in said
    assert "m1.tif (3 pages)" in said
