"""A machine without `fcntl`, such as one with Windows: commands import, train and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import sys
sys.modules["fcntl"] = None  # an import of it fails
from importlib import import_module
for name in ("train", "test", "predict", "data", "report", "status"):
    import_module(f"anomaly_lit.commands.{name}")
sys.argv = ["anomaly-train", *sys.argv[1:]]
from anomaly_lit.commands.train import main
main()
"""
LOAD = """
import sys
sys.modules["fcntl"] = None
import anomaly_lit
print(anomaly_lit.load(sys.argv[1], device="cpu").predict(sys.argv[2])[0].verdict)
"""


def run(code: str, *arguments: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_train_and_load_without_it(
    mvtec_folder: Path, settings: tuple[str, ...], environment: dict[str, str], tmp_path: Path
) -> None:
    line = (*settings, f"dataset.root={mvtec_folder}", f"output_dir={tmp_path / 'run'}")
    run(WITHOUT, *line, environment=environment)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    picture = str(next((mvtec_folder / "bolt" / "test" / "good").iterdir()))
    shown = run(LOAD, checkpoint, picture, environment=environment)
    assert shown.strip() in ("good", "defect")
