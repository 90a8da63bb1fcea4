"""Tries names as a checkpoint's `_target_` and tells what that did; run by `test_trust.py`.

`python audited.py names OUT` writes every name below the packages. `python audited.py try IN` reads
`{"names": [...] or null, "nodes": [[part, node], ...]}` and prints what it saw as JSON; null stands
for the names in modules that are loaded anyway.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

ROOTS = ("anomaly_lit", "torch.nn", "torch.optim")
QUIET = ("object.", "sys._getframe", "code.__new__", "gc.", "builtins.id")
NVML = "('libnvidia-ml.so.1',)"  # asked whether there is a GPU
METADATA = re.compile(r"(dist-info[/\\]+METADATA|python\d+\.zip|__path_hook__)'")  # for a version
seen: list[str] = []
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching or event.startswith(QUIET) or str(arguments) == NVML:
        return
    if event in ("open", "os.listdir") and METADATA.search(str(arguments)):
        return
    if event in ("compile", "exec"):  # annotations and data classes are texts of no file
        code = getattr(arguments[0], "co_filename", arguments[-1])
        if code in ("<string>", "<unknown>"):
            return
    seen.append(f"{event} {arguments[:2]!r:.200}")


def modules_of(*roots: str) -> list[ModuleType]:
    modules = [importlib.import_module(root) for root in roots]
    for module in list(modules):
        for info in pkgutil.walk_packages(module.__path__, f"{module.__name__}.", lambda _: None):
            try:
                modules.append(importlib.import_module(info.name))
            except Exception:
                continue  # needs a package that is not installed
    return modules


def names_in(modules: list[ModuleType], deep: bool) -> Iterator[str]:
    for module in modules:
        yield module.__name__
        for name in {*dir(module), *getattr(module, "__all__", ())}:
            yield f"{module.__name__}.{name}"
            for inner in dir(getattr(module, name, None)) if deep else ():
                yield f"{module.__name__}.{name}.{inner}"


def attempt(part: Any, node: Any) -> str:
    """Builds a node as `load` and `anomaly-test` do; returns the error, empty if there is none."""
    from anomaly_lit.config.build import instantiate
    from anomaly_lit.config.trust import admit

    global watching
    watching = True
    try:
        instantiate(admit(node, part), part)
        return ""
    except ValueError as error:
        return str(error)
    finally:
        watching = False


def try_all(names: list[str] | None, nodes: list[tuple[str, Any]]) -> dict[str, Any]:
    from anomaly_lit.config.trust import Part

    for _ in names_in(modules_of("anomaly_lit"), deep=False):
        pass  # packages that look their names up in our own files do so now
    if names is None:
        loaded = [m for n, m in list(sys.modules.items()) if f"{n}.".startswith(ROOTS)]
        names = sorted(set(names_in(loaded, deep=False)))
    sys.addaudithook(watch)
    outcomes: list[dict[str, Any]] = []

    def note(part: str, node: Any) -> str:
        seen.clear()
        before = set(sys.modules)
        error = attempt(part, node)
        imported = [f"import {name}" for name in set(sys.modules) - before]
        outcomes.append({"part": part, "node": node, "error": error, "seen": seen + imported})
        return error

    for part in get_args(Part):
        for start in range(0, len(names), 1000):
            chunk = [{"_target_": name} for name in names[start : start + 1000]]
            text = note(part, {"_target_": "none", "within": chunk})
            outcomes[-1]["error"] = ""
            for node in chunk:
                if f": {node['_target_']} is not on the list" not in text:
                    note(part, node)
                    note(part, {"_target_": "anomaly_lit.methods.UniAD", "loss": node})
        for name in names:
            error = attempt(part, {"_target_": name})
            if f"{part}: {name} is not on the list" not in error:
                note(part, {"_target_": name})
        outcomes.append(
            {"part": part, "node": {"_target_": "all"}, "error": "", "seen": list(seen)}
        )
    for part, node in nodes:
        note(part, node)
    return {"count": len(names), "outcomes": outcomes}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "names":
        found = sorted(set(names_in(modules_of(*ROOTS), deep=True)))
        Path(sys.argv[2]).write_text(json.dumps(found))
    else:
        given = json.loads(Path(sys.argv[2]).read_text())
        print(json.dumps(try_all(given["names"], given["nodes"])))
