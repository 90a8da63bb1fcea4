"""The code that a run's numbers depend on, and a digest of what it does.

Comments, docstrings, layout and code that a run never used do not change its numbers, so a change
of these must not make a finished run train again. The digest covers the syntax trees of everything
that the run's own `_target_`s import, directly or indirectly.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import anomaly_lit
from anomaly_lit.config.build import import_target, nodes

PACKAGE = "anomaly_lit"
# what every run depends on although no configuration names it; what these import is left out
ALWAYS = ("anomaly_lit.callbacks.run", "anomaly_lit.runs.fit")
EVALUATION = "anomaly_lit.callbacks.evaluation"  # the only callback that makes numbers
# parts of the configuration whose code changes no number: where data is kept
APART = ("cache", "feature_cache")


def code_digest(config: Mapping[str, Any]) -> str:
    """Return a SHA-256 over the code that a run's numbers depend on.

    Args:
        config: The run's composed configuration as plain data.

    Raises:
        UserError: A `_target_` cannot be imported.
    """
    marks = {f"{name} {tree_digest(file)}" for name, file in files_of(config)}
    return hashlib.sha256("\n".join(sorted(marks)).encode()).hexdigest()


def files_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield the modules that a run's numbers depend on, with their files."""
    for root in {*targets_of(config)}:
        for name in imported_by(root):
            file = _file_of(name, root)
            assert file is not None
            yield name, file
    for name in ALWAYS:
        file = _file_of(name, name)
        assert file is not None
        yield name, file


def targets_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules that define the parts of method, data set and evaluation.

    Installed libraries are left out: their versions are recorded with the results.
    """
    own = _module_of(config["method"])
    dataset = {key: value for key, value in config["dataset"].items() if key not in APART}
    parts = [node for section in (config["method"], dataset) for _, node in nodes(section)]
    parts += (config.get("callbacks") or {}).values()
    for module in map(_module_of, parts):
        top = module.partition(".")[0]
        if "callbacks" in module and module != EVALUATION:
            continue
        if top in (PACKAGE, own.partition(".")[0]) or not _is_installed(top):
            yield module


def _module_of(node: Mapping[str, Any]) -> str:
    return str(import_target(node["_target_"]).__module__)


def _is_installed(top: str) -> bool:
    """Return whether a top-level module belongs to a library or to Python itself."""
    if top in sys.stdlib_module_names:
        return True
    file = Path(sys.modules[top].__file__ or "") if top in sys.modules else Path()
    return any(part.endswith("-packages") for part in file.parts)


def imported_by(root: str) -> set[str]:
    """Return a module and everything it imports from this package or from beside a user's method.

    Imports within functions count; those that only type checkers see do not.
    """
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name not in found and _file_of(name, root) is not None:
            found.add(name)
            waiting += _imports(name, root)
    return found


def _file_of(name: str, root: str) -> Path | None:
    """Return the source file of a module in this package, or in the same place as module `root`.

    In the same place are the modules of its package or, for a single file, those beside it. Nothing
    is imported.
    """
    top, package = root.partition(".")[0], Path(anomaly_lit.__file__).parent
    home = (
        Path(sys.modules[top].__file__ or "") if top in sys.modules else Path(anomaly_lit.__file__)
    )
    alone = home.name != "__init__.py"
    folder = home.parent if alone else home.parent.parent
    if name.partition(".")[0] == PACKAGE:
        folder = package.parent
    elif name.partition(".")[0] != top and (not alone or folder.name.endswith("-packages")):
        return None
    place = folder.joinpath(*name.split("."))
    files = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _imports(name: str, root: str) -> Iterator[str]:
    """Yield the modules that a module imports; for lazy packages, those that define the names."""
    file = _file_of(name, root)
    assert file is not None
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for level, module, names in _read(file, file.stat().st_mtime_ns).imports:
        base = package.rsplit(".", level - 1)[0] if level > 1 else package * level
        source = ".".join(part for part in (base, module) if part)
        yield source
        yield from (_home_of(source, asked, root) for asked in names)


def _run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, except for branches that only type checkers read."""
    yield node
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children: Iterable[ast.AST] = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _run_time(child)


def _home_of(source: str, name: str, root: str) -> str:
    """Return the module behind `from source import name`."""
    file = _file_of(source, root)
    if file is None or _file_of(f"{source}.{name}", root) is not None:
        return f"{source}.{name}"
    if file.name == "__init__.py" and source.partition(".")[0] == PACKAGE:  # a lazy package
        return str(getattr(import_target(f"{source}.{name}"), "__module__", source))
    return source


class _Read(NamedTuple):
    """What is known about a source file."""

    digest: str  # of the syntax tree, without comments, docstrings and line numbers
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]  # level, module, names


def tree_digest(file: Path) -> str:
    """Return a SHA-256 of a file's syntax tree, without comments, docstrings and line numbers."""
    return _read(file, file.stat().st_mtime_ns).digest


@cache
def _read(file: Path, changed: int) -> _Read:
    """Read a file, and again only if `changed`, its modification time, has changed."""
    tree = ast.parse(file.read_bytes())
    imports: list[tuple[int, str, tuple[str, ...]]] = []
    for node in _run_time(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append((node.level, node.module or "", names))
    return _Read(hashlib.sha256(repr(_shape(tree)).encode()).hexdigest(), tuple(imports))


def _shape(value: Any) -> Any:
    """Return a tree as nested tuples that are the same in all versions of Python."""
    if isinstance(value, list):
        return tuple(_shape(item) for item in value)
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = dict(ast.iter_fields(value))
    with_docstring = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(value, with_docstring) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    kept = {key: field for key, field in fields.items() if field is not None and field != []}
    kept.pop("kind", None)  # of a literal: its prefix u
    return type(value).__name__, tuple((key, _shape(field)) for key, field in sorted(kept.items()))
