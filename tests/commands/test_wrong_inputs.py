"""What a person may get wrong: each ends in a message that names the path or key, no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

Run = Callable[..., Any]


@pytest.fixture
def spoilt(tmp_path: Path, new_category: Callable[..., None]) -> Path:
    """A data set of one category, to be spoilt by the test."""
    new_category(tmp_path / "data" / "bolt")
    return tmp_path / "data"


@pytest.fixture
def train(run_command: Run, settings: tuple[str, ...], tmp_path: Path) -> Run:
    def run(root: Path, *overrides: str) -> Any:
        output = f"output_dir={tmp_path / 'out'}"
        return run_command("train", *settings, f"dataset.root={root}", output, *overrides)

    return run


def assert_refused(outcome: Any, *texts: str | Path, code: int = 1) -> None:
    """The exit code, no traceback, and every text in the message."""
    shown = outcome.err
    assert outcome.code == code, shown
    assert "error: " in shown
    assert "Traceback" not in shown
    for text in texts:
        assert str(text) in shown


# -------------------------------------------------------------------------------- the data


def test_missing_folder(train: Run, tmp_path: Path) -> None:
    assert_refused(train(tmp_path / "gone"), "dataset.root", tmp_path / "gone")
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_empty_category(train: Run, spoilt: Path) -> None:
    for path in (spoilt / "bolt" / "train" / "good").iterdir():
        path.unlink()
    assert_refused(train(spoilt), spoilt / "bolt" / "train" / "good")


def test_truncated_image(train: Run, spoilt: Path) -> None:
    path = spoilt / "bolt" / "train" / "good" / "003.png"
    path.write_bytes(path.read_bytes()[:2000])
    assert_refused(train(spoilt), path)


def test_truncated_test_image_is_found_before_training(train: Run, spoilt: Path) -> None:
    path = spoilt / "bolt" / "test" / "scratch" / "001.png"
    path.write_bytes(path.read_bytes()[:2000])
    assert_refused(train(spoilt), path)
    assert not (spoilt.parent / "out" / "checkpoints" / "last.ckpt").exists()


def test_text_with_an_image_s_name(train: Run, spoilt: Path) -> None:
    path = spoilt / "bolt" / "test" / "good" / "notes.png"
    path.write_text("these are notes, no picture")
    assert_refused(train(spoilt), path)


def test_pictures_of_many_modes_are_handled(train: Run, spoilt: Path) -> None:
    good = spoilt / "bolt" / "train" / "good"
    for number, mode in enumerate(("L", "RGBA", "P", "LA", "1")):
        path = good / f"{number:03d}.png"
        Image.open(path).convert(mode).save(path)
    grey = np.asarray(Image.open(good / "005.png").convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(good / "005.png")
    tested = spoilt / "bolt" / "test" / "scratch" / "000.png"
    Image.open(tested).convert("RGBA").save(tested)
    outcome = train(spoilt)
    assert outcome.code == 0, outcome.err
    assert (spoilt.parent / "out" / "metrics.json").exists()


def test_mask_of_another_size(train: Run, spoilt: Path) -> None:
    path = spoilt / "bolt" / "ground_truth" / "scratch" / "000_mask.png"
    Image.open(path).resize((32, 48)).save(path)
    assert_refused(train(spoilt), path, "32x48", "64x64")


def test_mask_missing_for_a_defect(train: Run, spoilt: Path) -> None:
    (spoilt / "bolt" / "ground_truth" / "scratch" / "001_mask.png").unlink()
    image = spoilt / "bolt" / "test" / "scratch" / "001.png"
    assert_refused(train(spoilt), image, "dataset.masks=none")


def test_no_anomalous_test_image(train: Run, spoilt: Path) -> None:
    for path in (spoilt / "bolt" / "test" / "scratch").iterdir():
        path.unlink()
    outcome = train(spoilt)
    assert outcome.code == 0, outcome.err
    assert "no anomalous test image" in outcome.out + outcome.err
    metrics = json.loads((spoilt.parent / "out" / "metrics.json").read_text())
    assert metrics["test/image_auroc"] is None
    assert metrics["test/bolt/image_ap"] is None
    assert metrics["test/false_positive_rate"] is not None


# -------------------------------------------------------------------------------- the settings


def test_unknown_option_of_a_group(train: Run, mvtec_folder: Path) -> None:
    assert_refused(train(mvtec_folder, "backbone=resnet19"), "backbone/resnet19", "resnet18")


def test_misspelt_keys_are_listed_at_once(train: Run, mvtec_folder: Path) -> None:
    outcome = train(mvtec_folder, "+method.latent_dims=3", "+trainer.max_step=9")
    assert_refused(outcome, "latent_dims", "max_step", "did you mean 'max_steps'?")


def test_misspelt_key_without_a_plus(train: Run, mvtec_folder: Path) -> None:
    assert_refused(train(mvtec_folder, "dataset.batchsize=3"), "batchsize")


def test_wrong_type(train: Run, mvtec_folder: Path) -> None:
    outcome = train(mvtec_folder, "trainer.max_steps=many", "method.dim=[1, 2]")
    assert_refused(
        outcome,
        "trainer.max_steps: expected int of at least 1 or -1 or null, found 'many'",
        "method.dim: expected int, found [1, 2]",
    )


def test_weights_that_do_not_fit(train: Run, mvtec_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    assert_refused(train(mvtec_folder, f"method.backbone.weights={file}"), file, "resnet18")


def test_weights_file_absent(train: Run, mvtec_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    outcome = train(mvtec_folder, f"method.backbone.weights={file}")
    assert_refused(outcome, file, "method.backbone.weights")


def test_layer_that_is_not_in_the_file(train: Run, mvtec_folder: Path, tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    file = tmp_path / "partial.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}, file)
    weights = f"method.backbone.weights={file}"
    outcome = train(mvtec_folder, weights, "method.backbone.out_indices=[1, 2, 4]")
    assert_refused(outcome, file, "layer4", "method.backbone.out_indices")


def test_output_folder_that_cannot_be_written(
    train: Run, mvtec_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_refused(train(mvtec_folder, f"output_dir={file / 'out'}"), file)


def test_loss_that_is_no_longer_finite(train: Run, mvtec_folder: Path) -> None:
    outcome = train(mvtec_folder, "method.optimizer.lr=1e20")
    assert_refused(outcome, "the loss is", "method.optimizer.lr")


def test_no_network_and_no_weights(train: Run, mvtec_folder: Path, tmp_path: Path) -> None:
    outcome = train(mvtec_folder, "method.backbone.weights=pretrained", "backbone=mobilenetv2_100")
    assert_refused(outcome, "mobilenetv2_100", "method.backbone.weights=FILE")


# -------------------------------------------------------------------------------- other commands


def test_checkpoint_that_is_none(run_command: Run, tmp_path: Path) -> None:
    output = f"output_dir={tmp_path / 'out'}"
    gone = run_command("test", f"ckpt_path={tmp_path / 'gone.ckpt'}", output)
    assert_refused(gone, tmp_path / "gone.ckpt", "ckpt_path")
    file = tmp_path / "text.ckpt"
    file.write_text(os.fspath(tmp_path))
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    damaged = run_command("predict", f"ckpt_path={file}", f"input={picture}", output)
    assert_refused(damaged, file, code=3)
    assert "weights_only" not in damaged.err


@pytest.mark.parametrize("command", ["train", "test", "predict", "data"])
def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(
    run_here: Run, tmp_path: Path, command: str
) -> None:
    file = tmp_path / "notes"
    file.write_text("these are notes")
    code = 3 if command == "predict" else 1
    for place in (file, file / "run"):
        outcome = run_here(command, f"output_dir={place}")
        assert_refused(outcome, f"output_dir={place}", f"{file} is a file", code=code)
        assert "choose another output_dir" in outcome.err


def test_a_log_that_cannot_be_opened_is_told_in_a_sentence(run_here: Run, tmp_path: Path) -> None:
    (tmp_path / "predict.log").mkdir()
    outcome = run_here("predict", f"output_dir={tmp_path}")
    assert_refused(outcome, tmp_path / "predict.log", "choose another output_dir", code=3)


def test_results_among_the_images_are_refused(
    run_here: Run, settings: tuple[str, ...], spoilt: Path
) -> None:
    place = spoilt / "bolt" / "train" / "good" / "run"
    run = spoilt.parent / "run"
    line = ("train", *settings, f"dataset.root={spoilt}", "logger=none")
    assert run_here(*line, f"output_dir={run}").code == 0
    data = ("data", "dataset=mvtec_ad", f"dataset.root={spoilt}", "image_size=64")
    test = ("test", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
    for command in (line, data, test):
        assert_refused(run_here(*command, f"output_dir={place}"), place, "another output_dir")
        assert not place.exists()
