"""Small data sets in the layouts of the public ones, written to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Write = Callable[..., Path]


@pytest.fixture
def write_image() -> Write:
    """Write a noise picture, different for each path."""

    def write(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(list(str(path.relative_to(path.anchor)).encode()))
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        return path

    return write


@pytest.fixture
def write_mask() -> Write:
    """Write a mask with one marked square."""

    def write(path: Path, size: tuple[int, int] = (64, 64), value: int = 255) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros(size, dtype=np.uint8)
        mask[20:36, 24:40] = value
        Image.fromarray(mask).save(path)
        return path

    return write


@pytest.fixture
def mvtec(tmp_path: Path, write_image: Write, write_mask: Write) -> Path:
    """Two categories: bolt (12 train, 2 + 3 test of two kinds) and cloth (6 train, 1 + 1)."""
    root = tmp_path / "mvtec"
    for i in range(12):
        write_image(root / "bolt" / "train" / "good" / f"{i:03d}.png")
    for i in range(2):
        write_image(root / "bolt" / "test" / "good" / f"{i:03d}.png")
    for kind, count in (("bent", 2), ("scratch", 1)):
        for i in range(count):
            write_image(root / "bolt" / "test" / kind / f"{i:03d}.png")
            write_mask(root / "bolt" / "ground_truth" / kind / f"{i:03d}_mask.png")
    for i in range(6):
        write_image(root / "cloth" / "train" / "good" / f"{i:03d}.jpg")
    write_image(root / "cloth" / "test" / "good" / "000.jpg")
    write_image(root / "cloth" / "test" / "hole" / "000.jpg")
    write_mask(root / "cloth" / "ground_truth" / "hole" / "000.png")  # without "_mask"
    return root


@pytest.fixture
def btad(tmp_path: Path, write_image: Write, write_mask: Write) -> Path:
    """Two products, bmp images and png masks."""
    root = tmp_path / "btad"
    for product in ("01", "02"):
        for i in range(4):
            write_image(root / product / "train" / "ok" / f"{i:04d}.bmp")
        write_image(root / product / "test" / "ok" / "0000.bmp")
        write_image(root / product / "test" / "ko" / "0001.bmp")
        write_mask(root / product / "ground_truth" / "ko" / "0001.png")
    return root


@pytest.fixture
def visa(tmp_path: Path, write_image: Write, write_mask: Write) -> Path:
    """One object of the raw layout with the official split file's columns; masks hold indices."""
    root = tmp_path / "visa"
    rows = ["object,split,label,image,mask"]
    for i in range(5):
        name = f"candle/Data/Images/Normal/{i:04d}.JPG"
        write_image(root / name)
        rows.append(f"candle,{'train' if i < 4 else 'test'},normal,{name},")
    name, mask = "candle/Data/Images/Anomaly/000.JPG", "candle/Data/Masks/Anomaly/000.png"
    write_image(root / name)
    write_mask(root / mask, value=2)
    rows.append(f"candle,test,anomaly,{name},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def real_iad(tmp_path: Path, write_image: Write, write_mask: Write) -> Path:
    """One object: two views of four normal items, and of one whose defect a single view shows."""
    root, rows = tmp_path / "real_iad", []
    base = root / "realiad_1024" / "toy"
    for item in range(4):
        for view in (1, 2):
            name = f"OK/S{item:04d}/toy_{item:04d}_OK_C{view}_2023.jpg"
            write_image(base / name)
            rows.append({"anomaly_class": "OK", "image_path": name, "mask_path": None})
    for view, kind in ((1, "HS"), (2, "OK")):
        name = f"NG/HS/S0009/toy_0009_NG_HS_C{view}_2023"
        write_image(base / f"{name}.jpg")
        mask = f"{name}.png" if kind == "HS" else None
        if mask:
            write_mask(base / mask)
        rows.append({"anomaly_class": kind, "image_path": f"{name}.jpg", "mask_path": mask})
    split = {"meta": {"prefix": "toy/"}, "train": rows[:6], "test": rows[6:]}
    file = root / "realiad_jsons" / "realiad_jsons" / "toy.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(split))
    return root


@pytest.fixture
def ksdd2(tmp_path: Path, write_image: Write, write_mask: Write) -> Path:
    """Six training images, one of them defective, and two test images."""
    root = tmp_path / "ksdd2"
    for i in range(6):
        write_image(root / "train" / f"{10000 + i}.png")
        write_mask(root / "train" / f"{10000 + i}_GT.png", value=255 if i == 5 else 0)
    for i in range(2):
        write_image(root / "test" / f"{20000 + i}.png")
        write_mask(root / "test" / f"{20000 + i}_GT.png", value=255 * i)
    return root


@pytest.fixture
def plain(tmp_path: Path, write_image: Write, write_mask: Write) -> Path:
    """Folders of one's own: good (10), bad/{chip, stain}, masks for all of bad."""
    root = tmp_path / "plain"
    for i in range(10):
        write_image(root / "good" / f"a{i}.png")
    for kind in ("chip", "stain"):
        write_image(root / "bad" / kind / "b0.png")
        write_mask(root / "masks" / kind / "b0.png")
    return root


@pytest.fixture
def outliers(tmp_path: Path, write_image: Write) -> Path:
    """Five pictures of something else, of two sizes, some in a sub-folder."""
    root = tmp_path / "elsewhere"
    for i in range(3):
        write_image(root / f"{i}.jpg", size=(40, 52))
    for i in range(2):
        write_image(root / "more" / f"{i}.png")
    return root
