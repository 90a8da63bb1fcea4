"""One run per folder: who holds it, who is refused, and when it is free again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomaly_lit.commands.status import read_sweep
from anomaly_lit.files import HAS_LOCKS
from anomaly_lit.runs import claim
from anomaly_lit.runs.claim import claimed, holder
from anomaly_lit.types import UserError

pytestmark = pytest.mark.skipif(not HAS_LOCKS, reason="needs file locks")
VARIABLES = ("SLURM", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler around the tests, and no wait before a refusal."""
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(claim, "PATIENCE", 0.0)


def test_a_second_run_is_refused_with_the_first_ones_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with claimed(tmp_path):
        words = rf"output_dir=.* is being trained by process {os.getpid()} on .*SLURM job 7, since"
        with pytest.raises(UserError, match=words), claimed(tmp_path):
            pass
        assert holder(tmp_path) is not None
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path):  # and again
        pass


def test_one_of_many_at_a_time_holds_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while others remove the file that they have locked."""
    monkeypatch.setattr(claim, "PATIENCE", 60.0)
    inside, most = 0, []

    def enter() -> None:
        nonlocal inside
        for _ in range(5):
            with claimed(tmp_path):
                inside += 1
                most.append(inside)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path):
        raise RuntimeError
    assert holder(tmp_path) is None


def test_a_folder_is_free_when_its_run_was_killed(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from anomaly_lit.runs.claim import claimed\n"
    code += "with claimed(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(300)"
    line = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, env=os.environ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"held\n"
        facts = holder(tmp_path)
        assert facts is not None
        assert facts["pid"] == run.pid
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert holder(tmp_path) is None
    with claimed(tmp_path):
        pass


def test_a_forked_worker_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A worker may outlive its run for a moment."""
    with claimed(tmp_path):
        worker = os.fork()
        if worker == 0:
            time.sleep(300)
            os._exit(0)
        assert holder(tmp_path) is not None
    try:
        until = time.monotonic() + 30  # the worker lets go once it runs
        while holder(tmp_path) is not None and time.monotonic() < until:
            time.sleep(0.02)
        assert holder(tmp_path) is None
        with claimed(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def note_of_another_machine(folder: Path, seconds_ago: float, **more: Any) -> None:
    """What a run on a file system without locks between machines leaves."""
    facts = {"host": "elsewhere", "pid": 5, "job": None, "restart": "0", "since": "then"} | more
    (folder / claim.NAME).write_text(json.dumps(facts))
    when = time.time() - seconds_ago
    os.utime(folder / claim.NAME, (when, when))


def test_a_run_elsewhere_counts_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    note_of_another_machine(tmp_path, claim.SILENCE / 2)
    assert holder(tmp_path) is not None
    with pytest.raises(UserError, match="process 5 on elsewhere"), claimed(tmp_path):
        pass
    note_of_another_machine(tmp_path, claim.SILENCE * 2)
    assert holder(tmp_path) is None
    with claimed(tmp_path):
        pass


def test_a_job_that_slurm_has_moved_takes_its_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    note_of_another_machine(tmp_path, 0, job="7")
    with claimed(tmp_path):
        pass
    note_of_another_machine(tmp_path, 0, job="8")
    with pytest.raises(UserError, match="SLURM job 8"), claimed(tmp_path):
        pass


def test_a_run_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.01)
    with claimed(tmp_path):
        os.utime(tmp_path / claim.NAME, (0, 0))
        until = time.monotonic() + 60
        while (tmp_path / claim.NAME).stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_file_system_without_locks_leaves_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: Any, **__: Any) -> bool:
        raise OSError("no locks available")

    monkeypatch.setattr(claim, "lock", no_lock)
    with claimed(tmp_path):
        assert json.loads((tmp_path / claim.NAME).read_text())["pid"] == os.getpid()
    note_of_another_machine(tmp_path, 0)
    assert holder(tmp_path) is not None


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, True),
    ],
)
def test_only_the_first_of_all_processes_holds_the_folder(
    variables: dict[str, str], first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with claimed(tmp_path):
        assert (holder(tmp_path) is not None) == first


def test_status_sees_the_run_of_every_launcher(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": {"0": ["a=1"]}, "at_a_time": 1}))
    with claimed(tmp_path / "0"):
        assert [job.state for job in read_sweep(tmp_path)[0]] == ["running"]
    assert [job.state for job in read_sweep(tmp_path)[0]] == ["waiting"]


def test_the_command_refuses_a_folder_that_is_held(
    run_here: Callable[..., Any], settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    line = ("train", *settings, f"dataset.root={mvtec_folder}", f"output_dir={tmp_path}")
    with claimed(tmp_path):
        outcome = run_here(*line)
    assert outcome.code == 1
    assert "is being trained by process" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "config.yaml").exists()


def test_a_folder_of_images_gets_no_lock(
    run_here: Callable[..., Any],
    settings: tuple[str, ...],
    new_category: Callable[..., None],
    tmp_path: Path,
) -> None:
    new_category(tmp_path / "bolt")
    outcome = run_here("train", *settings, f"dataset.root={tmp_path}", f"output_dir={tmp_path}")
    assert "holds the images" in outcome.err
    assert not (tmp_path / claim.NAME).exists()
