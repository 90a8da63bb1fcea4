"""Processes that read images outlive a signal to their group, and never their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomaly_lit.data import workers
from anomaly_lit.types import UserError

PARENT = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from anomaly_lit.data.workers import start_worker

def work(ready):
    start_worker(0)
    ready.put(os.getpid())
    time.sleep(60)

def main():
    context = multiprocessing.get_context(sys.argv[2])
    ready = context.Queue()
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, frame: None)
    process = context.Process(target=work, args=(ready,))
    process.start()
    print(ready.get(), flush=True)
    sys.stdin.readline()
    process.terminate()
    process.join()
    print("ended", flush=True)

if __name__ == "__main__":
    main()
"""


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("obeys", [True, False])
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_worker_survives_signals_to_its_group_and_ends_with_its_parent(
    obeys: bool, method: str, tmp_path: Path
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = str(Path(workers.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, script, root, method], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.killpg(parent.pid, number)
    time.sleep(0.3)
    assert is_alive(worker)
    if obeys:
        parent.stdin.write("end\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "ended\n"
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(worker)


def test_too_little_shared_memory_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    workers.check_shared_memory(2**20, 2)
    workers.check_shared_memory(2**30, 0)
    with pytest.raises(UserError, match=r"dataset\.num_workers=4 needs 144 MB"):
        workers.check_shared_memory(16 * 2**20, 4)
