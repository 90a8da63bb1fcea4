"""Clips of frames: their layouts, the frames before an image, scores within clips, prediction."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy.io import savemat
from sklearn.metrics import roc_auc_score

from anomaly_lit.callbacks.clips import by_clip, summary, timelines
from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.data import (
    AnomalyDataModule,
    AvenueLayout,
    ClipsLayout,
    HostCache,
    Ped2Layout,
    ShanghaiTechLayout,
)
from anomaly_lit.drawing.timeline import Timeline, intervals, save_timeline
from anomaly_lit.folders import in_time
from anomaly_lit.inference.clips import frames_before, save_scores
from anomaly_lit.types import Sample, UserError

Write = Callable[..., Path]
LENGTHS = {"01": 7, "02": 9, "03": 6}


@pytest.fixture
def clips(tmp_path: Path, write_image: Write) -> Path:
    """Three normal clips and two tested ones; names of frames have no leading zeros."""
    for clip, length in LENGTHS.items():
        for number in range(length):
            write_image(tmp_path / "training/frames" / clip / f"{number + 1}.png", (24, 32))
    for clip in ("01", "02"):
        labels = []
        for number in range(12):
            write_image(tmp_path / "testing/frames" / clip / f"{number + 1}.png", (24, 32))
            labels.append((number + 1, int(clip == "01" and number >= 8)))
        file = tmp_path / "testing/frame_labels" / f"{clip}.csv"
        file.parent.mkdir(exist_ok=True)
        with file.open("w", newline="") as lines:
            csv.writer(lines).writerows([("frame", "label"), *labels])
    return tmp_path


def module(root: Path, layout: Any = None, **settings: Any) -> AnomalyDataModule:
    given: dict[str, Any] = {
        "image_size": [16, 24], "batch_size": 4, "holdout": 0.4, "masks": "none",
        "needs": ["frames"], "layout": layout or ClipsLayout(frames=3),
    }  # fmt: skip
    datamodule = AnomalyDataModule(str(root), **given | settings)
    datamodule.setup("fit")
    return datamodule


def place(path: str) -> tuple[str, int]:
    return str(Path(path).parent), int(Path(path).stem)


@pytest.mark.parametrize("cached", [False, True])
def test_frames_are_those_before_the_image_within_its_clip(clips: Path, cached: bool) -> None:
    datamodule = module(clips, cache=HostCache() if cached else None)
    loaders = {
        "train": datamodule.train_dataloader(),
        "holdout": datamodule.val_dataloader(),
        "test": datamodule.test_dataloader(),
    }
    plain_images = {}
    for sample in datamodule.clip_samples:
        plain_images[sample.path] = datamodule.resize.image(read(sample.path))
    for loader in loaders.values():
        for batch in loader:
            assert batch["frames"].shape[1:] == (3, 3, 16, 24)
            for row, path in enumerate(batch["path"]):
                clip, number = place(path)
                before = batch["frames_path"][3 * row : 3 * row + 3]
                assert [place(p) for p in before] == [(clip, number - n) for n in (3, 2, 1)]
                for frame, earlier in zip(batch["frames"][row], before, strict=True):
                    expected = torch.from_numpy(plain_images[earlier]).permute(2, 0, 1) / 255
                    torch.testing.assert_close(frame, expected)


def read(path: str) -> Any:
    from anomaly_lit.data.images import read_image

    return read_image(path)


def test_clips_are_held_out_whole_and_lose_their_first_frames(clips: Path) -> None:
    datamodule = module(clips)
    held = {sample.group for sample in datamodule.holdout_samples}
    trained = {sample.group for sample in datamodule.train_samples}
    assert held
    assert trained
    assert not held & trained
    counts = {name.rpartition("/")[2]: length - 3 for name, length in LENGTHS.items()}
    for samples in (datamodule.train_samples, datamodule.holdout_samples):
        for group in {sample.group for sample in samples}:
            own = [sample for sample in samples if sample.group == group]
            assert len(own) == counts[group.rpartition("/")[2]]
            assert all(place(sample.path)[1] > 3 for sample in own)
    assert len(datamodule.test_samples) == 18
    assert [b["frames"].shape[1] for b in datamodule.normal_batches("train", 4)]


def test_other_methods_see_every_frame(clips: Path) -> None:
    datamodule = module(clips, needs=[])
    assert len(datamodule.test_samples) == 24
    assert "frames" not in next(iter(datamodule.test_dataloader()))


def test_frames_need_clips(clips: Path) -> None:
    from anomaly_lit.data import MVTecAD

    with pytest.raises(UserError, match=r"choose a data set of clips, such as dataset=clips"):
        MVTecAD(str(clips), needs=["frames"])


def test_frames_are_ordered_by_numbers() -> None:
    names = ["10.png", "9.png", "a2.png", "a10.png", "a1.png"]
    assert [p.name for p in in_time(map(Path, names))] == [
        "9.png", "10.png", "a1.png", "a2.png", "a10.png"
    ]  # fmt: skip


def test_labels_that_do_not_fit_are_named(clips: Path) -> None:
    file = clips / "testing/frame_labels/02.csv"
    file.write_text("frame,label\n1,0\n")
    with pytest.raises(UserError, match=r"no label for 11 of 12 frames of .*02, such as 2"):
        module(clips)
    file.write_text("frame,label\n1,yes\n")
    with pytest.raises(UserError, match=r"has the label 'yes'; give 1"):
        module(clips)
    file.write_text("image,label\n1,1\n")
    with pytest.raises(UserError, match="has the columns image, label; it needs frame and label"):
        module(clips)
    file.unlink()
    with pytest.raises(UserError, match=r"02 has no labels: neither .*02\.csv nor 02\.npy exists"):
        module(clips)
    np.save(file.with_suffix(".npy"), np.zeros(5))
    with pytest.raises(UserError, match=r"02\.npy labels 5 frames, and .*02 holds 12"):
        module(clips)


def test_videos_in_the_place_of_frames_are_named(clips: Path) -> None:
    folder = clips / "films"
    folder.mkdir()
    (folder / "01.avi").touch()
    with pytest.raises(UserError, match=r"1 videos and no folder of frames.*ffmpeg -i 01\.avi"):
        module(clips, ClipsLayout(train_dir="films"))


def test_shanghaitech_reads_its_arrays(clips: Path) -> None:
    for clip in ("01", "02"):
        labels = clips / "testing/test_frame_mask" / f"{clip}.npy"
        labels.parent.mkdir(exist_ok=True)
        np.save(labels, np.array([0] * 10 + [1] * 2, dtype=np.int8))
    listing = ShanghaiTechLayout().list_category(clips, "shanghaitech")
    assert len(listing.train) == 22
    assert [sample.label for sample in listing.test] == ([False] * 10 + [True] * 2) * 2


def test_avenue_reads_its_masks(clips: Path) -> None:
    (clips / "training/frames").rename(clips / "training_videos")
    (clips / "testing/frames").rename(clips / "testing_videos")
    folder = clips / "ground_truth_demo/testing_label_mask"
    folder.mkdir(parents=True)
    for number in (1, 2):
        masks = np.empty((1, 12), dtype=object)
        for frame in range(12):
            masks[0, frame] = np.full((4, 5), frame >= 9, dtype=np.uint8)
        savemat(folder / f"{number}_label.mat", {"volLabel": masks})
    listing = AvenueLayout().list_category(clips, "avenue")
    assert [sample.label for sample in listing.test] == ([False] * 9 + [True] * 3) * 2
    assert {sample.group for sample in listing.test} == {"testing_videos/01", "testing_videos/02"}


def test_ped2_reads_its_masks(tmp_path: Path, write_image: Write, write_mask: Write) -> None:
    for number in range(1, 6):
        write_image(tmp_path / "Train/Train001" / f"{number:03d}.tif")
        write_image(tmp_path / "Test/Test001" / f"{number:03d}.tif")
        write_mask(tmp_path / "Test/Test001_gt" / f"{number:03d}.bmp", value=255 * (number > 3))
    listing = Ped2Layout().list_category(tmp_path, "ped2")
    assert [sample.label for sample in listing.test] == [False] * 3 + [True] * 2
    assert [sample.mask_path is not None for sample in listing.test] == [False] * 3 + [True] * 2
    assert {sample.group for sample in listing.test} == {"Test/Test001"}
    (tmp_path / "Test/Test001_gt/004.bmp").unlink()
    with pytest.raises(UserError, match=r"004\.tif has no mask in Test001_gt"):
        Ped2Layout().list_category(tmp_path, "ped2")


@pytest.mark.parametrize("name", ["clips", "ped2", "avenue", "shanghaitech"])
def test_options_build_their_layout(name: str, tmp_path: Path) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        line = [f"dataset={name}", f"dataset.root={tmp_path}", "method=video_ae", "output_dir=x"]
        config = plain(compose("train", line))
    datamodule = instantiate(config["dataset"] | {"needs": ["frames"]}, "dataset")
    assert datamodule.layout.frames == config["method"]["frames"] == 4


class Frame(NamedTuple):
    group: str
    label: bool


def test_scores_are_brought_to_0_and_1_within_each_clip() -> None:
    torch.manual_seed(0)
    samples: Any = [Frame("a", n > 5) for n in range(9)] + [Frame("b", n < 4) for n in range(7)]
    samples += [Frame("c", True)] * 5
    parts, weights = torch.randn(21, 2).double(), torch.tensor([0.6, 0.4]).double()
    lines = timelines(samples, parts, weights)
    expected = []
    for rows in (range(9), range(9, 16), range(16, 21)):
        for row in rows:
            score = 0.0
            for part, weight in enumerate((0.6, 0.4)):
                own = [float(parts[r, part]) for r in rows]
                score += weight * (float(parts[row, part]) - min(own)) / (max(own) - min(own))
            expected.append(score)
    assert np.concatenate([line.scores for line in lines]) == pytest.approx(expected, abs=1e-6)
    labels = [sample.label for sample in samples]
    values = summary(lines)
    assert values["frame_auroc"] == pytest.approx(roc_auc_score(labels, expected))
    each = [roc_auc_score(labels[a:b], expected[a:b]) for a, b in ((0, 9), (9, 16))]
    assert values["clip_auroc"] == pytest.approx(sum(each) / 2)
    assert values["clips_undefined"] == 1
    assert math.isnan(lines[2].auroc)


def test_frame_auroc_ignores_the_order_of_clips() -> None:
    torch.manual_seed(1)
    samples = [Frame("ab"[n // 8], n % 3 == 0) for n in range(16)]
    parts, weights = torch.randn(16, 1).double(), torch.ones(1).double()
    order = [*range(8, 16), *range(8)]
    one = summary(timelines(samples, parts, weights))
    other = summary(timelines([samples[n] for n in order], parts[order], weights))
    assert one == pytest.approx(other)
    assert by_clip([samples[0], samples[9], samples[1]]) == [samples[0], samples[1], samples[9]]


def test_intervals_of_labels() -> None:
    labels = np.array([1, 1, 0, 0, 1, 0, 1], dtype=bool)
    assert intervals(labels) == [(0, 1), (4, 4), (6, 6)]
    assert intervals(~labels) == [(2, 3), (5, 5)]
    assert intervals(np.zeros(3, dtype=bool)) == []


def test_timelines_are_drawn_with_and_without_labels(tmp_path: Path) -> None:
    scores = np.linspace(0, 1, 5)
    save_timeline(tmp_path / "one.png", [Timeline("a", scores, np.array([0, 1, 1, 0, 0]) > 0, 0.5)])
    paths = [tmp_path / "x" / f"{n}.png" for n in range(3)]
    save_scores(tmp_path / "two.png", dict.fromkeys(paths, 0.5), tmp_path, 0.4)
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_frames_before_are_of_the_same_folder() -> None:
    paths = [Path(f"{clip}/{number}.png") for clip in "ab" for number in (10, 9, 8, 7)]
    found = frames_before([*paths, Path("c/1.png")], 2)
    assert found == {
        Path(f"{clip}/{n}.png"): [Path(f"{clip}/{n - 2}.png"), Path(f"{clip}/{n - 1}.png")]
        for clip in "ab"
        for n in (9, 10)
    }
    with pytest.raises(UserError, match="none of 1 folders holds more than 2 frames"):
        frames_before([Path("c/1.png")], 2)


def test_a_sample_without_enough_frames_before_it_is_left_out() -> None:
    from anomaly_lit.data.companions import with_history

    samples = [Sample(f"{c}{n}", "x", "good", False, None, c) for c in "ab" for n in range(3)]
    assert [s.path for s in with_history(samples, 2)] == ["a2", "b2"]
