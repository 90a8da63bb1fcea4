"""What `wandb sync` sends of runs that were offline, received by a small stand-in for its service.

wandb's own program reads the runs' files and sends them to this machine; nothing leaves it.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from anomaly_lit.loggers import read_ids

Run = Callable[..., Any]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Service(ThreadingHTTPServer):
    """Keeps what runs send, by their ids, and answers as the real service does to the essentials.

    A run holds what it was created with (`groupName`, `displayName`, `jobType`, `config` ...), its
    files' lines (`wandb-history.jsonl`, `wandb-summary.json`) and the types of its artifacts.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {}

    def known(self, name: str) -> dict[str, Any]:
        return self.runs.setdefault(name, {"lines": {}, "artifacts": [], "files": set()})

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer GraphQL."""
        if "upsertBucket" in query:
            run = self.known(given["name"])
            run |= {key: value for key, value in given.items() if value is not None}
            return {"upsertBucket": {"bucket": self.bucket(given["name"]), "inserted": True}}
        if "RunResumeStatus" in query:
            name = given["name"]
            bucket = self.bucket(name) if name in self.runs else None
            return {"model": {"id": "p", "name": "p", "entity": ENTITY, "bucket": bucket}}
        if "createArtifact(" in query:
            given = given["input"]
            self.known(given["runName"])["artifacts"].append(given["artifactTypeName"])
            stored = {"id": "a", "state": "COMMITTED"}  # as if the content were there already
            return {"createArtifact": {"artifact": stored | {"artifactSequence": {}}}}
        if "createRunFiles" in query:
            run = self.known(given["run"])
            run["files"] |= set(given["files"])
            to = f"http://127.0.0.1:{self.server_port}/file"
            files = [{"name": name, "uploadUrl": to} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self, name: str) -> dict[str, Any]:
        """What the service tells of a run, so that a resumed one goes on after its last line."""
        run = self.known(name)
        history, events = (
            run["lines"].get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events")
        )
        summary = run["lines"].get("wandb-summary.json", ["{}"])[-1]
        return {
            "id": name, "name": name, "displayName": run.get("displayName"), "description": "",
            "config": run.get("config", "{}"), "sweepName": None, "tags": [],
            "project": {"id": "p", "name": "anomaly_lit", "entity": ENTITY},
            "historyLineCount": len(history), "eventsLineCount": len(events),
            "logLineCount": 0, "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]), "summaryMetrics": summary,
            "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def receive(self, name: str, files: dict[str, Any]) -> None:
        """Put lines at the place in their file where they belong."""
        for file, part in files.items():
            lines = self.known(name)["lines"].setdefault(file, [])
            place = part["offset"] if file.endswith(".jsonl") else 0
            lines[place : place + len(part["content"])] = part["content"]


ENTITY = {"id": "e", "name": "me"}


class Handler(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *_: Any) -> None:
        pass

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") else content

    def say(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_PUT(self) -> None:
        self.content()  # of a file
        self.say({})

    def do_POST(self) -> None:
        content = self.content()
        if self.path == "/graphql":
            asked = json.loads(content)
            self.say({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):  # /files/ENTITY/PROJECT/RUN/file_stream
            self.server.receive(self.path.split("/")[4], json.loads(content).get("files") or {})
        self.say({})


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def sync(service: Service, environment: dict[str, str]) -> Callable[[Path], None]:
    """Sends the offline runs below a folder by the documented command."""

    def send(folder: Path) -> None:
        runs = sorted(str(path) for path in folder.glob("**/wandb/offline-run-*"))
        assert runs
        address = f"http://127.0.0.1:{service.server_port}"
        login = {"WANDB_BASE_URL": address, "WANDB_API_KEY": 40 * "a"}
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *runs],
            env=environment | login, capture_output=True, text=True, timeout=100, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    return send


@pytest.fixture(scope="module")
def line(settings: tuple[str, ...], mvtec_folder: Path) -> list[str]:
    return [
        *settings, f"dataset.root={mvtec_folder}", "trainer.log_every_n_steps=1",
        "logger=wandb_offline",
    ]  # fmt: skip


def history_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(row) for row in run["lines"]["wandb-history.jsonl"]]


def test_a_sweep_arrives_as_a_group_of_runs_that_can_be_told_apart(
    run_command: Run, line: list[str], service: Service, sync: Callable[[Path], None],
    tmp_path: Path,
) -> None:  # fmt: skip
    sweep = tmp_path / "my_sweep"
    outcome = run_command("train", "-m", *line, "seed=0,1", f"output_dir={sweep}")
    assert outcome.code == 0, outcome.err
    sync(sweep)
    folders = [file.parent for file in sweep.glob("*/metrics.json")]
    runs = {folder: service.runs[read_ids(folder)["wandb"]] for folder in folders}
    assert {run["displayName"] for run in runs.values()} == {"seed=0", "seed=1"}
    for folder, run in runs.items():
        assert (run["groupName"], run["jobType"]) == ("my_sweep", "train")
        assert run["project"] == "anomaly_lit"
        config = json.loads(run["config"])
        assert config["method"]["value"]["dim"] == 32
        assert f"seed={config['seed']['value']}" == run["displayName"]
        metrics = json.loads((folder / "metrics.json").read_text())
        summary = json.loads(run["lines"]["wandb-summary.json"][-1])
        for key in ("test/image_auroc", "test/bolt/pixel_ap", "test/cloth/pixel_aupro"):
            assert summary[key] == pytest.approx(metrics[key])
        assert summary["test/images"]["count"] == 8
        curve = [row["trainer/global_step"] for row in history_of(run) if "train/loss" in row]
        assert curve == list(range(6))
        assert "run_table" in run["artifacts"]
        pictures = [name for name in run["files"] if name.startswith("media/images/")]
        assert len(pictures) >= 8


def test_a_run_that_was_stopped_goes_on_in_the_same_curves(
    start_command: Run, run_command: Run, line: list[str], service: Service,
    sync: Callable[[Path], None], tmp_path: Path,
) -> None:  # fmt: skip
    line = [*line, "trainer.max_steps=40", "checkpoint.every_steps=4", f"output_dir={tmp_path}"]
    started = start_command("train", *line)
    until = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(started.process.pid, signal.SIGUSR1)
    stopped = started.wait()
    assert stopped.code == 75, stopped.err
    again = run_command("train", *line)
    assert again.code == 0, again.err
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    sync(tmp_path)
    run = service.runs[read_ids(tmp_path)["wandb"]]
    rows = history_of(run)
    assert [row["trainer/global_step"] for row in rows if "train/loss" in row] == list(range(40))
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    assert run["displayName"] == tmp_path.name
