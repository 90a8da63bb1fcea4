"""The frames of a video are judged like the pictures of a folder, and no more than one is held."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomaly_lit.inference import film as module
from anomaly_lit.inference.clips import frames_before
from anomaly_lit.inference.detector import Finding
from anomaly_lit.inference.film import Film, is_film, upright
from anomaly_lit.inference.folder import Judge, batches_of, find_pictures, names_of
from anomaly_lit.types import UserError

av = pytest.importorskip("av")


def frames_of(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(count)]


def write_film(path: Path, frames: list[np.ndarray]) -> Path:
    """Without loss, so that frames come back as they were."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


class Fake:
    """A detector that scores an image by its mean, and by that of the frames before it."""

    categories = ("line",)
    calibration: dict[str, Any] = {}  # noqa: RUF012

    def predict(
        self, images: list[Any], category: str, batch_size: int, frames: Any = None
    ) -> list[Finding]:
        before = frames or [[] for _ in images]
        scores = [float(np.mean([*b, i])) for i, b in zip(images, before, strict=True)]
        return [
            Finding(score, 1000.0, "good", np.zeros(image.shape[:2], np.float32), image)
            for score, image in zip(scores, images, strict=True)
        ]


def judged(source: Path, output: Path, frames: int = 0) -> Judge:
    found = find_pictures(source, output)
    before = frames_before(found.paths, frames) if frames else None
    judge = Judge(Fake(), names_of(found.paths, found.root), output, before=before, film=found.film)  # type: ignore[arg-type]
    with judge:
        for batch in batches_of([*before] if before else found.paths, 2, found.film):
            judge.judge(batch)
    return judge


@pytest.mark.parametrize("before", [0, 2])
def test_a_film_is_judged_as_a_folder_of_its_frames(before: int, tmp_path: Path) -> None:
    frames = frames_of(7)
    write_film(tmp_path / "line.mkv", frames)
    (tmp_path / "line").mkdir()
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(tmp_path / "line" / f"{number:06d}.png")
    of_film = judged(tmp_path / "line.mkv", tmp_path / "of_film", before)
    of_folder = judged(tmp_path / "line", tmp_path / "of_folder", before)
    assert [*of_film.scores.values()] == [*of_folder.scores.values()]
    assert len(of_film.scores) == 7 - before
    with (tmp_path / "of_film" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["path"] == str(tmp_path / "line.mkv" / f"{before:06d}")
    assert (tmp_path / "of_film" / "overlays" / "line.mkv" / "000006.png").is_file()


def test_frames_are_decoded_no_further_than_asked(tmp_path: Path) -> None:
    frames = frames_of(5)
    film = Film(write_film(tmp_path / "line.mkv", frames))
    assert [path.name for path in film.paths] == [f"{n:06d}" for n in range(5)]
    assert film.pixels == 48 * 64
    for number in (0, 2, 3):  # one between is passed over
        assert np.array_equal(film.read(film.paths[number]), frames[number])
        assert film._next == number + 1


def test_a_film_that_breaks_off_is_judged_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Film) -> Iterator[Any]:
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number == 3:
                raise OSError("invalid data")
            yield frame

    source = write_film(tmp_path / "line.mkv", frames_of(6))
    monkeypatch.setattr(Film, "_decoded", broken)
    judge = judged(source, tmp_path / "out")
    assert judge.counts == {"good": 3, "unreadable": 3}
    assert "line.mkv/000005: frame 3 cannot be decoded: invalid data" in judge.errors[-1]


def test_a_film_shorter_than_it_says_is_named(tmp_path: Path) -> None:
    film = Film(write_film(tmp_path / "line.mkv", frames_of(2)))
    film.read(film.paths[1])
    with pytest.raises(UserError, match=r"line\.mkv/000002: the video ends after 2 frames"):
        film.read(film.path / "000002")


def test_what_is_no_film_is_named(tmp_path: Path) -> None:
    file = tmp_path / "line.mp4"
    file.write_bytes(b"not a film")
    with pytest.raises(UserError, match=r"line\.mp4: "):
        find_pictures(file, tmp_path / "out")
    assert not is_film(tmp_path / "missing.mp4")
    with pytest.raises(UserError, match="does not exist"):
        find_pictures(tmp_path / "missing.mp4", tmp_path / "out")


def test_frames_that_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than max_pixels=1000"):
        Film(write_film(tmp_path / "line.mkv", frames_of(1)), 1000)


def test_without_the_extra_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "line.mp4").touch()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'anomaly-lit\[video\]'"):
        find_pictures(tmp_path / "line.mp4", tmp_path / "out")


def test_frames_are_turned_as_the_file_says() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert upright(pixels, 0).tolist() == pixels.tolist()
    assert upright(pixels, 180).tolist() == pixels[::-1, ::-1].tolist()
    turned = upright(pixels, -90)  # with the clock: the left column, from below, is the first row
    assert turned[0].tolist() == pixels[::-1, 0].tolist()


def test_a_film_of_a_turned_camera_is_upright(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:16, :16] = 255  # at the top left, which a turn against the clock moves down
    with av.open(str(tmp_path / "line.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this version of av writes no rotation")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
            container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    film = Film(tmp_path / "line.mp4")
    found = film.read(film.paths[0])
    assert found.shape == (64, 48, 3)
    assert found[-12:, :12].min() > 200
    assert found[:12].max() < 60
