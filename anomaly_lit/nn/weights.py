"""Find a backbone's weights; imports nothing slow, so that a command fails early."""

from __future__ import annotations

import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from anomaly_lit.types import UserError

WEIGHTS_FOLDER = "ANOMALY_LIT_WEIGHTS"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def find_weights(
    name: str, weights: str, stem: str | None = None, key: str = "method.backbone.weights"
) -> Path | None:
    """Return the file to read, or None if the weights are random or come from the hub.

    Args:
        name: timm's name with its tag, such as `resnet18.tv_in1k`.
        weights: `pretrained`, `random`, `demo` (the file in this package) or a path.
        stem: Name, without its ending, of the file in the folder `ANOMALY_LIT_WEIGHTS`; by default
            the architecture's name.
        key: The configuration key to set, for error messages.

    Raises:
        UserError: A named file is missing, two files of the folder fit, or `pretrained` weights are
            neither in the folder nor in the hub's cache, and the hub cannot be reached.
    """
    if weights == "random":
        return None
    if weights == "demo":
        return Path(__file__).parent.parent / "weights" / "demo_backbone.safetensors"
    if weights != "pretrained":
        return _existing(Path(weights).expanduser(), name, key)
    found = _search_folder(name, stem or name.split(".")[0])
    if found is None and not (_in_hub_cache(name) or _hub_answers()):
        folder = os.environ.get(WEIGHTS_FOLDER)
        looked = f"the folder {folder} ({WEIGHTS_FOLDER})" if folder else f"{WEIGHTS_FOLDER} unset"
        raise UserError(
            f"no weights for the backbone {name}: {looked}, nothing in the hub's cache, and the "
            f"hub does not answer. Set {key}=FILE (timm state dict, .safetensors "
            f"or .pth), or {WEIGHTS_FOLDER}=DIR with a file named {stem or name.split('.')[0]}"
            f".safetensors, or {key}=random to train on random features"
        )
    return found


def _existing(path: Path, name: str, key: str) -> Path:
    if path.is_file():
        return path
    raise UserError(
        f"the weights file {path} for the backbone {name} does not exist; "
        f"{key} takes a file, 'pretrained' or 'random'"
    )


def _search_folder(name: str, stem: str) -> Path | None:
    folder = os.environ.get(WEIGHTS_FOLDER)
    if not folder:
        return None
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{WEIGHTS_FOLDER} names {root}, which is not a folder")
    files = sorted(path for path in root.iterdir() if path.suffix in SUFFIXES)
    fitting = [path for path in files if path.stem == stem]
    fitting = fitting or [path for path in files if path.stem == name]
    longer = re.compile(re.escape(name) + r"[._-]")
    fitting = fitting or [path for path in files if longer.match(path.stem)]
    if len(fitting) > 1:
        names = ", ".join(path.name for path in fitting)
        raise UserError(f"{root} holds several files for {name}: {names}; name one with weights=")
    return fitting[0] if fitting else None


def _in_hub_cache(name: str) -> bool:
    cache = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    return any(cache.glob(f"models--timm--{name}/snapshots/*/*"))


def _hub_answers(timeout: float = 1.0) -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    from huggingface_hub import constants

    url = urlparse(os.environ.get("HF_ENDPOINT", constants.ENDPOINT))
    answered = threading.Event()

    def knock() -> None:
        with suppress(OSError), socket.create_connection((url.hostname, url.port or 443), timeout):
            answered.set()

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no timeout
    thread.start()
    thread.join(timeout)
    return answered.is_set()
