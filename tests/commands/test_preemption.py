"""What becomes of a run that a scheduler stops or that loses a rank: processes and signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]
SLURM = {  # of a job with one task
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture(scope="module")
def line(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    """Ten steps to an epoch, and no checkpoint but those that are asked for."""
    return [
        *settings, f"dataset.root={mvtec_folder}", "dataset.batch_size=1", "trainer.max_steps=60",
        "trainer.val_check_interval=25", "checkpoint.every_minutes=60",
    ]  # fmt: skip


def wait_for(happened: Callable[[], Any], alive: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < until
        assert alive()
        time.sleep(0.002)


def weights_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("sent", "slurm"),
    [
        pytest.param(signal.SIGTERM, {}, id="SIGTERM"),
        pytest.param(signal.SIGUSR1, SLURM, id="SIGUSR1 of SLURM"),
        pytest.param(signal.SIGTERM, SLURM, id="SIGTERM of SLURM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_step_and_a_rerun_ends_with_the_same_weights(
    start_command: Run, run_command: Run, line: list[str], whole: Path, tmp_path: Path,
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, sent: signal.Signals,
    slurm: dict[str, str], assert_same_end: Callable[..., None],
) -> None:  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setitem(environment, name, value)
    folder, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    started = start_command("train", *line, f"output_dir={folder}", cwd=here)
    wait_for((folder / "training.png").exists, started.process.is_alive)  # drawn at the first step
    os.kill(started.process.pid, sent)
    outcome = started.wait(60)
    assert outcome.code == 75, outcome.err
    told = re.search(rf"stopped by {sent.name} at step (\d+), and saved", outcome.err)
    assert told, outcome.err
    assert "the same command with the same output_dir goes on" in outcome.err
    assert "Traceback" not in outcome.err
    assert weights_of(folder)["global_step"] == int(told[1]) < 60
    assert not (folder / "metrics.json").exists()
    again = run_command("train", *line, f"output_dir={folder}", cwd=here)
    assert again.code == 0, again.err
    assert_same_end(folder, whole)
    assert os.listdir(here) == []  # Lightning's own requeueing leaves checkpoints there


def goes_on_training(folder: Path) -> Callable[[], bool]:
    """Whether the run has written a checkpoint since now."""
    last = folder / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    return lambda: last.exists() and last.stat().st_mtime_ns > before


def is_left(group: int) -> bool:
    """Whether a process group has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def assert_group_stops(
    start_command: Run, line: list[str], folder: Path, sent: signal.Signals
) -> None:
    """Sends a signal to a run and its workers, which saves and ends all of them."""
    trains = goes_on_training(folder)
    started = start_command("train", *line, f"output_dir={folder}", alone=True)
    wait_for(trains, started.process.is_alive)
    group = started.process.pid
    os.killpg(group, sent)
    outcome = started.wait(60)
    assert outcome.code == 75, outcome.err
    told = re.search(rf"stopped by {sent.name} at step (\d+), and saved", outcome.err)
    assert told, outcome.err
    assert "Traceback" not in outcome.err
    assert weights_of(folder)["global_step"] == int(told[1])
    wait_for(lambda: not is_left(group), lambda: True)


WITH_WORKERS = ("dataset.num_workers=2", "checkpoint.every_steps=7")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_a_run_and_its_workers_saves_the_step(
    start_command: Run, run_command: Run, line: list[str], whole: Path, tmp_path: Path,
    sent: signal.Signals,
) -> None:  # fmt: skip
    line = [*line, *WITH_WORKERS]
    assert_group_stops(start_command, line, tmp_path, sent)
    again = run_command("train", *line, f"output_dir={tmp_path}")
    assert again.code == 0, again.err
    states = [weights_of(folder)["state_dict"] for folder in (tmp_path, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_with_workers_that_is_stopped_ten_times_ends_with_the_same_weights(
    start_command: Run,
    run_command: Run,
    line: list[str],
    tmp_path: Path,
    assert_same_end: Callable[..., None],
) -> None:
    line = [*line, *WITH_WORKERS, "trainer.max_steps=600"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    outcome = run_command("train", *line, f"output_dir={whole}")
    assert outcome.code == 0, outcome.err
    for number in range(10):
        sent = (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2)[number % 3]
        assert_group_stops(start_command, line, folder, sent)
    again = run_command("train", *line, f"output_dir={folder}")
    assert again.code == 0, again.err
    assert_same_end(folder, whole)


IMPORTED = """
import os, signal, time
os.kill(os.getpid(), signal.{sent})
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("command", "sent"),
    [("train", "SIGUSR1"), ("train", "SIGUSR2"), ("train", "SIGTERM"), ("predict", "SIGTERM")],
)
def test_a_signal_while_a_command_imports_asks_to_run_it_again(
    environment: dict[str, str], tmp_path: Path, command: str, sent: str
) -> None:
    (tmp_path / "omegaconf.py").write_text(IMPORTED.replace("{sent}", sent))
    paths = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", f"anomaly_lit.commands.{command}"],
        env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert done.stderr == f"stopped by {sent} with nothing to save; run it again\n"


def test_a_program_that_imports_a_command_keeps_its_signals() -> None:
    code = "import signal, anomaly_lit.commands.train; print(repr(signal.getsignal(15)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "SIG_DFL" in done.stdout, done.stdout + done.stderr


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    start_command: Run, line: list[str], tmp_path: Path
) -> None:
    started = start_command("train", *line, f"output_dir={tmp_path}")
    wait_for((tmp_path / "config.yaml").exists, started.process.is_alive)
    os.kill(started.process.pid, signal.SIGTERM)
    outcome = started.wait(60)
    assert outcome.code == 75
    assert "Traceback" not in outcome.err


# ---------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def ddp(line: list[str]) -> list[str]:
    return [*line, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def start(line: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "anomaly_lit.commands.train", *line, f"output_dir={folder}"]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def second_rank(first: int) -> int:
    """The process that the first rank has started."""
    listed = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    ranks = [int(n) for n in listed if b"anomaly_lit" in Path(f"/proc/{n}/cmdline").read_bytes()]
    assert len(ranks) == 1
    return ranks[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "sent", "code", "words"),
    [
        ("first", signal.SIGTERM, 75, "stopped by SIGTERM at step"),
        ("second", signal.SIGTERM, 75, "stopped by SIGTERM at step"),
        ("second", signal.SIGKILL, 1, "error: rank 1 was ended by SIGKILL"),
        ("first", signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_what_ends_a_rank_ends_all_and_a_rerun_goes_on(
    environment: dict[str, str], ddp: list[str], tmp_path: Path, victim: str, sent: signal.Signals,
    code: int, words: str,
) -> None:  # fmt: skip
    line = [*ddp, "trainer.max_steps=2000", "checkpoint.every_steps=5"]
    started = start(line, tmp_path, environment)
    last = tmp_path / "checkpoints" / "last.ckpt"
    wait_for(last.exists, lambda: started.poll() is None)
    other = second_rank(started.pid)
    os.kill(started.pid if victim == "first" else other, sent)
    out = started.communicate(timeout=60)[0]
    assert started.returncode == code, out
    assert words in out
    assert "Traceback" not in out
    wait_for(lambda: not Path(f"/proc/{other}/cmdline").exists(), lambda: True)
    step = weights_of(tmp_path)["global_step"]
    assert 0 < step < 2000
    again = start(line, tmp_path, environment)
    wait_for(lambda: weights_of(tmp_path)["global_step"] > step, lambda: again.poll() is None)
    again.terminate()
    assert "Resuming" in again.communicate(timeout=60)[0]


FAILS = """
import os, runpy, sys
from anomaly_lit.methods import AMINet
step = AMINet.training_step
def fail(self, batch, number):
    if os.environ["LOCAL_RANK"] == "{rank}" and self.global_step == 3:
        raise RuntimeError("too few pears")
    return step(self, batch, number)
AMINet.training_step = fail
from anomaly_lit.commands.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_error_is_told_before_what_it_causes(
    environment: dict[str, str], ddp: list[str], tmp_path: Path, rank: int
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS.replace("{rank}", str(rank)))
    done = subprocess.run(
        [sys.executable, script, *ddp, f"output_dir={tmp_path / 'run'}"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "too few pears" in done.stderr
    if rank:
        assert done.stderr.index("error: rank 1: too few pears") < done.stderr.index(
            "error: rank 1 failed, with the error above"
        )
    else:
        assert "connection" not in done.stderr.lower()
