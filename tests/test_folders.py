"""Which files of a folder are pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from anomaly_lit.folders import (
    NOT_READ,
    formats,
    list_folders,
    list_images,
    passed_over,
    suffixes,
    told,
    walk,
    walk_images,
)
from anomaly_lit.types import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def names(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_what_pillow_reads_is_a_picture() -> None:
    wanted = ".jfif .jpe .jp2 .avif .tga .pbm .pgm .png .jpg .jpeg .bmp .gif .tif .tiff .webp .ppm"
    assert set(wanted.split()) <= suffixes()
    assert not suffixes() & {".pdf", ".eps", ".mpg", ".ico", ".h5", ".svg", ".txt", ".db", ""}


@pytest.mark.parametrize("suffix", sorted(suffixes()))
def test_every_format_with_a_picture_suffix_is_opened(suffix: str) -> None:
    name = Image.registered_extensions()[suffix]
    assert name in formats() or name == "MPO"
    assert name not in NOT_READ


def test_hidden_and_foreign_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a.jpg", "._b.PNG", ".ipynb_checkpoints/a.png", "Thumbs.db", "README")
    touch(tmp_path, "notes.txt", "sub/c.tga", "sub/more.txt", "x.png/inner.bmp")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path, list_images(tmp_path)) == ["a.jpg", "b.PNG"]
    assert names(tmp_path, list_folders(tmp_path)) == ["sub", "x.png"]
    assert names(tmp_path, walk_images(tmp_path)) == [
        "a.jpg",
        "b.PNG",
        "sub/c.tga",
        "x.png/inner.bmp",
    ]
    counts = passed_over([tmp_path])
    assert told(counts) == (
        "7 files were passed over: 2 .txt, 1 .db, 1 hidden, 1 hidden folder, 1 special file, "
        "1 without a suffix"
    )
    used = {str(tmp_path / "a.jpg"), str(tmp_path / "b.PNG")}
    assert passed_over([tmp_path], used)["unused picture"] == 2


def test_nothing_is_told_where_nothing_was_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    assert told(passed_over([tmp_path], {str(tmp_path / "a.png")})) == ""
    assert told({".txt": 1}) == "1 file was passed over: 1 .txt"
    assert walk_images(tmp_path / "absent") == list_images(tmp_path / "absent") == []


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/b0.png", "elsewhere/deep/b1.png", "good/a0.png")
    (tmp_path / "good" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "good" / "a1.png").symlink_to(tmp_path / "elsewhere" / "b0.png")
    good = tmp_path / "good"
    assert names(good, walk_images(good)) == [
        "a0.png", "a1.png", "linked/b0.png", "linked/deep/b1.png",
    ]  # fmt: skip
    (tmp_path / "again").symlink_to(good)
    assert len(walk_images(tmp_path / "again")) == len(list_images(tmp_path / "again")) + 2 == 4


def test_loops_of_links_end_and_each_folder_is_read_once(tmp_path: Path) -> None:
    touch(tmp_path, "z/a.png", "z/inner/b.png")
    (tmp_path / "a_link_to_z").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "inner" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert names(tmp_path, walk_images(tmp_path)) == ["z/a.png", "z/inner/b.png"]
    assert passed_over([tmp_path])["repeated link"] == 2


def test_a_link_that_leads_nowhere_is_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert names(tmp_path, walk_images(tmp_path)) == ["a.png", "loop.png"]


def test_a_folder_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        walk_images(tmp_path)


HEADER = "path,category,score,threshold,verdict,error\n"
TARGET = "callbacks:\n  outputs:\n    _target_: anomaly_lit.callbacks.Outputs\n"


def write_results(folder: Path, command: str) -> None:
    """Write what a command leaves in a folder, with pictures of no content."""
    pictures = {
        "predict": ("overlays/a.png", "overlays/good/b.png"),
        "train": ("images/000_missed_a.png", "overview.png", "loss.png", "wandb/media/a.png"),
        "test": ("images/000_missed_a.png", "overview.png", "curves.png"),
        "data": ("sample_grid.png",),
    }
    touch(folder, *pictures[command])
    if command == "train":
        (folder / "config.yaml").write_text(TARGET)
        (folder / "checkpoints").mkdir()
    if command in ("predict", "test"):
        (folder / "predictions.csv").write_text(HEADER)
    if command in ("test", "data"):
        touch(folder, "metrics.json" if command == "test" else "report.json")


@pytest.mark.parametrize("place", ["", "run"])
@pytest.mark.parametrize("command", ["predict", "train", "test", "data"])
def test_earlier_results_are_passed_over_and_counted(
    tmp_path: Path, command: str, place: str
) -> None:
    touch(tmp_path, "part.png", "more/part.png", f"{place}/mine/other.png".lstrip("/"))
    write_results(tmp_path / place, command)
    mine = sorted(["part.png", "more/part.png", f"{place}/mine/other.png".lstrip("/")])
    found = walk([tmp_path])
    assert sorted(names(tmp_path, found.pictures)) == mine
    assert found.others == {"earlier result": 1}
    assert found.results == [tmp_path / place]
    assert names(tmp_path, list_images(tmp_path)) == ["part.png"]
    expected = ["mine", "more"] if not place else ["more", "run"]
    assert names(tmp_path, list_folders(tmp_path)) == expected


def test_folders_that_only_have_the_names_of_results_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "overlays/a.png", "maps/b.png", "images/c.png", "checkpoints/d.png")
    assert len(walk_images(tmp_path)) == 4
    (tmp_path / "predictions.csv").write_text("image,score\na.png,0.5\n")
    (tmp_path / "config.yaml").write_text("model: resnet\n")
    assert len(walk_images(tmp_path)) == 4
    assert "earlier result" not in passed_over([tmp_path])


FOLDERS = ("", "a", "b", "b/c")


@given(
    pictures=st.sets(st.sampled_from(FOLDERS), min_size=1),
    links=st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(FOLDERS)), max_size=5),
)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_the_links_each_picture_is_found_once_by_its_own_name(
    tmp_path_factory: pytest.TempPathFactory, pictures: set[str], links: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    for folder in pictures:
        touch(root, f"{folder}/x.png".lstrip("/"))
    for number, (where, target) in enumerate(links):
        (root / where / f"0link{number}").symlink_to(root / target)
    expected = sorted(f"{folder}/x.png".lstrip("/") for folder in pictures)
    assert sorted(names(root, walk_images(root))) == expected
    assert passed_over([root]).get("repeated link", 0) == len(links)
