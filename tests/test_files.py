from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from anomaly_lit.files import (
    code_commit,
    environment,
    peak_memory_mb,
    replace_file,
    without_secrets,
    write_json,
)


def test_file_takes_its_place_once_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replace_file(path, encoding="utf-8") as file:
        file.write("ä")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "ä"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replace_file(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    with replace_file(tmp_path / "ours") as file:
        file.write("")
    (tmp_path / "plain").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_json_is_strict(tmp_path: Path) -> None:
    content = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": True}, "e": None}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": True}, "e": None}
    assert "NaN" not in text


def test_json_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_environment_names_versions_machine_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/anomaly-train", "seed=1"])
    found = environment()
    names = ("torch", "timm", "python", "pytorch-lightning")
    assert {f"versions/{name}" for name in names} <= found.keys()
    assert found["command"] == "anomaly-train seed=1"
    assert found["hardware"]
    assert found["commit"] == code_commit()


def test_peak_memory_is_plausible() -> None:
    pytest.importorskip("resource")
    assert 50 < peak_memory_mb()["peak_memory_mb"] < 100_000


def test_passwords_are_written_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"a": ["https://me:secret@host:5000/x", 1], "b": "mail@host", "c": None}
    assert without_secrets(plain) == {
        "a": ["https://***@host:5000/x", 1],
        "b": "mail@host",
        "c": None,
    }
    uri = "logger.mlflow.tracking_uri=https://me:secret@host"
    monkeypatch.setattr(sys, "argv", ["anomaly-train", uri])
    assert "secret" not in environment()["command"]
