from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_lit.drawing import png
from anomaly_lit.types import UserError


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_saved_picture_is_whole_and_alone(tmp_path: Path):
    image = photo(12, 9)
    path = tmp_path / "new" / "deep" / "a.png"
    png.save_image(np.zeros((3, 3, 3), np.uint8), path)
    png.save_image(image, path)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert (np.array(Image.open(path)) == image).all()


def test_interrupted_write_leaves_the_old_picture_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.png"
    png.save_image(photo(4, 4), path)
    before = path.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(png.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        png.save_image(photo(5, 5), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_unwritable_place_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "a.png"
    with pytest.raises(UserError, match=r"file.a\.png.*choose an output folder"):
        png.save_image(photo(4, 4), path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png"):
        png.save_image(photo(4, 4), tmp_path / "folder.png")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_name_of_another_format_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a\.jpg end in \.png"):
        png.save_image(photo(4, 4), tmp_path / "a.jpg")
