"""What a job finds around it: GPUs, cores, variables, and the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from anomaly_lit.files import cores
from anomaly_lit.types import UserError

# which of SLURM's processes this is; a job starts its own
TASKS_OF_SLURM = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
                  "SLURM_STEP", "SLURM_TASKS_PER_NODE")  # fmt: skip


def check_alone() -> None:
    """Raise `UserError` in all but the first of several tasks of SLURM."""
    rank = os.environ.get("SLURM_PROCID", "0")
    if rank != "0":
        raise UserError(
            f"the sweep is running already: task {rank} of SLURM is a copy of it. Start it once, "
            "in the script of sbatch without srun"
        )


def visible_gpus() -> list[str]:
    """Return the GPUs that the environment names, else those that the driver lists.

    Asking a library instead would be slow.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    places = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(places.iterdir())] if places.is_dir() else []


def environment(gpus: list[str], places: int) -> dict[str, str]:
    """Return a job's variables: its GPUs, a port of its own, its share of the CPU's cores."""
    variables = dict(os.environ)
    variables.pop("HYDRA_FULL_ERROR", None)  # set while the launcher's own command runs
    for name in [name for name in variables if name.startswith(TASKS_OF_SLURM)]:
        del variables[name]  # a job is no task of the allocation that the sweep runs in
    variables["PYTHONUNBUFFERED"] = "1"
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["MASTER_PORT"] = str(free.getsockname()[1])
    if places > 1 and "OMP_NUM_THREADS" not in variables:
        variables["OMP_NUM_THREADS"] = str(max(1, cores() // places))
    return variables


def escaped(path: Path) -> str:
    """Return a path within single quotes of Hydra's grammar."""
    return str(path).replace("\\", "\\\\").replace("'", "\\'")


def die_with_parent() -> None:
    """Have the kernel end the job should the launcher be killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def count(devices: Any) -> int:
    """Return how many devices `trainer.devices` asks for; `auto` counts as one.

    >>> count(2), count("3"), count([0, 1]), count("auto")
    (2, 3, 2, 1)
    """
    if OmegaConf.is_list(devices) or isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return max(1, int(text)) if text.lstrip("-").isdigit() else 1
