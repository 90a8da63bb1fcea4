from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from anomaly_lit.commands.data import check_data, without_demo_keys
from anomaly_lit.config.build import import_target
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.data import (
    BTAD,
    AnomalyDataModule,
    Folder,
    KolektorSDD2,
    Listing,
    MVTecAD,
    VisA,
)
from anomaly_lit.data.inspect import Report
from anomaly_lit.data.layouts.mvtec_ad import MVTecADLayout

Write = Callable[..., Path]


def check(root: Path, **arguments: object) -> Report:
    datamodule = MVTecAD(str(root), image_size=32, **arguments)  # type: ignore[arg-type]
    return check_data(datamodule, root.parent / "report")


def kinds(report: Report, level: str) -> list[str]:
    return [finding.kind for finding in report.findings if finding.level == level]


def details(report: Report, kind: str) -> str:
    return "\n".join(
        "\n".join([finding.text, *finding.paths])
        for finding in report.findings
        if finding.kind == kind
    )


def test_a_good_data_set_has_no_findings(mvtec: Path) -> None:
    report = check(mvtec)
    assert report.findings == []
    assert report.ok
    assert report.counts["bolt"]["train"] == 11
    assert report.sizes["bolt"] == {"64x64": 17}
    assert report.modes["bolt"] == {"RGB": 17}


def test_report_and_grid_are_written(mvtec: Path) -> None:
    check(mvtec)
    folder = mvtec.parent / "report"
    written = json.loads((folder / "report.json").read_text())
    assert written["counts"]["cloth"]["test hole"] == 1
    with Image.open(folder / "sample_grid.png") as grid:
        assert min(grid.size) > 300


def test_unreadable_files_are_all_reported_and_do_not_stop_the_check(mvtec: Path) -> None:
    good = mvtec / "bolt" / "train" / "good"
    (good / "003.png").write_bytes((good / "003.png").read_bytes()[:3000])
    (good / "004.png").write_text("no picture")
    (mvtec / "bolt" / "ground_truth" / "bent" / "000_mask.png").write_text("no mask")
    report = check(mvtec)
    assert kinds(report, "error") == ["unreadable", "mask"]
    found = details(report, "unreadable")
    assert "003.png" in found
    assert "004.png: not an image" in found
    assert "000_mask.png: not an image" in details(report, "mask")


def test_masks_that_are_missing_empty_or_of_another_size_are_errors(mvtec: Path) -> None:
    truth = mvtec / "bolt" / "ground_truth"
    (truth / "scratch" / "000_mask.png").unlink()
    Image.new("L", (64, 64)).save(truth / "bent" / "000_mask.png")
    Image.new("L", (32, 64), 255).save(truth / "bent" / "001_mask.png")
    report = check(mvtec)
    assert kinds(report, "error") == ["incomplete", "mask", "empty"]
    assert "scratch/000.png" in details(report, "incomplete")
    assert "bent/000_mask.png" in details(report, "empty")
    assert "32x64" in details(report, "mask")


def test_soft_masks_are_errors_and_class_indices_warnings(mvtec: Path) -> None:
    soft = np.zeros((64, 64), dtype=np.uint8)
    soft[20:40, 10:50] = np.linspace(1, 255, 40)
    Image.fromarray(soft).save(mvtec / "bolt" / "ground_truth" / "bent" / "000_mask.png")
    classes = np.zeros((64, 64), dtype=np.uint8)
    classes[20:30, :20], classes[30:40, :20] = 1, 2
    Image.fromarray(classes).save(mvtec / "bolt" / "ground_truth" / "bent" / "001_mask.png")
    report = check(mvtec)
    assert kinds(report, "error") == ["soft"]
    assert kinds(report, "warning") == ["values"]


def test_the_same_picture_in_train_and_test_is_an_error_in_any_format(mvtec: Path) -> None:
    source = mvtec / "bolt" / "train" / "good" / "005.png"
    with Image.open(source) as picture:
        picture.save(mvtec / "bolt" / "test" / "good" / "000.bmp")
    report = check(mvtec)
    assert kinds(report, "error") == ["leak"]
    assert str(source) in details(report, "leak")
    assert "000.bmp" in details(report, "leak")


def test_the_same_picture_twice_in_train_is_a_warning(mvtec: Path) -> None:
    good = mvtec / "bolt" / "train" / "good"
    shutil.copy(good / "005.png", good / "copy.png")
    report = check(mvtec)
    assert report.ok
    assert kinds(report, "warning") == ["duplicates in train"]


def test_a_picture_both_normal_and_anomalous_is_an_error(mvtec: Path) -> None:
    test = mvtec / "bolt" / "test"
    shutil.copy(test / "good" / "000.png", test / "bent" / "000.png")
    assert kinds(check(mvtec), "error") == ["contradiction"]


def test_pictures_that_belong_nowhere_are_warned_of(mvtec: Path) -> None:
    (mvtec / "bolt" / "train" / "bad").mkdir()
    shutil.copy(
        mvtec / "bolt" / "test" / "bent" / "000.png", mvtec / "bolt" / "train" / "bad" / "a.png"
    )
    report = check(mvtec, shots=2)
    assert kinds(report, "warning") == ["unused"]
    assert "train/bad/a.png" in details(report, "unused")
    assert "1 pictures" in details(report, "unused")


def test_modes_shapes_and_dark_16_bit_files_are_warned_of(mvtec: Path, write_image: Write) -> None:
    good = mvtec / "bolt" / "train" / "good"
    Image.fromarray(np.full((64, 64), 900, dtype=np.uint16)).save(good / "dark.png")
    write_image(good / "clear.png", mode="RGBA")
    write_image(good / "wide.png", size=(64, 128))
    report = check(mvtec)
    assert report.ok
    assert kinds(report, "warning") == ["shapes", "modes", "dark", "alpha"]
    assert "dark.png: 16 bits, but no value above 900" in details(report, "dark")


def test_groups_on_both_sides_are_warned_of(mvtec: Path) -> None:
    class Photographed(MVTecADLayout):
        """Pictures of one number show one item."""

        def list_category(self, root: Path, category: str) -> Listing:
            named = super().list_category(root, category)
            return Listing(*(
                [sample._replace(group=Path(sample.path).stem) for sample in samples]
                for samples in named
            ))  # fmt: skip

    datamodule = AnomalyDataModule(str(mvtec), "bolt", image_size=32, layout=Photographed())
    report = check_data(datamodule, mvtec.parent / "report")
    assert report.ok
    assert kinds(report, "warning") == ["groups"]
    assert details(report, "groups").endswith("bolt: 000\nbolt: 001")


def test_an_empty_category_is_reported_beside_the_others(mvtec: Path) -> None:
    (mvtec / "empty" / "train" / "good").mkdir(parents=True)
    report = check(mvtec)
    assert "empty/train/good" in details(report, "incomplete")
    assert report.counts["bolt"]["train"] == 11
    assert not report.ok


def test_other_layouts_are_checked(
    btad: Path, visa: Path, ksdd2: Path, plain: Path, tmp_path: Path
) -> None:
    folder = Folder(str(plain), abnormal_dir="bad", mask_dir="masks")
    for datamodule in (BTAD(str(btad)), VisA(str(visa)), KolektorSDD2(str(ksdd2)), folder):
        report = check_data(datamodule, tmp_path / "report")
        assert report.ok
        assert not set(kinds(report, "warning")) - {"note", "values"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anomaly_lit.commands.data", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_command_exits_with_0_on_a_good_data_set(btad: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = command(
        "dataset=btad", f"dataset.root={btad}", "dataset.categories=[01]", f"output_dir={output}"
    )
    assert result.returncode == 0, result.stderr
    assert "fit for use" in result.stdout
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "sample_grid.png"]


def test_command_exits_with_1_and_names_the_file(mvtec: Path, tmp_path: Path) -> None:
    path = mvtec / "bolt" / "train" / "good" / "003.png"
    path.write_text("no picture")
    result = command(f"dataset.root={mvtec}", f"output_dir={tmp_path / 'out'}")
    assert result.returncode == 1
    assert str(path) in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def options() -> list[str]:
    return sorted(path.stem for path in (Path(config_dir()) / "dataset").glob("*.yaml"))


@pytest.mark.parametrize("name", options())
def test_every_option_shows_all_parameters_of_its_class(name: str) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = without_demo_keys(plain(compose("data", overrides=[f"dataset={name}"])))
    validate(config, "data")
    target = import_target(config["dataset"]["_target_"])
    parameters = set(inspect.signature(target).parameters)
    given_elsewhere = {"cache", "feature_cache", "synthesis"}  # by other groups
    given_elsewhere |= {"needs", "validate_on_test", "pin_memory", "persistent_workers"}  # by runs
    layout = config["dataset"].pop("layout", None)
    given_elsewhere |= {"layout"} & parameters  # by the class, or with all that it takes
    assert set(config["dataset"]) == parameters - given_elsewhere | {"_target_"}
    if layout is not None:
        chosen = inspect.signature(import_target(layout["_target_"])).parameters
        assert set(layout) == set(chosen) | {"_target_"}


@pytest.mark.parametrize("name", ["device", "disk", "host", "none"])
def test_every_cache_fits_every_data_set(name: str) -> None:
    for dataset in options():
        overrides = [f"dataset={dataset}", f"+cache={name}"]
        with initialize_config_dir(config_dir(), version_base="1.3"):
            config = without_demo_keys(plain(compose("data", overrides=overrides)))
        validate(config, "data")
        assert (config["dataset"]["cache"] is None) == (name == "none")


def test_help_names_every_data_set() -> None:
    help_text = command("--help").stdout
    assert all(f"dataset={name} " in help_text for name in options())


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("dataset.root=/nowhere", "dataset.root=/nowhere is not a folder"),
        ("dataset=mvtec", "mvtec_ad"),
    ],
)
def test_command_explains_wrong_settings(tmp_path: Path, argument: str, text: str) -> None:
    result = command(argument, f"output_dir={tmp_path / 'out'}")
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.real_data
def test_real_data_is_fit_for_use(tmp_path: Path) -> None:
    folder = os.environ.get("ANOMALY_LIT_DATA")
    if not folder:
        pytest.skip("ANOMALY_LIT_DATA does not name a folder")
    report = check_data(MVTecAD(str(Path(folder) / "industrial")), tmp_path)
    assert report.ok
    assert sum(sum(counts.values()) for counts in report.counts.values()) == 904
