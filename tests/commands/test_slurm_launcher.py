"""The launcher for SLURM, with commands that play SLURM: what is sent, waited for and told.

`tests/cluster/test_slurm.py` runs it on a real SLURM.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from anomaly_lit.commands.status import read_sweep
from anomaly_lit.runs.claim import claimed
from anomaly_lit.types import Stopped, UserError
from hydra_plugins.anomaly_lit_launcher import SlurmLauncher, sbatch, slurm
from hydra_plugins.anomaly_lit_launcher.jobs import Job, write_ids, write_plan
from hydra_plugins.anomaly_lit_launcher.sbatch import Queued

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SLURM is for Linux")
OTHER = OmegaConf.create({"hydra": {"job": {"config_name": "other"}}})
FAKE = """#!/bin/bash
# sbatch runs all jobs of the array before it returns; a file `end.N_M` is the end of a job that
# then does not run.
here=$(dirname "$0")
echo "$(basename "$0") $*" >>"$here/asked"
case $(basename "$0") in
sbatch)
  if [ -f "$here/refusal" ]; then cat "$here/refusal" >&2; exit 1; fi
  env >"$here/environment"
  number=$(($(cat "$here/last" 2>/dev/null || echo 0) + 1))
  echo $number >"$here/last"
  for word in "$@"; do
    case $word in --array=0-*) last=${word#--array=0-} last=${last%%%*} ;; esac
  done
  for task in $(seq 0 "$last"); do
    [ -f "$here/end.${number}_$task" ] && continue
    export SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$task SLURM_RESTART_COUNT=0
    while :; do
      bash "${@: -1}" >>"$here/script.log" 2>&1
      code=$?
      [ -f "$here/again" ] || break
      rm "$here/again"
      SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
    done
    if [ $code -eq 0 ]; then echo COMPLETED; else echo FAILED; fi >"$here/end.${number}_$task"
  done
  echo "$number;here" ;;
squeue) case $* in *--jobs=*) echo "${FAKE_STATE:-RUNNING}" ;; esac ;;
scontrol)
  if [ "$1" = requeue ]; then touch "$here/again"; fi
  if [ "$1" = show ]; then echo "JobId=1 JobState=$(cat "$here/end.$4") Reason=None"; fi ;;
srun)
  while [[ $1 == --* ]]; do shift; done
  exec "$@" ;;
esac
exit 0
"""


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the commands that play SLURM; what they were asked is in `asked`."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(stat.S_IRWXU)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "POLL", 0.01)
    monkeypatch.setattr(slurm, "LATE", 0.05)
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


def asked(fake: Path, command: str) -> list[str]:
    lines = (fake / "asked").read_text().splitlines() if (fake / "asked").is_file() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(command + " ")]


def launcher_of(sweep: Path, **settings: Any) -> SlurmLauncher:
    launcher = SlurmLauncher(**settings)
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
    return launcher


def jobs_of(sweep: Path, *codes: str) -> list[Job]:
    """Jobs that run some lines of Python, in the folders 0, 1, ..."""
    jobs = [
        Job(n, [f"n={n}"], f"n={n}", sweep / str(n), [sys.executable, "-c", code], OTHER)
        for n, code in enumerate(codes)
    ]
    write_plan(sweep, jobs, 8)
    return jobs


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "job.json").read_text())


def queues(patch: pytest.MonkeyPatch, answers: Sequence[Any]) -> None:
    """Has the queue answer these one after the other; the last one for ever."""
    left: Iterator[Any] = iter(answers[:-1])
    patch.setattr(sbatch, "queue", lambda: next(left, answers[-1]))


# -------------------------------------------------------------------------------- how jobs end


def test_a_failed_job_stops_no_other_and_tells_its_last_words(sweep: Path, fake: Path) -> None:
    srun = "srun: error: n1: task 0: Exited with exit code 3"
    jobs = jobs_of(sweep, "print('fine')", f"print('error: no pears\\n{srun}'); exit(3)")
    launcher = launcher_of(sweep)
    launcher.run(jobs, launcher.options)
    assert [job.state for job in jobs] == ["done", "failed"]
    assert jobs[1].error == "no pears"
    assert facts(sweep / "1")["exit_code"] == 3
    assert facts(sweep / "1")["slurm"] == "1_1"
    assert facts(sweep / "1")["started"] <= facts(sweep / "1")["ended"]
    assert "fine" in (sweep / "0" / "job.log").read_text()
    assert json.loads((sweep / "sweep.json").read_text())["slurm"] == {"0": "1_0", "1": "1_1"}
    with pytest.raises(UserError, match=r"1 of 2 jobs failed:\n  n=1: no pears"):
        _ = launcher.results(jobs)[1].return_value
    (sweep / "0" / "metrics.json").write_text("{}")
    assert [job.state for job in read_sweep(sweep)[0]] == ["done", "failed"]


@pytest.mark.parametrize("code", [75, 138, 140, 143])
def test_a_job_that_was_stopped_is_queued_again(code: int, sweep: Path) -> None:
    counted = f"f = open({str(sweep / 'count')!r}, 'a+'); f.write('x'); f.seek(0)"
    (job,) = jobs_of(sweep, f"{counted}; exit({code} if len(f.read()) < 3 else 0)")
    launcher_of(sweep).run([job], [])
    assert (job.state, job.attempt) == ("done", 3)
    assert (sweep / "0" / "job.log").read_text().count("--- ") == 3


def test_a_job_that_is_always_stopped_is_given_up(sweep: Path) -> None:
    (job,) = jobs_of(sweep, "exit(75)")
    launcher_of(sweep, max_num_timeout=2).run([job], [])
    assert (job.state, job.attempt) == ("failed", 3)
    assert "hydra.launcher.max_num_timeout=2" in job.error


def test_a_job_that_was_cancelled_is_not_queued_again(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STATE", "CANCELLED")
    (job,) = jobs_of(sweep, "exit(75)")
    launcher_of(sweep).run([job], [])
    assert (job.state, job.attempt) == ("failed", 1)


@pytest.mark.parametrize("state", slurm.ENDS)
def test_what_slurm_did_to_a_job_is_one_line_and_hides_no_other(
    state: str, sweep: Path, fake: Path
) -> None:
    (fake / "end.1_1").write_text(state)
    jobs = jobs_of(sweep, "", "", "exit('error: no pears')")
    launcher_of(sweep).run(jobs, [])
    assert [job.state for job in jobs] == ["done", "failed", "failed"]
    assert f"SLURM job 1_1: {state}" in jobs[1].error
    assert "\n" not in jobs[1].error
    assert jobs[2].error == "no pears"
    assert [job.state for job in read_sweep(sweep)[0]][1] == "failed"


def test_a_job_that_vanished_is_told_with_what_its_script_said(sweep: Path, fake: Path) -> None:
    (fake / "end.1_0").write_text("FAILED")
    (sweep / ".slurm").mkdir(parents=True)
    (sweep / ".slurm" / "1_0.log").write_text("a\nmodule: command not found\n")
    (job,) = jobs_of(sweep, "")
    launcher_of(sweep).run([job], [])
    assert "without an exit code (FAILED)" in job.error
    assert job.error.endswith("module: command not found")


def test_a_killed_job_is_told_in_words(sweep: Path) -> None:
    (job,) = jobs_of(sweep, "import os; os.kill(os.getpid(), 9)")
    launcher_of(sweep).run([job], [])
    assert "killed (exit code 137), perhaps since main memory ran short" in job.error


# ------------------------------------------------------------------- jobs of an earlier command


def test_jobs_that_an_earlier_command_has_sent_are_waited_for(
    sweep: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = jobs_of(sweep, "exit(1)")
    write_ids(sweep, {"5_0": job})
    job.folder.mkdir()
    (job.folder / "job.json").write_text(json.dumps({"slurm": "5_0", "exit_code": 0}))
    (fake / "end.5_0").write_text("COMPLETED")
    running = {"5_0": Queued("RUNNING", "None")}
    queues(monkeypatch, [running, None, running, {}])
    launcher_of(sweep).run([job], [])
    assert job.state == "done"
    assert asked(fake, "sbatch") == []
    assert "waiting for 1 jobs that an earlier command has sent" in capsys.readouterr().out


def test_the_queue_must_answer_before_jobs_are_sent_twice(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = jobs_of(sweep, "")
    write_ids(sweep, {"5_0": job})
    queues(monkeypatch, [None])
    with pytest.raises(UserError, match="squeue does not answer"):
        launcher_of(sweep).run([job], [])


def test_old_and_new_jobs_together_keep_to_the_number_at_a_time(
    sweep: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(sweep, "", "", "", "")
    write_ids(sweep, {"5_0": jobs[0], "5_1": jobs[1]})
    for number in ("5_0", "5_1"):
        (fake / f"end.{number}").write_text("COMPLETED")
        folder = sweep / number[-1]
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps({"slurm": number, "exit_code": 0}))
    one = {"5_1": Queued("RUNNING", "None")}
    new = {f"1_{n}": Queued("RUNNING", "None") for n in range(2)}
    queues(monkeypatch, [{"5_0": one["5_1"], **one}, one, one | new, new, new, {}])
    launcher_of(sweep, array_parallelism=2).run(jobs, [])
    assert {job.state for job in jobs} == {"done"}
    (line,) = asked(fake, "sbatch")
    assert "--array=0-1%1" in line
    assert "update JobId=1 ArrayTaskThrottle=2" in asked(fake, "scontrol")


def test_a_job_whose_folder_is_held_is_sent_later(
    sweep: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(sweep, "", "")
    with claimed(sweep / "1"):
        launcher = launcher_of(sweep)
        launcher.send(waiting := list(jobs), [])
        launcher.send(waiting, [])
        assert waiting == [jobs[1]]
    launcher.run(waiting, [])
    assert jobs[1].state == "done"
    assert len(asked(fake, "sbatch")) == 2
    assert capsys.readouterr().out.count("n=1: waiting for process") == 1


def test_ctrl_c_cancels_the_jobs_and_sigterm_leaves_them(
    sweep: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(error: BaseException) -> Callable[[], None]:
        def queue() -> None:
            raise error

        return queue

    def launch() -> None:
        launcher = launcher_of(sweep)
        monkeypatch.setattr(launcher, "plan", lambda *_: jobs_of(sweep, ""))
        monkeypatch.setattr(launcher, "check", lambda _: None)
        launcher.launch([[]], 0)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sbatch, "queue", press(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        launch()
    assert asked(fake, "scancel") == ["1_0"]
    (sweep / "sweep.json").unlink()
    monkeypatch.setattr(sbatch, "queue", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="go on in SLURM"):
        launch()
    assert asked(fake, "scancel") == ["1_0"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_reason_to_wait_for_ever_is_told_once(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"1_0": Queued("PENDING", "JobHeldUser"), "1_1": Queued("PENDING", "Priority")}
    queues(monkeypatch, [held, held, {}])
    launcher_of(sweep).run(jobs_of(sweep, "", ""), [])
    out = capsys.readouterr().out
    assert out.count("1 jobs wait in SLURM's queue for this reason: JobHeldUser") == 1
    assert "Priority" not in out


# ------------------------------------------------------------------------------------- settings


def test_what_sbatch_is_asked(sweep: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "MASTER_PORT", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "file")
    launcher = launcher_of(
        sweep, name="n", timeout_min=60, nodes=2, tasks_per_node=3, cpus_per_task=5, mem_gb=1.5,
        partition="p", qos="q", account="a", constraint="c", exclude="e", gres="g", comment="k",
        array_parallelism=7, signal_delay_s=9, setup=["echo from setup"],
        additional_parameters={"nice": 0, "exclusive": True, "mail_user": None},
    )  # fmt: skip
    launcher.run(jobs_of(sweep, ""), launcher.options)
    (line,) = asked(fake, "sbatch")
    for option in (
        "--parsable --array=0-0%7 --job-name=n --time=60 --nodes=2 --ntasks-per-node=3",
        "--cpus-per-task=5 --mem=1536M --partition=p --qos=q --account=a --constraint=c",
        "--exclude=e --gres=g --comment=k --signal=USR1@9 --requeue --open-mode=append",
        "--nice=0 --exclusive --output=",
    ):
        assert option in line
    assert "mail-user" not in line
    assert "from setup" in (fake / "script.log").read_text()
    (srun,) = asked(fake, "srun")
    assert srun.startswith("--kill-on-bad-exit=1 --cpus-per-task=5 ")
    told = dict(
        v.split("=", 1) for v in (fake / "environment").read_text().splitlines() if "=" in v
    )
    assert told["SLURM_CONF"] == "file"
    assert not told.keys() & {"SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "MASTER_PORT"}
    assert "HYDRA_FULL_ERROR" not in told


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        ("Batch job submission failed: Invalid generic resource (gres) specification",
         "hydra.launcher.gpus_per_node=0"),
        ("invalid partition specified: gpu", "hydra.launcher.partition"),
        ("Batch job submission failed: Requested time limit is invalid", "timeout_min"),
        ("Batch job submission failed: Invalid qos specification", "hydra.launcher.qos"),
        ("Memory specification can not be satisfied", "hydra.launcher.mem_gb"),
        ("Requested node configuration is not available", "cpus_per_task"),
        ("Batch job submission failed: Invalid job array specification", "fewer jobs"),
        ("something new", "the settings of hydra.launcher"),
    ],
)  # fmt: skip
def test_what_slurm_refuses_is_told_with_the_setting(
    said: str, setting: str, sweep: Path, fake: Path
) -> None:
    (fake / "refusal").write_text(f"sbatch: error: {said}\n")
    with pytest.raises(UserError, match="SLURM refuses the jobs") as caught:
        launcher_of(sweep).run(jobs_of(sweep, ""), [])
    assert setting in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_without_slurm_is_told(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no sbatch here"):
        launcher_of(sweep).run(jobs_of(sweep, ""), [])


@pytest.mark.parametrize(
    ("kinds", "settings", "expected"),
    [
        (["cpu", "cpu"], {}, 0),
        (["gpu", "auto"], {}, 1),
        (["gpu"], {"tasks_per_node": 4}, 4),
        (["cpu", "gpu"], {"gpus_per_node": 2}, 2),
    ],
)
def test_jobs_get_a_gpu_for_each_task_and_none_on_cpus(
    kinds: list[str], settings: dict[str, Any], expected: int, sweep: Path
) -> None:
    jobs = jobs_of(sweep, *kinds)
    for job, kind in zip(jobs, kinds, strict=True):
        job.config = OmegaConf.create({"trainer": {"accelerator": kind}})
    assert launcher_of(sweep, **settings).gpus(jobs) == expected


def test_cpus_and_gpus_in_one_sweep_are_refused(sweep: Path) -> None:
    jobs = jobs_of(sweep, "", "")
    for job, kind in zip(jobs, ("cpu", "gpu"), strict=True):
        job.config = OmegaConf.create({"trainer": {"accelerator": kind}})
    with pytest.raises(UserError, match=r"hydra\.launcher\.gpus_per_node"):
        launcher_of(sweep).gpus(jobs)


def test_each_device_needs_a_task(sweep: Path) -> None:
    def trainer(devices: Any, nodes: int | None = None) -> Any:
        settings = {"devices": devices} | ({"num_nodes": nodes} if nodes else {})
        return OmegaConf.create({"trainer": settings})

    launcher = launcher_of(sweep, tasks_per_node=2, nodes=2)
    launcher.check(trainer(2, 2))
    with pytest.raises(UserError, match=r"tasks_per_node=4 hydra\.launcher\.nodes=1"):
        launcher.check(trainer(4))


@pytest.mark.parametrize("settings", [{"array_parallelism": 0}, {"max_num_timeout": -1}])
def test_numbers_that_are_none_are_refused(settings: dict[str, int], sweep: Path) -> None:
    with pytest.raises(UserError, match="array_parallelism"):
        launcher_of(sweep, **settings)


# --------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["slurm", "submitit_slurm"])
def test_the_command_sends_a_sweep_and_tells_what_failed(
    name: str, run_here: Callable[..., Any], fake: Path, sweep: Path
) -> None:
    """By its old name, too."""
    for job in range(2):
        (fake / f"end.1_{job}").write_text("NODE_FAIL")
    outcome = run_here(
        "train", "-m", f"hydra/launcher={name}", "seed=1,2", "trainer=cpu", f"output_dir={sweep}"
    )
    assert outcome.code == 1
    assert "2 of 2 jobs failed" in outcome.err, outcome.err
    (asked_of,) = asked(fake, "sbatch")
    assert "--array=0-1%256" in asked_of
    assert "gpus" not in asked_of
    assert {job.state for job in read_sweep(sweep)[0]} == {"failed"}
    assert {job.name for job in read_sweep(sweep)[0]} == {"seed=1", "seed=2"}
