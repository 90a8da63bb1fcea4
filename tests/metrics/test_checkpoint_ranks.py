"""One checkpoint, judged by one, two and four processes: the same numbers, row by row."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

JUDGES = """
import json, sys, warnings
import pytorch_lightning as pl
from anomaly_lit.callbacks.outputs import Outputs
from anomaly_lit.callbacks.run import StepSeeds
from anomaly_lit.config.build import instantiate
from anomaly_lit.inference.checkpoint import build_method, read_checkpoint

warnings.simplefilter("ignore")
file, folder, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = read_checkpoint(file)
config = checkpoint["anomaly_lit"]["config"]
method = build_method(config, False)
method.load_state_dict(checkpoint["state_dict"])
data = instantiate(config["dataset"])
data.setup("fit")
evaluation = instantiate(config["callbacks"]["evaluation"])
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    use_distributed_sampler=False, callbacks=[evaluation, Outputs(folder, 4), StepSeeds(0)],
)
trainer.validate(method, datamodule=data, verbose=False)
trainer.test(method, datamodule=data, verbose=False)
if trainer.is_global_zero:
    found = {"calibration": evaluation.calibration, "results": evaluation.results}
    with open(f"{folder}/found.json", "w") as out:
        json.dump(found, out, default=lambda value: getattr(value, "tolist", value.__dict__.copy)())
"""


@pytest.fixture(scope="module")
def uneven_folder(
    tmp_path_factory: pytest.TempPathFactory, new_category: Callable[..., None]
) -> Path:
    """Two categories with 11 test images, some of whose defects are hard to see."""
    root = tmp_path_factory.mktemp("uneven")
    for category in ("bolt", "cloth"):
        new_category(root / category)
    bolt, generator = root / "bolt", np.random.default_rng(5)
    clean = np.array(Image.open(bolt / "test" / "good" / "000.png")).astype(float)
    for number in range(2, 5):
        picture = clean + generator.normal(0, 25, clean.shape)
        kind = "good" if number == 2 else "scratch"
        if kind == "scratch":
            picture[20:26, 24:30] += 40
            masks = bolt / "ground_truth" / "scratch"
            shutil.copy(masks / "000_mask.png", masks / f"{number:03d}_mask.png")
        picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        picture.save(bolt / "test" / kind / f"{number:03d}.png")
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_processes_judge_a_checkpoint_as_one_does(
    run_command: Callable[..., Any], settings: tuple[str, ...], uneven_folder: Path,
    environment: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    line = [
        *settings, f"dataset.root={uneven_folder}", "dataset.holdout=0.5",
        "dataset.eval_batch_size=1", "trainer.max_steps=3", "trainer.val_check_interval=3",
    ]  # fmt: skip
    trained = run_command("train", *line, f"output_dir={tmp_path / 'run'}")
    assert trained.code == 0, trained.err
    script = tmp_path / "judges.py"
    script.write_text(JUDGES)
    found, rows = {}, {}
    for devices in (1, 2, 4):
        folder = tmp_path / str(devices)
        folder.mkdir()
        file = tmp_path / "run" / "checkpoints" / "last.ckpt"
        done = subprocess.run(
            [sys.executable, script, file, folder, str(devices)], env=environment,
            capture_output=True, text=True, timeout=400, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[devices] = (folder / "found.json").read_text()
        rows[devices] = list(csv.DictReader((folder / "predictions.csv").open()))
    assert len(rows[1]) == 11
    results = json.loads(found[1])["results"]
    assert results["bolt/image_auroc_low"] < results["bolt/image_auroc_high"]
    for devices in (2, 4):
        assert rows[devices] == rows[1]
        assert found[devices] == found[1]
