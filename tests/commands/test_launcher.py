"""Sweeps of processes: what ran, what failed, what is done again, and how ``status`` tells it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from anomaly_lit.commands.status import duration, read_sweep, report
from anomaly_lit.files import runs_below
from anomaly_lit.runs.claim import claimed
from anomaly_lit.types import UserError
from hydra_plugins.anomaly_lit_launcher import ProcessLauncher
from hydra_plugins.anomaly_lit_launcher.jobs import (
    Job,
    check_folders,
    last_words,
    name_by_difference,
    write_plan,
)
from hydra_plugins.anomaly_lit_launcher.surroundings import environment, visible_gpus

Run = Callable[..., Any]
OTHER = OmegaConf.create({"hydra": {"job": {"config_name": "other"}}})


def job(folder: Path, code: str, number: int = 0) -> Job:
    """A job that runs some lines of Python."""
    return Job(number, [f"n={number}"], f"n={number}", folder, [sys.executable, "-c", code], OTHER)


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "job.json").read_text())


# ------------------------------------------------------------------------------- processes


def test_a_failed_job_stops_no_other_and_tells_its_last_words(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path / "0", "print('fine')", 0),
        job(tmp_path / "1", "raise RuntimeError('no more pears')", 1),
        job(tmp_path / "2", "print('error: two\\nlines'); exit(3)", 2),
    ]
    launcher = ProcessLauncher(jobs=2, gpus=[])
    launcher.run(jobs, launcher.slots())
    assert [j.state for j in jobs] == ["done", "failed", "failed"]
    assert jobs[1].error == "RuntimeError: no more pears"
    assert jobs[2].error == "two\nlines"
    assert "Traceback" in (tmp_path / "1" / "job.log").read_text()
    assert facts(tmp_path / "2")["exit_code"] == 3
    with pytest.raises(UserError, match=r"2 of 3 jobs failed:\n  n=1: RuntimeError: no more"):
        _ = launcher.results(jobs)[1].return_value
    assert launcher.results(jobs)[0].return_value is None


def test_a_failed_job_is_tried_again(tmp_path: Path) -> None:
    count = repr(str(tmp_path / "count"))
    code = f"f = open({count}, 'a+'); f.write('x'); f.seek(0); exit(len(f.read()) < 3)"
    launcher = ProcessLauncher(gpus=[], retries=2)
    one = job(tmp_path / "0", code)
    launcher.run([one], launcher.slots())
    assert (one.state, one.attempt) == ("done", 3)
    assert (tmp_path / "0" / "job.log").read_text().count("\n--- ") == 2


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    launcher = ProcessLauncher(gpus=[], timeout_minutes=0.005)
    one = job(tmp_path / "0", "import time; time.sleep(60)")
    start = time.monotonic()
    launcher.run([one], launcher.slots())
    assert time.monotonic() - start < 20
    assert one.state == "failed"
    assert "timeout_minutes=0.005" in one.error


def test_jobs_get_gpus_and_ports_of_their_own(tmp_path: Path) -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['MASTER_PORT'])"
    launcher = ProcessLauncher(jobs=2, gpus=[0, 1, 2, 3], gpus_per_job=2)
    assert launcher.slots() == [["0", "1"], ["2", "3"]]
    jobs = [job(tmp_path / str(n), code, n) for n in range(4)]
    launcher.run(jobs, launcher.slots())
    seen = [(tmp_path / str(n) / "job.log").read_text().split()[-2:] for n in range(4)]
    assert {gpus for gpus, _ in seen} == {"0,1", "2,3"}
    assert len({port for _, port in seen}) == 4


def test_more_jobs_than_gpus_is_an_error() -> None:
    with pytest.raises(UserError, match="2 jobs at a time with 2 GPUs each, and 3 GPUs"):
        ProcessLauncher(jobs=2, gpus=[0, 1, 2], gpus_per_job=2).slots()
    with pytest.raises(UserError, match="jobs=0"):
        ProcessLauncher(jobs=0).slots()


def test_visible_gpus_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert visible_gpus() == ["3", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []


def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment([], 1000)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment([], 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment([], 1000)["OMP_NUM_THREADS"] == "5"


def test_two_jobs_in_one_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two jobs share the folder"):
        check_folders([job(tmp_path, "", 0), job(tmp_path, "", 1)])


def test_jobs_are_named_by_what_differs(tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(n), "", n) for n in range(2)]
    for one in jobs:
        one.overrides = ["a=1", *one.overrides]
    name_by_difference(jobs)
    assert [one.name for one in jobs] == ["n=0", "n=1"]


def test_last_words_are_those_of_the_last_attempt(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("--- 1\nerror: old\n--- 2\nfirst\n  last  \n\n")
    assert last_words(log) == "  last"


def test_a_folder_in_use_is_waited_for(tmp_path: Path) -> None:
    """A job whose launcher was killed may live for a moment."""
    import fcntl

    launcher, one = ProcessLauncher(gpus=[]), job(tmp_path / "0", "")
    (tmp_path / "0").mkdir()
    with (tmp_path / "0" / "job.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert not launcher.start(one, [], 1)
        write_plan(tmp_path, [one], 1)
        assert [j.state for j in read_sweep(tmp_path)[0]] == ["running"]
    launcher.run([one], launcher.slots())
    assert one.state == "done"


def test_a_folder_that_another_run_trains_in_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher, one = ProcessLauncher(gpus=[]), job(tmp_path / "0", "")
    with claimed(tmp_path / "0"):
        assert not launcher.start(one, [], 1)
        assert not launcher.start(one, [], 1)
        assert not (tmp_path / "0" / "job.log").exists()
    assert capsys.readouterr().out.count("n=0: waiting for process") == 1
    launcher.run([one], launcher.slots())
    assert one.state == "done"


# ------------------------------------------------------------------------------------ status


def test_status_tells_what_is_done_failed_and_waiting(tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(n), "", n) for n in range(3)]
    jobs[1].command[-1] = "exit('error: too few pears')"
    write_plan(tmp_path, jobs, 1)
    launcher = ProcessLauncher(gpus=[])
    launcher.run(jobs[:2], launcher.slots())
    (tmp_path / "0" / "metrics.json").write_text("{}")
    found, at_a_time = read_sweep(tmp_path)
    assert [j.state for j in found] == ["done", "failed", "waiting"]
    lines = report(found, at_a_time).splitlines()
    assert lines[0] == "3 jobs: 1 done, 1 failed, 1 waiting"
    assert "left" in lines[1]
    assert lines[2:] == ["failed: n=1", "    too few pears"]


def test_status_of_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        read_sweep(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        read_sweep(tmp_path / "none")


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (150, "2 min"), (3600, "1 h 00 min"), (7380, "2 h 03 min")]
)
def test_durations_are_read_easily(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ------------------------------------------------------------------------------------ sweeps


@pytest.fixture(scope="module")
def sweep(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    return [
        "-m", *settings, f"dataset.root={mvtec_folder}", "hydra/launcher=process",
        "hydra.launcher.jobs=2",
    ]  # fmt: skip


def state_of(folder: Path) -> dict[str, str]:
    return {one.name: one.state for one in read_sweep(folder)[0]}


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(run_here: Run, sweep: list[str], tmp_path: Path) -> None:
    """One job fails; mended, only that one runs."""
    weights = tmp_path / "w.safetensors"
    line = [*sweep, f"method.backbone.weights=random,{weights}", f"output_dir={tmp_path / 's'}"]
    outcome = run_here("train", *line)
    assert outcome.code == 1
    assert "1 of 2 jobs failed" in outcome.err
    assert str(weights) in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(state_of(tmp_path / "s").values()) == ["done", "failed"]
    save_resnet(weights)
    outcome = run_here("train", *line)
    assert outcome.code == 0, outcome.err
    assert "weights=random: already finished" in outcome.out
    assert set(state_of(tmp_path / "s").values()) == {"done"}


@pytest.mark.slow
def test_finished_jobs_of_other_images_or_code_are_run_again(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(mvtec_folder, data)
    line = [
        "-m", *settings, f"dataset.root={data}", "hydra/launcher=process", "seed=1",
        f"output_dir={tmp_path / 's'}",
    ]  # fmt: skip
    assert run_here("train", *line).code == 0
    [job] = runs_below(tmp_path / "s")
    results = json.loads((job / "metrics.json").read_text())
    (job / "metrics.json").write_text(json.dumps({**results, "code_digest": "older"}))
    outcome = run_here("train", *line, "when_changed=keep")
    assert "already finished" in outcome.out
    assert "the code has changed since" in outcome.err
    next((data / "bolt" / "train" / "good").iterdir()).unlink()
    outcome = run_here("train", *line, "when_changed=keep")
    assert outcome.code == 0, outcome.err
    assert "the images have changed since" in outcome.err
    assert "trained again" in outcome.err
    again = json.loads((job / "metrics.json").read_text())
    assert again["data_digest"] != results["data_digest"]
    assert not again["resumed"]
    kept = json.loads((job / ".earlier" / "1" / "metrics.json").read_text())
    assert kept["data_digest"] == results["data_digest"]
    assert (job / ".earlier" / "1" / "checkpoints" / "last.ckpt").is_file()
    assert runs_below(tmp_path / "s") == [job]
    assert list(state_of(tmp_path / "s").values()) == ["done"]


def save_resnet(file: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet18").state_dict(), file)


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_job_behind_and_is_taken_up(
    sweep: list[str], environment: dict[str, str], run_here: Run, tmp_path: Path
) -> None:
    steps = ("trainer.max_steps=4000", "checkpoint.every_steps=5")
    line = [*sweep, *steps, "seed=0,1,2,3", f"output_dir={tmp_path}"]
    program = [sys.executable, "-m", "anomaly_lit.commands.train"]
    started = subprocess.Popen([*program, *line], env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("*/checkpoints/last.ckpt"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    running = children_of(started.pid)
    assert len(running) == 2
    started.send_signal(signal.SIGKILL)
    started.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in running):
        assert time.monotonic() < until + 60
        time.sleep(0.1)
    assert set(state_of(tmp_path).values()) <= {"waiting", "failed"}
    folder = next(tmp_path.glob("*/checkpoints/last.ckpt")).parent.parent
    config = yaml.safe_load((folder / "config.yaml").read_text())
    again = [f"seed={config['seed']}" if word.startswith("seed=") else word for word in line]
    outcome = run_here("train", *again, "hydra.launcher.timeout_minutes=0.3")
    assert "timeout_minutes=0.3" in outcome.err
    assert "Resuming" in (folder / "job.log").read_text()


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def test_several_devices_within_one_process_are_refused(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    outcome = run_here(
        "train", "-m", *settings, f"dataset.root={mvtec_folder}", "seed=3,4", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.devices=2", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.code == 1
    assert "hydra/launcher=process" in outcome.err
    assert not list(tmp_path.glob("*/metrics.json"))


@pytest.mark.slow
def test_two_devices_within_a_sweep_train_the_same_parameters(
    run_here: Run, sweep: list[str], tmp_path: Path
) -> None:
    outcome = run_here(
        "train", *sweep, "hydra.launcher.jobs=1", "seed=3,4", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.devices=2", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    seeds = []
    for file in tmp_path.glob("*/metrics.json"):
        config = yaml.safe_load((file.parent / "config.yaml").read_text())
        assert config["trainer"]["devices"] == 2
        assert json.loads(file.read_text())["seed"] == config["seed"]
        seeds.append(config["seed"])
    assert sorted(seeds) == [3, 4]
