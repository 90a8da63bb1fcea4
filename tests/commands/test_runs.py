"""What the commands leave behind, and what they do when they are called again."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.loggers.logger import DummyLogger

import anomaly_lit
from anomaly_lit import loggers
from anomaly_lit.commands.status import read_sweep
from anomaly_lit.data import batches, workers
from anomaly_lit.nn.weights import check_archive
from anomaly_lit.types import UserError

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def overrides(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    return [*settings, f"dataset.root={mvtec_folder}"]


@pytest.fixture(scope="module")
def finished(run_here: Run, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Shared: nobody writes into it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    outcome = run_here("train", *overrides, f"output_dir={folder}", "logger=csv")
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def weights(finished: Path) -> Path:
    return finished / "checkpoints" / "last.ckpt"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def snapshot(folder: Path) -> dict[Path, int]:
    """When each result was written; logs of the command itself apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log")
    return {path: path.stat().st_mtime_ns for path in files}


# -------------------------------------------------------------------------------- results


def test_metrics_are_fractions_per_category_and_mean(finished: Path) -> None:
    metrics = read_json(finished / "metrics.json")
    for name in (
        "image_auroc",
        "image_ap",
        "image_f1max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1max",
        "pixel_aupro",
    ):
        of_categories = [metrics[f"test/{category}/{name}"] for category in ("bolt", "cloth")]
        assert all(0 <= value <= 1 for value in of_categories)
        assert metrics[f"test/{name}"] == pytest.approx(np.mean(of_categories))


def test_metrics_say_what_they_depend_on(finished: Path) -> None:
    metrics = read_json(finished / "metrics.json")
    assert metrics["seed"] == 0
    assert metrics["selection"] == "last step"
    assert metrics["steps"] == 6
    assert [metrics[f"images/{split}"] for split in ("train", "holdout", "test")] == [10, 2, 8]
    assert not any(isinstance(value, dict | list) for value in metrics.values())
    assert len(metrics["data_digest"]) == 64
    assert metrics["versions/torch"] == torch.__version__.split("+")[0]
    assert metrics["trainable_parameters"] > 0
    assert metrics["frozen_parameters"] == 2782784  # ResNet-18 without its last stage
    assert metrics["peak_memory_mb"] > 0
    assert metrics["training_seconds"] > 0
    assert {"commit", "hardware", "command", "precision", "threshold_fpr"} <= metrics.keys()


def test_the_log_tells_what_a_run_was_and_what_it_gave(finished: Path) -> None:
    log = (finished / "train.log").read_text()
    metrics = read_json(finished / "metrics.json")
    expected = [
        metrics["command"],
        f"commit {metrics['commit']}, ",
        f"torch {metrics['versions/torch']}",
        metrics["hardware"],
        "6 steps of",
        f"Writing to {finished}",
        "trained to step 6 in",
        f"val/loss {metrics['val/loss']:.4g}",
        "image AUROC",
        f"{100 * metrics['test/bolt/image_auroc']:.1f}",
    ]
    places = [log.find(words) for words in expected]
    assert -1 not in places, expected[places.index(-1)]
    assert places == sorted(places)
    assert "\x1b" not in log  # no colours
    assert re.match(r"\[20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", log)


def test_the_log_tells_why_a_run_failed(
    run_here: Run, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomaly_lit.runs.fit import Run as Training

    def fail(run: Training) -> None:
        raise UserError("the drive is gone")

    monkeypatch.setattr(Training, "test", fail)
    assert run_here("train", *overrides, f"output_dir={tmp_path / 'run'}").code == 1
    assert "[ERROR] - the drive is gone" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.skipif(os.name == "nt", reason="Windows names files in Unicode")
def test_files_of_any_name_are_trained_and_tested_on(
    run_here: Run, settings: tuple[str, ...], new_category: Callable[..., None], tmp_path: Path
) -> None:
    bolt, folder = tmp_path / "data" / "bolt", tmp_path / "run"
    new_category(bolt)
    for place in ("train", "test"):
        good = bolt / place / "good"
        (good / "000.png").rename(good / os.fsdecode(b"caf\xe9.png"))
        (good / "001.png").rename(good / f"{'x' * 240}.png")
    root = f"dataset.root={bolt.parent}"
    outcome = run_here("train", *settings, root, f"output_dir={folder}", "logger=tensorboard")
    assert outcome.code == 0, outcome.err
    assert "warning: cannot" not in outcome.err
    rows = read_rows(folder / "predictions.csv")
    assert any(row["path"].endswith("caf\\xe9.png") for row in rows)
    assert len(list((folder / "images").iterdir())) == len(rows)


def test_predictions_have_a_row_and_a_verdict_per_image(finished: Path, mvtec_folder: Path) -> None:
    rows = read_rows(finished / "predictions.csv")
    columns = ["path", "category", "defect_type", "label", "score", "threshold", "verdict"]
    assert list(rows[0]) == columns
    assert {row["path"] for row in rows} == set(map(str, mvtec_folder.glob("*/test/*/*.png")))
    for row in rows:
        assert row["label"] == str(int(row["defect_type"] != "good"))
        exceeds = float(row["score"]) > float(row["threshold"])
        assert row["verdict"] == ("defect" if exceeds else "good")


def test_pictures_are_written_with_the_worst_mistakes_first(finished: Path) -> None:
    images = sorted((finished / "images").glob("*.png"))
    kinds = [path.name.split("_")[1] for path in images]
    assert 0 < len(images) <= 24
    assert kinds == sorted(kinds, key=["missed", "false", "found", "passed"].index)
    for path in [*images, finished / "curves.png", finished / "loss.png"]:
        with Image.open(path) as picture:
            assert min(picture.size) > 32


def test_composed_configuration_is_kept_beside_and_inside_the_weights(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["method"]["dim"] == 32
    assert config["dataset"]["image_size"] == 64
    assert state_of(finished)["anomaly_lit"]["config"] == config


def test_csv_logger_writes_losses(finished: Path) -> None:
    assert list((finished / "logs").rglob("metrics.csv"))


# -------------------------------------------------------------------------------- called again


def test_same_command_says_already_finished(
    run_here: Run, overrides: list[str], finished: Path
) -> None:
    before = snapshot(finished)
    outcome = run_here("train", *overrides, f"output_dir={finished}", "logger=csv")
    assert outcome.code == 0
    assert "already finished" in outcome.out
    assert snapshot(finished) == before


def test_another_configuration_is_refused_with_the_keys_that_differ(
    run_here: Run, overrides: list[str], finished: Path
) -> None:
    before = snapshot(finished)
    changes = ["method.dim=64", "seed=3", "logger=csv"]
    outcome = run_here("train", *overrides, f"output_dir={finished}", *changes)
    assert outcome.code == 1
    assert "method.dim: 32 there, 64 now" in outcome.err
    assert "seed: 0 there, 3 now" in outcome.err
    assert "batch_size" not in outcome.err
    assert snapshot(finished) == before


def test_a_renamed_folder_is_the_same_run(
    run_here: Run, overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "renamed")
    log = tmp_path / "renamed" / "train.log"
    log.unlink()
    outcome = run_here("train", *overrides, f"output_dir={tmp_path / 'renamed'}", "logger=csv")
    assert outcome.code == 0, outcome.err
    assert "already finished" in outcome.out
    assert not log.exists()  # nothing was told that is worth a file


def test_results_without_their_configuration_are_left_alone(
    run_here: Run, overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    outcome = run_here("train", *overrides, f"output_dir={tmp_path}")
    assert outcome.code == 1
    assert str(tmp_path) in outcome.err
    assert (tmp_path / "metrics.json").read_text() == "{}"


@pytest.fixture(scope="module")
def longer(overrides: list[str]) -> list[str]:
    """Forty steps of ten to an epoch; every checkpoint lies within one."""
    changes = ["dataset.batch_size=1", "trainer.max_steps=40", "trainer.val_check_interval=15"]
    return [*overrides, *changes, "checkpoint.every_steps=7"]


@pytest.fixture(scope="module")
def uninterrupted(
    run_command: Run, longer: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    outcome = run_command("train", *longer, f"output_dir={folder}")
    assert outcome.code == 0, outcome.err
    return folder


def kill_when(started: Any, file: Path) -> None:
    """Kills a command, without warning, once a file has appeared."""
    until = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < until, started.wait(0).err
        assert started.process.is_alive(), started.wait(0).err
        time.sleep(0.002)
    started.process.kill()
    started.process.join()


def test_run_killed_within_an_epoch_ends_with_the_same_weights(
    start_command: Run,
    run_command: Run,
    longer: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    folder = tmp_path / "killed"
    last = folder / "checkpoints" / "last.ckpt"
    kill_when(start_command("train", *longer, f"output_dir={folder}"), last)
    step = state_of(folder)["global_step"]
    assert 0 < step < 40
    assert step % 10  # within an epoch
    assert not (folder / "metrics.json").exists()
    outcome = run_command("train", *longer, f"output_dir={folder}")
    assert outcome.code == 0, outcome.err
    assert "Resuming" in outcome.out
    assert_same_weights(folder, uninterrupted)
    assert state_of(folder)["global_step"] == 40
    one, other = (read_json(f / "metrics.json") for f in (folder, uninterrupted))
    assert one["resumed"]
    assert not other["resumed"]
    assert {k: v for k, v in one.items() if k.startswith("test/")} == {
        k: v for k, v in other.items() if k.startswith("test/")
    }
    calibrations = [state_of(f)["anomaly_lit"]["calibration"] for f in (folder, uninterrupted)]
    assert calibrations[0] == calibrations[1]


def test_run_killed_before_its_first_checkpoint_starts_anew(
    start_command: Run,
    run_command: Run,
    longer: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    folder = tmp_path / "killed"
    command = [*longer, f"output_dir={folder}", "checkpoint.every_steps=null"]
    kill_when(start_command("train", *command), folder / "config.yaml")
    assert not (folder / "checkpoints" / "last.ckpt").exists()
    outcome = run_command("train", *command)
    assert outcome.code == 0, outcome.err
    assert_same_weights(folder, uninterrupted)


def test_a_run_of_an_earlier_version_goes_on_from_a_checkpoint_that_is_read_once(
    run_here: Run,
    overrides: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_weights: Callable[..., None],
) -> None:
    folder, read = tmp_path / "run", []
    shutil.copytree(finished, folder)
    (folder / "metrics.json").unlink()
    before = yaml.safe_load((folder / "config.yaml").read_text())
    del before["trainer"]["num_nodes"], before["checkpoint"]["every_steps"]
    del before["callbacks"]["evaluation"]["pixel_crop"], before["dataset"]["drop_last"]
    (folder / "config.yaml").write_text(yaml.safe_dump(before))

    def noted(file: Any, path: Path) -> None:
        read.append(path.name)
        check_archive(file, path)

    monkeypatch.setattr("anomaly_lit.inference.checkpoint.check_archive", noted)
    outcome = run_here("train", *overrides, f"output_dir={folder}", "logger=csv")
    assert outcome.code == 0, outcome.err
    assert "Resuming" in outcome.out
    assert read == ["last.ckpt"]
    assert_same_weights(folder, finished)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["num_nodes"] == 1


def test_run_killed_after_training_only_tests(
    start_command: Run,
    run_command: Run,
    longer: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    folder = tmp_path / "killed"
    command = [*longer, f"output_dir={folder}"]
    kill_when(start_command("train", *command), folder / "loss.png")  # drawn when training ends
    outcome = run_command("train", *command)
    assert outcome.code == 0, outcome.err
    assert (folder / "metrics.json").exists()
    assert_same_weights(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["best", "oracle"])
def test_no_candidate_is_lost_with_a_kill(
    start_command: Run,
    run_command: Run,
    longer: list[str],
    tmp_path: Path,
    selection: str,
    assert_same_weights: Callable[..., None],
) -> None:
    changes = ["trainer.val_check_interval=5", "checkpoint.every_steps=5", "trainer.max_steps=20"]
    command = [*longer, *changes, f"selection={selection}"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert run_command("train", *command, f"output_dir={whole}").code == 0
    last = folder / "checkpoints" / "last.ckpt"
    kill_when(start_command("train", *command, f"output_dir={folder}"), last)
    assert run_command("train", *command, f"output_dir={folder}").code == 0
    curves = [
        state_of(f)["callbacks"]["LossCurves"]["history"]["val/loss"] for f in (whole, folder)
    ]
    assert [step for step, _ in curves[0]] == [5, 10, 15, 20]
    assert curves[0] == curves[1]
    assert_same_weights(whole, folder, selection)


def test_interrupted_run_says_how_to_go_on(
    start_command: Run, longer: list[str], tmp_path: Path
) -> None:
    started = start_command("train", *longer, f"output_dir={tmp_path}", "trainer.max_steps=4000")
    until = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(started.process.pid, signal.SIGINT)
    outcome = started.wait(60)
    assert outcome.code == 130
    assert "same command with the same output_dir goes on" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.slow
def test_accumulated_gradients_survive_a_kill(
    start_command: Run,
    run_command: Run,
    longer: list[str],
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    changes = ["trainer.accumulate_grad_batches=3", "trainer.max_steps=14"]
    command = [*longer, *changes, "checkpoint.every_steps=2"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert run_command("train", *command, f"output_dir={whole}").code == 0
    last = folder / "checkpoints" / "last.ckpt"
    kill_when(start_command("train", *command, f"output_dir={folder}"), last)
    assert 0 < state_of(folder)["global_step"] < 14
    assert run_command("train", *command, f"output_dir={folder}").code == 0
    assert_same_weights(folder, whole)


def test_same_seed_gives_the_same_weights_and_another_seed_others(
    run_here: Run,
    overrides: list[str],
    finished: Path,
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    run_here("train", *overrides, f"output_dir={tmp_path / 'same'}")
    assert_same_weights(tmp_path / "same", finished)
    run_here("train", *overrides, f"output_dir={tmp_path / 'other'}", "seed=1")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "other", finished)


@pytest.mark.parametrize(
    "change",
    [
        "cache=none",
        "cache=device",
        "cache=disk",
        # the command's process starts workers as Windows does: nothing is inherited
        pytest.param("dataset.num_workers=1", marks=pytest.mark.slow),
    ],
)
def test_how_images_are_read_changes_no_weight(
    run_command: Run,
    longer: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    change: str,
    assert_same_weights: Callable[..., None],
) -> None:
    command = [*longer, f"output_dir={tmp_path / 'run'}", change]
    if change == "cache=disk":
        command += [f"dataset.{key}.folder={tmp_path}" for key in ("cache", "feature_cache")]
    outcome = run_command("train", *command)
    assert outcome.code == 0, outcome.err
    if change == "cache=disk":
        assert {path.parts[-3] for path in tmp_path.rglob("*.rows")} == {"images", "features"}
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_folders_may_have_any_name(
    run_here: Run, overrides: list[str], mvtec_folder: Path, tmp_path: Path
) -> None:
    root, folder = tmp_path / "Prüfling (neu)", tmp_path / "out = 50% 'ok'"
    shutil.copytree(mvtec_folder, root)
    command = [*overrides, f"dataset.root={root}", f"output_dir={folder}"]
    outcome = run_here("train", *command)
    assert outcome.code == 0, outcome.err
    assert (folder / "metrics.json").exists()
    assert "already finished" in run_here("train", *command).out


def test_out_of_memory_names_the_setting_to_lower(
    run_here: Run, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomaly_lit.methods import AMINet

    def fail(self: Any, batch: Any, batch_idx: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(AMINet, "training_step", fail)
    outcome = run_here("train", *overrides, f"output_dir={tmp_path}")
    assert outcome.code == 1
    assert "dataset.batch_size (now 2)" in outcome.err
    assert "image_size (now 64)" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.skipif(sys.platform != "linux", reason="forks its workers")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("what", "words"), [("hangs", "no image came for 2 s"), ("is killed", "has died")]
)
def test_a_worker_that_hangs_or_dies_ends_the_run_in_words(
    run_here: Run, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, words: str,
) -> None:  # fmt: skip
    here, read = os.getpid(), batches.Images.batch

    def spoilt(self: Any, rows: Any) -> Any:
        if os.getpid() != here and what == "hangs":
            time.sleep(60)
        elif os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, rows)

    monkeypatch.setattr(batches.Images, "batch", spoilt)
    monkeypatch.setattr(workers, "PATIENCE", 2)
    outcome = run_here("train", *overrides, "dataset.num_workers=1", f"output_dir={tmp_path}")
    assert outcome.code == 1
    assert words in outcome.err
    assert "dataset.num_workers" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_password_in_an_address_reaches_no_file(
    run_here: Run, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quiet(DummyLogger):  # in the place of one that asks a server
        def __init__(self, directory: str, tracking_uri: str | None = None, **_: object) -> None:
            super().__init__()
            assert tracking_uri == "https://me:pear-tree@host/x"

        def describe(self, *given: object) -> None:
            assert "pear-tree" not in str(given)

    monkeypatch.setattr(loggers, "MLflowRun", Quiet)
    own = ["logger=mlflow", "logger.mlflow.tracking_uri=https://me:pear-tree@host/x"]
    outcome = run_here("train", *overrides, *own, f"output_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "https://***@host/x" in (tmp_path / "config.yaml").read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.json", "last.ckpt"} <= {file.name for file in files}
    assert not [file for file in files if b"pear-tree" in file.read_bytes()]
    assert "pear-tree" not in outcome.out + outcome.err


# -------------------------------------------------------------------------------- loggers


def test_logger_for_tensorboard(run_here: Run, overrides: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    outcome = run_here("train", *overrides, f"output_dir={tmp_path}", "logger=tensorboard")
    assert outcome.code == 0, outcome.err
    assert list((tmp_path / "logs").rglob("events.out.*"))


def test_logger_that_is_not_installed_is_named(
    run_here: Run, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_lightning.loggers import mlflow

    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", False)
    monkeypatch.setattr(mlflow, "_MLFLOW_SKINNY_AVAILABLE", False, raising=False)
    outcome = run_here("train", *overrides, f"output_dir={tmp_path}", "logger=mlflow")
    assert outcome.code == 1
    assert "logger=mlflow" in outcome.err
    assert "anomaly-lit[loggers]" in outcome.err


@pytest.mark.slow
def test_wandb_writes_offline(run_command: Run, overrides: list[str], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    outcome = run_command("train", *overrides, f"output_dir={tmp_path}", "logger=wandb_offline")
    assert outcome.code == 0, outcome.err
    assert list((tmp_path / "wandb").rglob("*.wandb"))


@pytest.mark.slow
def test_wandb_without_a_login_says_what_else_there_is(
    run_command: Run, overrides: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    outcome = run_command("train", *overrides, f"output_dir={tmp_path}", "logger=wandb")
    assert outcome.code == 1
    assert "logger=wandb_offline" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "checkpoints").exists()


# -------------------------------------------------------------------------------- sweeps


def test_jobs_of_a_sweep_have_folders_of_their_own(
    run_here: Run, overrides: list[str], tmp_path: Path
) -> None:
    changes = ["seed=0,1", "trainer.max_steps=2", "logger=csv"]
    sweep = ["-m", *overrides, f"output_dir={tmp_path}", *changes]
    outcome = run_here("train", *sweep)
    assert outcome.code == 0, outcome.err
    folders = sorted(path.parent for path in tmp_path.rglob("metrics.json"))
    assert len(folders) == 2
    assert {read_json(folder / "metrics.json")["seed"] for folder in folders} == {0, 1}
    assert not any(tmp_path.name in folder.name for folder in folders)
    for folder in folders:
        assert folder.parent == tmp_path
        for name in ("predictions.csv", "curves.png", "config.yaml", "images", "logs"):
            assert (folder / name).exists(), name
    beside = {path.name for path in tmp_path.iterdir()} - {folder.name for folder in folders}
    assert beside <= {"multirun.yaml"}
    again = run_here("train", *sweep)
    assert again.code == 0, again.err
    assert again.out.count("already finished") == 2


def test_a_job_that_fails_does_not_stop_the_others(
    run_command: Run, overrides: list[str], tmp_path: Path
) -> None:
    changes = ["method.heads=3,2", "trainer.max_steps=2"]
    outcome = run_command("train", "-m", *overrides, f"output_dir={tmp_path}", *changes)
    assert outcome.code == 1
    assert "method.heads=3" in outcome.err
    assert "Traceback" not in outcome.err
    assert len(list(tmp_path.rglob("metrics.json"))) == 1
    assert sorted(job.state for job in read_sweep(tmp_path)[0]) == ["done", "failed"]


def test_sweeper_gets_the_metric_it_names(
    run_here: Run, overrides: list[str], finished: Path
) -> None:
    known = [*overrides, f"output_dir={finished}", "logger=csv", "optimized_metric=test/nothing"]
    assert run_here("train", *known).code == 1


def test_scoring_can_be_changed_for_a_test_and_gets_thresholds_of_its_own(
    run_here: Run, weights: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "max"
    changed = [f"ckpt_path={weights}", "+method.score=max", f"output_dir={folder}"]
    outcome = run_here("test", *changed)
    assert outcome.code == 0, outcome.err
    found, before = (read_rows(f / "predictions.csv") for f in (folder, finished))
    assert read_json(folder / "metrics.json")["method_changes"] == {"score": "max"}
    assert found[0]["score"] != before[0]["score"]
    assert found[0]["threshold"] != before[0]["threshold"]


@pytest.mark.parametrize(
    ("change", "text"),
    [("+method.depth=2", "does not fit the checkpoint"), ("+method.sigmas=1", "did you mean")],
)
def test_other_changes_of_the_method_are_refused(
    run_here: Run, weights: Path, tmp_path: Path, change: str, text: str
) -> None:
    outcome = run_here("test", f"ckpt_path={weights}", change, f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 1
    assert text in outcome.err


# -------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(
    overrides: list[str], environment: dict[str, str], run_command: Run, tmp_path: Path
) -> None:
    changes = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    line = [sys.executable, "-m", "anomaly_lit.commands.train", *overrides, *changes]
    line += ["dataset.batch_size=1", f"output_dir={tmp_path / 'two'}"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Writing to") == 1
    assert "sync_dist" not in done.stderr
    weights = tmp_path / "two" / "checkpoints" / "last.ckpt"
    outcome = run_command("test", f"ckpt_path={weights}", f"output_dir={tmp_path / 'one'}")
    assert outcome.code == 0, outcome.err
    two, one = (read_json(tmp_path / name / "metrics.json") for name in ("two", "one"))
    keys = [key for key in two if key.startswith("test/")]
    assert {key: two[key] for key in keys} == {key: one[key] for key in keys}
    rows = [read_rows(tmp_path / name / "predictions.csv") for name in ("two", "one")]
    assert rows[0] == rows[1]


# -------------------------------------------------------------------------------- after training


def test_testing_a_checkpoint_repeats_the_metrics_of_training(
    run_here: Run, finished: Path, weights: Path, tmp_path: Path
) -> None:
    outcome = run_here("test", f"ckpt_path={weights}", f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    one, other = (read_json(f / "metrics.json") for f in (finished, tmp_path / "out"))
    keys = {key for key in one if key.startswith("test/")}
    assert keys == {key for key in other if key.startswith("test/")}
    assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    assert other["data_digest"] == one["data_digest"]
    assert other["selection"] == "last step"
    log = (tmp_path / "out" / "test.log").read_text()
    for words in (other["command"], "torch", "bolt: ", "image AUROC"):
        assert words in log
    for name in ("predictions.csv", "curves.png"):
        assert (tmp_path / "out" / name).exists()
    assert read_rows(tmp_path / "out" / "predictions.csv") == read_rows(
        finished / "predictions.csv"
    )


def test_testing_needs_nothing_that_only_training_reads(
    run_here: Run, overrides: list[str], tmp_path: Path, new_category: Callable[..., None]
) -> None:
    folder, textures = tmp_path / "run", tmp_path / "textures"
    new_category(textures)
    own = ["synthesis=draem", "dataset.validate_on_synthesis=true"]
    own += [f"dataset.synthesis.texture_dir={textures}", "cache=disk"]
    own += [f"dataset.{key}.folder={tmp_path / 'cache'}" for key in ("cache", "feature_cache")]
    assert run_here("train", *overrides, *own, f"output_dir={folder}").code == 0
    for gone in (textures, tmp_path / "cache"):
        shutil.rmtree(gone)
    weights = folder / "checkpoints" / "last.ckpt"
    outcome = run_here("test", f"ckpt_path={weights}", f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "cache").exists()


def test_testing_overwrites_nothing(run_here: Run, weights: Path, finished: Path) -> None:
    before = snapshot(finished)
    outcome = run_here("test", f"ckpt_path={weights}", f"output_dir={finished}")
    assert outcome.code == 1
    assert "choose another output_dir" in outcome.err
    assert snapshot(finished) == before


def test_testing_another_data_set(
    run_here: Run, weights: Path, new_category: Callable[..., None], tmp_path: Path
) -> None:
    new_category(tmp_path / "data" / "bolt", (48, 80))
    data = [f"dataset.root={tmp_path / 'data'}", "dataset.categories=[bolt]"]
    outcome = run_here("test", f"ckpt_path={weights}", *data, f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert "test/bolt/image_auroc" in metrics
    assert "test/cloth/image_auroc" not in metrics


@pytest.fixture
def pictures(tmp_path: Path, new_category: Callable[..., None]) -> Path:
    """Pictures of another size than the network's, in two folders."""
    new_category(tmp_path / "new" / "bolt", (48, 80))
    return tmp_path / "new" / "bolt" / "test"


def test_predictions_come_with_overlays_at_the_original_size(
    run_here: Run, weights: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    command = [f"ckpt_path={weights}", f"input={pictures}", f"output_dir={folder}"]
    outcome = run_here("predict", *command, "save_maps=true", "category=bolt")
    assert outcome.code == 0, outcome.err
    rows = read_rows(folder / "predictions.csv")
    assert [row["path"] for row in rows] == sorted(map(str, pictures.rglob("*.png")))
    assert {"path", "score", "threshold", "verdict"} <= rows[0].keys()
    assert {row["verdict"] for row in rows} <= {"good", "defect"}
    overlays = sorted((folder / "overlays").rglob("*.png"))
    assert len(overlays) == 4
    assert all(Image.open(path).size == (80, 48) for path in overlays)
    maps = [np.load(path) for path in sorted((folder / "maps").rglob("*.npy"))]
    assert [(map_.shape, map_.dtype) for map_ in maps] == [((48, 80), np.float16)] * 4
    assert all(np.isfinite(map_).all() and map_.any() for map_ in maps)
    log = (folder / "predict.log").read_text()
    assert all(f" - {line}" in log for line in outcome.out.splitlines()[:2])
    assert f"ckpt_path={weights}" in log


@pytest.mark.slow
def test_openvino_gives_the_same_verdicts(
    run_here: Run, weights: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    command = [f"ckpt_path={weights}", f"input={pictures}", "category=bolt", "device=cpu"]
    rows = []
    for name in ("torch", "openvino"):
        folder = tmp_path / name
        outcome = run_here("predict", *command, f"output_dir={folder}", f"engine={name}")
        assert outcome.code == 0, outcome.err
        rows.append(read_rows(folder / "predictions.csv"))
    for one, other in zip(*rows, strict=True):
        assert one["verdict"] == other["verdict"]
        assert float(one["score"]) == pytest.approx(float(other["score"]), rel=1e-3)
    outcome = run_here("predict", *command, f"output_dir={tmp_path / 'x'}", "engine=tensorrt")
    assert outcome.code == 3
    assert "torch" in outcome.err
    assert "openvino" in outcome.err


def test_predicting_overwrites_nothing(
    run_here: Run, weights: Path, pictures: Path, tmp_path: Path
) -> None:
    command = [f"ckpt_path={weights}", f"input={pictures}", f"output_dir={tmp_path / 'out'}"]
    assert run_here("predict", *command).code == 0
    before = snapshot(tmp_path / "out")
    assert run_here("predict", *command).code == 3
    assert snapshot(tmp_path / "out") == before


def test_exit_code_tells_good_defect_and_unreadable(
    run_here: Run, weights: Path, pictures: Path, tmp_path: Path
) -> None:
    def code(source: Path, *more: str) -> int:
        place = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        command = [f"ckpt_path={weights}", f"input={source}", f"output_dir={place}"]
        return run_here("predict", *command, *more).code

    finding = anomaly_lit.load(weights, device="cpu").predict(pictures / "scratch" / "000.png")[0]
    assert finding.verdict == "defect"
    good = "category=bolt"
    assert code(pictures / "scratch" / "000.png", good, "exit_code=true") == 1
    assert code(pictures / "scratch" / "000.png", good) == 0  # not asked for
    (pictures / "scratch" / "002.png").write_text("no picture")
    assert code(pictures, good, "exit_code=true") == 2
    assert code(pictures / "gone.png", good, "exit_code=true") == 3


def test_all_good_exits_with_zero(
    run_here: Run, finished: Path, pictures: Path, tmp_path: Path
) -> None:
    checkpoint = state_of(finished)
    for limits in checkpoint["anomaly_lit"]["calibration"]["categories"].values():
        limits["threshold"] = 1e9
    torch.save(checkpoint, tmp_path / "lenient.ckpt")
    command = [f"ckpt_path={tmp_path / 'lenient.ckpt'}", f"input={pictures}", "category=bolt"]
    outcome = run_here("predict", *command, f"output_dir={tmp_path / 'out'}", "exit_code=true")
    assert outcome.code == 0, outcome.err
    with Image.open(pictures / "good" / "000.png") as page:
        page.save(pictures / "pages.tif", save_all=True, append_images=[page.copy()])
    outcome = run_here("predict", *command, f"output_dir={tmp_path / 'again'}", "exit_code=true")
    assert outcome.code == 2
    assert "pages.tif: 1 of 2 pages judged" in outcome.err
    assert "; 1 in part, by their first page" in outcome.out


def test_an_unreadable_picture_does_not_stop_the_others(
    run_here: Run, weights: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "good" / "broken.png").write_bytes(b"\x89PNG\r\n")
    command = [f"ckpt_path={weights}", f"input={pictures}", f"output_dir={tmp_path / 'out'}"]
    outcome = run_here("predict", *command)
    rows = {Path(r["path"]).name: r for r in read_rows(tmp_path / "out" / "predictions.csv")}
    assert rows["broken.png"]["verdict"] == "unreadable"
    assert rows["001.png"]["verdict"] in ("good", "defect")
    assert "broken.png" in outcome.err
    assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 4


@pytest.mark.parametrize("name", ["a (1).png", "50% done.png", "it's.png", "ä ö.png", "a=b.png"])
def test_odd_file_names_need_no_quotes(
    run_here: Run, weights: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    odd = tmp_path / name
    odd.write_bytes((pictures / "good" / "000.png").read_bytes())
    command = [f"ckpt_path={weights}", f"input={odd}", f"output_dir={tmp_path / 'out'}"]
    outcome = run_here("predict", *command)
    assert outcome.code == 0, outcome.err
    assert read_rows(tmp_path / "out" / "predictions.csv")[0]["path"] == str(odd)


def test_input_and_checkpoint_have_to_be_named(
    run_here: Run, weights: Path, tmp_path: Path
) -> None:
    output = f"output_dir={tmp_path}"
    assert "ckpt_path is not set" in run_here("predict", output).err
    assert "input is not set" in run_here("predict", f"ckpt_path={weights}", output).err
    assert "ckpt_path is not set" in run_here("test", output).err
    empty = tmp_path / "empty"
    empty.mkdir()
    outcome = run_here("predict", f"ckpt_path={weights}", f"input={empty}", output)
    assert str(empty) in outcome.err


# -------------------------------------------------------------------------------- checkpoints


def test_checkpoint_is_plain_data_with_everything_in_it(finished: Path) -> None:
    entry = state_of(finished)["anomaly_lit"]  # loaded with weights_only=True
    assert entry["format_version"] == 2
    assert entry["config"]["method"]["_target_"] == "anomaly_lit.methods.AMINet"
    assert set(entry["calibration"]["categories"]) == {"bolt", "cloth"}
    assert entry["calibration"]["fpr"] == 0.01
    state = state_of(finished)["state_dict"]
    assert any(name.startswith("backbone.network.") for name in state)


def test_thresholds_belong_to_the_last_weights(finished: Path, weights: Path) -> None:
    detector = anomaly_lit.load(weights, device="cpu")
    config = yaml.safe_load((finished / "config.yaml").read_text())
    from anomaly_lit.data import MVTecAD

    datamodule = MVTecAD(config["dataset"]["root"], ["bolt"], 64)
    datamodule.list_samples()
    scores = [detector.predict(s.path, "bolt")[0].score for s in datamodule.holdout_samples]
    threshold = detector.calibration["categories"]["bolt"]["threshold"]
    assert threshold == pytest.approx(max(scores), rel=1e-5)


def test_weights_file_is_not_needed_after_training(
    run_here: Run, overrides: list[str], tmp_path: Path, pictures: Path
) -> None:
    import timm

    file = tmp_path / "net.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    command = [*overrides, f"method.backbone.weights={file}", f"output_dir={tmp_path / 'run'}"]
    assert run_here("train", *command).code == 0
    file.unlink()
    weights = tmp_path / "run" / "checkpoints" / "last.ckpt"
    outcome = run_here("test", f"ckpt_path={weights}", f"output_dir={tmp_path / 'test'}")
    assert outcome.code == 0, outcome.err
    one, other = (read_json(tmp_path / f / "metrics.json") for f in ("run", "test"))
    assert one["test/pixel_ap"] == other["test/pixel_ap"]
    assert anomaly_lit.load(weights).predict(pictures / "good" / "000.png")
    assert "already finished" in run_here("train", *command).out


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "torch.hub.load", "torch.nnx.A"])
def test_foreign_code_in_a_checkpoint_is_refused(
    run_here: Run, finished: Path, tmp_path: Path, target: str
) -> None:
    checkpoint = state_of(finished)
    checkpoint["anomaly_lit"]["config"]["method"]["loss"] = {"_target_": target}
    file = tmp_path / "foreign.ckpt"
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match=rf"loss: {target}"):
        anomaly_lit.load(file)
    outcome = run_here("test", f"ckpt_path={file}", f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 1
    assert target in outcome.err
    assert "trust=true" in outcome.err


@pytest.mark.parametrize("section", ["method", "dataset", "callbacks"])
@pytest.mark.parametrize(
    "smuggled",
    [
        {"_target_": "pathlib.Path.touch", "_args_": ["MARKER"]},
        {
            "_target_": "anomaly_lit.files.Path.touch",
            "_args_": [{"_target_": "anomaly_lit.files.Path", "_args_": ["MARKER"]}],
        },
        {"_target_": "anomaly_lit.files.write_json", "path": "MARKER", "content": {}},
        "${oc.create:'{_target_: builtins.open, _args_: [MARKER, w]}'}",
    ],
    ids=["foreign", "imported", "function", "interpolation"],
)
def test_no_place_of_a_checkpoint_smuggles_code(
    run_here: Run, finished: Path, tmp_path: Path, section: str, smuggled: Any
) -> None:
    marker = tmp_path / "executed"
    evil = json.loads(json.dumps(smuggled).replace("MARKER", str(marker)))
    checkpoint = state_of(finished)
    node = checkpoint["anomaly_lit"]["config"][section]
    (node["evaluation"] if section == "callbacks" else node)["extra"] = [{"deep": evil}]
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    command = [f"ckpt_path={tmp_path / 'evil.ckpt'}", f"output_dir={tmp_path / 'out'}"]
    outcome = run_here("test", *command)
    assert outcome.code == 1
    assert "trust=true" in outcome.err
    assert not marker.exists()


def test_foreign_code_loads_with_trust(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text("from torch import nn\nclass Mine(nn.L1Loss): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = state_of(finished)
    checkpoint["anomaly_lit"]["config"]["method"]["loss"] = {"_target_": "my_losses.Mine"}
    torch.save(checkpoint, tmp_path / "mine.ckpt")
    with pytest.raises(UserError, match=r"my_losses\.Mine"):
        anomaly_lit.load(tmp_path / "mine.ckpt")
    detector = anomaly_lit.load(tmp_path / "mine.ckpt", trust=True)
    assert type(detector.method.loss).__name__ == "Mine"


def test_checkpoint_of_a_later_format_is_refused(finished: Path, tmp_path: Path) -> None:
    checkpoint = state_of(finished)
    checkpoint["anomaly_lit"]["format_version"] = 99
    torch.save(checkpoint, tmp_path / "later.ckpt")
    with pytest.raises(UserError, match=r"later\.ckpt has format 99"):
        anomaly_lit.load(tmp_path / "later.ckpt")


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt holds no configuration"):
        anomaly_lit.load(tmp_path / "other.ckpt")


# -------------------------------------------------------------------------------- from Python


def test_detector_takes_paths_arrays_and_pictures(weights: Path, pictures: Path) -> None:
    detector = anomaly_lit.load(weights, device="cpu")
    path = pictures / "scratch" / "000.png"
    picture = Image.open(path)
    findings = detector.predict([path, str(path), np.asarray(picture), picture], category="bolt")
    assert len({finding.score for finding in findings}) == 1
    assert all(finding.anomaly_map.shape == (48, 80) for finding in findings)
    assert findings[0].verdict in ("good", "defect")
    assert len(detector.predict(path)) == 1
    assert detector.predict([]) == []


def test_detector_scores_as_training_did(finished: Path, weights: Path) -> None:
    detector = anomaly_lit.load(weights, device="cpu")
    for row in read_rows(finished / "predictions.csv"):
        finding = detector.predict(row["path"], category=row["category"])[0]
        assert finding.score == pytest.approx(float(row["score"]), rel=1e-4)
        assert finding.threshold == float(row["threshold"])


def test_detector_names_what_it_cannot_use(weights: Path, tmp_path: Path) -> None:
    detector = anomaly_lit.load(weights, device="cpu")
    assert detector.categories == ["bolt", "cloth"]
    with pytest.raises(UserError, match="category=screw; known: bolt, cloth"):
        detector.predict(tmp_path, category="screw")
    with pytest.raises(UserError, match=r"gone\.png"):
        detector.predict(tmp_path / "gone.png")
    with pytest.raises(UserError, match="uint8"):
        detector.predict(np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match=r"gone\.ckpt"):
        anomaly_lit.load(tmp_path / "gone.ckpt")


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*")
def test_method_and_data_built_by_hand_train_with_a_plain_trainer(
    mvtec_folder: Path, tmp_path: Path
) -> None:
    from functools import partial

    import pytorch_lightning as pl

    from anomaly_lit.callbacks import Evaluation
    from anomaly_lit.data import MVTecAD
    from anomaly_lit.losses import MSECosineLoss
    from anomaly_lit.masks import RandomMask
    from anomaly_lit.methods import AMINet
    from anomaly_lit.nn.backbone import Backbone

    method = AMINet(
        Backbone("resnet18.tv_in1k", weights="random"),
        RandomMask(),
        MSECosineLoss(),
        partial(torch.optim.AdamW, lr=1e-3),
        grid=8,
        patch=2,
        dim=32,
        heads=2,
        depth=1,
    )
    data = MVTecAD(str(mvtec_folder), image_size=64, batch_size=4)
    evaluation = Evaluation()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[evaluation],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)
    trainer.validate(method, datamodule=data, verbose=False)
    trainer.test(method, datamodule=data, verbose=False)
    assert 0 <= evaluation.results["image_auroc"] <= 1
    assert len(evaluation.rows) == 8
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    torch.load(tmp_path / "plain.ckpt", weights_only=True)


# -------------------------------------------------------------------------------- selection


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "text"),
    [("best", "held-out"), ("synthetic", "synthetic defects"), ("oracle", "ORACLE")],
)
def test_selection_is_named_in_every_output(
    run_here: Run, overrides: list[str], tmp_path: Path, selection: str, text: str
) -> None:
    own = ["synthesis=cutpaste"] if selection == "synthetic" else []
    command = [*overrides, f"selection={selection}", *own, f"output_dir={tmp_path / 'run'}"]
    outcome = run_here("train", *command)
    assert outcome.code == 0, outcome.err
    assert text in read_json(tmp_path / "run" / "metrics.json")["selection"]
    assert text in outcome.out
    chosen = tmp_path / "run" / "checkpoints" / f"{selection}.ckpt"
    assert "calibration" in torch.load(chosen, weights_only=True)["anomaly_lit"]
    tested = run_here("test", f"ckpt_path={chosen}", f"output_dir={tmp_path / 'test'}")
    assert text in tested.out
    one, other = (read_json(tmp_path / f / "metrics.json") for f in ("run", "test"))
    assert one["test/image_auroc"] == other["test/image_auroc"]
    assert one["test/pixel_ap"] == other["test/pixel_ap"]
    assert other["selection"] == one["selection"]


def test_best_selection_needs_held_out_images(
    run_here: Run, overrides: list[str], tmp_path: Path
) -> None:
    command = [*overrides, "selection=best", "dataset.holdout=0", f"output_dir={tmp_path}"]
    outcome = run_here("train", *command)
    assert outcome.code == 1
    assert "dataset.holdout" in outcome.err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "checkpoint.every_steps=many",
            "checkpoint.every_steps: expected int | None, found 'many'",
        ),
        ("checkpoint.every_steps=0", "checkpoint.every_steps=0"),
        ("threshold.fpr=2", "threshold.fpr=2"),
        ("cache=null", "error: "),
        ("trainer.accelerator=quantum", "trainer.accelerator=quantum"),
        ("~callbacks.evaluation", "Evaluation"),
        ("trainer.val_check_interval=100 selection=best", "trainer.val_check_interval=100"),
        ("image_size=abc", "image_size: expected int | list[int], found 'abc'"),
        ("method.patch=3", "method.patch=3"),
        ("dataset.categories=[screw]", "dataset.categories: no screw"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    run_here: Run, overrides: list[str], tmp_path: Path, change: str, text: str
) -> None:
    outcome = run_here("train", *overrides, f"output_dir={tmp_path}", *change.split())
    assert outcome.code == 1
    assert text in outcome.err
    assert not (tmp_path / "checkpoints").exists()


def test_unknown_selection_is_refused(run_here: Run, overrides: list[str], tmp_path: Path) -> None:
    outcome = run_here("train", *overrides, "selection=first", f"output_dir={tmp_path}")
    assert outcome.code == 1
    assert "selection" in outcome.err
    assert "oracle" in outcome.err


@pytest.mark.filterwarnings("ignore:.*across ranks is zero.*")
def test_without_held_out_images_there_is_no_verdict(
    run_here: Run, overrides: list[str], tmp_path: Path
) -> None:
    outcome = run_here("train", *overrides, "dataset.holdout=0", f"output_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    rows = read_rows(tmp_path / "run" / "predictions.csv")
    assert {row["verdict"] for row in rows} == {"unknown"}
    weights = tmp_path / "run" / "checkpoints" / "last.ckpt"
    finding = anomaly_lit.load(weights).predict(rows[0]["path"])[0]
    assert finding.verdict == "unknown"


# -------------------------------------------------------------------------------- help


COMMANDS = ["train", "test", "predict", "data"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_written_for_people_and_imports_nothing_heavy(
    command: str, environment: dict[str, str]
) -> None:
    line = [sys.executable, "-X", "importtime", "-m", f"anomaly_lit.commands.{command}", "--help"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines() if "|" in row}
    heavy = {"torch", "pytorch_lightning", "timm", "matplotlib", "scipy", "kornia", "numpy"}
    assert heavy & imported == set()
    assert "anomaly-" in done.stdout
    assert "Powered by Hydra" not in done.stdout
    assert len(done.stdout.splitlines()) < 80


def test_package_imports_nothing_heavy(environment: dict[str, str]) -> None:
    code = "import sys, anomaly_lit; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_configuration_is_shown_without_a_run(run_command: Run, tmp_path: Path) -> None:
    outcome = run_command("train", "--cfg", "job", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)["method"]["_target_"] == "anomaly_lit.methods.AMINet"
    assert os.listdir(tmp_path) == []
