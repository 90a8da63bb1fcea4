"""Sweeps that Ray runs: commands as its tasks. Needs an environment with Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.ray import check_nodes, places_in


def line(settings: tuple[str, ...], root: Path, folder: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "anomaly_lit.commands.train", "-m", "hydra/launcher=ray"]
    return [*command, *settings, f"dataset.root={root}", f"output_dir={folder}", *more]


@pytest.mark.slow
def test_jobs_run_as_commands_and_a_failed_one_stops_no_other(
    settings: tuple[str, ...], mvtec_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    command = line(settings, mvtec_folder, tmp_path, "dataset.categories=[bolt],[absent],[cloth]")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: 1 of 3 jobs failed:\n" in done.stderr
    assert "absent" in done.stderr
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2
    codes = [json.loads(file.read_text())["exit_code"] for file in tmp_path.glob("*/job.json")]
    assert sorted(codes) == [0, 0, 1]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["jobs"]) == 3
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert again.stdout.count("already finished") == 2


@pytest.mark.slow
def test_jobs_of_an_interrupted_sweep_save_and_go_on(
    settings: tuple[str, ...], mvtec_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    more = ("seed=1", "trainer.max_steps=2000", "checkpoint.every_steps=20")
    command = line(settings, mvtec_folder, tmp_path, *more)
    sweep = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not list(tmp_path.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < until
        assert sweep.poll() is None
        time.sleep(0.05)
    sweep.send_signal(2)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, err
    (log,) = tmp_path.glob("*/job.log")
    assert "stopped by SIGTERM at step" in log.read_text()


def test_jobs_that_do_not_fit_are_refused() -> None:
    cluster = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}
    assert places_in(cluster, {"num_cpus": 1, "num_gpus": 0}) == 8
    assert places_in(cluster, {"num_cpus": 4, "num_gpus": 0.5}) == 2
    with pytest.raises(UserError, match="Ray has 8 CPUs and 2 GPUs, and a job wants 1 and 4"):
        places_in(cluster, {"num_cpus": 1, "num_gpus": 4})
    job: Any = SimpleNamespace(config=OmegaConf.create({"trainer": {"num_nodes": 2}}))
    with pytest.raises(UserError, match="a job has one machine"):
        check_nodes([job])


def test_a_missing_ray_is_told(
    run_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = run_here("train", "-m", "hydra/launcher=ray", "seed=1,2", f"output_dir={tmp_path}")
    assert outcome.code == 1
    assert 'pip install "anomaly-lit[ray]", or take hydra/launcher=process' in outcome.err
