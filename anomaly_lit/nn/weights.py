"""Find a backbone's weights, and check archives of weights; imports nothing slow."""

from __future__ import annotations

import os
import re
import socket
import threading
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

from anomaly_lit.types import UserError

WEIGHTS_FOLDER = "ANOMALY_LIT_WEIGHTS"
RECORD = b"PK\x03\x04"  # the first bytes of a zip archive, and so of every checkpoint
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


def check_archive(file: BinaryIO, path: Path) -> None:
    """Compare every record of a zip archive with its checksum, chunk by chunk.

    Raises:
        UserError: The file is empty, truncated, changed, or not an archive as torch writes it.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UserError(f"the checkpoint {path} is empty: use another one")
    if file.read(len(RECORD)) != RECORD:
        raise UserError(
            f"{path} is not a checkpoint, or its first bytes are damaged: give one that "
            "anomaly-train wrote"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            odd = any(  # torch would read uninitialised memory for a record marked as a folder
                record.compress_type != zipfile.ZIP_STORED or record.external_attr
                for record in records
            )
            if odd or sum(record.file_size for record in records) > size:
                raise zipfile.BadZipFile("its records are not as torch writes them")
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile raises many kinds
        raise UserError(
            f"the checkpoint {path} is damaged or truncated ({error}): copy it again or use "
            "another one"
        ) from error
    if damaged is not None:
        raise UserError(
            f"the checkpoint {path} is damaged: the checksum of its record {damaged} is wrong; "
            "copy it again or use another one"
        )


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
