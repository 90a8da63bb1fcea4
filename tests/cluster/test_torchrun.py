"""Processes that torchrun starts, on one node and on two, train what one command does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NODES = {"lit-a": "10.231.7.1", "lit-b": "10.231.7.2"}  # network namespaces, joined by a cable


@pytest.fixture(scope="module")
def ddp(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    return [
        *settings, f"dataset.root={mvtec_folder}", "dataset.holdout=0.5", "trainer=ddp",
        "trainer.accelerator=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_lightning(
    ddp: list[str], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two processes that the command has started itself."""
    folder = tmp_path_factory.mktemp("lightning")
    command = [sys.executable, "-m", "anomaly_lit.commands.train", *ddp, "trainer.devices=2"]
    done = subprocess.run(
        [*command, f"output_dir={folder}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def torchrun(folder: Path, line: list[str], *options: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*command, "-m", "anomaly_lit.commands.train", *line, f"output_dir={folder}"]


def test_two_processes_of_torchrun(
    ddp: list[str], by_lightning: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    line = [*ddp, "trainer.devices=2"]
    done = subprocess.run(
        torchrun(tmp_path, line, "--standalone", "--nproc-per-node=2"),
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = "predictions.csv"
    assert (tmp_path / name).read_bytes() == (by_lightning / name).read_bytes()


def test_an_error_that_both_processes_find_is_told_once(
    ddp: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    line = [*ddp, "trainer.devices=2", "method.no_such_thing=1"]
    done = subprocess.run(
        torchrun(tmp_path, line, "--standalone", "--nproc-per-node=2"),
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1, done.stderr


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Two network namespaces that reach each other."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need root and iproute2")
    first, second = NODES

    def ip(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *line.split()], capture_output=True, text=True)

    if ip(f"netns add {first}").returncode:
        pytest.skip("this system has no network namespaces to give")
    try:
        ip(f"netns add {second}")
        made = ip(f"link add cable netns {first} type veth peer name cable netns {second}")
        if made.returncode:
            pytest.skip(f"no cable between network namespaces: {made.stderr.strip()}")
        for node, address in NODES.items():
            ip(f"-n {node} addr add {address}/24 dev cable")
            ip(f"-n {node} link set cable up")
            ip(f"-n {node} link set lo up")
        yield NODES
    finally:
        for node in NODES:
            ip(f"netns delete {node}")


def test_two_nodes_of_torchrun(
    ddp: list[str], by_lightning: Path, environment: dict[str, str], tmp_path: Path,
    nodes: dict[str, str],
) -> None:  # fmt: skip
    line = [*ddp, "trainer.devices=1", "trainer.num_nodes=2"]
    first = next(iter(nodes.values()))
    running: list[Any] = []
    for rank, (node, address) in enumerate(nodes.items()):
        command = torchrun(
            tmp_path / "run", line, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}",
            f"--master-addr={first}", "--master-port=29511", f"--local-addr={address}",
        )  # fmt: skip
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", node, *command],
                env=environment | {"GLOO_SOCKET_IFNAME": "cable"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        for process in running:
            out, _ = process.communicate(timeout=400)
            assert process.returncode == 0, out
    finally:
        for process in running:
            process.kill()
    name = "predictions.csv"
    assert (tmp_path / "run" / name).read_bytes() == (by_lightning / name).read_bytes()
