"""A checkpoint is whole or is not there, and the one before is kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from anomaly_lit.config.hydra import message_of
from anomaly_lit.inference.checkpoint import read_checkpoint
from anomaly_lit.runs import storage
from anomaly_lit.runs.storage import Start, WholeFiles, checkpoint_to_go_on_from
from anomaly_lit.types import UserError


def content(step: int, size: int = 10) -> dict[str, Any]:
    from anomaly_lit.inference.checkpoint import FORMAT_VERSION

    config = {"method": {"_target_": "x"}, "dataset": {"image_size": 64}, "callbacks": {}}
    entry = {"config": config, "format_version": FORMAT_VERSION}
    return {"global_step": step, "state_dict": {"x": torch.ones(size)}, "anomaly_lit": entry}


def step_of(found: Path | Start | None) -> int:
    """The step of a file, or of what a run would go on from."""
    assert found is not None
    if isinstance(found, Path):
        return int(torch.load(found, weights_only=True)["global_step"])
    assert found.content is not None
    assert found.content["global_step"] == step_of(found.path)
    return int(found.content["global_step"])


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    for step in (1, 2, 3):
        WholeFiles().save_checkpoint(content(step), last)
    assert step_of(last) == 3
    assert step_of(last.with_name("last.earlier.ckpt")) == 2
    assert sorted(p.name for p in last.parent.iterdir()) == ["last.ckpt", "last.earlier.ckpt"]
    WholeFiles().save_checkpoint(content(4), last.with_name("best.ckpt"))
    assert not (last.parent / "best.earlier.ckpt").exists()


def test_the_last_one_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint(content(1), last)
    seen = []

    def replace(*paths: Any) -> None:
        os.rename(*paths)
        seen.append(step_of(last))

    monkeypatch.setattr(os, "replace", replace)
    WholeFiles().save_checkpoint(content(2), last)
    assert seen == [1, 2]


def test_a_file_system_without_hard_links_keeps_the_one_before_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        WholeFiles().save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "last.ckpt") == 2
    assert step_of(tmp_path / "last.earlier.ckpt") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert checkpoint_to_go_on_from(tmp_path) is None
    for step in (1, 2):
        WholeFiles().save_checkpoint(content(step), last)
    whole = checkpoint_to_go_on_from(tmp_path)
    assert step_of(whole) == 2
    assert whole is not None
    assert (whole.path, whole.remark) == (last, "")
    last.write_bytes(last.read_bytes()[:-100])
    found = checkpoint_to_go_on_from(tmp_path)
    assert step_of(found) == 1
    assert found is not None
    assert "last.ckpt" in found.remark
    assert "going on from" in found.remark
    last.unlink()  # as after a kill between two renamings
    assert step_of(checkpoint_to_go_on_from(tmp_path)) == 1
    last.with_name("last.earlier.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="another output_dir"):
        checkpoint_to_go_on_from(tmp_path)


def test_what_a_run_goes_on_from_is_read_once_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, best = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    for step, path in enumerate((last, best)):
        WholeFiles().save_checkpoint(content(step), path)
    read: list[Path] = []

    def noted(path: Path) -> dict[str, Any]:
        read.append(path)
        return read_checkpoint(path)

    monkeypatch.setattr(storage, "read_checkpoint", noted)
    start = checkpoint_to_go_on_from(tmp_path)
    files = WholeFiles(start)
    assert files.load_checkpoint(best)["global_step"] == 1
    assert files.load_checkpoint(str(last))["global_step"] == 0
    assert read == [last, best]
    assert start is not None
    assert start.content is None
    assert files.load_checkpoint(last)["global_step"] == 0  # of the file, which may be newer
    assert read == [last, best, last]


def test_a_full_disk_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    WholeFiles().save_checkpoint(content(1), last)
    before = last.read_bytes()

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("writing failed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.torch, "save", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        WholeFiles().save_checkpoint(content(2), last)
    assert last.read_bytes() == before
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]


def test_a_disk_that_is_full_elsewhere_is_told_with_the_way_out() -> None:
    error = OSError(errno.ENOSPC, "no space", "/run/config.yaml")
    assert message_of(error).startswith("no space left on the disk of /run/config.yaml: free some")
    assert "free some" in message_of(OSError(errno.EDQUOT, "over quota"))
    assert message_of(OSError(errno.EACCES, "denied")) == f"[Errno {errno.EACCES}] denied"


def write_on(last: Path, told: int) -> None:
    """Write one checkpoint after the other, and tell of each through a pipe."""
    step = 0
    while True:
        step += 1
        WholeFiles().save_checkpoint(content(step, 1_000_000), last)
        os.write(told, f"{step}\n".encode())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty kills; TMPDIR lies on another file system where there is one."""
    if Path("/dev/shm").is_dir():
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    last = tmp_path / "checkpoints" / "last.ckpt"
    for number in range(20):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            write_on(last, writing)
        os.close(writing)
        with open(reading) as pipe:
            pipe.readline()
            time.sleep(0.003 * number)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told = max([1, *(int(line) for line in pipe.read().split())])
        assert step_of(checkpoint_to_go_on_from(tmp_path)) >= told
        assert not list(last.parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        last = small / "checkpoints" / "last.ckpt"
        for size in (1, 2):  # 4 and 8 MB; the next would need 16
            WholeFiles().save_checkpoint(content(size, size * 1_000_000), last)
        for _ in range(10):
            with pytest.raises(UserError, match="no space left on the disk"):
                WholeFiles().save_checkpoint(content(3, 4_000_000), last)
            assert step_of(checkpoint_to_go_on_from(small)) == 2
    finally:
        subprocess.run(["umount", str(small)], check=True)
