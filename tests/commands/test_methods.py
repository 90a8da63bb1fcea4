"""Every method through the commands: train, test, predict, stop and go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image

from anomaly_lit import methods
from anomaly_lit.config.build import nodes
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.methods import files

Run = Callable[..., Any]
COMMON = (
    "dataset=mvtec_ad", "dataset.batch_size=2", "image_size=64", "trainer=cpu",
    "trainer.precision=32-true", "logger=none",
)  # fmt: skip
TRANSFORMER = (
    "method.backbone.weights=random", "method.dim=32", "method.heads=2", "method.feedforward=32",
    "method.encoder_depth=1", "method.decoder_depth=1", "method.window=1",
)  # fmt: skip
METHODS = sorted(set(files().values()))
CLASSES = {name: found for found, name in files().items()}
TINY = Path(__file__).parents[1] / "methods" / "tiny"
TEACHER = "method.teacher_weights"


@pytest.fixture(scope="module")
def root(mvtec_folder: Path) -> str:
    return f"dataset.root={mvtec_folder}"


def of_method(name: str) -> tuple[str, ...]:
    """A command line for a method's small preset with tiny numbers and random weights."""
    preset = f"method={name}_small"
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose("train", [preset, "output_dir=unused"]))["method"]
    frozen = [
        f"{path}.weights=random"
        for path, node in nodes(config, "method")
        if node["_target_"] == "anomaly_lit.nn.backbone.Backbone"
    ]
    numbers: dict[str, Any] = {}
    for key, value in yaml.safe_load((TINY / f"{name}.yaml").read_text()).items():
        parts = value if isinstance(value, dict) else {"": value}
        numbers |= {f"method.{key}.{part}".rstrip("."): number for part, number in parts.items()}
    set_ = [f"{key}={'null' if value is None else value}" for key, value in numbers.items()]
    return preset, *frozen, *set_, *COMMON


CLIPS = {name for name in METHODS if "frames" in getattr(methods, CLASSES[name]).needs}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four normal clips and two tested ones of noise, for methods that read clips."""
    root, generator = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for folder, count in (("training", 4), ("testing", 2)):
        for clip in range(count):
            for frame in range(6):
                file = root / folder / "frames" / f"{clip:02d}" / f"{frame}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    for clip in ("00", "01"):
        labels = root / "testing" / "frame_labels" / f"{clip}.npy"
        labels.parent.mkdir(exist_ok=True)
        np.save(labels, np.array([0, 0, 0, 0, 0, 1]))
    return root


@pytest.fixture
def given(root: str, clips: Path, tiny_teacher: Path) -> Callable[[str], tuple[str, ...]]:
    """Gives a command line for what a method reads: its data, and a teacher if it needs one."""

    def line(name: str) -> tuple[str, ...]:
        data = ("dataset=clips", f"dataset.root={clips}") if name in CLIPS else (root,)
        return (*data, f"{TEACHER}={tiny_teacher}") if name == "efficient_ad" else data

    return line


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_trains_tests_and_predicts(
    name: str, given: Run, run_here: Run, mvtec_folder: Path, clips: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = ("trainer.max_steps=3", "trainer.val_check_interval=3")
    outcome = run_here("train", *of_method(name), *given(name), *steps, f"output_dir={run}")
    assert outcome.code == 0, outcome.err
    metrics = metrics_of(run)
    assert metrics["setting"] == ("one-class" if name in CLIPS else "multi-class")
    assert (run / "training.png").is_file()
    assert (run / "overview.png").is_file()
    checkpoint = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    outcome = run_here("test", checkpoint, f"output_dir={tmp_path / 'test'}")
    assert outcome.code == 0, outcome.err
    again = metrics_of(tmp_path / "test")
    assert {k: again[k] for k in again if k[:5] == "test/"} == {
        k: metrics[k] for k in metrics if k[:5] == "test/"
    }
    pictures = mvtec_folder / "bolt" / "test" / "scratch"
    images = f"input={clips / 'testing' / 'frames' / '00' if name in CLIPS else pictures}"
    outcome = run_here("predict", checkpoint, images, f"output_dir={tmp_path / 'found'}")
    assert outcome.code == 0, outcome.err
    assert len((tmp_path / "found" / "predictions.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_killed_run_ends_with_the_same_weights(
    name: str, given: Run, run_command: Run, start_command: Run, tmp_path: Path
) -> None:
    """Both in processes of their own; the kill comes after a checkpoint within an epoch."""
    steps = ("trainer.max_steps=12", "trainer.val_check_interval=12", "checkpoint.every_steps=4")
    line = (*of_method(name), *given(name), *steps)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = start_command("train", *line, f"output_dir={killed}")
    last = killed / "checkpoints" / "last.ckpt"
    while not last.is_file() and started.process.is_alive():
        time.sleep(0.002)
    started.process.kill()
    started.process.join()
    assert not (killed / "metrics.json").exists()
    for folder in (killed, whole):
        outcome = run_command("train", *line, f"output_dir={folder}")
        assert outcome.code == 0, outcome.err
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (killed, whole)
    )
    tensors = [key for key, value in other.items() if isinstance(value, torch.Tensor)]
    assert one.keys() == other.keys()
    assert [key for key in tensors if not torch.equal(one[key], other[key])] == []
    assert [metrics_of(folder)["resumed"] for folder in (killed, whole)] == [True, False]


def test_real_defects_leave_the_test_and_are_said(
    root: str, run_here: Run, mvtec_folder: Path, tmp_path: Path
) -> None:
    run, line = tmp_path / "run", ("trainer.max_steps=2", "trainer.val_check_interval=2")
    outcome = run_here(
        "train", *of_method("prn"), root, *line, "dataset.seen=1", f"output_dir={run}"
    )
    assert outcome.code == 0, outcome.err
    assert "SEEN: learned from 1 test images of each defect type" in outcome.out
    metrics = metrics_of(run)
    assert (metrics["images/seen"], metrics["images/test"]) == (2, 6)
    assert [Path(name).parent.as_posix() for name in metrics["seen"].splitlines()] == [
        "bolt/test/scratch", "cloth/test/scratch"
    ]  # fmt: skip
    tested = (run / "predictions.csv").read_text()
    for name in metrics["seen"].splitlines():
        assert (mvtec_folder / name).is_file()
        assert name not in tested
    checkpoint = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    outcome = run_here("test", checkpoint, f"output_dir={tmp_path / 'test'}")
    assert outcome.code == 0, outcome.err
    assert "SEEN" in outcome.out
    assert (tmp_path / "test" / "predictions.csv").read_text() == tested
    again = metrics_of(tmp_path / "test")
    for change in ("dataset.seen=0", "+dataset.seed=7"):
        refused = run_here("test", checkpoint, change, f"output_dir={tmp_path / 'other'}")
        assert refused.code == 1
        assert "learned from the test images that dataset.seen=1 and dataset.seed=0" in refused.err
        assert not (tmp_path / "other" / "metrics.json").exists()
    assert again["selection"] == metrics["selection"]
    assert again["seen"] == metrics["seen"]
    assert again["data_digest"] == metrics["data_digest"]


def test_options_of_a_step_leave_no_trace_in_the_checkpoint(
    root: str, run_here: Run, tmp_path: Path
) -> None:
    """Tested later, without them, it gives the same to the bit."""
    run, test = tmp_path / "run", tmp_path / "test"
    line = ("trainer.max_steps=2", "trainer.val_check_interval=1", "dataset.num_workers=1")
    step = ("step.channels_last=true", "step.fused=true", "step.persistent_workers=false")
    outcome = run_here("train", *of_method("uniad"), root, *line, *step, f"output_dir={run}")
    assert outcome.code == 0, outcome.err
    outcome = run_here("test", f"ckpt_path={run / 'checkpoints/last.ckpt'}", f"output_dir={test}")
    assert outcome.code == 0, outcome.err
    tested = {k: v for k, v in metrics_of(run).items() if k[:5] == "test/"}
    assert tested == {k: v for k, v in metrics_of(test).items() if k[:5] == "test/"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            ("step.fused=true", "method.optimizer._target_=torch.optim.Adamax"),
            "Adamax has no fused form",
        ),
        (("step.pin_memory=true",), "training runs on cpu"),
        (("step.compile=3",), "step.compile: expected bool (true or false) or null, found 3"),
    ],
)
def test_options_of_a_step_that_cannot_be_had_are_refused(
    line: tuple[str, ...], words: str, root: str, run_here: Run, tmp_path: Path
) -> None:
    outcome = run_here("train", *of_method("uniad"), root, *line, f"output_dir={tmp_path}")
    assert outcome.code == 1
    assert words in outcome.err


def test_prompts_are_changed_when_testing(root: str, run_here: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ("trainer.max_steps=2", "trainer.val_check_interval=2", "method.prompts=3")
    assert run_here("train", *of_method("onenip"), root, *steps, f"output_dir={run}").code == 0
    scores = []
    for number in range(3):
        folder = tmp_path / str(number)
        outcome = run_here(
            "test", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
            f"+method.prompt_index={number}", f"output_dir={folder}",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        scores.append((folder / "predictions.csv").read_text())
    assert scores[0] == (run / "predictions.csv").read_text()
    assert len(set(scores)) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("method=onenip_small", "synthesis=none"), "OneNIP learns from corrupted images"),
        (("method=uniad_small", "synthesis=draem"), "UniAD does not learn from corrupted images"),
        (("method=uniad_small", "dataset.validate_on_synthesis=true"), "needs a synthesis"),
    ],
)
def test_synthesis_that_does_not_fit_the_method_is_refused(
    line: tuple[str, ...], words: str, root: str, run_here: Run, tmp_path: Path
) -> None:
    outcome = run_here("train", *line, *TRANSFORMER, *COMMON, root, f"output_dir={tmp_path}")
    assert outcome.code != 0
    assert words in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_inp_former_with_its_head_trains_and_is_tested_again(
    root: str, run_here: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = run_here(
        "train", *of_method("inp_former"), root, "method.head=residual", "synthesis=draem",
        "trainer.max_steps=3", "trainer.val_check_interval=3",
        f"output_dir={run}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    checkpoint = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    outcome = run_here("test", checkpoint, f"output_dir={tmp_path / 'test'}")
    assert outcome.code == 0, outcome.err
    metrics, again = metrics_of(run), metrics_of(tmp_path / "test")
    tested = {k: again[k] for k in again if k[:5] == "test/"}
    assert tested == {k: metrics[k] for k in metrics if k[:5] == "test/"}


def test_any_method_is_validated_on_synthesis(root: str, run_here: Run, tmp_path: Path) -> None:
    outcome = run_here(
        "train", *of_method("uniad"), root, "synthesis=cutpaste", "trainer.max_steps=2",
        "dataset.validate_on_synthesis=true", "trainer.val_check_interval=2",
        "optimized_metric=val/synthetic_pixel_ap", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert 0 <= metrics_of(tmp_path)["val/synthetic_pixel_ap"] <= 1
