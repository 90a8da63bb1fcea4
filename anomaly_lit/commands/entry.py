"""How every command starts under Hydra, and how its errors look.

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from anomaly_lit.config.hydra import check_own_options, config_dir, in_sweep, message_of
from anomaly_lit.runs.ranks import tells
from anomaly_lit.types import RUN_AGAIN, Stopped, UserError

INTERRUPTED = 130  # exit code after Ctrl-C, as in a shell
GOES_ON = "the same command with the same output_dir goes on from here"
STRANGE = re.compile(r"[^\w\s/\\+.$%*@?|:,=()\[\]{}'\"-]", re.ASCII)  # not in Hydra's grammar


def run_command(task: Callable[[DictConfig], Any], config_name: str, error_code: int = 1) -> None:
    """Run a task under Hydra; print errors that the user can fix without a traceback.

    `HYDRA_FULL_ERROR=1` shows the traceback of every error. The exit code is `RUN_AGAIN` if a
    scheduler's signal ended the task, `INTERRUPTED` after Ctrl-C, and `error_code` after any error.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    started = False

    def fail(error: BaseException) -> None:
        if started or tells():
            print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        sys.exit(error_code)

    def guarded(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        try:
            result = task(cfg)
            drop_empty_log()  # such as that of each rank but the first
            return result
        except Exception as error:
            if not in_sweep():
                leave_nothing(existed)
            in_words = isinstance(error, UserError | OSError)
            if in_words and not full and not in_sweep():  # the other jobs of a sweep go on
                fail(error)
            if in_sweep() and not in_words:
                # the launcher prints the error without a traceback, from another process
                logging.getLogger(__name__).exception("this job of the sweep failed")
            raise

    guarded.__module__ = task.__module__  # Hydra names the job after it
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, not exit
    named = [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("output_dir=")]
    existed = bool(named) and Path(named[-1].strip("'\"")).exists()
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    register_plugins()
    loud, logging.raiseExceptions = logging.raiseExceptions, full
    # a log that cannot be written, as on a full disk, must not bury the error that says why
    main = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)
    try:
        check_own_options(sys.argv[1:])
        main(guarded)()
    except KeyboardInterrupt:
        print(f"interrupted; {GOES_ON}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Stopped as stop:
        print(f"{stop}; {GOES_ON}", file=sys.stderr, flush=True)
        sys.exit(RUN_AGAIN)
    except SystemExit as end:
        if started or not end.code:
            raise
        sys.exit(error_code)  # argparse, which has already said what is wrong
    except Exception as error:
        if not started and (words := no_folder(error)):
            error = UserError(words)
        of_hydra = (CompactHydraException, OmegaConfBaseException)  # such as a null group
        in_words = isinstance(error, (*of_hydra, UserError, OSError)) or (
            isinstance(error, ValueError) and not started
        )
        if in_words and not full:
            fail(error)
        traceback.print_exc()
        sys.exit(error_code)
    finally:
        logging.raiseExceptions = loud
        if not full:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def no_folder(error: Exception) -> str:
    """Say that Hydra could not make the folder of a run, or its log; empty for any other error."""
    of_log = str(error).startswith("Unable to configure handler")
    cause = error.__cause__ if of_log else error
    full = (errno.ENOSPC, errno.EDQUOT)
    if not isinstance(cause, OSError) or not cause.filename or cause.errno in full:
        return ""
    place = Path(cause.filename)
    file = next((path for path in (place, *place.parents) if path.is_file()), None)
    reason = f"{file} is a file" if file else cause.strerror
    name = f"{place} in output_dir" if of_log else f"output_dir={place}"
    return f"{name} cannot be made ({reason}): choose another output_dir that you can write to"


def leave_nothing(existed: bool) -> None:
    """Remove the empty log and the new folder that Hydra made for a task that then failed."""
    drop_empty_log()
    if not existed:
        with suppress(OSError):
            Path(HydraConfig.get().runtime.output_dir).rmdir()


def drop_empty_log() -> None:
    """Remove the log that Hydra opened for this command if nothing was written."""
    log = Path(HydraConfig.get().runtime.output_dir, f"{HydraConfig.get().job.name}.log")
    with suppress(OSError):
        if not log.stat().st_size:
            log.unlink()


def register_plugins() -> None:
    """Register our launchers and sweeper; let our presets replace others of the same name."""
    from hydra_plugins.anomaly_lit_launcher import ProcessLauncher, SlurmLauncher
    from hydra_plugins.anomaly_lit_launcher.others import OtherLauncher
    from hydra_plugins.anomaly_lit_launcher.ray import RayLauncher
    from hydra_plugins.anomaly_lit_sweeper import StudySweeper

    for plugin in (ProcessLauncher, SlurmLauncher, RayLauncher, OtherLauncher, StudySweeper):
        Plugins.instance().register(plugin)  # Hydra's search misses them in a checkout
    stored = ConfigStore.instance().repo.get("hydra", {})
    for group in ("launcher", "sweeper", "sweeper/sampler", "sweeper/pruner"):
        names = {path.name for path in Path(config_dir(), "hydra", group).glob("*.yaml")}
        options = stored
        for part in group.split("/"):
            options = options.get(part, {})
        for name in names & options.keys():
            del options[name]  # Hydra would merge it into ours, with a warning


def quoted(argument: str) -> str:
    """Quote the value of `key=value` where Hydra's grammar would stumble over a path.

    >>> quoted("input=/a/b (1).png")
    "input='/a/b (1).png'"
    """
    key, equals, value = argument.partition("=")
    strange = STRANGE.search(value) or (
        re.search(r"[/\\]", value) and re.search(r"[=(){}:'\"\s]", value)
    )
    there = re.search(r"[,=]", value) and os.path.lexists(os.path.expanduser(value))
    if there and "'" not in value:
        return f"{key}='{value}'"
    if not equals or not strange or value[0] in "'\"[{$" or "," in value or "${" in value:
        return argument
    # Hydra reads backslashes as themselves, except before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"
