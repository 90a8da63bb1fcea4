"""Launchers of other packages: jobs that fail, packages that are missing, devices they lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from anomaly_lit.commands.status import read_sweep
from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher import jobs, others
from hydra_plugins.anomaly_lit_launcher.others import OtherLauncher

Run = Callable[..., Any]
PACKAGES = {"joblib": "joblib"}
TOY = """
from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.hydra import output_folder

def toy(cfg):
    (output_folder() / "done").touch()
    if cfg.seed == 13:
        raise RuntimeError("unlucky")
    return float(cfg.seed)

if __name__ == "__main__":
    run_command(toy, "train")
"""


def need(launcher: str) -> None:
    """Skips the test where the launcher's package is not installed."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    pytest.importorskip(PACKAGES[launcher])


@pytest.mark.parametrize(
    "launcher",
    ["joblib"],
)
def test_a_failed_job_stops_no_other(
    launcher: str, environment: dict[str, str], tmp_path: Path
) -> None:
    need(launcher)
    (tmp_path / "toy.py").write_text(TOY)
    line = [sys.executable, "toy.py", "-m", f"hydra/launcher={launcher}", "seed=1,13,2"]
    done = subprocess.run(
        [*line, f"output_dir={tmp_path / 's'}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "validated against ConfigStore" not in done.stderr  # of the plugin's own preset
    assert "error: 1 of 3 jobs failed:\n" in done.stderr
    assert "RuntimeError: unlucky" in done.stderr.rpartition("error: ")[2]
    assert {path.parent.name for path in tmp_path.glob("s/*/done")} == {
        "seed=1", "seed=13", "seed=2"
    }  # fmt: skip
    assert "Traceback" in (tmp_path / "s" / "seed=13" / "train.log").read_text()
    states = {job.name: (job.state, job.line) for job in read_sweep(tmp_path / "s")[0]}
    assert states["seed=13"] == ("failed", "unlucky")
    assert states.keys() == {"seed=1", "seed=13", "seed=2"}
    facts = json.loads((tmp_path / "s" / "seed=2" / "job.json").read_text())
    assert facts["exit_code"] == 0
    assert facts["started"] <= facts["ended"]


@pytest.mark.parametrize(
    ("name", "extra"),
    [("joblib", "sweep")],
)
def test_a_missing_package_is_told_with_its_extra(
    name: str, extra: str, run_here: Run, tmp_path: Path
) -> None:
    absent = "hydra.launcher.plugin=hydra_plugins.absent.Launcher"
    line = ("-m", f"hydra/launcher={name}", absent, "seed=1,2", f"output_dir={tmp_path}")
    outcome = run_here("train", *line)
    assert outcome.code == 1
    assert f"hydra/launcher={name} needs a package" in outcome.err
    assert f'pip install "anomaly-lit[{extra}]"' in outcome.err
    assert "Traceback" not in outcome.err


def launcher_of(name: str, **settings: Any) -> OtherLauncher:
    launcher = OtherLauncher("a.B", "sweep", **settings)
    launcher.config = OmegaConf.create(
        {"hydra": {"runtime": {"choices": {"hydra/launcher": name}}}}
    )
    return launcher


def trainer(devices: Any, nodes: int | None = None) -> Any:
    settings = {"devices": devices} | ({"num_nodes": nodes} if nodes else {})
    return OmegaConf.create({"trainer": settings})


@pytest.mark.parametrize("devices", [2, "2", [0, 1]])
def test_several_devices_are_refused_where_jobs_are_calls(devices: Any) -> None:
    launcher = launcher_of("joblib", n_jobs=2)
    launcher.check(trainer(1))
    launcher.check(trainer([3]))
    launcher.check(trainer("auto"))  # the run itself looks again
    with pytest.raises(UserError, match=r"trainer\.devices=2 with hydra/launcher=joblib.*process"):
        launcher.check(trainer(devices))


def test_a_job_waits_while_another_run_trains_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [{"pid": 5}, {"pid": 5}, None]
    monkeypatch.setattr(jobs, "holder", lambda _: held.pop(0))
    monkeypatch.setattr(others, "WAIT", 0.0)
    hydra = {"runtime": {"output_dir": str(tmp_path)}, "overrides": {"task": ["seed=1"]}}
    hydra |= {"job": {"num": 0, "override_dirname": "seed=1"}}
    config = OmegaConf.create({"hydra": hydra})
    monkeypatch.setattr(others.HydraConfig, "get", lambda: config.hydra)
    monkeypatch.setattr(others, "output_folder", lambda: tmp_path)
    assert others.Noted(lambda _: len(held))(config) == 0
    assert json.loads((tmp_path / "job.json").read_text())["exit_code"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_joblib_trains_two_at_a_time(
    environment: dict[str, str], settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    need("joblib")
    done = subprocess.run(  # a forked process would leave joblib's workers idle for minutes
        [
            sys.executable, "-m", "anomaly_lit.commands.train", "-m", "hydra/launcher=joblib",
            *settings, f"dataset.root={mvtec_folder}", "seed=3,4", f"output_dir={tmp_path}",
        ],
        env=environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2
    assert {job.state for job in read_sweep(tmp_path)[0]} == {"done"}


def test_slurm_variables_around_a_run_on_one_device_are_told(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_NTASKS", "4")
        for name in ("SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID"):
            patch.delenv(name, raising=False)
        outcome = run_here(
            "train", *settings, f"dataset.root={mvtec_folder}", f"output_dir={tmp_path}"
        )
    assert outcome.code == 1
    assert "SLURM runs 4 tasks (SLURM_NTASKS) on 1 node for trainer.devices=1" in outcome.err
    assert "srun" in outcome.err
    assert not os.path.exists(tmp_path / "checkpoints")
