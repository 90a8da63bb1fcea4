"""What of Hydra a run needs to know: where configurations lie, the job, its folder."""

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
    """The folder of configurations: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return str(next(path for path in (here / "conf", here.parent / "conf") if path.is_dir()))


def job_folder(overrides: str) -> str:
    """Name of a sweep job's folder: its overrides, short and safe for every file system.

    Where they are long, each key is reduced to its last part, and each value to 16 letters; a hash
    of the whole tells apart what then looks the same. At most 120 letters, since dashboards cut
    names at 128.

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
    """What went wrong, in words, with the cause that Hydra keeps apart."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return message_of(error.__cause__)
    text = str(error) or type(error).__name__
    if text.startswith("Caught UserError in DataLoader worker"):
        text = text.rpartition("UserError: ")[2].strip()  # torch puts a traceback before it
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    return text


def in_sweep() -> bool:
    """Whether this job is one of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def output_folder() -> Path:
    """The folder of this run or of this job of a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def plain(config: Any) -> Any:
    """Dicts, lists and numbers, with every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
