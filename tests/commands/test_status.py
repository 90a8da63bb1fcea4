"""What `anomaly-status` makes of broken files and wrong options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomaly_lit import files
from anomaly_lit.commands.report import main as report_main
from anomaly_lit.commands.status import is_held, is_running, main, read_sweep, report
from anomaly_lit.runs.failures import noted


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two jobs that are done."""
    jobs = {"0": ["lr=1"], "1": ["lr=2"]}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs, "at_a_time": 1}))
    for place in jobs:
        (tmp_path / place).mkdir()
        (tmp_path / place / "metrics.json").write_text('{"training_seconds": 60.0}')
    return tmp_path


@pytest.mark.parametrize("name", ["metrics.json", "job.json"])
@pytest.mark.parametrize("content", ["", '{"a": 0.', "[1]", "[" * 50_000])
def test_a_broken_file_of_one_job_is_its_failure(
    sweep: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "1" / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(sweep)])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "2 jobs: 1 done, 1 failed" in out
    assert f"cannot read {sweep / '1' / name}" in out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"jobs": 3, "at_a_time": 1}'])
def test_a_broken_plan_is_an_error_in_words(sweep: Path, content: str) -> None:
    (sweep / "sweep.json").write_text(content)
    with pytest.raises(SystemExit, match=r"error: .*sweep\.json"):
        main([str(sweep)])


def test_a_log_that_ends_in_an_error_is_of_no_running_job(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    start = "[2025-01-01 10:00:00,000][anomaly_lit][INFO] - 500 steps of 8 images\n"
    log.write_text(start)
    assert is_running(tmp_path, log, {})
    log.write_text(f"{start}[2025-01-01 10:00:09,000][anomaly_lit][ERROR] - Traceback\n  line 1\n")
    assert not is_running(tmp_path, log, {})


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf"])
def test_an_interval_that_is_none_is_refused(
    sweep: Path, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(sweep), "--every", seconds])
    assert stopped.value.code == 2
    assert f"--every {seconds}: give a number of seconds" in capsys.readouterr().err


def test_no_log_is_held_where_files_have_no_locks(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "HAS_LOCKS", False)
    assert not is_held(sweep / "sweep.json")
    assert [job.state for job in read_sweep(sweep)[0]] == ["done", "done"]


def test_a_job_that_failed_is_counted_and_named_without_a_launcher(
    tmp_path: Path, run_here: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root, sweep = tmp_path / "data", tmp_path / "sweep"
    (root / "good").mkdir(parents=True)
    done = sweep / "done"
    done.mkdir(parents=True)
    (done / "config.yaml").write_text("seed: 0\n")
    (done / "metrics.json").write_text('{"seed": 0}')
    arguments = f"-m dataset=folder dataset.root={root} logger=none output_dir={sweep}"
    assert run_here("train", *arguments.split()).code == 1
    why = f"no normal training images in {root / 'good'}; put images there"
    jobs, _ = read_sweep(sweep)
    assert report(jobs, 1).startswith("2 jobs: 1 done, 1 failed\nfailed: ")
    assert [why in job.line for job in jobs if job.state == "failed"] == [True]
    report_main([str(sweep)])
    assert f"failed before it began: {why}" in capsys.readouterr().err


def test_a_failure_is_forgotten_when_its_job_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    with pytest.raises(ValueError, match="why"), noted(tmp_path):
        raise ValueError("why")
    assert read_sweep(tmp_path)[0][0][1::2] == ("failed", "why")
    with noted(tmp_path):
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt), noted(tmp_path):
        raise KeyboardInterrupt  # no failure: the same command goes on
    assert not file.exists()
    of_launcher = '{"exit_code": null, "error": ""}'
    file.write_text(of_launcher)
    with noted(tmp_path):
        assert file.read_text() == of_launcher


def test_a_single_run_that_failed_is_not_waiting(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    entry = "[2025-01-01 10:00:09,000][anomaly_lit][ERROR] - the loss is NaN\n"
    (tmp_path / "train.log").write_text(entry)
    (job,), _ = read_sweep(tmp_path)
    assert job.state == "failed"
    assert "the loss is NaN" in job.line
