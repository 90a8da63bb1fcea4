"""`anomaly-test`: test a checkpoint on the data set it was trained for, or on another."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import output_folder, plain
from anomaly_lit.config.trust import admit
from anomaly_lit.config.validate import validate
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    from anomaly_lit.methods.base import Method


def main() -> None:
    """Run the command."""
    run_command(test, "test")


def test(cfg: DictConfig) -> None:
    """Load the checkpoint, test it, and write what `anomaly-train` writes about a test."""
    config = plain(cfg)
    validate(config, "test")
    directory = output_folder()
    if config["ckpt_path"] is None:
        raise UserError("ckpt_path is not set: anomaly-test ckpt_path=FILE")
    if (directory / "metrics.json").exists():
        raise UserError(f"{directory / 'metrics.json'} exists; choose another output_dir")

    import pytorch_lightning as pl

    from anomaly_lit.callbacks.clips import ClipScores
    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.outputs import Outputs
    from anomaly_lit.callbacks.progress import progress_bar
    from anomaly_lit.callbacks.run import StepSeeds
    from anomaly_lit.files import environment, note, note_origin, write_json
    from anomaly_lit.inference.checkpoint import build_method, read_checkpoint
    from anomaly_lit.reporting.terminal import print_results, results_text
    from anomaly_lit.runs.build import made_by
    from anomaly_lit.runs.failures import quiet
    from anomaly_lit.runs.record import seen_names, selection_of, tested

    quiet()
    checkpoint = read_checkpoint(config["ckpt_path"])
    trained = checkpoint["anomaly_lit"]["config"]
    node = trained["method"] | config["method"]
    dataset = trained["dataset"] | {k: v for k, v in config["dataset"].items() if v is not None}
    if not config["method"]:  # there is no validation, so nothing is corrupted
        dataset |= {"synthesis": None, "validate_on_synthesis": False}
    trust = config["trust"]
    check_seen(trained["dataset"], dataset)
    dataset = admit(dataset, "dataset", trust)
    scoring = admit(trained["callbacks"]["evaluation"], "evaluation", trust)
    method = build_method({**trained, "method": node}, trust)
    load_weights(method, checkpoint["state_dict"], config["method"])
    needs = sorted(method.needs & {"frames"})  # what a test reads
    datamodule = instantiate({**dataset, "needs": needs}, "dataset")
    if trust or config["dataset"]["root"] is not None:  # may write, so only if the user allows it
        datamodule.prepare_data()
    datamodule.check_apart(directory)
    datamodule.setup("test")
    calibration = checkpoint["anomaly_lit"].get("calibration", {})
    build = instantiate({**scoring, "_partial_": True}, "evaluation")
    evaluation = build(calibration=calibration)  # data of the checkpoint: never instantiated
    assert isinstance(evaluation, Evaluation)
    outputs = Outputs(str(directory), config["max_images"])
    make = partial(
        pl.Trainer,
        accelerator=config["accelerator"],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            evaluation,
            outputs,
            ClipScores(str(directory)),
            StepSeeds(trained["seed"]),
            progress_bar(),
        ],
    )
    trainer = made_by(make, {"accelerator": config["accelerator"]})
    note_origin()
    note(datamodule.summary())
    if config["method"]:  # other scores need other thresholds
        datamodule.setup("validate")
        trainer.validate(method, datamodule=datamodule, verbose=False)
    start = time.perf_counter()
    trainer.test(method, datamodule=datamodule, verbose=False)
    seconds = time.perf_counter() - start
    metrics = {
        **tested(trainer, evaluation),
        "test_seconds_per_image": seconds / max(1, len(datamodule.test_samples)),
        "selection": selection_of(trained, method),
        "seen": seen_names(datamodule),
        "seed": trained["seed"],
        "method_changes": config["method"],
        "ckpt_path": str(config["ckpt_path"]),
        "data_digest": datamodule.digest,
        **environment(),
    }
    write_json(directory / "metrics.json", metrics)
    print_results(metrics, directory)
    note(results_text(metrics))


def check_seen(trained: dict[str, Any], tested: dict[str, Any]) -> None:
    """Refuse a test on images that the checkpoint learned from.

    Args:
        trained: The data set of training.
        tested: The data set of this test.

    Raises:
        UserError: Training drew real defects from the test set, and the test would draw others.
    """
    keys = ("seen", "seed")
    if trained.get("seen") and any(trained.get(key) != tested.get(key) for key in keys):
        then, now = (
            " and ".join(f"dataset.{key}={of.get(key)}" for key in keys) for of in (trained, tested)
        )
        raise UserError(
            f"the checkpoint learned from the test images that {then} draw, and {now} would score "
            "some of them: leave both as they were in training"
        )


def load_weights(method: Method, weights: dict[str, Any], changes: dict[str, Any]) -> None:
    """Load weights into a method whose configuration may differ from that of training.

    Raises:
        UserError: The changes do not fit the weights.
    """
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"method {changes} does not fit the checkpoint's weights: change only what scoring "
            "reads, not what shapes the network"
        ) from error


if __name__ == "__main__":
    main()
