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
import yaml
from omegaconf import OmegaConf

from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher.others import OtherLauncher

Run = Callable[..., Any]
PACKAGES = {"joblib": "joblib", "submitit_local": "submitit"}
TOY = """
import os
from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.hydra import output_folder

def toy(cfg):
    (output_folder() / "done").write_text(os.environ.get("SUBMITIT_LOCAL_JOB_ID", ""))
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
    ["joblib", "submitit_local"],
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


@pytest.mark.parametrize(
    ("name", "extra"),
    [("joblib", "sweep"), ("submitit_local", "sweep"), ("submitit_slurm", "sweep")],
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


def test_submitit_starts_a_task_for_each_device() -> None:
    launcher = launcher_of("submitit_slurm", tasks_per_node=2, nodes=2)
    launcher.check(trainer(2, 2))
    with pytest.raises(UserError, match=r"tasks_per_node=4 hydra\.launcher\.nodes=1"):
        launcher.check(trainer(4))


def test_presets_name_what_the_plugins_take() -> None:
    """Every setting of ours is one of theirs, where they are installed to be asked."""
    config = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    own = Path(__file__).parents[2] / "conf" / "hydra" / "launcher"
    for name, theirs in (("local", config.LocalQueueConf()), ("slurm", config.SlurmQueueConf())):
        preset = yaml.safe_load((own / f"submitit_{name}.yaml").read_text())
        unknown = preset.keys() - OmegaConf.structured(theirs).keys()
        assert unknown == {"plugin", "extra"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_tasks_of_submitit_train_one_model(
    start_command: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    """Stands in for SLURM: two jobs at once, each with two processes that find each other."""
    need("submitit_local")
    started = start_command(
        "train", "-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2",
        *settings, f"dataset.root={mvtec_folder}", "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2", "seed=3,4", f"output_dir={tmp_path}", cwd=tmp_path,
    )  # fmt: skip
    outcome = started.wait(800)
    assert outcome.code == 0, outcome.err
    found = [json.loads(file.read_text()) for file in tmp_path.glob("*/metrics.json")]
    assert sorted(metrics["seed"] for metrics in found) == [3, 4]
    logs = [file.read_text(errors="replace") for file in tmp_path.rglob("*_log.out")]
    assert sum("MEMBER: 2/2" in log for log in logs) == 2


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
    assert "SLURM runs 4 tasks (SLURM_NTASKS) for trainer.devices=1" in outcome.err
    assert "srun" in outcome.err
    assert not os.path.exists(tmp_path / "checkpoints")
