"""The processes of a training: which of them writes, and which ways to start them are refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from anomaly_lit.config.hydra import in_sweep
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from anomaly_lit.data.datamodule import AnomalyDataModule

PATIENCE = 10.0  # seconds that the first process gets to report what is wrong


def is_first_process() -> bool:
    """Return whether this process is the first of its node, which is the one that writes there."""
    return int(os.environ.get("SLURM_LOCALID" if uses_slurm() else "LOCAL_RANK", 0)) == 0


def uses_slurm() -> bool:
    """Return whether Lightning leaves starting the processes of a training to SLURM."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    elastic = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun within a job has precedence
    return "SLURM_NTASKS" in os.environ and not interactive and not elastic


def check_tasks(devices: object, nodes: int) -> None:
    """Refuse processes of SLURM that would not train as one.

    Lightning itself checks only a part of this; the rest would hang, train on fewer devices than
    it says, or write several runs into one folder.

    Args:
        devices: `trainer.devices`; anything but a number is left to the trainer, later.
        nodes: `trainer.num_nodes`.

    Raises:
        UserError: There is not one task for each device, the tasks were not started by srun, or
            they cannot find the first node.
    """
    if not uses_slurm():
        return
    tasks = int(os.environ["SLURM_NTASKS"])
    machines = nodes_of_slurm() or min(nodes, tasks)
    known = os.environ.get("SLURM_NTASKS_PER_NODE") if tasks > 1 else None
    each = int(known or max(1, tasks // machines))
    if isinstance(devices, int) and devices > 0 and (
        (tasks, machines, each) != (devices * nodes, nodes, devices)
    ):  # fmt: skip
        raise UserError(
            f"SLURM runs {tasks} task{'s'[: tasks > 1]} (SLURM_NTASKS) on {machines} "
            f"node{'s'[: machines > 1]} for trainer.devices={devices} on trainer.num_nodes="
            f"{nodes}, and each device needs one task: set trainer.devices={each} "
            f"trainer.num_nodes={machines}, or start the tasks with srun --nodes={nodes} "
            f"--ntasks-per-node={devices}. Where SLURM is not to start the processes, "
            "SLURM_JOB_NAME=interactive leaves them to the command"
        )
    if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
        raise UserError(
            f"the job has {tasks} tasks (SLURM_NTASKS), and this command was started once, without "
            "srun: it would wait for the others. Put srun in front of it"
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"Lightning needs the tasks of each node: --ntasks-per-node={max(1, tasks // nodes)} "
            f"instead of --ntasks={tasks}"
        )
    if tasks > 1:
        check_first_node()


def nodes_of_slurm() -> int | None:
    """Return on how many nodes SLURM runs the tasks of this step; None if it does not say."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def check_first_node() -> None:
    """Refuse a first node without an address: the ranks would look for it for half an hour.

    Raises:
        UserError: Its name does not resolve, and MASTER_ADDR does not give another one.
    """
    if "MASTER_ADDR" in os.environ or "SLURM_NODELIST" not in os.environ:
        return
    import socket

    from pytorch_lightning.plugins.environments import SLURMEnvironment

    listed = os.environ["SLURM_NODELIST"]
    name = SLURMEnvironment.resolve_root_node_address(listed)
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise UserError(
            f"the node {name}, first of SLURM_NODELIST={listed}, has no address here "
            f"({error.strerror}): export MASTER_ADDR=ADDRESS, one that all nodes reach"
        ) from error


@contextmanager
def told_once() -> Iterator[None]:
    """Let the first process alone report an error that all processes of a training share."""
    try:
        yield
    except UserError as error:
        if tells():
            raise
        raise SystemExit(1) from error


def tells() -> bool:
    """Return whether this is the first process of those that SLURM or torchrun started.

    The others wait here before they end, since the launcher may then kill all processes.
    """
    first = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    if uses_slurm() and "SLURM_STEP_ID" in os.environ:
        first = os.environ.get("SLURM_PROCID", "0")
    if first != "0":
        time.sleep(PATIENCE)
    return first == "0"


def check_launcher(trainer: pl.Trainer) -> None:
    """Refuse several devices within a sweep that runs its jobs in one process.

    Raises:
        UserError: The other ranks would repeat the command and so train another job.
    """
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    check_tasks(trainer.num_devices, trainer.num_nodes)
    launcher = trainer.strategy.launcher
    if not in_sweep() or not isinstance(launcher, _SubprocessScriptLauncher):
        return
    if not launcher.cluster_environment.creates_processes_externally:
        raise UserError(
            f"trainer.devices={trainer.num_devices} within a sweep needs a process for each job: "
            "hydra/launcher=process (or one device: trainer.devices=1)"
        )


def check_shares(datamodule: AnomalyDataModule, ranks: int) -> None:
    """Refuse a data set of which some ranks would get no images.

    Raises:
        UserError: There are fewer images to train on, held out or to test on than ranks.
    """
    remedies = {
        "train": "train on fewer devices",
        "holdout": f"raise dataset.holdout (now {datamodule.holdout}), or train on fewer devices",
        "test": "train on fewer devices, and test the checkpoint with anomaly-test",
    }
    for name, samples in (
        ("train", datamodule.train_samples),
        ("holdout", datamodule.holdout_samples),
        ("test", datamodule.test_samples),
    ):
        if 0 < len(samples) < ranks:
            what = {"train": "to train on", "holdout": "held out", "test": "to test on"}[name]
            raise UserError(
                f"{len(samples)} image{'s'[: len(samples) > 1]} {what} for {ranks} ranks, and each "
                f"needs one: {remedies[name]}"
            )
