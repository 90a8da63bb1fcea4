from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_lit.data import DeviceCache, DiskCache, HostCache, MVTecAD
from anomaly_lit.data.caches import disk, locks, store
from anomaly_lit.data.caches.memory import ImageCache
from anomaly_lit.data.caches.store import cache_folder, clear
from anomaly_lit.types import UserError

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ready(root: Path, cache: ImageCache | None, size: int = 32, **options: object) -> MVTecAD:
    datamodule = MVTecAD(str(root), image_size=size, cache=cache, **options)  # type: ignore[arg-type]
    datamodule.setup()
    return datamodule


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that the disk cache reads from now on."""
    paths: list[str] = []
    read = disk.read_image
    monkeypatch.setattr(
        disk, "read_image", lambda path, most: paths.append(path) or read(path, most)
    )
    return paths


def rows(folder: Path, kind: str = "*") -> list[Path]:
    return sorted(folder.glob(f"images/{kind}/*.rows"))


def same(first: MVTecAD, second: MVTecAD) -> None:
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = [getattr(datamodule, part)() for datamodule in (first, second)]
        for expected, batch in zip(*loaders, strict=True):
            assert expected.keys() == batch.keys()
            for key, value in expected.items():
                alike = torch.equal(value, batch[key]) if torch.is_tensor(value) else None
                assert alike or value == batch[key]


@pytest.mark.parametrize("kind", ["host", "disk", "device"])
@pytest.mark.parametrize("prompts", [False, True])
def test_every_cache_gives_the_batches_of_none(
    mvtec: Path, folder: Path, kind: str, prompts: bool
) -> None:
    caches = {"host": HostCache, "disk": lambda: DiskCache(str(folder)), "device": DeviceCache}
    needs = {"prompt"} if prompts else set()
    plain, cached = ready(mvtec, None, needs=needs), ready(mvtec, caches[kind](), needs=needs)
    same(plain, cached)


def test_a_later_run_decodes_nothing(
    mvtec: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(mvtec, DiskCache(str(folder)))
    paths = decoded(monkeypatch)
    later = ready(mvtec, DiskCache(str(folder)))
    same(ready(mvtec, None), later)
    assert paths == []


def test_another_choice_of_images_decodes_only_what_is_new(
    mvtec: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(mvtec, DiskCache(str(folder)), categories=["bolt"])
    paths = decoded(monkeypatch)
    both = ready(mvtec, DiskCache(str(folder)), seed=3)
    assert len(paths) == 8
    assert all("cloth" in path for path in paths)
    same(ready(mvtec, None, seed=3), both)


def test_a_changed_file_is_decoded_again(
    mvtec: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(mvtec, DiskCache(str(folder)))
    paths = decoded(monkeypatch)
    changed = mvtec / "bolt" / "train" / "good" / "003.png"
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(changed)
    mask = mvtec / "bolt" / "ground_truth" / "bent" / "000_mask.png"
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(mask)
    later = ready(mvtec, DiskCache(str(folder)))
    assert paths == [str(changed)]
    same(ready(mvtec, None), later)


@pytest.mark.parametrize("how", ["written over", "replaced", "swapped"])
def test_a_file_with_the_size_and_time_of_its_forerunner_is_decoded_again(
    mvtec: Path, folder: Path, how: str, tmp_path: Path
) -> None:
    good = mvtec / "bolt" / "train" / "good"
    for number, shade in ((3, 50), (4, 200)):
        Image.fromarray(np.full((64, 64, 3), shade, np.uint8)).save(good / f"{number:03d}.bmp")
        (good / f"{number:03d}.png").unlink()
    changed, other = good / "003.bmp", good / "004.bmp"
    status = os.stat(changed)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    ready(mvtec, DiskCache(str(folder)))
    if how == "written over":
        changed.write_bytes(other.read_bytes())
    else:
        shutil.copy2(other, tmp_path / "copy.bmp")
        if how == "swapped":
            changed.rename(other)
        (tmp_path / "copy.bmp").replace(changed)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = os.stat(changed)
    assert (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    same(ready(mvtec, None), ready(mvtec, DiskCache(str(folder))))


def test_another_geometry_is_another_entry(mvtec: Path, folder: Path) -> None:
    def entries(size: int = 32, **options: str) -> int:
        same(
            ready(mvtec, None, size, **options),
            ready(mvtec, DiskCache(str(folder)), size, **options),
        )
        return len(list((folder / "images").glob("*/*.rows")))

    assert entries() == 2  # images and masks
    assert entries(16) == 4
    assert entries(interpolation="bicubic") == 6
    assert entries(resize="pad") == 8


@pytest.mark.parametrize("harm", ["cut", "values", "header", "foreign", "empty"])
def test_a_damaged_file_is_noticed_and_built_anew(
    mvtec: Path, folder: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    ready(mvtec, DiskCache(str(folder)))
    for path in rows(folder):
        content = bytearray(path.read_bytes())
        if harm == "values":
            content[-5] ^= 1
        elif harm == "header":
            content[60] ^= 1
        path.write_bytes(
            {"cut": content[:-100], "foreign": b"something else" * 999, "empty": b""}.get(
                harm, bytes(content)
            )
        )
    later = ready(mvtec, DiskCache(str(folder)))
    assert caplog.text.count("is damaged") == 2
    same(ready(mvtec, None), later)
    assert len(rows(folder)) == 2


def test_a_file_of_another_subject_is_not_trusted(
    mvtec: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready(mvtec, DiskCache(str(folder)), 32)
    ready(mvtec, DiskCache(str(folder)), 32, interpolation="bicubic")
    files = [path for path in rows(folder) if path.stat().st_size > 50_000]
    files[0].write_bytes(files[1].read_bytes())
    for options in ({}, {"interpolation": "bicubic"}):
        same(ready(mvtec, None, 32, **options), ready(mvtec, DiskCache(str(folder)), 32, **options))
    assert "rows of another kind" in caplog.text


def test_what_does_not_fit_is_said_and_decoded(
    mvtec: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(str(folder), max_gb=4e-5)
    same(ready(mvtec, None), ready(mvtec, cache))
    assert "of 25 missing rows fit into dataset.cache.max_gb=4e-05" in caplog.text
    assert sum(path.stat().st_size for path in rows(folder)) <= 4e4


def test_the_least_recently_used_makes_room_and_what_is_in_use_stays(
    mvtec: Path, folder: Path
) -> None:
    in_use = ready(mvtec, DiskCache(str(folder)), interpolation="bilinear")
    first = set(rows(folder))
    ready(mvtec, DiskCache(str(folder)), interpolation="bicubic")
    gc.collect()
    second = max(set(rows(folder)) - first, key=lambda path: path.stat().st_size)
    size = sum(path.stat().st_size for path in rows(folder)) / 1e9
    ready(mvtec, DiskCache(str(folder), max_gb=1.2 * size), interpolation="lanczos")
    assert all(path.exists() for path in first)  # older, but in use
    assert not second.exists()
    same(ready(mvtec, None, interpolation="bilinear"), in_use)
    assert sum(path.stat().st_size for path in rows(folder)) <= 1.2e9 * size


def read_slowly(root: Path, folder: Path, delay: float, said: Connection) -> None:
    """What a process does: says each image that it decodes, and last the sum of all pixels."""
    read = disk.read_image

    def slowly(path: str, most: int | None) -> object:
        said.send(path)
        time.sleep(delay)
        return read(path, most)

    disk.read_image = slowly  # type: ignore[assignment]
    locks.PATIENCE = 0.1
    store.warn_once = said.send  # type: ignore[assignment]
    torch.set_num_threads(1)
    said.send(pixel_sum(ready(root, DiskCache(str(folder)))))


def start_reading(root: Path, folder: Path, delay: float) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=read_slowly, args=(root, folder, delay, sender))
    process.start()
    sender.close()
    return process, receiver


def all_said(process: BaseProcess, receiver: Connection) -> list[object]:
    """Waits for the end, which must be a good one."""
    said: list[object] = []
    with suppress(EOFError):
        while True:
            said.append(receiver.recv())
    process.join()
    assert process.exitcode == 0
    return said


def pixel_sum(datamodule: MVTecAD) -> float:
    return sum(float(batch["image"].double().sum()) for batch in datamodule.test_dataloader())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_of_several_processes_one_decodes_and_a_killed_one_hinders_nobody(
    mvtec: Path, folder: Path
) -> None:
    killed, receiver = start_reading(mvtec, folder, 0.5)
    receiver.recv()  # it decodes
    killed.kill()
    killed.join()
    assert len(list(folder.glob("images/*/*.draft"))) == 1

    said: list[object] = []
    for process, receiver in [start_reading(mvtec, folder, 0.1) for _ in range(3)]:
        said += all_said(process, receiver)
    sums = [text for text in said if isinstance(text, float)]
    paths = [text for text in said if str(text).endswith((".png", ".jpg"))]
    assert sums == 3 * [pixel_sum(ready(mvtec, None))]
    assert len(paths) == len(set(paths)) == 25
    assert any("waiting for it" in str(text) for text in said)
    assert not list(folder.glob("images/*/*.draft"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_twenty_times_processes_build_together_and_are_killed(mvtec: Path, tmp_path: Path) -> None:
    """Two of three are killed at random moments; the third and a later one read all pixels."""
    expected, draw = pixel_sum(ready(mvtec, None)), random.Random(0)
    for number in range(20):
        folder = tmp_path / f"cache {number}"
        *killed, third = [start_reading(mvtec, folder, 0.01) for _ in range(3)]
        for process, _ in killed:
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
            process.join()
        for reader in (third, start_reading(mvtec, folder, 0.01)):
            assert all_said(*reader)[-1] == expected
        assert not list(folder.glob("images/*/*.draft"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
@pytest.mark.parametrize("how", ["clear", "rm -r"])
def test_deleting_the_cache_kills_no_process_that_builds_it(
    mvtec: Path, folder: Path, how: str
) -> None:
    builder, receiver = start_reading(mvtec, folder, 0.05)
    receiver.recv()  # it decodes
    if how == "clear":
        clear(folder)  # waits
    else:
        shutil.rmtree(folder)
    said = all_said(builder, receiver)
    assert said[-1] == pixel_sum(ready(mvtec, None))
    told = any("deleted while it was being filled" in str(text) for text in said)
    assert told == (how == "rm -r")
    same(ready(mvtec, None), ready(mvtec, DiskCache(str(folder))))


def test_worker_processes_read_the_same(mvtec: Path, folder: Path) -> None:
    same(ready(mvtec, None), ready(mvtec, DiskCache(str(folder)), num_workers=2))


def test_the_cache_can_be_sent_to_another_process(mvtec: Path, folder: Path) -> None:
    datamodule = ready(mvtec, DiskCache(str(folder)))
    sent = pickle.dumps(datamodule.test_dataloader().dataset)
    assert len(sent) < 20_000  # paths, no pixels
    for expected, batch in zip(
        datamodule.test_dataloader().dataset, pickle.loads(sent), strict=True
    ):
        assert torch.equal(expected["image"], batch["image"])


def test_deleting_the_folder_meanwhile_harms_nobody(mvtec: Path, folder: Path) -> None:
    datamodule = ready(mvtec, DiskCache(str(folder)))
    assert clear(folder) > 0
    assert not rows(folder)
    same(ready(mvtec, None), datamodule)
    same(ready(mvtec, None), ready(mvtec, DiskCache(str(folder))))


def test_a_broken_image_is_named_and_nothing_is_kept(mvtec: Path, folder: Path) -> None:
    path = mvtec / "bolt" / "test" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"test/good/001\.png: .*damaged"):
        ready(mvtec, DiskCache(str(folder)))
    assert sum(path.stat().st_size for path in rows(folder)) < 20_000  # masks alone
    assert not list(folder.glob("images/*/*.draft"))


def test_a_folder_that_cannot_be_written_is_named(mvtec: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*dataset\.cache\.folder"):
        ready(mvtec, DiskCache(str(tmp_path / "file")))


def test_a_full_disk_is_told_before_decoding(
    mvtec: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("anomaly_lit.data.caches.store.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"GB free; set dataset\.cache\.folder"):
        ready(mvtec, DiskCache(str(folder)))


def test_the_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ANOMALY_LIT_CACHE", raising=False)
    assert cache_folder(None) == tmp_path / "anomaly_lit"
    monkeypatch.setenv("ANOMALY_LIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder(None) == tmp_path / "mine"
    assert cache_folder(str(tmp_path / "named")) == tmp_path / "named"


def test_the_device_cache_keeps_all_or_refuses(mvtec: Path) -> None:
    with pytest.raises(UserError, match=r"cache=device keeps all images, and 10 of 25"):
        ready(mvtec, DeviceCache(max_gb=10.5 * 32 * 32 * 3 / 1e9))


def test_worker_processes_cannot_reach_a_device() -> None:
    with pytest.raises(UserError, match=r"dataset\.num_workers=2 with cache=device"):
        DeviceCache().prepare(torch.device("meta"), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_the_gpu_are_the_same_to_the_bit(mvtec: Path) -> None:
    plain, cached = ready(mvtec, None), ready(mvtec, DeviceCache())
    assert cached.cache is not None
    cached.cache.prepare(torch.device("cuda", torch.cuda.current_device()), 0)
    for expected, batch in zip(plain.test_dataloader(), cached.test_dataloader(), strict=True):
        assert batch["image"].is_cuda
        assert torch.equal(expected["image"], batch["image"].cpu())
        assert torch.equal(expected["gt_mask"], batch["gt_mask"].cpu())


def test_a_command_clears_the_default_folder_and_nothing_else(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here: Run
) -> None:
    folder = tmp_path / "mine"
    monkeypatch.setenv("ANOMALY_LIT_CACHE", str(folder))
    ready(mvtec, DiskCache())
    (folder / "other.txt").write_text("not of the cache")
    outcome = run_here("data", "clear_cache=true", f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert f"GB freed in {folder}" in outcome.out
    assert not rows(folder)
    assert (folder / "other.txt").exists()
