"""A machine without `fcntl` and `resource`, as Windows is: commands import, train and load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import pkgutil, sys
sys.modules["fcntl"] = sys.modules["resource"] = None  # an import of these fails

import anomaly_lit
for package in pkgutil.walk_packages(anomaly_lit.__path__, "anomaly_lit."):
    if not package.name.endswith("__main__"):
        __import__(package.name)
import hydra_plugins.anomaly_lit_launcher as launcher
for module in pkgutil.iter_modules(launcher.__path__, launcher.__name__ + "."):
    __import__(module.name)

from anomaly_lit.commands.train import main
main()
print(anomaly_lit.load(sys.argv[1].partition("=")[2] + "/checkpoints/last.ckpt").categories)
"""


@pytest.mark.slow
def test_commands_train_and_load_without_locks(tmp_path: Path, mvtec_folder: Path) -> None:
    arguments = (
        f"output_dir={tmp_path / 'run'} dataset=mvtec_ad dataset.root={mvtec_folder} "
        "dataset.categories=[bolt] method=ami_net_small method.backbone.weights=random "
        "method.grid=8 method.dim=32 method.heads=2 method.depth=1 image_size=64 trainer=cpu "
        "trainer.max_steps=2 trainer.val_check_interval=2 dataset.cache=null logger=none"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"ANOMALY_LIT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['bolt']"
