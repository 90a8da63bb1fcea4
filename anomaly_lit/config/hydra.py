"""What a run needs to know from Hydra: where configurations are, the job, and its folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def config_dir() -> str:
    """Return the folder of configurations: in an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return str(next(path for path in (here / "conf", here.parent / "conf") if path.is_dir()))


def job_folder(overrides: str) -> str:
    """Return the folder name of a sweep's job: its overrides, short and safe on any file system.

    If they are long, each key is reduced to its last part and each value to 16 characters, and a
    hash of the full text keeps names distinct. At most 120 characters, since dashboards cut names
    at 128.

    >>> job_folder("method=uniad,dataset.categories=[a b]")
    'method=uniad,dataset.categories=_a_b_'
    """

    def safe(text: str) -> str:
        return re.sub(r"[^\w=.,+-]", "_", text)

    if len(overrides) <= 120:
        return safe(overrides) or "default"
    parts = [part.partition("=") for part in re.split(r",(?=[\w.@/+~]+=)", overrides)]
    short = ",".join(f"{re.split(r'[./]', key)[-1]}={value[:16]}" for key, _, value in parts)
    mark = hashlib.sha256(overrides.encode()).hexdigest()[:12]
    return f"{safe(short)[:107]}-{mark}"


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def message_of(error: BaseException) -> str:
    """Return what went wrong, in words, with the cause that Hydra keeps separately."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return message_of(error.__cause__)
    text = str(error) or type(error).__name__
    if text.startswith("Caught UserError in DataLoader worker"):
        text = text.rpartition("UserError: ")[2].strip()  # torch puts a traceback in front
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    return text


def in_sweep() -> bool:
    """Return whether this job is part of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def output_folder() -> Path:
    """Return the folder of this run or of this job of a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def plain(config: Any) -> Any:
    """Return dicts, lists and numbers, with every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
