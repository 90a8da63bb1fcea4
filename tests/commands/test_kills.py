"""What twenty kills and ten full disks cost a run that goes on after each of them: nothing."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anomaly_lit.runs.storage import checkpoint_to_go_on_from

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
Run = Callable[..., Any]
OTHER_DISK = Path("/dev/shm")


@pytest.fixture(scope="module")
def line(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    """A checkpoint after every step, so that many moments lie within the writing of one."""
    return [
        *settings, f"dataset.root={mvtec_folder}", "trainer.max_steps=500",
        "trainer.val_check_interval=250", "checkpoint.every_steps=1",
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path, whole: Path) -> Iterator[Path]:
    """A disk with room for five checkpoints."""
    if sys.platform != "linux":
        pytest.skip("mounts a small disk")
    folder, size = tmp_path / "small", (whole / "checkpoints" / "last.ckpt").stat().st_size
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={5 * size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def wait_for_a_checkpoint(started: Any, folder: Path) -> None:
    """Waits until a run has written one."""
    last, until = folder / "checkpoints" / "last.ckpt", time.monotonic() + 120
    before = last.stat().st_mtime_ns if last.exists() else 0
    while not (last.exists() and last.stat().st_mtime_ns > before):
        assert time.monotonic() < until, started.wait(0).err
        assert started.process.is_alive(), started.wait(0).err
        time.sleep(0.002)


def step_reached(folder: Path) -> int:
    """The step of the checkpoint that the next call goes on from; 0 without one."""
    start = checkpoint_to_go_on_from(folder)
    if start is None:
        return 0
    assert not start.remark  # no file is damaged
    assert start.content is not None
    return int(start.content["global_step"])


def test_twenty_kills_at_random_moments_change_no_weight(
    start_command: Run,
    run_command: Run,
    line: list[str],
    whole: Path,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_end: Callable[..., None],
) -> None:
    """TMPDIR lies on another disk; every fourth kill may come before the first step."""
    if not OTHER_DISK.is_dir() or OTHER_DISK.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip(f"{OTHER_DISK} is no other disk")
    monkeypatch.setitem(environment, "TMPDIR", str(OTHER_DISK))
    folder, draw, reached = tmp_path / "run", random.Random(0), [0]
    for number in range(20):
        started = start_command("train", *line, f"output_dir={folder}")
        if number % 4 == 3:
            time.sleep(draw.uniform(0, 3))
        else:
            wait_for_a_checkpoint(started, folder)
            time.sleep(draw.uniform(0, 0.1))
        started.process.kill()
        started.process.join()
        reached.append(step_reached(folder))
        assert reached[-1] >= reached[-2] + (number % 4 != 3)
    assert not (folder / "metrics.json").exists()
    print(f"steps reached: {reached}")
    outcome = run_command("train", *line, f"output_dir={folder}")
    assert outcome.code == 0, outcome.err
    assert_same_end(folder, whole)


def fill_up(disk: Path, started: Any) -> None:
    """Leaves no room on a disk until a run has ended, whatever it removes."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        while started.process.is_alive():
            try:
                filler.write(bytes(2**16))
            except OSError:
                time.sleep(0.002)


def test_ten_times_a_full_disk_changes_no_weight(
    start_command: Run,
    run_command: Run,
    line: list[str],
    whole: Path,
    small_disk: Path,
    assert_same_end: Callable[..., None],
) -> None:
    """It fills up at random moments; a call that finds it full says so, too."""
    folder, draw, reached = small_disk / "run", random.Random(0), [0]
    for _ in range(10):
        started = start_command("train", *line, f"output_dir={folder}")
        wait_for_a_checkpoint(started, folder)
        time.sleep(draw.uniform(0, 0.1))
        fill_up(small_disk, started)
        for outcome in (started.wait(), run_command("train", *line, f"output_dir={folder}")):
            assert outcome.code == 1
            assert "no space left on the disk" in outcome.err
            assert "Traceback" not in outcome.err
        (small_disk / "filler").unlink()
        reached.append(step_reached(folder))
        assert reached[-1] > reached[-2]
    print(f"steps reached: {reached}")
    outcome = run_command("train", *line, f"output_dir={folder}")
    assert outcome.code == 0, outcome.err
    assert_same_end(folder, whole)
