"""AMI-Net on real pictures, through the command, with the shared ResNet-18."""

import json
import os
import subprocess
import sys

import pytest

DATA, WEIGHTS = (os.environ.get(name) for name in ("ANOMALY_LIT_DATA", "ANOMALY_LIT_WEIGHTS"))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (DATA and WEIGHTS), reason="ANOMALY_LIT_DATA or ANOMALY_LIT_WEIGHTS is not set"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on hazelnuts: 100 steps of the small preset."""
    output = tmp_path_factory.mktemp("real") / "run"
    command = [
        *(
            sys.executable,
            "-m",
            "anomaly_lit.commands.train",
            "method=ami_net_small",
            "backbone=resnet18",
        ),
        *("dataset=mvtec_ad", f"dataset.root={DATA}/industrial"),
        *("dataset.categories=[hazelnut_toy]", "seed=0", f"output_dir={output}"),
        *("trainer.max_steps=100", "trainer.val_check_interval=100"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


def test_a_short_training_tells_hazelnuts_apart(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/image_auroc"] > 0.9
    assert metrics["test/hazelnut_toy/pixel_auroc"] > 0.9


def test_predictions_of_the_checkpoint_repeat_those_of_the_test(run):
    import csv

    import anomaly_lit

    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))[:4]
    findings = anomaly_lit.load(run / "checkpoints" / "last.ckpt").predict(
        [row["path"] for row in rows]
    )
    for row, finding in zip(rows, findings, strict=True):
        assert finding.score == pytest.approx(float(row["score"]), rel=1e-3)
        assert finding.verdict == row["verdict"]
        assert finding.anomaly_map.shape == finding.image.shape[:2]
