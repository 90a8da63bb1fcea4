"""Composition of the configuration: where it lies, whether it fits the code, how errors look.

The one module besides the commands that knows Hydra. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anomaly_lit.types import Stopped, UserError
from hydra_plugins.anomaly_lit_launcher import ProcessLauncher
from hydra_plugins.anomaly_lit_launcher.others import OtherLauncher
from hydra_plugins.anomaly_lit_sweeper import StudySweeper

RUN_AGAIN, INTERRUPTED = 75, 130  # exit codes: EX_TEMPFAIL of sysexits.h, and Ctrl-C in a shell
GOES_ON = "the same command with the same output_dir goes on from here"
SAFE_TARGETS = ("anomaly_lit.", "torch.nn.", "torch.optim.")
STRANGE = re.compile(r"[^\w\s/\\+.$%*@?|:,=()\[\]{}'\"-]", re.ASCII)  # no word of Hydra's
HINTS: dict[str, Any] = {  # of keys that belong to no node with a signature
    "seed": int,
    "image_size": int | list[int],
    "output_dir": str,
    "selection": Literal["last", "best", "oracle"],
    "threshold.fpr": float,
    "checkpoint.every_minutes": float,
    "checkpoint.every_steps": int | None,
    "clear_cache": bool,
}


def config_dir() -> str:
    """The folder of configurations: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
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


def run_command(task: Callable[[DictConfig], Any], config_name: str, error_code: int = 1) -> None:
    """Runs a task under Hydra; what the user can mend is shown in a line, without a traceback.

    ``HYDRA_FULL_ERROR=1`` shows the traceback of every error. The exit code is ``RUN_AGAIN`` where
    a scheduler's signal ended the task, and ``INTERRUPTED`` after Ctrl-C.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    started = False

    def fail(error: BaseException) -> None:
        print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        sys.exit(error_code)

    def guarded(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        try:
            return task(cfg)
        except (UserError, OSError) as error:
            if full or in_sweep():  # the other jobs of a sweep go on
                raise
            fail(error)
        except Exception:
            if in_sweep():  # the launcher tells the error alone, and from another process
                logging.getLogger(__name__).exception("this job of the sweep failed")
            raise

    guarded.__module__ = task.__module__  # Hydra names the job after it
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of exiting
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    register_plugins()
    main = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)
    try:
        main(guarded)()
    except (CompactHydraException, OmegaConfBaseException, UserError, OSError) as error:
        if full:
            raise
        fail(error)
    except ValueError as error:
        if full or started:
            raise
        fail(error)  # Hydra's, such as for a group set to null
    except KeyboardInterrupt:
        print(f"interrupted; {GOES_ON}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Stopped as stop:
        print(f"{stop}; {GOES_ON}", file=sys.stderr, flush=True)
        sys.exit(RUN_AGAIN)
    finally:
        if not full:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def register_plugins() -> None:
    """Our launchers and our sweeper, and our presets in place of others of the same name."""
    for plugin in (ProcessLauncher, OtherLauncher, StudySweeper):
        Plugins.instance().register(plugin)  # Hydra's search misses them in a checkout
    stored = ConfigStore.instance().repo.get("hydra", {})
    for group in ("launcher", "sweeper", "sweeper/sampler", "sweeper/pruner"):
        names = {path.name for path in Path(config_dir(), "hydra", group).glob("*.yaml")}
        options = stored
        for part in group.split("/"):
            options = options.get(part, {})
        for name in names & options.keys():
            del options[name]  # Hydra would merge it into ours, with a warning


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


def quoted(argument: str) -> str:
    """Quotes the value of ``key=value`` where Hydra's grammar would stumble over a path.

    >>> quoted("input=/a/b (1).png")
    "input='/a/b (1).png'"
    """
    key, equals, value = argument.partition("=")
    strange = STRANGE.search(value) or (
        re.search(r"[/\\]", value) and re.search(r"[=(){}:'\"\s]", value)
    )
    if not equals or not strange or value[0] in "'\"[{$" or "," in value or "${" in value:
        return argument
    # Hydra reads backslashes as themselves, save before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"


def in_sweep() -> bool:
    """Whether this job is one of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def output_folder() -> Path:
    """The folder of this run or of this job of a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def plain(config: Any) -> Any:
    """Dicts, lists and numbers, with every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def instantiate(config: Any) -> Any:
    """Builds what a configuration describes; its errors come out as they were raised."""
    from hydra.utils import instantiate as build

    try:
        return build(config, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise


def import_target(path: str) -> Any:
    """The class or function that a ``_target_`` names.

    Raises:
        UserError: There is none of that name.
    """
    try:
        return hydra.utils.get_object(path)
    except Exception as error:
        raise UserError(f"cannot import {path!r}: {error}") from error


def check_targets(config: Any, trust: bool = False) -> None:
    """Refuses code that a checkpoint of unknown origin might smuggle in.

    A name says little: ``anomaly_lit.files.os.system`` begins well, so the place where the object
    was defined decides. Interpolations are refused, since they may build nodes of their own.

    Raises:
        UserError: A ``_target_`` lies outside anomaly_lit, torch.nn and torch.optim.
    """
    if trust:
        return
    found = [(path, node["_target_"]) for path, node in nodes(config)]
    foreign = [f"  {path}: {target}" for path, target in found if not _is_safe(target)]
    foreign += [f"  {path}: {text}" for path, text in _texts(config) if "${" in text]
    if foreign:
        raise UserError(
            "the checkpoint's configuration names code outside "
            f"{', '.join(name.rstrip('.') for name in SAFE_TARGETS)}:\n" + "\n".join(foreign)
            + "\nLoad it with trust=true only if you know who made it"
        )  # fmt: skip


def _is_safe(target: Any) -> bool:
    if not isinstance(target, str) or not target.startswith(SAFE_TARGETS):
        return False
    found = import_target(target)
    home = f"{getattr(found, '__module__', '')}."
    return home.startswith(SAFE_TARGETS) and (inspect.isclass(found) or home.startswith("torch."))


def _texts(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string, keys included, with its path."""
    if isinstance(config, str):
        yield path, config
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from _texts(key, path)
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for position, value in enumerate(config):
            yield from _texts(value, f"{path}[{position}]")


def nodes(config: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a ``_target_``, with its path, outermost first."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for position, value in enumerate(config):
            yield from nodes(value, f"{path}[{position}]")


def validate(config: Mapping[str, Any]) -> None:
    """Compares every ``_target_`` node with the signature it is meant for.

    Args:
        config: The composed configuration as plain data.

    Raises:
        UserError: Lists every unknown, missing or ill-typed parameter with its path.
    """
    problems = [problem for path, node in nodes(config) for problem in _misfits(path, node)]
    for path, hint in HINTS.items():
        section, _, key = path.rpartition(".")
        values = config.get(section, {}) if section else config
        if key in values and not fits(values[key], hint):
            problems.append(f"{path}: {values[key]!r} is no {_name(hint)}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"the config does not fit the code:\n{lines}")


def _misfits(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    try:
        target = import_target(node["_target_"])
    except UserError as error:
        yield f"{path}: {error}"
        return
    function = target.__init__ if inspect.isclass(target) else target
    try:
        parameters = dict(inspect.signature(target).parameters)
    except ValueError:  # a builtin that does not tell
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that only a type checker can read
        hints = {}
    for key, value in given.items():
        if key not in parameters:
            if not takes_any:
                near = difflib.get_close_matches(key, parameters, n=1)
                mean = f"; did you mean {near[0]!r}?" if near else ""
                yield f"{path}: {node['_target_']} has no parameter {key!r}{mean}"
        elif key in hints and not fits(value, hints[key]):
            yield f"{path}.{key}: {value!r} is no {_name(hints[key])}"
    if not node.get("_partial_") and "_args_" not in node:
        for key, parameter in parameters.items():
            if (
                parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
                and key not in given
            ):
                yield f"{path}: {node['_target_']} needs {key!r}, which the config does not give"


def fits(value: Any, hint: Any) -> bool:
    """Whether plain data may be passed where ``hint`` is expected; unknown hints accept all."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # built before it is passed
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence, typing.Sequence):
        return isinstance(value, list) and (
            not arguments or all(fits(item, arguments[0]) for item in value)
        )
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if inspect.isclass(hint) and hint.__module__.split(".")[0] in ("torch", "anomaly_lit"):
        return not isinstance(value, str | int | float | bool | list) and value is not None
    return True


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(str(option) for option in typing.get_args(hint))}"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def moved(config: Any, folder: str) -> Any:
    """The configuration of a run as it reads after its output_dir was renamed to ``folder``."""
    old = config["output_dir"]

    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.replace(old, folder) if isinstance(value, str) else value

    return move(config)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """The keys in which two plain configurations differ, each with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = list(dict.fromkeys([*before, *after]))
        absent = object()
        return [
            line
            for key in keys
            for line in differences(
                before.get(key, absent), after.get(key, absent), f"{path}.{key}" if path else key
            )
        ]
    if before == after:
        return []
    shown = [json.dumps(v) if _is_plain(v) else "absent" for v in (before, after)]
    return [f"{path}: {shown[0]} there, {shown[1]} now"]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)
