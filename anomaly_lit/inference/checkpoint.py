"""What a checkpoint holds, read without running any code that it might hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.trust import check_targets
from anomaly_lit.data.images import Resize
from anomaly_lit.methods.base import Method
from anomaly_lit.types import UserError

FORMAT_VERSION = 1


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The plain content of a checkpoint; runs no code that it might hold.

    Raises:
        UserError: The file is absent, damaged, or lacks the configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist; set ckpt_path=FILE")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text advises to run whatever it holds
        raise UserError(
            f"the checkpoint {path} is damaged, no checkpoint, or holds more than plain data"
        ) from error
    except Exception as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error}") from error
    entry = checkpoint.get("anomaly_lit", {}) if isinstance(checkpoint, dict) else {}
    if "config" not in entry:
        raise UserError(
            f"{path} holds no configuration: only checkpoints of anomaly-train can be loaded so; "
            "for others use the method's load_from_checkpoint"
        )
    if entry["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {entry['format_version']}, this version reads up to "
            f"{FORMAT_VERSION}: update anomaly_lit"
        )
    return checkpoint


def build_method(config: dict[str, Any], trust: bool = False) -> Method:
    """The untrained method of a plain configuration, after a look at the code it names."""
    check_targets(config["method"], trust)
    return instantiate(config["method"])


def geometry_of(config: dict[str, Any]) -> Resize:
    """The geometry with which the images of a run were read."""
    dataset = config["dataset"]
    return Resize(
        dataset["image_size"],
        dataset.get("resize", "stretch"),
        dataset.get("center_crop"),
        dataset.get("interpolation", "bilinear"),
    )
