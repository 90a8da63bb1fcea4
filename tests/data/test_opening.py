"""Large pictures, and which formats are opened at all."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image, TiffImagePlugin

from anomaly_lit.data import MVTecAD
from anomaly_lit.data.images import read_header, read_image
from anomaly_lit.data.inspect import inspect_data
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.data.truth import read_mask
from anomaly_lit.types import UserError


def write_png(path: Path, width: int, height: int, rows: int = 1) -> Path:
    """A grey PNG whose header promises any size; only `rows` rows are there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * rows), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    return path


def test_a_bomb_is_refused_before_memory_is_spent(tmp_path: Path) -> None:
    path = write_png(tmp_path / "bomb.png", 50_000, 50_000, rows=400)
    assert path.stat().st_size < 30_000
    tracemalloc.start()
    for read in (read_image, lambda path: read_mask(path, MAX_PIXELS)):
        with pytest.raises(UserError, match=r"bomb\.png: the picture is 50000x50000, 2500 megapix"):
            read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_the_limit_is_said_in_words_and_can_be_raised(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", 40, 30, rows=30)
    message = r"40x30, 0\.0012 megapixels, more than max_pixels=1199: raise it .* or shrink"
    for read in (read_image, read_mask, read_header):
        with pytest.raises(UserError, match=message):
            read(path, 1199)
        read(path, 1200)
        read(path, None)
    with pytest.raises(UserError, match="max_pixels=1199"):
        read_image(io.BytesIO(path.read_bytes()), 1199)


def test_a_camera_with_196_megapixels_is_within_the_limit(tmp_path: Path) -> None:
    path = write_png(tmp_path / "wide.png", 16384, 12000)
    assert read_header(path, MAX_PIXELS).size == (12000, 16384)


def test_a_large_picture_is_read_without_a_word_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write_png(tmp_path / "a.png", 40, 30, rows=30)
    with ThreadPoolExecutor(8) as pool:
        sizes = {image.shape for image in pool.map(read_image, [path] * 64)}
    assert sizes == {(30, 40, 3)}
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 100  # others have their guard again


def test_a_format_that_is_left_out_is_not_opened_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.ico")
    (tmp_path / "b.ico").rename(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match="not an image that Pillow can read"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("what", ["image", "mask"])
def test_training_and_the_check_refuse_what_is_over_the_limit(mvtec: Path, what: str) -> None:
    bolt = mvtec / "bolt"
    place = {"image": "train/good/big.png", "mask": "ground_truth/bent/000_mask.png"}[what]
    write_png(bolt / place, 30_000, 30_000, rows=9)
    with pytest.raises(UserError, match=r"30000x30000, 900 megapixels, more than max_pixels=2000"):
        MVTecAD(str(mvtec), image_size=32).setup()
    report = inspect_data(MVTecAD(str(mvtec), image_size=32))
    assert not report.ok
    assert any("900 megapixels" in path for finding in report.findings for path in finding.paths)


def test_the_data_modules_limit_counts(mvtec: Path) -> None:
    with pytest.raises(UserError, match=r"64x64.*max_pixels=4095"):
        MVTecAD(str(mvtec), image_size=32, max_pixels=4095).setup()
    MVTecAD(str(mvtec), image_size=32, max_pixels=4096).setup()
    MVTecAD(str(mvtec), image_size=32, max_pixels=None).setup()
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(UserError, match=r"dataset\.max_pixels=.*positive whole number"):
            MVTecAD(str(mvtec), image_size=32, max_pixels=wrong)  # type: ignore[arg-type]


def pages(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (12, 8), (50 * number, 0, 0)) for number in range(count)]


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_pages_are_counted_and_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    first, *others = pages(3)
    first.save(tmp_path / f"one.{suffix}")
    first.save(tmp_path / f"three.{suffix}", save_all=True, append_images=others)
    counts = [read_header(tmp_path / f"{name}.{suffix}").pages for name in ("one", "three")]
    assert counts == [1, 3]
    assert read_image(tmp_path / f"three.{suffix}")[..., 0].max() < 10


def test_previews_are_no_pages(tmp_path: Path) -> None:
    first, second = pages(2)
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second])  # as cameras do
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    first, second = pages(2)
    small = TiffImagePlugin.ImageFileDirectory_v2()
    small[0x00FE] = 1
    second.encoderinfo = {"tiffinfo": small}
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.tif") as file:
        assert file.n_frames == 2
    assert [read_header(tmp_path / name).pages for name in ("a.jpg", "a.tif")] == [1, 1]


def test_a_page_that_cannot_be_opened_is_counted_and_spoils_no_other(tmp_path: Path) -> None:
    first, *others = pages(2)
    path = tmp_path / "a.tif"
    first.save(path, save_all=True, append_images=others)
    with Image.open(path) as file:
        file.seek(1)
        start = file._frame_pos[1]  # type: ignore[attr-defined]
    content = bytearray(path.read_bytes())
    entries = range(start + 2, start + 2 + 12 * content[start], 12)
    place = next(at for at in entries if content[at : at + 2] == (262).to_bytes(2, "little"))
    content[place + 8] = 77  # an unknown photometric interpretation
    path.write_bytes(content)
    assert read_header(path).pages == 2
    assert read_image(path).shape == (8, 12, 3)
