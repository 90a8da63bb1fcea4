"""What a run needs to know from Hydra: where configurations are, the job, and its folder."""

from __future__ import annotations

import difflib
import errno
import hashlib
import re
import sys
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anomaly_lit.types import UserError

MOST_OPTIONS = 24  # most options of a group that a message lists


def config_dir() -> str:
    """Return the folder of configurations: in an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return str(next(path for path in (here / "conf", here.parent / "conf") if path.is_dir()))


def check_own_options(arguments: Sequence[str]) -> None:
    """Refuse options in the user's `--config-dir` that have the name of one of the package's.

    Raises:
        UserError: There is one: Hydra would take the package's, and say nothing.
    """
    pairs = pairwise([*arguments, ""])
    given = [
        a.partition("=")[2] or after for a, after in pairs if re.match("(--config-dir|-cd)(=|$)", a)
    ]
    for folder in map(Path, given):
        for file in sorted(folder.rglob("*.yaml")):
            option = file.relative_to(folder)
            if Path(config_dir(), option).exists():
                raise UserError(
                    f"{file} would never be used: the package has {option.with_suffix('')} too; "
                    "give it another name"
                )


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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" of {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}: free some, and run the same command again"
    text = _hydra_in_words(error) or str(error) or type(error).__name__
    if text.startswith("Caught UserError in DataLoader worker"):
        text = text.rpartition("UserError: ")[2].strip()  # torch puts a traceback in front
    if isinstance(error, OmegaConfBaseException):
        first = text.splitlines()[0]
        return f"{error.full_key}: {first}" if error.full_key else first
    return text


def _hydra_in_words(error: BaseException) -> str:
    """Say in one sentence what Hydra says in several lines; empty for any other error."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        reason = error.message.partition("See https://")[0].splitlines()[-1]
        return (
            f"cannot read the argument {error.override!r} ({reason}): write KEY=VALUE, and a value "
            "with special characters as KEY=\\'VALUE\\'"
        )
    if text.startswith("Ambiguous value for argument"):
        argument = text.splitlines()[0].removeprefix("Ambiguous value for argument ")
        return (
            f"{argument} has a comma: add -m to run one job after another, write KEY=[a,b] for a "
            "list, or KEY=\\'a,b\\' for a text with a comma"
        )
    if text.startswith("Config group override must be"):
        wrong = ", ".join(a for a in sys.argv[1:] if re.fullmatch(r"[\w/@.]*=(null|[\d.]+)?", a))
        return f"a group takes the name of one of its options, such as dataset=demo; found {wrong}"
    sought = re.match(r"(?s)(?:In '.*?': )?Could not find '(.*?)'\n+Available options in", text)
    if sought:
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        group, _, name = sought[1].rpartition("/")
        near = nearest(name, options)
        what = f"the options of {group} are"
        if len(options) > MOST_OPTIONS:
            what = (
                f"of the {len(options)} options of {group}, which --help shows, the most alike are"
            )
            options = sorted(difflib.get_close_matches(name, options, MOST_OPTIONS, cutoff=0))
        return f"could not find {sought[1]!r}: {what} {', '.join(options)}{near}"
    there = re.match(r"Could not append to config. An item is already at '(.*?)'", text)
    if there:
        return f"{there[1]} is there already: write it without the +"
    absent = re.match(r"Could not override '(.*?)'", text)
    if absent:
        parent = getattr(error.__cause__, "parent_node", None)
        known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
        near = nearest(absent[1].rpartition(".")[2], known)
        return f"{absent[1]}: there is no such key{near or '; --cfg job shows all'}"
    return ""


def nearest(key: str, known: Collection[str]) -> str:
    """Return `; did you mean 'NAME'?` with the most similar of several names, or nothing."""
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def in_sweep() -> bool:
    """Return whether this job is part of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides_of_job(typed: list[str]) -> list[str]:
    """Return the overrides of this job of a multirun that its jobs do not share.

    Args:
        typed: The overrides as typed, where those that vary have several values.
    """
    if not in_sweep():
        return []
    parsed = OverridesParser.create().parse_overrides(typed)
    shared = {one.get_key_element() for one in parsed if not one.is_sweep_override()}
    told = HydraConfig.get().overrides.task
    return [override for override in told if override.partition("=")[0] not in shared]


def output_folder() -> Path:
    """Return the folder of this run or of this job of a sweep.

    Raises:
        UserError: Its name is empty.
    """
    if not in_sweep() and not str(HydraConfig.get().run.dir).strip():
        raise UserError("output_dir is empty: name the folder of the run with output_dir=DIR")
    return Path(HydraConfig.get().runtime.output_dir)


def plain(config: Any) -> Any:
    """Return dicts, lists and numbers, with every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
