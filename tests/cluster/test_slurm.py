"""Jobs of a real SLURM: several tasks and nodes, sweeps, failures, signals, requeues.

Start one with `eval "$(scripts/slurm-here up)"`. Both of its nodes are this machine.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

COMMANDS = "anomaly_lit.commands"  # the package of train, test, status and report
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
ON_CPUS = (
    "hydra/launcher=slurm", "hydra.launcher.partition=main", "hydra.launcher.cpus_per_task=1",
)  # fmt: skip
LONG = ("trainer.max_steps=400", "trainer.val_check_interval=100", "checkpoint.every_minutes=60")
LONGER = ("trainer.max_steps=100000", "trainer.val_check_interval=100000")
PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
Call = Callable[..., subprocess.CompletedProcess[str]]


def runs_here() -> bool:
    """Whether the SLURM of `scripts/slurm-here` answers; no other one is sent any job."""
    if shutil.which("scontrol") is None:
        return False
    asked = ["scontrol", "show", "config"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return re.search(r"^ClusterName\s*= here$", answer.stdout, re.MULTILINE) is not None


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> None:
    if not runs_here():
        pytest.skip('no SLURM answers: eval "$(scripts/slurm-here up)"')


@pytest.fixture(autouse=True)
def _empty_queue() -> Iterator[None]:
    """Leaves no job to the next test."""
    yield
    left = squeue("%A")
    if left:
        subprocess.run(["scancel", "--signal=KILL", "--full", *left], capture_output=True)
        subprocess.run(["scancel", *left], capture_output=True)
        wait_for(lambda: not squeue("%A"), 60)


# -------------------------------------------------------------------------------- helpers


def line(command: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"{COMMANDS}.{command}", *arguments]


def squeue(columns: str, *options: str) -> list[str]:
    asked = ["squeue", "--noheader", "--format", columns, *options]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


def state_of(job: str) -> str:
    shown = subprocess.run(
        ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"JobState=(\w+)", shown)
    assert found, shown
    return found[1]


def wait_for(happened: Callable[[], Any], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def documented_script(command: str) -> str:
    """Gives the batch script of docs/cluster.md with a command in place of its own."""
    page = PAGE.read_text(encoding="utf-8")
    begin = page.index("    #!/bin/bash")
    script = textwrap.dedent(page[begin : page.index("    exit $code", begin)]) + "exit $code\n"
    return re.sub(r"anomaly-train .*?(?= && exit 0)", lambda _: command, script)


def weights_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def results_of(folder: Path) -> dict[str, float]:
    return {key: v for key, v in metrics_of(folder).items() if key.startswith("test/")}


# -------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def call(environment: dict[str, str]) -> Call:
    """Runs a command line and waits for its end."""

    def run(*command: str, cwd: Path | None = None, **more: str) -> Any:
        return subprocess.run(
            command, cwd=cwd, env=environment | more, capture_output=True, text=True, timeout=500
        )

    return run


@pytest.fixture(scope="module")
def faint_folder(
    tmp_path_factory: pytest.TempPathFactory, new_category: Callable[..., None]
) -> Path:
    """A category whose defects are hard to see, so that no metric is perfect: 9 good, 8 bad."""
    folder = tmp_path_factory.mktemp("faint") / "plate"
    new_category(folder)
    generator = np.random.default_rng(5)
    stripes = np.array(Image.open(folder / "test" / "good" / "000.png")).astype(float)
    for number in range(2, 9):
        picture = stripes + generator.normal(0, 25, stripes.shape)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
            folder / "test" / "good" / f"{number:03d}.png"
        )
    for number in range(2, 8):
        picture = stripes + generator.normal(0, 25, stripes.shape)
        picture[20:26, 24:30] += 40
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
            folder / "test" / "scratch" / f"{number:03d}.png"
        )
        shutil.copy(
            folder / "ground_truth" / "scratch" / "000_mask.png",
            folder / "ground_truth" / "scratch" / f"{number:03d}_mask.png",
        )
    return folder.parent


@pytest.fixture(scope="module")
def ddp(settings: tuple[str, ...], faint_folder: Path) -> list[str]:
    return [
        *settings, f"dataset.root={faint_folder}", "dataset.batch_size=1", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.max_steps=6", "trainer.val_check_interval=3",
        "dataset.holdout=0.5",  # three images, so that shares are uneven
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    return [*settings, f"dataset.root={mvtec_folder}"]


@pytest.fixture(scope="module")
def two_tasks(call: Call, ddp: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks on one node."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    done = call(
        "srun", "--ntasks-per-node=2", "--ntasks=2", "--nodes=1",
        *line("train", *ddp, "trainer.devices=2", f"output_dir={folder}"), cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(call: Call, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run that nobody disturbs, with workers."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = call(*line("train", *tiny, *LONG, "dataset.num_workers=2", f"output_dir={folder}"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command line; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def batch(call: Call, tmp_path: Path) -> Callable[..., str]:
    """Sends the documented script with a command and gives the job's number."""

    def send(*command: str) -> str:
        script = tmp_path / "job.sh"
        quoted = " ".join(f"'{word}'" for word in command)
        script.write_text(documented_script(quoted))
        done = call(
            "sbatch", "--parsable", f"--output={tmp_path / 'job.log'}", "--time=30", "--ntasks=1",
            "--ntasks-per-node=1", str(script),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return send


# ------------------------------------------------------------------------ tasks and nodes


@pytest.mark.slurm_core
def test_two_tasks_score_as_one_process_does(
    call: Call, two_tasks: Path, faint_folder: Path, tmp_path: Path
) -> None:
    """Metrics, intervals and thresholds of two ranks are those of one that tests the weights."""
    done = call(
        *line(
            "test", f"ckpt_path={two_tasks / 'checkpoints' / 'last.ckpt'}",
            f"dataset.root={faint_folder}", f"output_dir={tmp_path}",
        )
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_two, of_one = results_of(two_tasks), results_of(tmp_path)
    assert 0 < of_one["test/image_auroc_low"] < of_one["test/image_auroc_high"]
    # maps of another batch size differ in the last bits of float32, and pixel metrics with them
    assert of_two == pytest.approx(of_one, abs=1e-6)
    rows = [
        {r["path"]: r for r in csv.DictReader((folder / "predictions.csv").open())}
        for folder in (two_tasks, tmp_path)
    ]
    assert rows[0].keys() == rows[1].keys()
    assert len(rows[0]) == 17


@pytest.mark.slurm_core
def test_two_nodes_train_the_same_model_as_two_tasks(
    call: Call, ddp: list[str], two_tasks: Path, tmp_path: Path
) -> None:
    done = call(
        "srun", "--nodes=2", "--ntasks-per-node=1", "--ntasks=2",
        *line("train", *ddp, "trainer.devices=1", "trainer.num_nodes=2", f"output_dir={tmp_path}"),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MEMBER: 2/2" in done.stdout + done.stderr
    name = "predictions.csv"
    assert (tmp_path / name).read_bytes() == (two_tasks / name).read_bytes()
    assert results_of(tmp_path) == results_of(two_tasks)


@pytest.mark.parametrize(
    ("options", "settings_of_trainer", "remedy"),
    [
        (["--ntasks=2", "--ntasks-per-node=2"], ["trainer.devices=1"], "trainer.devices=2"),
        (["--ntasks=1"], ["trainer.devices=2"], "--ntasks-per-node=2"),
        (
            ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"],
            ["trainer.devices=2"],
            "trainer.devices=1 trainer.num_nodes=2",
        ),
    ],
    ids=["two tasks, one device", "one task, two devices", "two nodes, one told"],
)
def test_other_numbers_of_tasks_are_refused_once_in_words(
    call: Call, ddp: list[str], tmp_path: Path, options: list[str], settings_of_trainer: list[str],
    remedy: str,
) -> None:  # fmt: skip
    done = call(
        "srun", *options, *line("train", *ddp, *settings_of_trainer, f"output_dir={tmp_path}")
    )
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert text.count("SLURM_NTASKS") == 1, text
    assert remedy in text, text
    assert not (tmp_path / "checkpoints").exists()


def test_a_main_node_whose_name_does_not_resolve_is_told_at_once(
    call: Call, ddp: list[str], tmp_path: Path
) -> None:
    wrong = "SLURM_NODELIST=nowhere[1-2] SLURM_JOB_NODELIST=nowhere[1-2]"
    done = call(
        "timeout", "60", "srun", "--ntasks=2", "--ntasks-per-node=2", "env", *wrong.split(),
        *line("train", *ddp, "trainer.devices=2", f"output_dir={tmp_path}"),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nowhere1" in done.stdout + done.stderr
    assert "MASTER_ADDR" in done.stdout + done.stderr


def test_a_run_outside_of_slurm_hears_nothing_of_it(
    call: Call, tiny: list[str], tmp_path: Path
) -> None:
    done = call(*line("train", *tiny, f"output_dir={tmp_path}"))
    assert done.returncode == 0
    assert "srun" not in done.stdout + done.stderr


def test_fewer_held_out_images_than_ranks_are_told_in_words(
    call: Call, ddp: list[str], tmp_path: Path
) -> None:
    done = call(
        "srun", "--ntasks=2", "--ntasks-per-node=2",
        *line("train", *ddp, "dataset.holdout=0.1", "trainer.devices=2", f"output_dir={tmp_path}"),
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0 or "dataset.holdout" in text, text
    assert "Traceback" not in text


# ------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("sent", [pytest.param("USR1", marks=pytest.mark.slurm_core), "TERM"])
def test_a_stopped_job_with_workers_is_queued_again_and_ends_with_the_same_weights(
    batch: Callable[..., str],
    tiny: list[str],
    whole: Path,
    tmp_path: Path,
    sent: str,
    assert_same_end: Callable[..., None],
) -> None:
    folder = tmp_path / "run"
    job = batch(*line("train", *tiny, *LONG, "dataset.num_workers=2", f"output_dir={folder}"))
    wait_for((folder / "training.png").exists)  # drawn at the first step
    subprocess.run(["scancel", f"--signal={sent}", job], check=True)
    log = tmp_path / "job.log"
    wait_for(lambda: state_of(job) in ("COMPLETED", "FAILED", "CANCELLED"))
    text = log.read_text()
    assert state_of(job) == "COMPLETED", text
    assert re.search(rf"stopped by SIG{sent} at step \d+, and saved", text), text
    assert "Resuming in" in text
    assert "Traceback" not in text
    assert_same_end(folder, whole)


@pytest.mark.parametrize("sent", ["USR1", "TERM"])
def test_a_job_that_is_stopped_while_it_imports_is_queued_again(
    batch: Callable[..., str], tiny: list[str], tmp_path: Path, sent: str
) -> None:
    folder = tmp_path / "run"
    job = batch(*line("train", *tiny, f"output_dir={folder}"))
    wait_for(lambda: state_of(job) == "RUNNING")
    time.sleep(1.0)  # Python runs, and imports for some seconds more
    subprocess.run(["scancel", f"--signal={sent}", job], check=True)
    wait_for(lambda: state_of(job) in ("COMPLETED", "FAILED", "CANCELLED"))
    assert state_of(job) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert (folder / "metrics.json").is_file()


def test_workers_end_with_a_job_that_is_killed(
    batch: Callable[..., str], tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = batch(*line("train", *tiny, *LONGER, "dataset.num_workers=2", f"output_dir={folder}"))
    wait_for((folder / "training.png").exists)
    mark = f"output_dir={folder}".encode()
    assert len(processes_with(mark)) >= 3  # the run and its workers
    main = min(processes_with(mark, of_python=True))
    os.kill(main, signal.SIGKILL)
    wait_for(lambda: not processes_with(mark), 30)
    subprocess.run(["scancel", job])


def processes_with(mark: bytes, of_python: bool = False) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in words and (not of_python or b"python" in words.split(b"\0")[0]):
                found.append(int(entry.name))
    return found


# -------------------------------------------------------------------------------- sweeps


@pytest.mark.slurm_core
def test_a_sweep_with_a_job_that_fails_tells_of_it_and_finishes_the_others(
    call: Call, tiny: list[str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    command = line(
        "train", "-m", *ON_CPUS, *tiny, "dataset.categories=[bolt],[absent]", "seed=1,2",
        f"output_dir={sweep}",
    )  # fmt: skip
    done = call(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "2 of 4 jobs failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list(sweep.glob("*/metrics.json"))) == 2
    status = call(*line("status", str(sweep)))
    assert "4 jobs: 2 done, 2 failed" in status.stdout, status.stdout
    assert "failed: dataset.categories=[absent] seed=1" in status.stdout
    assert status.returncode == 1
    report = call(*line("report", str(sweep)))
    assert report.returncode == 0, report.stderr
    again = call(*command, cwd=tmp_path)
    assert "2 of 4 jobs failed" in again.stderr
    assert "already finished" in again.stdout


def test_a_sweep_can_be_watched_while_it_runs(
    call: Call, start: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    parent = start(
        *line("train", "-m", *ON_CPUS, "hydra.launcher.array_parallelism=1", *tiny, *LONG,
              "seed=1,2", f"output_dir={sweep}")
    )  # fmt: skip
    wait_for(lambda: list(sweep.glob("*/training.png")))
    status = call(*line("status", str(sweep)))
    assert "2 jobs: 1 running, 1 waiting" in status.stdout, status.stdout
    assert re.search(r"running( for \d+ s)?: seed=[12]$", status.stdout, re.MULTILINE)
    assert status.returncode == 2
    _, err = parent.communicate(timeout=300)
    assert parent.returncode == 0, err
    status = call(*line("status", str(sweep)))
    assert "2 jobs: 2 done" in status.stdout
    assert status.returncode == 0


@pytest.mark.slurm_core
def test_a_cancelled_job_is_told_in_a_line_and_hides_no_other(
    call: Call, start: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    parent = start(
        *line("train", "-m", *ON_CPUS, *tiny, "trainer.max_steps=6,100000",
              "dataset.categories=[bolt],[absent]", f"output_dir={sweep}")
    )  # fmt: skip
    wait_for(lambda: len(list(sweep.glob("*/training.png"))) == 2)
    wait_for(lambda: len(list(sweep.glob("*/metrics.json"))) == 1)
    wait_for(lambda: len(squeue("%i", "--array", "--states=running")) == 1)
    subprocess.run(["scancel", *squeue("%i", "--array", "--states=running")], check=True)
    _, err = parent.communicate(timeout=300)
    assert parent.returncode == 1
    assert "Traceback" not in err, err
    assert "3 of 4 jobs failed" in err
    assert "cancelled" in err
    status = call(*line("status", str(sweep)))
    assert "4 jobs: 1 done, 3 failed" in status.stdout, status.stdout


@pytest.mark.slurm_core
def test_the_same_command_waits_for_jobs_of_a_parent_that_was_killed(
    start: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    command = line("train", "-m", *ON_CPUS, *tiny, *LONG, "seed=1,2", f"output_dir={sweep}")
    parent = start(*command)
    wait_for(lambda: len(list(sweep.glob("*/training.png"))) == 2)
    parent.kill()
    parent.wait()
    assert len(squeue("%i", "--array", "--states=running")) == 2
    again = start(*command)
    most = 0
    while again.poll() is None:
        most = max(most, len(squeue("%i", "--array", "--states=running")))
        time.sleep(0.2)
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert most == 2  # none was trained twice at once
    assert len(list(sweep.glob("*/metrics.json"))) == 2


def test_ctrl_c_cancels_the_jobs_and_those_that_run_save_their_step(
    start: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    parent = start(
        *line("train", "-m", *ON_CPUS, "hydra.launcher.array_parallelism=1", *tiny, *LONGER,
              "seed=1,2", f"output_dir={sweep}")
    )  # fmt: skip
    wait_for(lambda: list(sweep.glob("*/training.png")))
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "cancelled 2 jobs in SLURM" in out
    wait_for(lambda: not squeue("%i"), 60)
    (log,) = sweep.glob("*/job.log")
    assert re.search(r"stopped by SIGTERM at step \d+, and saved", log.read_text())
    assert (log.parent / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("sent", ["USR1", "USR2"])
def test_a_job_of_a_sweep_that_is_warned_saves_and_goes_on(
    start: Callable[..., Any],
    tiny: list[str],
    whole: Path,
    tmp_path: Path,
    sent: str,
    assert_same_end: Callable[..., None],
) -> None:
    """As a scheduler does ahead of the end of the time."""
    sweep = tmp_path / "sweep"
    parent = start(
        *line("train", "-m", *ON_CPUS, *tiny, *LONG, "dataset.num_workers=2", "seed=0",
              f"output_dir={sweep}")
    )  # fmt: skip
    wait_for(lambda: list(sweep.glob("*/training.png")))
    running = squeue("%i", "--array", "--states=running")
    subprocess.run(["scancel", f"--signal={sent}", *running], check=True)
    _, err = parent.communicate(timeout=400)
    assert parent.returncode == 0, err
    logs = "".join(file.read_text(errors="replace") for file in sweep.rglob("job.log"))
    assert re.search(rf"stopped by SIG{sent} at step \d+, and saved", logs), logs
    assert "Resuming in" in logs
    (folder,) = (file.parent for file in sweep.glob("*/metrics.json"))
    assert_same_end(folder, whole)


@pytest.mark.slurm_core
def test_settings_that_slurm_refuses_are_told_in_words(
    call: Call, tiny: list[str], tmp_path: Path
) -> None:
    done = call(
        *line("train", "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=main",
              "hydra.launcher.gpus_per_node=1", *tiny, "seed=1,2", f"output_dir={tmp_path}")
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert "hydra.launcher.gpus_per_node=0" in done.stderr
