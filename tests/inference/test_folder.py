"""Pictures of any name in any folder are judged once, and what was found is never lost."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomaly_lit.inference import folder as module
from anomaly_lit.inference.detector import Finding
from anomaly_lit.inference.folder import (
    Judge,
    batches_of,
    cell,
    find_pictures,
    headers_of,
    names_of,
)
from anomaly_lit.types import UserError

PIXELS = np.full((8, 12, 3), 90, np.uint8)


class Fake:
    """A detector whose scores are the pictures' number."""

    categories = ("bolt",)
    calibration: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, scores: list[float] | None = None, localises: bool = True) -> None:
        self.scores = scores
        self.localises = localises
        self.seen = 0

    def predict(
        self, images: list[Any], category: str, batch_size: int, frames: None = None
    ) -> list[Finding]:
        findings = []
        for image in images:
            score = float(self.seen) if self.scores is None else self.scores[self.seen]
            map_ = np.zeros(image.shape[:2], np.float32) if self.localises else None
            good = "good" if np.isfinite(score) else "unknown"
            findings.append(Finding(score, 10.0, good, map_, image))
            self.seen += 1
        return findings


def write(path: Path, size: tuple[int, int] = (8, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path, "PNG")
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def judge(source: Path, output: Path, detector: Any = None, **options: Any) -> Judge:
    found = find_pictures(source, output)
    names, headers = names_of(found.paths, found.root), headers_of(found.paths)
    with Judge(detector or Fake(), names, output, headers=headers, **options) as judging:
        for batch in batches_of(found.paths, 2, headers=headers):
            judging.judge(batch)
    return judging


def test_pictures_whose_paths_look_alike_have_overlays_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a" / "b.png")
    write(tmp_path / "in" / "a__b.png")
    judge(tmp_path / "in", tmp_path / "out")
    overlays = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    assert overlays == {"overlays/a/b.png", "overlays/a__b.png"}


@pytest.mark.skipif(os.name == "nt", reason="Windows names files in Unicode")
def test_names_that_are_no_utf_8_are_judged(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    write(source / name)
    judging = judge(source, tmp_path / "out")
    assert judging.counts == {"good": 1}
    assert rows_of(tmp_path / "out")[0]["path"].endswith("caf\\xe9.png")
    assert (tmp_path / "out" / "overlays" / name).is_file()


def test_names_as_long_as_a_file_system_takes_them_are_judged(tmp_path: Path) -> None:
    for letter in "ab":
        write(tmp_path / "in" / f"{'ä' * 120}{letter}.png")
    judge(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 2


def names(*paths: str) -> list[str]:
    """Give the names of overlays of images in the folder `in`."""
    found = names_of([Path("in", path) for path in paths], Path("in"))
    return [f"{found[Path('in', path)].as_posix()}.png" for path in paths]


def test_an_overlay_has_the_name_of_its_image() -> None:
    assert names("a/b.png", "a/c.jpg", "d.e.TIFF") == ["a/b.png", "a/c.png", "d.e.png"]


def test_images_that_differ_in_their_suffix_have_overlays_of_their_own() -> None:
    assert names("0.jpg", "0.png", "1/0.jpg") == ["0.jpg.png", "0.png", "1/0.png"]
    assert names("0.bmp", "0.jpg") == ["0.bmp.png", "0.jpg.png"]
    assert names("A.jpg", "a.png") == ["A.jpg.png", "a.png"]  # some file systems ignore case


def test_no_two_overlays_have_one_name() -> None:
    found = names("0.jpg", "0.png", "0.jpg.png", "0.PNG", "0.jpg.PNG")
    assert found[1:4] == ["0.png", "0.jpg.png", "0.PNG.png"]
    assert len({name.casefold() for name in found}) == 5


def test_a_name_that_is_too_long_is_cut() -> None:
    long = Path(names("a/" + "x" * 250 + ".png")[0])
    assert long.parent == Path("a")
    assert len(long.name) < 240


def test_results_are_not_judged_again(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write(source / "part.png")
    judge(source, source / "first")
    found = find_pictures(source, source / "second")
    assert found.paths == [source / "part.png"]
    assert found.results == [source / "first"]


def test_a_folder_of_pictures_may_be_that_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "part.png")
    monkeypatch.chdir(tmp_path)
    judging = judge(Path("in"), tmp_path / "in")
    assert judging.counts == {"good": 1}
    for source in (Path("in"), tmp_path / "in"):
        assert [path.name for path in find_pictures(source, tmp_path / "out").paths] == ["part.png"]


@pytest.mark.parametrize("place", ["overlays", "maps/inner"])
@pytest.mark.parametrize("output", [".", "in"])
def test_pictures_in_folders_named_like_results_are_judged_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, output: str
) -> None:
    write(tmp_path / "in" / "part.png")
    own = write(tmp_path / "in" / place / "part.png")
    content = own.read_bytes()
    monkeypatch.chdir(tmp_path / "in")
    target = {".": Path("."), "in": tmp_path / "in"}[output]
    with pytest.raises(UserError, match=f"{place[:4]}.* holds files.*choose another output_dir"):
        judge(tmp_path / "in", target)
    assert own.read_bytes() == content
    judging = judge(tmp_path / "in", tmp_path / "in" / "results")
    assert judging.counts == {"good": 2}
    assert own.read_bytes() == content


def test_what_was_judged_survives_a_later_fault(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / "in" / f"{number}.png")

    class Fails(Fake):
        def predict(
            self, images: list[Any], category: str, batch_size: int, frames: None = None
        ) -> list[Finding]:
            if self.seen >= 4:
                raise MemoryError
            return super().predict(images, category, batch_size)

    with pytest.raises(MemoryError):
        judge(tmp_path / "in", tmp_path / "out", Fails())
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "out")] == [
        "0.png", "1.png", "2.png", "3.png",
    ]  # fmt: skip


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_no_verdict(tmp_path: Path, score: float) -> None:
    write(tmp_path / "in" / "part.png")
    judging = judge(tmp_path / "in", tmp_path / "out", Fake([score]))
    assert judging.counts == {"unknown": 1}
    assert not judging.all_judged
    assert "the score is" in rows_of(tmp_path / "out")[0]["error"]


def test_an_unreadable_picture_is_told_in_its_place(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    write(tmp_path / "in" / "c.png")
    judging = judge(tmp_path / "in", tmp_path / "out")
    assert [row["verdict"] for row in rows_of(tmp_path / "out")] == ["good", "unreadable", "good"]
    assert not judging.all_judged
    assert "b.png" in judging.errors[0]


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_a_file_of_several_pages_is_judged_in_part(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "in" / "a.png")
    first, *others = [Image.fromarray(PIXELS + number) for number in range(3)]
    path = tmp_path / "in" / f"b.{suffix}"
    first.save(path, save_all=True, append_images=others)
    judging = judge(tmp_path / "in", tmp_path / "out")
    assert judging.counts == {"good": 2}
    assert [row["error"] for row in rows_of(tmp_path / "out")] == ["", "1 of 3 pages judged"]
    assert judging.errors == [f"good: {path}: 1 of 3 pages judged"]
    assert (judging.in_part, judging.all_judged) == (1, False)


def test_a_method_without_maps_gives_pictures_without_heat(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.png")
    judge(tmp_path / "in", tmp_path / "out", Fake(localises=False), save_maps=True)
    shown = np.asarray(Image.open(tmp_path / "out" / "overlays" / "a.png"))
    assert np.array_equal(shown, np.asarray(Image.open(path)))
    assert not (tmp_path / "out" / "maps").exists()


def test_batches_hold_fewer_pictures_where_these_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{number}.png", (8, 12)) for number in range(5)]
    paths.append(write(tmp_path / "large.png", (80, 120)))
    monkeypatch.setattr(module, "MOST_PIXELS", 200)
    assert [len(batch) for batch in batches_of(paths, 16)] == [2, 2, 1, 1]
    assert [len(batch) for batch in batches_of(paths[:5], 1)] == [1] * 5


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert cell(text) == f"'{text}"
    assert cell("a=b.png") == "a=b.png"


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no picture"):
        find_pictures(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        find_pictures(tmp_path / "gone", tmp_path / "out")


def test_the_rule_of_training_says_which_files_are_judged(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.jfif", "sub/b.tga.png", "._a.png", ".ipynb_checkpoints/a.png", "notes.txt"):
        write(source / name)
    write(tmp_path / "elsewhere" / "c.png")
    (source / "x.png").mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    (source / "gone.png").symlink_to(source / "absent.png")
    found = find_pictures(source, tmp_path / "out")
    names = [path.relative_to(source).as_posix() for path in found.paths]
    assert names == ["a.jfif", "gone.png", "linked/c.png", "sub/b.tga.png"]
    assert found.others == (
        "4 files were passed over: 1 .txt, 1 hidden, 1 hidden folder, 1 repeated link"
    )
    judging = judge(source, tmp_path / "out")
    assert judging.counts == {"good": 3, "unreadable": 1}  # the link that leads nowhere is told


def test_a_picture_over_the_limit_is_told_in_words(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png", (8, 12))
    write(tmp_path / "in" / "b.png", (8, 13))
    judging = judge(tmp_path / "in", tmp_path / "out", max_pixels=96)
    assert judging.counts == {"good": 1, "unreadable": 1}
    assert "13x8" in rows_of(tmp_path / "out")[1]["error"]
    assert "more than max_pixels=96: raise it" in judging.errors[0]
