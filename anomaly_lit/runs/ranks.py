"""How a run finds the other processes of its training, and what it refuses of launchers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from anomaly_lit.config.hydra import in_sweep
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl


def join_tasks() -> None:
    """Lets the tasks that submitit started for one job find each other.

    On SLURM Lightning reads SLURM's own variables, and the port follows from the job's number; one
    from the shell that submitted the jobs would be the same for all of them. Local tasks have no
    such variables and are told here, in the way of torchrun.
    """
    kind = os.environ.get("SUBMITIT_EXECUTOR")
    if kind == "slurm":
        os.environ.pop("MASTER_PORT", None)
        os.environ.pop("MASTER_ADDR", None)
    if kind != "local" or int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) == 1:
        return
    told = {
        name: os.environ[f"SUBMITIT_LOCAL_{name}"] for name in ("NTASKS", "GLOBALID", "LOCALID")
    }
    job = os.environ["SUBMITIT_LOCAL_JOB_ID"]  # of a process, so unique among those that live
    os.environ.update(
        RANK=told["GLOBALID"], LOCAL_RANK=told["LOCALID"], GROUP_RANK="0",
        WORLD_SIZE=told["NTASKS"], LOCAL_WORLD_SIZE=told["NTASKS"],
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(10000 + int(job) % 50000),
        TORCHELASTIC_RUN_ID=job,
    )  # fmt: skip


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0 of its node, or the only one."""
    return int(os.environ.get("SLURM_LOCALID" if uses_slurm() else "LOCAL_RANK", 0)) == 0


def uses_slurm() -> bool:
    """Whether Lightning leaves the processes of a training to SLURM."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    elastic = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun within a job has precedence
    return "SLURM_NTASKS" in os.environ and not interactive and not elastic


def check_tasks(devices: object, nodes: int) -> None:
    """Refuses processes of SLURM that would not train as one.

    Lightning itself looks at a part of this; what is left would hang, train on fewer devices than
    it says, or write several runs into one folder.

    Args:
        devices: ``trainer.devices``; what is no number is counted later, by the trainer.
        nodes: ``trainer.num_nodes``.

    Raises:
        UserError: The tasks are not one for each device, or were not started by srun.
    """
    if not uses_slurm():
        return
    tasks = int(os.environ["SLURM_NTASKS"])
    if isinstance(devices, int) and devices > 0 and tasks != devices * nodes:
        raise UserError(
            f"SLURM runs {tasks} task{'s'[: tasks > 1]} (SLURM_NTASKS) for trainer.devices="
            f"{devices} on trainer.num_nodes={nodes}, one task for each device is needed: "
            f"srun --nodes={nodes} --ntasks-per-node={devices}, or trainer.devices="
            f"{max(1, tasks // nodes)}. Where SLURM is not to start the processes, "
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


def check_launcher(trainer: pl.Trainer) -> None:
    """Refuses several devices within a sweep that runs its jobs in one process.

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
