"""What a run leaves in wandb, TensorBoard and MLflow, read back from their files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anomaly_lit.loggers import kept_id, remedy, sweep_and_name
from anomaly_lit.types import UserError

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def line(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    return [*settings, f"dataset.root={mvtec_folder}", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def folder(run_command: Run, line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of two finished jobs of a sweep. Shared: nobody writes into it."""
    pytest.importorskip("tensorboard")
    sweep = tmp_path_factory.mktemp("dashboards") / "my_sweep"
    services = ["logger=[csv,tensorboard,wandb_offline]", "logger.wandb.send_checkpoint=true"]
    outcome = run_command("train", "-m", *line, *services, "seed=0,1", f"output_dir={sweep}")
    assert outcome.code == 0, outcome.err
    found = [file.parent for file in sweep.glob("*/metrics.json")]
    assert len(found) == 2
    return next(f for f in found if json.loads((f / "metrics.json").read_text())["seed"] == 1)


def records_of(file: Path) -> Iterator[Any]:
    """The messages in a ``.wandb`` file: blocks of 32 KiB with records that may span them."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def items_of(updates: Any) -> dict[str, Any]:
    """Values by name; those of a picture or a table as a dictionary."""
    found: dict[str, Any] = {}
    for item in updates:
        *above, last = list(item.nested_key) or [item.key]
        place = found
        for name in above:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Any]:
    """What the run of the folder sent."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return content_of(file)


def content_of(file: Path) -> dict[str, Any]:
    """Of a wandb run: the run, config, summary and metrics by name, history, kinds of records."""
    found: dict[str, Any] = {
        "config": {}, "summary": {}, "metrics": {}, "history": [], "kinds": set(),
        "files": file.parent / "files",
    }  # fmt: skip
    for record in records_of(file):
        kind = record.WhichOneof("record_type")
        found["kinds"].add(kind)
        if kind == "run":
            found["run"] = record.run
            found["config"] |= items_of(record.run.config.update)
        elif kind == "config":
            found["config"] |= items_of(record.config.update)
        elif kind == "summary":
            found["summary"] |= items_of(record.summary.update)
        elif kind == "history":
            found["history"].append(items_of(record.history.item))
        elif kind == "metric":
            found["metrics"][record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            found["artifact"] = record.artifact
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_wandb_groups_runs_by_sweep_and_names_them_by_job(
    written: dict[str, Any], folder: Path
) -> None:
    run = written["run"]
    assert (run.run_group, run.display_name, run.job_type) == ("my_sweep", "seed=1", "train")
    files = folder.parent.glob("*/wandb/offline-run-*/run-*.wandb")
    names = {content_of(file)["run"].display_name for file in files}
    assert names == {"seed=0", "seed=1"}
    assert run.run_id == kept_id(folder, "wandb")
    assert written["exit"] == 0
    assert "stats" in written["kinds"]  # use of the processor, memory and GPU


def test_wandb_holds_the_configuration_as_plain_data(written: dict[str, Any], folder: Path) -> None:
    config = written["config"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert config["method"]["dim"] == 32
    assert config["run"]["data_digest"] == metrics["data_digest"]
    assert config["run"]["commit"] == metrics["commit"]


def test_wandb_has_losses_metrics_and_costs(written: dict[str, Any], folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    logged = {key: value for row in written["history"] for key, value in row.items()}
    for key in ("test/image_auroc", "test/bolt/pixel_ap", "test/cloth/pixel_aupro"):
        assert logged[key] == pytest.approx(metrics[key])
        assert written["summary"][key] == pytest.approx(metrics[key])
    assert logged["run/training_seconds"] > 0
    assert {"val/bolt/threshold", "val/cloth/threshold", "val/loss"} <= logged.keys()
    losses = [row for row in written["history"] if "train/loss" in row or "val/loss" in row]
    assert all("trainer/global_step" in row for row in losses)
    assert written["metrics"]["val/loss"].summary.min
    assert written["metrics"]["val/synthetic_*"].summary.max


def test_wandb_shows_findings_with_masks_and_the_worst_cases(
    written: dict[str, Any], folder: Path
) -> None:
    logged = {key: value for row in written["history"] for key, value in row.items()}
    images = logged["test/images"]
    assert images["count"] == len(list((folder / "images").glob("*.png"))) == 8
    assert all({"truth", "finding"} == set(masks) for masks in images["all_masks"])
    for path in images["filenames"]:
        assert (written["files"] / path).is_file()
    table = json.loads((written["files"] / logged["test/worst"]["path"]).read_text())
    assert table["columns"][:3] == ["picture", "category", "defect_type"]
    assert len(table["data"]) == 8
    for key in ("train/batch", "train/curves", "test/curves", "test/overview"):
        assert (written["files"] / logged[key]["path"]).is_file()


def test_wandb_gets_the_checkpoint_where_asked(written: dict[str, Any]) -> None:
    assert written["artifact"].type == "model"
    assert [entry.path for entry in written["artifact"].manifest.contents] == ["last.ckpt"]


def scalars_of(folder: Path) -> set[str]:
    """Names of all curves in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(folder / "logs")).Reload().Tags()["scalars"])


def numbers_of(summary: dict[str, Any]) -> set[str]:
    """Names of what is a number in wandb, but its own; of `val/loss` it keeps the least."""
    own = ("_", "trainer/")
    return {
        key
        for key, value in summary.items()
        if (isinstance(value, int | float) or value.keys() == {"min"}) and not key.startswith(own)
    }


def test_tensorboard_shows_the_same(folder: Path, written: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert set(written["summary"]) & scalars_of(folder) == numbers_of(written["summary"])
    events = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "test/bolt/image_auroc"} <= set(tags["scalars"])
    assert {"train/batch", "test/curves", "test/overview"} <= set(tags["images"])
    assert sum(tag.startswith("test/images/") for tag in tags["images"]) == 8
    assert any(tag.startswith("test/worst") for tag in tags["tensors"])


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    assert kept_id(tmp_path, "wandb") == kept_id(tmp_path, "wandb")
    assert json.loads((tmp_path / "run_ids.json").read_text()).keys() == {"wandb"}


def test_a_sweep_is_known_by_what_its_launcher_wrote(tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "a=1" / "b=2"
    assert sweep_and_name(job) == (None, "b=2")
    job.mkdir(parents=True)
    plan = tmp_path / "sweep" / "sweep.json"
    plan.write_text(json.dumps({"jobs": {}}))
    assert sweep_and_name(job) == ("sweep", "a=1/b=2")
    shared = ["trainer.max_steps=5", "dataset=visa"]
    jobs = {"a=1/b=2": ["a=1", *shared, "b=2"], "a=1/b=3": ["a=1", *shared, "b=3"]}
    plan.write_text(json.dumps({"jobs": jobs}))
    assert sweep_and_name(job) == ("sweep", "b=2")


def test_offline_is_one_run_not_the_process(tmp_path: Path, monkeypatch: Any) -> None:
    import os

    from anomaly_lit.loggers import WandbRun

    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = WandbRun(str(tmp_path), offline=True)
    assert logger.experiment.offline
    logger.experiment.finish()
    assert "WANDB_MODE" not in os.environ


OPENS = """
import sys
from anomaly_lit.loggers import MLflowRun
logger = MLflowRun(sys.argv[1], tracking_uri=f"sqlite:///{sys.argv[2]}")
logger.describe({"seed": int(sys.argv[3])}, {"commit": "abc"})
"""


@pytest.mark.slow
def test_jobs_that_begin_at_once_create_one_mlflow_file(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    file, jobs = tmp_path / "mlflow.db", range(3)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", OPENS, str(tmp_path / f"job{number}"), str(file), str(number)],
            env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for number in jobs
    ]  # fmt: skip
    for process in running:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    client = mlflow.MlflowClient(f"sqlite:///{file}")
    experiment = client.get_experiment_by_name("anomaly_lit")
    runs = client.search_runs([experiment.experiment_id])
    assert {(run.info.run_name, run.data.params["seed"]) for run in runs} == {
        (f"job{number}", str(number)) for number in jobs
    }


def test_a_logger_that_does_not_start_is_told_with_its_own_remedy() -> None:
    refused, missing = UserError("no"), UserError("no")
    missing.__cause__ = ModuleNotFoundError("mlflow")
    assert "wandb login" in remedy("wandb", refused)
    for name in ("mlflow", "tensorboard"):
        assert "wandb" not in remedy(name, refused)
        assert "anomaly-lit[loggers]" in remedy(name, missing)


def test_mlflow_keeps_one_run(run_here: Run, line: list[str], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    command = [
        *line,
        f"output_dir={tmp_path}",
        "logger=[mlflow,tensorboard]",
        "logger.mlflow.send_checkpoint=true",
    ]
    for _ in range(2):
        outcome = run_here("train", *command)
        assert outcome.code == 0, outcome.err
        (tmp_path / "metrics.json").unlink()  # as if the first had been stopped
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("anomaly_lit")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == tmp_path.name
    assert run.data.params["method/dim"] == "32"
    assert len(run.data.tags["data_digest"]) == 64
    assert "test/bolt/pixel_ap" in run.data.metrics
    assert set(run.data.metrics) - {"epoch"} == scalars_of(tmp_path) - {"epoch", "hp_metric"}
    names = {item.path for folder in ("test", "train", "checkpoints")
             for item in client.list_artifacts(run.info.run_id, folder)}  # fmt: skip
    assert {"test/images", "test/worst.json", "test/curves.png", "checkpoints/last.ckpt"} <= names
