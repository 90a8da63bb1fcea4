"""What tests of several parts share: a small data set on disk, and two ways to run a command."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# One thread, or tests on a busy machine wait for each other. Set before anything imports torch,
# which reads it once; commands and workers that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell without job control starts `pytest ... &` with Ctrl-C ignored, and commands that tests
# start would inherit that and never hear theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "method=ami_net_small",
    "method.backbone.weights=random",
    "method.grid=8",
    "method.dim=32",
    "method.heads=2",
    "method.depth=1",
    "dataset=mvtec_ad",
    "dataset.batch_size=2",
    "image_size=64",
    "trainer=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.precision=32-true",
    "logger=none",
)
PRELOADED = [
    "anomaly_lit.callbacks.outputs",
    "anomaly_lit.data.datamodule",
    "anomaly_lit.methods.ami_net",
    "pytorch_lightning",
    "timm",
]


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def write_picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    """Stripes with a little noise, so that images of a category resemble each other."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    stripes = 128 + 60 * np.sin((rows + 2 * columns) / 6)
    pixels = stripes[..., None] + generator.normal(0, 6, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def write_defect(path: Path, mask_path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    """The same with a bright square, and its mask."""
    write_picture(path, seed, size)
    pixels = np.array(Image.open(path))
    mask = np.zeros(size, dtype=np.uint8)
    mask[20:36, 24:40] = 255
    pixels[mask > 0] = (250, 240, 30)
    Image.fromarray(pixels).save(path)
    mask_path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(mask_path)


def write_category(folder: Path, size: tuple[int, int] = (64, 64)) -> None:
    """Six training images, two normal and two anomalous test images in MVTec's layout."""
    first = sum(folder.name.encode())
    for number in range(6):
        write_picture(folder / "train" / "good" / f"{number:03d}.png", first + number, size)
    for number in range(2):
        write_picture(folder / "test" / "good" / f"{number:03d}.png", first + 10 + number, size)
        write_defect(
            folder / "test" / "scratch" / f"{number:03d}.png",
            folder / "ground_truth" / "scratch" / f"{number:03d}_mask.png",
            first + 20 + number,
            size,
        )


@pytest.fixture(scope="session")
def new_category() -> Callable[..., None]:
    """Writes a category, ``new_category(folder, size)``, for a test to spoil."""
    return write_category


@pytest.fixture(scope="session")
def mvtec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small categories, ``bolt`` and ``cloth``. Shared: nobody writes into it."""
    root = tmp_path_factory.mktemp("mvtec")
    for category in ("bolt", "cloth"):
        write_category(root / category)
    return root


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a teacher for the tiny EfficientAD. Its error is made up: nothing taught it."""
    import torch
    import yaml

    from anomaly_lit.nn.pdn import PDN, write_teacher

    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    tiny = ROOT / "tests" / "methods" / "tiny" / "efficient_ad.yaml"
    numbers = yaml.safe_load(tiny.read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = PDN("small", numbers["width"], numbers["channels"])
    made_up = {"backbone": "none", "steps": "0", "images": "0", "held_out_error": "0.5"}
    write_teacher(file, teacher, made_up)
    return file


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what differs between two state dicts; a part's extra state is plain data."""
    import torch

    assert first.keys() == second.keys()
    return [
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name])
            if isinstance(value, torch.Tensor)
            else value == second[name]
        )
    ]


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[..., None]:
    """Compares checkpoints of two runs bit for bit: ``check(one, other, name="last")``.

    Both come from ``run_here`` or both from ``run_command``: the latter has one thread, and another
    number of threads rounds differently.
    """
    import torch

    def check(one: Path, other: Path, name: str = "last") -> None:
        files = [folder / "checkpoints" / f"{name}.ckpt" for folder in (one, other)]
        first, second = (torch.load(file, weights_only=True) for file in files)
        assert first["global_step"] == second["global_step"]
        assert differing(first["state_dict"], second["state_dict"]) == []

    return check


@pytest.fixture(scope="session")
def assert_same_end(assert_same_weights: Callable[..., None]) -> Callable[..., None]:
    """Compares the weights and the test results of two runs: ``check(one, other)``."""

    def check(one: Path, other: Path) -> None:
        assert_same_weights(one, other)
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
        tested = [{k: v for k, v in of_one.items() if k[:5] == "test/"} for of_one in metrics]
        assert tested[0] == tested[1]

    return check


@pytest.fixture(scope="session")
def settings() -> tuple[str, ...]:
    """Overrides of ``anomaly-train`` for a tiny model and a run of six steps."""
    return SETTINGS


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Variables for a command of its own: one thread, no hub, no login, no weights of ours."""
    private = ("ANOMALY_LIT_", "WANDB_", "PL_")
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(private)}
    changes = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return kept | changes | {"NETRC": str(ROOT / "no_login")}


IN_CHILD = """
import multiprocessing, os, runpy, signal, sys, tempfile
multiprocessing.set_start_method(method, force=True)  # of workers, as in a command of its own
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
for number, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
if alone:
    os.setsid()
os.environ.clear()
os.environ.update(environment)
tempfile.tempdir = None  # that of the environment, as in a command of its own
os.chdir(cwd)
sys.argv = ["anomaly-" + command, *arguments]
runpy.run_module("anomaly_lit.commands." + command, run_name="__main__", alter_sys=True)
"""


class Started:
    """A command that runs in a process of its own."""

    def __init__(self, process: multiprocessing.process.BaseProcess, folder: Path) -> None:
        self.process = process
        self.folder = folder

    def wait(self, seconds: float = 240) -> Outcome:
        """Waits for the end; a command that takes longer is killed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        return Outcome(self.process.exitcode or 0, out, err)


@pytest.fixture(scope="session")
def start_command(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Started]:
    """Starts ``python -m anomaly_lit.commands.<command> ARGUMENTS`` in a process of its own.

    The process is forked from one that has imported the heavy packages once for all. `alone` gives
    it a process group of its own, for signals to it and to all that it starts.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork processes")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        multiprocessing.forkserver.ensure_running()

    def start(command: str, *arguments: str, cwd: Path = ROOT, alone: bool = False) -> Started:
        folder = tmp_path_factory.mktemp("process")
        names = {"command": command, "arguments": arguments, "environment": environment}
        names |= {"cwd": str(cwd), "out": str(folder / "out"), "err": str(folder / "err")}
        names |= {"alone": alone, "method": multiprocessing.get_start_method()}
        process = context.Process(target=exec, args=(IN_CHILD, names))
        process.start()
        return Started(process, folder)

    return start


@pytest.fixture(scope="session")
def run_command(start_command: Callable[..., Started]) -> Callable[..., Outcome]:
    """Runs a command in a process of its own and waits for its end."""

    def run(command: str, *arguments: str, cwd: Path = ROOT) -> Outcome:
        return start_command(command, *arguments, cwd=cwd).wait()

    return run


@pytest.fixture(scope="session")
def run_here() -> Callable[..., Outcome]:
    """Runs a command in this process, where another process is not the point."""

    def run(command: str, *arguments: str) -> Outcome:
        main = importlib.import_module(f"anomaly_lit.commands.{command}").main
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            pytest.MonkeyPatch.context() as patch,
            _logging_kept(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", [f"anomaly-{command}", *arguments])
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.delenv("ANOMALY_LIT_WEIGHTS", raising=False)
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                err.write(end.code if isinstance(end.code, str) else "")
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


class _logging_kept:  # noqa: N801
    """Takes back what Hydra does to the root logger, whose handlers hold on to pytest's streams.

    And what it makes others do: told to shut down, the handler of absl, which exporters import,
    closes the stream that was stderr at its import, if that is not stderr now.
    """

    def __enter__(self) -> None:
        if "absl.logging" in sys.modules:
            handler = sys.modules["absl.logging"].get_absl_handler()
            handler.python_handler.stream = sys.__stderr__
        self.before = logging.root.handlers[:], logging.root.level

    def __exit__(self, *error: object) -> None:
        logging.root.handlers[:], level = self.before
        logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def _no_seed_left() -> Iterator[None]:
    """Removes what ``seed_everything`` leaves in the environment."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.pop("PL_SEED_WORKERS", None)
