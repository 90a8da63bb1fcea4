import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy import ndimage

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.data.demo.datamodule import CATEGORIES, MANIFEST, Demo, generate_demo
from anomaly_lit.data.demo.products import GOOD, PRODUCTS, capture, picture
from anomaly_lit.nn.weights import find_weights
from anomaly_lit.types import UserError

SMALL = {"size": 64, "train": 2, "test_good": 1, "test_defective": 5}


def contents(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_demo(tmp_path_factory.mktemp("demo") / "data", **SMALL)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_demo(tmp_path_factory.mktemp("demo") / "data", train=12)


def auroc(scores: list[float], labels: list[bool]) -> float:
    """Chance that a defective item outranks a good one."""
    values, truth = np.array(scores), np.array(labels)
    above = values[truth][:, None] - values[~truth][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def test_folders_follow_mvtec(small: Path):
    files = contents(small)
    assert sorted({name.split("/")[0] for name in files} - {MANIFEST}) == sorted(CATEGORIES)
    for category, product in PRODUCTS.items():
        assert f"{category}/train/good/001.png" in files
        assert f"{category}/test/good/000.png" in files
        for defect in product.defects:
            assert f"{category}/test/{defect}/000.png" in files
            assert f"{category}/ground_truth/{defect}/000_mask.png" in files
        assert f"{category}/test/{product.defects[0]}/001.png" in files  # the fifth


def test_same_seed_gives_same_bytes_and_another_seed_gives_others(small: Path, tmp_path: Path):
    again = contents(generate_demo(tmp_path / "again", **SMALL))
    other = contents(generate_demo(tmp_path / "other", seed=1, **SMALL))
    assert again == contents(small)
    assert again.keys() == other.keys()
    images = [name for name in again if name.endswith(".png") and "ground_truth" not in name]
    assert all(again[name] != other[name] for name in images)
    assert len({again[name] for name in images}) == len(images)  # nothing is in train and test


def test_finished_data_set_is_used_again_untouched(small: Path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert generate_demo(small, **SMALL) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_empty_folder_is_filled(tmp_path: Path):
    root = tmp_path / "empty"
    root.mkdir()
    generate_demo(root, **(SMALL | {"test_defective": 1}))
    assert (root / MANIFEST).is_file()


def test_folder_of_the_user_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a demo data set.*dataset\.root"):
        generate_demo(tmp_path, **SMALL)
    assert contents(tmp_path).keys() == {"thesis.txt"}


def test_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(UserError, match="data"):
        generate_demo(tmp_path / "data", **SMALL)


def test_data_set_of_another_seed_or_version_is_an_error(small: Path, tmp_path: Path):
    with pytest.raises(UserError, match="another demo data set"):
        generate_demo(small, seed=7, **SMALL)
    manifest = json.loads((small / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(UserError, match="another demo data set"):
        generate_demo(tmp_path, **SMALL)


def test_failed_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anomaly_lit.data.demo.datamodule.save", fail)
    with pytest.raises(KeyboardInterrupt):
        generate_demo(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("category", "defect"),
    [(name, kind) for name, item in PRODUCTS.items() for kind in item.defects],
)
def test_every_defect_is_visible_and_inside_its_mask(category: str, defect: str):
    for index in range(6):
        seed = [0, 9, index]
        image, mask = picture(category, defect, seed, 128)
        good, nothing = picture(category, GOOD, seed, 128)
        change = np.abs(image.astype(int) - good).max(axis=-1)
        assert not nothing.any()
        assert 30 <= mask.sum() <= 128 * 128 / 8
        assert change[mask].mean() > 20
        beyond = ~ndimage.binary_dilation(mask)  # the lens smears an edge by a pixel
        assert change[beyond].max() < 30


def test_masks_are_binary_files_of_the_image_s_size(small: Path):
    for path in small.rglob("*_mask.png"):
        mask = np.asarray(Image.open(path))
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}


def test_exposure_stays_in_range():
    rng = np.random.default_rng(0)
    assert capture(rng, np.full((16, 16, 3), 2.0)).max() == 255


def test_distance_to_the_mean_image_does_not_solve_the_demo(full: Path):
    def read(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path), dtype=np.float64) / 255

    results = []
    for category in CATEGORIES:
        normal = np.stack([read(path) for path in (full / category / "train/good").iterdir()])
        tests = sorted((full / category / "test").rglob("*.png"))
        labels = [path.parent.name != GOOD for path in tests]
        distances = [float(((read(path) - normal.mean(axis=0)) ** 2).mean()) for path in tests]
        results.append(auroc(distances, labels))
    assert np.mean(results) < 0.80, dict(zip(CATEGORIES, results, strict=True))


def test_data_module_makes_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def generate(root: Path, seed: int) -> Path:
        return generate_demo(root, seed, **SMALL)

    monkeypatch.setattr("anomaly_lit.data.demo.datamodule.generate_demo", generate)
    data = Demo(str(tmp_path / "data"), image_size=32, batch_size=4, holdout=0.5)
    data.prepare_data()
    data.setup()
    assert data.categories == sorted(CATEGORIES)
    assert (len(data.train_samples), len(data.holdout_samples)) == (5, 5)
    assert sum(sample.label for sample in data.test_samples) == 25
    assert data.has_masks
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 32, 32)
    digest = data.digest
    again = Demo(str(tmp_path / "data"), image_size=32, holdout=0.5)
    again.prepare_data()
    again.setup()
    assert again.digest == digest


@pytest.mark.slow
def test_two_processes_may_prepare_the_data_at_once(tmp_path: Path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(generate_demo, tmp_path / "data", **SMALL) for _ in range(2)]
        assert {job.result() for job in jobs} == {tmp_path / "data"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_shipped_backbone_is_small_and_fits_its_option():
    option = plain(OmegaConf.load(Path(config_dir()) / "backbone" / "demo.yaml"))
    backbone = instantiate(option)
    before = backbone.network.state_dict()["layer1.0.conv1.weight"].clone()
    backbone.load_weights()
    assert not torch.equal(before, backbone.network.state_dict()["layer1.0.conv1.weight"])
    assert backbone.strides == [4, 8, 16]
    assert all(stage.isfinite().all() for stage in backbone(torch.rand(1, 3, 128, 128)))
    file = find_weights(option["name"], option["weights"])
    assert file is not None
    assert file.stat().st_size < 4e6
