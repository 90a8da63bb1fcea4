"""Processes of SLURM: what is told to Lightning, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from anomaly_lit.runs import ranks
from anomaly_lit.runs.ranks import (
    check_shares,
    check_tasks,
    is_first_process,
    told_once,
)
from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.surroundings import check_alone, environment

SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a scheduler; what a test sets is taken back."""
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
             "MASTER_PORT", "TORCHELASTIC_RUN_ID")  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", *names))}
    monkeypatch.setattr(os, "environ", kept)


def test_one_task_for_each_device_is_right() -> None:
    check_tasks(8, 1)
    os.environ |= SRUN
    check_tasks(2, 2)
    check_tasks("auto", 2)


@pytest.mark.parametrize(
    ("variables", "devices", "words"),
    [
        (SRUN, 1, r"4 tasks .* trainer.devices=1 on trainer.num_nodes=2.*--ntasks-per-node=1"),
        ({"SLURM_NTASKS": "1"}, 4, r"1 task .*srun --nodes=2 --ntasks-per-node=4"),
        (
            {**SRUN, "SLURM_NNODES": "4", "SLURM_NTASKS_PER_NODE": "1"},
            2,
            r"4 tasks .* on 4 nodes .*set trainer.devices=1 trainer.num_nodes=4",
        ),
        ({**SRUN, "SLURM_STEP_ID": None}, 2, "without srun: it would wait"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": None}, 2, "--ntasks-per-node=2 instead of --ntasks=4"),
    ],
)
def test_other_tasks_are_refused(
    variables: Mapping[str, str | None], devices: int, words: str
) -> None:
    os.environ |= {key: value for key, value in variables.items() if value is not None}
    with pytest.raises(UserError, match=words):
        check_tasks(devices, 2)
    os.environ["SLURM_JOB_NAME"] = "interactive"  # leaves the processes to Lightning
    check_tasks(devices, 2)


def test_one_task_on_each_of_two_nodes_is_not_two_devices_of_one() -> None:
    two_nodes = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
    os.environ |= {**SRUN, **two_nodes}
    check_tasks(1, 2)
    with pytest.raises(UserError, match=r"set trainer.devices=1 trainer.num_nodes=2"):
        check_tasks(2, 1)


def test_a_first_node_without_an_address_is_told() -> None:
    os.environ |= {**SRUN, "SLURM_NODELIST": "nowhere.invalid,other"}
    with pytest.raises(UserError, match=r"node nowhere.invalid, first of .*export MASTER_ADDR="):
        check_tasks(2, 2)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    check_tasks(2, 2)
    del os.environ["MASTER_ADDR"]
    os.environ["SLURM_NODELIST"] = "localhost"
    check_tasks(2, 2)


@pytest.mark.parametrize(
    "variables",
    [
        {**SRUN, "SLURM_PROCID": "3"},
        {"TORCHELASTIC_RUN_ID": "1", "RANK": "3"},
    ],
    ids=["srun", "torchrun"],
)
def test_one_of_several_processes_tells_what_all_find(
    variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    os.environ |= variables
    with pytest.raises(SystemExit), told_once():
        raise UserError("wrong")
    assert waited  # the first one has time to tell
    os.environ |= {name: "0" for name in variables if name in ("SLURM_PROCID", "RANK")}
    with pytest.raises(UserError), told_once():
        raise UserError("wrong")
    assert len(waited) == 1


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1, 4, 4), r"1 image to train on for 2 ranks"),
        ((4, 1, 4), r"1 image held out for 2 ranks, .*raise dataset.holdout \(now 0.1\)"),
        ((4, 4, 1), r"1 image to test on for 2 ranks"),
    ],
)
def test_fewer_images_than_ranks_are_refused(counts: tuple[int, int, int], words: str) -> None:
    names = ("train_samples", "holdout_samples", "test_samples")
    data: Any = SimpleNamespace(
        holdout=0.1, **{name: [0] * count for name, count in zip(names, counts, strict=True)}
    )
    check_shares(data, 1)
    with pytest.raises(UserError, match=words):
        check_shares(data, 2)
    data.holdout_samples = []  # holdout=0 validates on none
    check_shares(data, 1)


def test_the_first_process_of_a_node_is_known_by_either_name() -> None:
    assert is_first_process()
    os.environ["LOCAL_RANK"] = "1"
    assert not is_first_process()
    os.environ |= {**SRUN, "SLURM_LOCALID": "0"}
    assert is_first_process()
    os.environ["SLURM_LOCALID"] = "1"
    assert not is_first_process()


def test_jobs_of_the_process_launcher_are_no_tasks_of_slurm() -> None:
    os.environ |= {**SRUN, "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}
    kept = [name for name in environment([], 1) if name.startswith("SLURM")]
    assert kept == ["SLURM_JOB_ID"]
    check_alone()
    os.environ["SLURM_PROCID"] = "3"
    with pytest.raises(UserError, match="task 3 of SLURM"):
        check_alone()
