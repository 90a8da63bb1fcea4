"""Sweeps that Ray runs: commands as its tasks. Needs an environment with Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from anomaly_lit.runs.claim import holder
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


@pytest.fixture
def long_sweep(
    settings: tuple[str, ...], mvtec_folder: Path, environment: dict[str, str], tmp_path: Path
) -> Iterator[tuple[list[str], subprocess.Popen[str]]]:
    """The command of a sweep with one job that trains for a while, and its process."""
    pytest.importorskip("ray")
    more = ("seed=1", "trainer.max_steps=600", "trainer.val_check_interval=600")
    command = line(settings, mvtec_folder, tmp_path, *more, "checkpoint.every_steps=20")
    sweep = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("*/checkpoints/last.ckpt")), sweep)
    yield command, sweep
    sweep.kill()
    sweep.wait()


def wait_for(happened: Callable[[], Any], alive: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < until
        assert alive is None or alive.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_jobs_of_an_interrupted_sweep_save_their_step(
    long_sweep: tuple[list[str], subprocess.Popen[str]], tmp_path: Path, sent: signal.Signals
) -> None:
    _, sweep = long_sweep
    sweep.send_signal(sent)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, err
    assert "Traceback" not in err
    (log,) = tmp_path.glob("*/job.log")
    assert "stopped by SIGTERM at step" in log.read_text()


@pytest.mark.slow
def test_jobs_of_a_sweep_that_is_killed_end_and_the_same_command_goes_on(
    long_sweep: tuple[list[str], subprocess.Popen[str]], environment: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    command, sweep = long_sweep
    sweep.kill()
    sweep.wait()
    (job,) = tmp_path.glob("*/checkpoints")
    wait_for(lambda: holder(job.parent) is None)
    assert not (job.parent / "metrics.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    assert json.loads((job.parent / "metrics.json").read_text())["resumed"]
    status = subprocess.run(
        [sys.executable, "-m", "anomaly_lit.commands.status", str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "1 jobs: 1 done" in status.stdout


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
    assert 'pip install "anomaly-lit[ray]", or use hydra/launcher=process' in outcome.err
