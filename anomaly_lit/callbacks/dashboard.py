"""Send a run's figures, worst cases and thresholds to the services of its loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from anomaly_lit.callbacks.evaluation import Evaluation
from anomaly_lit.callbacks.outputs import Finding, Outputs
from anomaly_lit.reporting.predictions import caption_of

FILES = {  # figures that other callbacks write into the output folder
    "train/batch": "training.png",
    "train/curves": "loss.png",
    "test/curves": "curves.png",
    "test/overview": "overview.png",
}
COLUMNS = ("category", "defect_type", "label", "score", "threshold", "verdict", "path")


class Results(NamedTuple):
    """What is shown of a test or validation."""

    step: int
    findings: Sequence[Finding]  # worst mistakes first
    pictures: dict[str, Path]  # by their name in the service
    checkpoint: Path  # the one that was tested


class Dashboard(pl.Callback):
    """Send the figures that `Outputs` and other callbacks drew; nothing is computed or drawn again.

    Lightning itself sends metrics and losses. This callback must come after those that draw.

    Args:
        directory: The output folder.
        checkpoint: The tested checkpoint, for loggers that send it.
    """

    def __init__(self, directory: str, checkpoint: str) -> None:
        self.directory = Path(directory)
        self.checkpoint = Path(checkpoint)
        self.batch_shown = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send each category's threshold and, once, the first batch as training sees it."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        thresholds = {
            f"val/{category}/threshold": limits["threshold"]
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation)
            for category, limits in callback.calibration.get("categories", {}).items()
        }
        pictures = {} if self.batch_shown else self._pictures("training.png")
        self.batch_shown = True
        for logger in trainer.loggers:
            if thresholds:
                logger.log_metrics(thresholds, trainer.global_step)
            show(logger, Results(trainer.global_step, (), pictures, self.checkpoint))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the findings with their masks, the worst cases as a table, and all curves."""
        if not trainer.is_global_zero:
            return
        outputs = next((c for c in trainer.callbacks if isinstance(c, Outputs)), None)  # type: ignore[attr-defined]
        findings = outputs.findings if outputs else ()
        pictures = self._pictures("loss.png", "curves.png", "overview.png")
        for logger in trainer.loggers:
            show(logger, Results(trainer.global_step, findings, pictures, self.checkpoint), True)

    def _pictures(self, *files: str) -> dict[str, Path]:
        found = {key: self.directory / file for key, file in FILES.items() if file in files}
        return {key: path for key, path in found.items() if path.is_file()}


def show(logger: Logger, results: Results, tested: bool = False) -> None:
    """Send what a service can show; a CSV file gets nothing, since it holds numbers only."""
    if isinstance(logger, WandbLogger):
        show_in_wandb(logger, results, tested)
    elif isinstance(logger, TensorBoardLogger):
        show_in_tensorboard(logger, results)
    elif isinstance(logger, MLFlowLogger):
        show_in_mlflow(logger, results, tested)


def show_in_wandb(logger: WandbLogger, results: Results, tested: bool) -> None:
    """Send images with truth and finding as masks that can be toggled, a table, and a model."""
    import wandb

    shown: dict[str, Any] = {key: wandb.Image(str(p)) for key, p in results.pictures.items()}
    if results.findings:
        shown["test/images"] = [
            wandb.Image(finding.image, caption=caption_of(finding.row), masks=masks_of(finding))
            for finding in results.findings
        ]
        table = wandb.Table(columns=["picture", *COLUMNS])
        for finding in results.findings:
            values = (finding.row[column] for column in COLUMNS)
            table.add_data(wandb.Image(str(finding.file)), *values)
        shown["test/worst"] = table
    if shown:
        logger.experiment.log({**shown, "trainer/global_step": results.step})
    if tested and getattr(logger, "send_checkpoint", False):
        artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model")
        artifact.add_file(str(results.checkpoint))
        logger.experiment.log_artifact(artifact)


def masks_of(finding: Finding) -> dict[str, Any]:
    """Return masks for wandb: the true defect, if it was drawn, and the method's finding."""
    nothing = np.zeros(finding.image.shape[:2], dtype=bool)
    found = nothing if finding.outline is None else finding.outline
    masks = {"truth": finding.truth, "finding": found}
    return {
        name: {"mask_data": mask.astype(np.uint8), "class_labels": {0: "good", 1: name}}
        for name, mask in masks.items()
        if mask is not None
    }


def show_in_tensorboard(logger: TensorBoardLogger, results: Results) -> None:
    """Send the drawn panels, which show truth and finding as outlines, and the table as text."""
    from PIL import Image

    writer, step = logger.experiment, results.step
    pictures = dict(results.pictures)
    pictures |= {f"test/images/{finding.file.stem}": finding.file for finding in results.findings}
    for key, path in pictures.items():
        with Image.open(path) as picture:
            writer.add_image(key, np.array(picture.convert("RGB")), step, dataformats="HWC")
    if results.findings:
        lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        for finding in results.findings:
            lines.append("| " + " | ".join(str(finding.row[c]) for c in COLUMNS) + " |")
        writer.add_text("test/worst", "\n".join(lines), step)


def show_in_mlflow(logger: MLFlowLogger, results: Results, tested: bool) -> None:
    """Send the drawn files and the table as artifacts."""
    client, run = logger.experiment, logger.run_id
    for key, path in results.pictures.items():
        client.log_artifact(run, str(path), key.partition("/")[0])
    for finding in results.findings:
        client.log_artifact(run, str(finding.file), "test/images")
    if results.findings:
        rows = [[finding.row[column] for column in COLUMNS] for finding in results.findings]
        client.log_dict(run, {"columns": list(COLUMNS), "data": rows}, "test/worst.json")
    if tested and getattr(logger, "send_checkpoint", False):
        client.log_artifact(run, str(results.checkpoint), "checkpoints")
