"""Runs in wandb, MLflow and TensorBoard: one per output folder, however often it is resumed.

The ids of runs are kept in `run_ids.json` in the output folder. The runs of a sweep are grouped
under the name of the sweep's folder; each is named by the overrides that set its job apart.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning_fabric.utilities.logger import _flatten_dict
from pytorch_lightning.loggers import Logger, MLFlowLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from anomaly_lit.config.hydra import overrides_of_job
from anomaly_lit.files import lock, write_json

LONGEST = 128  # most characters of a name in wandb
MARKS = ("sweep.json", "multirun.yaml")  # launchers write one of them into a sweep's folder


class WandbRun(WandbLogger):
    """The run of an output folder in wandb, online or offline.

    Args:
        directory: The run's output folder.
        project: Project in wandb.
        entity: User or team; None takes the account's default.
        group: Group of runs; None takes the name of the sweep's folder, if there is one.
        name: Name shown in wandb; None takes the overrides that set a sweep's job apart, or else
            the folder's name.
        job_type: Kind of the run, to filter by.
        tags: Tags of the run.
        offline: Write to `directory/wandb` only. This concerns this run alone; Lightning's own
            parameter sets the mode of the whole process, and so of the other jobs of a sweep.
        send_checkpoint: Send the tested checkpoint as an artifact of type `model`.
        init_timeout: Seconds to wait for the service before training.
        finish_timeout: Seconds to wait for uploads at the end; whatever is not sent by then stays
            on disk.
    """

    def __init__(
        self,
        directory: str,
        project: str = "anomaly_lit",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        job_type: str = "train",
        offline: bool = False,
        send_checkpoint: bool = False,
        init_timeout: float = 60.0,
        finish_timeout: float = 600.0,
    ) -> None:
        import wandb

        sweep, job = sweep_and_name(Path(directory))
        super().__init__(
            name=name or job[:LONGEST],
            project=project,
            save_dir=directory,
            id=kept_id(Path(directory), "wandb"),
            log_model=False,
            entity=entity,
            group=group or sweep,
            tags=list(tags),
            job_type=job_type,
            mode="offline" if offline else None,  # None: WANDB_MODE decides
            settings=wandb.Settings(init_timeout=init_timeout, finish_timeout=finish_timeout),
        )
        self.send_checkpoint = send_checkpoint


class MLflowRun(MLFlowLogger):
    """The run of an output folder in MLflow.

    Args:
        directory: The run's output folder.
        experiment_name: Experiment in MLflow.
        tracking_uri: A server or a database; None takes `directory/mlflow.db`.
        artifact_location: Where a new experiment stores its figures if no server decides; None
            takes `directory/mlflow`.
        group: The tag `group`; None takes the name of the sweep's folder, if there is one.
        name: Name shown in MLflow; None as in `WandbRun`.
        send_checkpoint: Also send the tested checkpoint.
    """

    def __init__(
        self,
        directory: str,
        experiment_name: str = "anomaly_lit",
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        group: str | None = None,
        name: str | None = None,
        send_checkpoint: bool = False,
    ) -> None:
        folder = Path(directory)
        sweep, job = sweep_and_name(folder)
        group = group or sweep
        if tracking_uri is None:
            folder.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
            artifact_location = artifact_location or (folder.resolve() / "mlflow").as_uri()
        with in_turn(tracking_uri):
            super().__init__(
                experiment_name=experiment_name,
                run_name=name or job,
                tracking_uri=tracking_uri,
                artifact_location=artifact_location,
                tags={"group": group} if group else None,
                run_id=read_ids(folder).get("mlflow"),
            )
            _ = self.experiment  # creates it, and the run
        self.folder = folder
        self.send_checkpoint = send_checkpoint

    def describe(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Record the configuration as parameters, which MLflow never changes, and facts as tags."""
        write_ids(self.folder, {"mlflow": self.run_id})
        known = self.experiment.get_run(self.run_id).data.params
        self.log_hyperparams({k: v for k, v in _flatten_dict(config).items() if k not in known})
        for key, value in facts.items():
            self.experiment.set_tag(self.run_id, key.replace("/", "."), str(value))


@contextmanager
def in_turn(tracking_uri: str) -> Iterator[None]:
    """Let processes open an SQLite file one by one: MLflow creates its tables in several steps."""
    if not tracking_uri.startswith("sqlite:///"):
        yield
        return
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    with database.with_name(f".{database.name}.lock").open("a") as file:
        while not lock(file):
            time.sleep(0.05)
        yield


def remedy(name: str, error: BaseException) -> str:
    """Return what to do about a logger that does not start.

    Args:
        name: Option of the group `logger`.
        error: The error that it raised; its causes are looked at as well.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            return 'pip install "anomaly-lit[loggers]", or take logger=csv'
        cause = cause.__cause__
    return {
        "wandb": "run `wandb login`, or take logger=wandb_offline",
        "mlflow": "check logger.mlflow.tracking_uri, or take logger=csv",
    }.get(name, "take logger=csv")


@rank_zero_only
def describe(logger: Logger, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Open a run and record its configuration and facts.

    Args:
        logger: Any logger of Lightning.
        config: The composed configuration as plain data.
        facts: Commit, digest of the data, versions, hardware.
    """
    if isinstance(logger, MLflowRun):
        logger.describe(config, facts)
        return
    logger.log_hyperparams({**config, "run": facts})
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        for name, summary in {"loss": "min", "synthetic_*": "max"}.items():
            run.define_metric(f"val/{name}", step_metric="trainer/global_step", summary=summary)
        run.define_metric("oracle/*", step_metric="trainer/global_step", summary="max")


def finish(logger: Logger, exit_code: int, stopped: bool) -> None:
    """Close a wandb run; otherwise a later job of the same process would write into it."""
    if isinstance(logger, WandbLogger) and logger._experiment is not None:
        if stopped:
            logger.experiment.mark_preempting()
        logger.experiment.finish(exit_code=exit_code)


def sweep_and_name(directory: Path) -> tuple[str | None, str]:
    """Return the names of the sweep and of the run.

    The sweep's name is that of its folder; None outside a sweep. The run's name consists of the
    overrides that tell it from the other jobs or, if there are none, is its path below the sweep's
    folder. Outside a sweep it is the name of the run's folder.
    """
    directory = directory.resolve()
    for folder in list(directory.parents)[:3]:
        if any((folder / mark).is_file() for mark in MARKS):
            place = directory.relative_to(folder).as_posix()
            return folder.name, " ".join(what_sets_apart(folder, place)) or place
    return None, directory.name


def what_sets_apart(sweep: Path, place: str) -> list[str]:
    """Return the overrides of a sweep's job that others of its jobs do not have.

    Args:
        sweep: The sweep's folder.
        place: The job's path below it.
    """
    plan, multirun = (sweep / mark for mark in MARKS)
    if plan.is_file():  # a launcher's list of all jobs
        jobs = json.loads(plan.read_text(encoding="utf-8")).get("jobs", {})
        own, others = jobs.get(place, []), list(jobs.values())
        return [o for o in own if any(o not in other for other in others)]
    written = yaml.safe_load(multirun.read_text(encoding="utf-8")) or {}
    return overrides_of_job(written.get("hydra", {}).get("overrides", {}).get("task", []))


def kept_id(directory: Path, service: str) -> str:
    """Return the id of the folder's run in a service; draw and store one the first time."""
    known = read_ids(directory).get(service)
    if known is None:
        known = secrets.token_hex(4)
        write_ids(directory, {service: known})
    return known


def read_ids(directory: Path) -> dict[str, str]:
    """Return the run ids of a folder, by service."""
    file = directory / "run_ids.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@rank_zero_only
def write_ids(directory: Path, ids: dict[str, str | None]) -> None:
    """Add run ids to those of a folder."""
    write_json(directory / "run_ids.json", {**read_ids(directory), **ids})
