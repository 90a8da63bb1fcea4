"""Read what a checkpoint holds, without running any code in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.trust import admit, check_size
from anomaly_lit.config.validate import validate
from anomaly_lit.data.images import Resize
from anomaly_lit.methods.base import Method
from anomaly_lit.nn.weights import check_archive
from anomaly_lit.types import UserError

FORMAT_VERSION = 2  # of the checkpoints that this version writes
OLDEST_READABLE = 2
WRITERS = {1: "0.1"}  # the version of anomaly_lit that wrote each old format


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the plain content of a checkpoint, without running any code in it.

    The checksum of every record is compared first, which takes about a millisecond for each MB.

    Raises:
        UserError: The file is missing, damaged, not a checkpoint, or of another format.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            check_archive(file, path)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # torch's message advises running its code
        raise UserError(
            f"the checkpoint {path} is not a checkpoint, or holds more than plain data: give one "
            "that anomaly-train wrote"
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"the checkpoint {path} cannot be read: {reason}") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the checkpoint {path} cannot be read: {reason}") from error
    _check_content(checkpoint, path)
    return checkpoint


def build_method(config: Mapping[str, Any], trust: bool = False) -> Method:
    """Build the untrained method of a checkpoint's configuration, without backbone weights.

    Raises:
        UserError: It names something that a checkpoint may not name, or does not fit the code.
    """
    return instantiate(admit(config["method"], "method", trust), "method")


def method_of(checkpoint: Mapping[str, Any], trust: bool = False) -> Method:
    """Build the method of a checkpoint with its weights.

    Raises:
        UserError: As in `build_method`, or the weights do not fit the configuration.
    """
    method = build_method(checkpoint["anomaly_lit"]["config"], trust)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # of any kind, since a module may bring a state of its own
        lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines()]
        raise UserError(
            f"the checkpoint's weights do not fit its configuration: {' '.join(lines[:3])[:300]}; "
            "another version of anomaly_lit may have written it"
        ) from error
    return method


def geometry_of(config: Mapping[str, Any]) -> Resize:
    """Return the geometry with which the images of a run were read.

    Raises:
        UserError: The configuration has none, or its values have the wrong type.
    """
    dataset = config["dataset"]
    names = {"image_size": "image_size", "resize": "policy", "center_crop": "center_crop",
             "interpolation": "interpolation"}  # fmt: skip
    given = {name: dataset[key] for key, name in names.items() if key in dataset}
    validate({"dataset": {"_target_": "anomaly_lit.data.images.Resize", **given}}, None)
    return Resize(**given)


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        inside = path / "checkpoints" / "last.ckpt"
        hint = inside if inside.is_file() else f"{path}/FILE"
        raise UserError(f"the checkpoint {path} is a folder; set ckpt_path={hint}")
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist; set ckpt_path=FILE")
    if not path.is_file():  # opening a pipe would wait for a writer
        raise UserError(f"the checkpoint {path} is not a regular file; set ckpt_path=FILE")
    return path.open("rb")


def _check_content(checkpoint: Any, path: Path) -> None:
    """Raise if a part is missing, or this version does not read the format."""
    entry = checkpoint.get("anomaly_lit") if isinstance(checkpoint, Mapping) else None
    if not isinstance(entry, Mapping) or "config" not in entry:
        raise UserError(
            f"{path} holds no configuration: only checkpoints of anomaly-train can be loaded this "
            "way; for others use the method's load_from_checkpoint"
        )
    check_format(entry.get("format_version"), path)
    config = entry["config"]
    parts = {
        "config": config,
        "config.method": config.get("method") if isinstance(config, Mapping) else None,
        "config.dataset": config.get("dataset") if isinstance(config, Mapping) else None,
        "calibration": entry.get("calibration", {}),
        "state_dict": checkpoint.get("state_dict"),
    }
    for name, part in parts.items():
        if not isinstance(part, Mapping) or not all(isinstance(key, str) for key in part):
            raise UserError(
                f"the checkpoint {path} has no valid {name}: give one that anomaly-train wrote"
            )
    check_size(config, "configuration")


def check_format(version: Any, path: Path) -> None:
    """Raise if this version does not read a checkpoint's format.

    Raises:
        UserError: The format is older than `OLDEST_READABLE` or newer than `FORMAT_VERSION`.
    """
    if not isinstance(version, int):
        raise UserError(
            f"the checkpoint {path} has no valid format_version: give one that anomaly-train wrote"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, this version reads up to {FORMAT_VERSION}: update "
            "anomaly_lit"
        )
    if version < OLDEST_READABLE:
        writer = f"anomaly_lit {WRITERS.get(version, 'of that time')}"
        raise UserError(
            f"{path} has format {version} ({writer}); this version reads format {FORMAT_VERSION}: "
            f"train again with the same command, or use {writer} to read it"
        )
