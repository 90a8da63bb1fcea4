"""The demo from start to finish: what a newcomer runs first."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_finds_the_defects_and_shows_them(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("ANOMALY_LIT_WEIGHTS", None)
    command = [
        sys.executable,
        "-m",
        "anomaly_lit.commands.train",
        "output_dir=run",
        "dataset.root=data",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/image_auroc"] >= 0.95
    assert metrics["test/pixel_auroc"] >= 0.90
    assert "capsule" in done.stdout
    assert "run/images" in done.stdout
    assert (tmp_path / "run" / "overview.png").stat().st_size > 10_000
    assert len(list((tmp_path / "run" / "images").glob("*.png"))) == 24
