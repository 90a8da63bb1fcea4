"""Imports go one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anomaly_lit

PACKAGE = Path(anomaly_lit.__file__).parent
LAYERS = [
    {"types", "config", "cluster", "sweep", "files", "tables"},
    {"nn", "losses", "masks", "schedules", "synthesis"},
    {"data", "metrics", "methods", "pictures", "page"},
    {"callbacks", "loggers", "plan", "engine"},
    {"checkpoint"},
    {"used_code"},
    {"runs"},
    {"train", "test", "predict", "check", "status", "report"},
]
COMMANDS = LAYERS[-1]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
APART = {"data", "metrics", "methods"}  # of one layer, and strangers to each other
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """``nn`` of nn/backbone.py, ``train`` of train.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path, also_for_types: bool = False) -> list[str]:
    """Modules that a file names in imports, at the top or within functions."""
    tree = ast.parse(file.read_text())
    typing_only = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    ]
    found = []
    for node in ast.walk(tree):
        if node in typing_only and not also_for_types:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    part = part_of(file)
    if part == "__init__":
        return
    for module in imports(file, also_for_types=True):
        parts = module.split(".")
        other = parts[1] if parts[0] == "anomaly_lit" and len(parts) > 1 else part
        if other not in RANK or other == part:
            continue
        assert RANK[other] <= RANK[part], f"{part} imports {module}"
        if part in COMMANDS:
            continue
        assert not ({part, other} <= APART), f"{part} imports {module}"


def test_every_part_has_a_layer() -> None:
    assert {part_of(file) for file in FILES} - {"__init__", "conf"} <= set(RANK)


def test_methods_do_not_import_each_other() -> None:
    for file in (PACKAGE / "methods").rglob("*.py"):
        if file.name == "__init__.py" and file.parent.name == "methods":
            continue
        own = file.relative_to(PACKAGE / "methods").parts[0].removesuffix(".py")
        for module in imports(file):
            if module.startswith("anomaly_lit.methods."):
                assert module.split(".")[2] in (own, "base"), f"{file.name} imports {module}"


def test_only_config_and_the_commands_know_hydra() -> None:
    knowing = {
        part_of(file)
        for file in FILES
        if any(m.split(".")[0] in ("hydra", "omegaconf") for m in imports(file, True))
    }
    assert knowing <= {"config"} | COMMANDS


def loaded_by(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a new process after ``code``."""
    shown = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "numpy", "pytorch_lightning", "timm", "kornia", "scipy", "matplotlib", "PIL"}


def test_modules_that_fail_early_import_nothing_heavy() -> None:
    light = ["types", "config", "files", "nn.weights", *sorted(COMMANDS)]
    light += ["methods", "data", "callbacks"]
    code = "\n".join(f"import anomaly_lit.{name}" for name in light)
    assert loaded_by(code) & HEAVY == set()


def test_the_package_alone_imports_next_to_nothing() -> None:
    assert loaded_by("import anomaly_lit") & (HEAVY | {"hydra", "omegaconf", "rich"}) == set()


def test_what_packages_offer_can_be_imported() -> None:
    for name in ("", ".methods", ".data", ".callbacks"):
        module = __import__(f"anomaly_lit{name}", fromlist=["x"])
        for offered in module.__all__:
            assert getattr(module, offered) is not None
        with pytest.raises(AttributeError, match="nothing_such"):
            _ = module.nothing_such


def test_no_module_runs_anything_that_a_spawned_process_would_repeat() -> None:
    """Spawned workers import the main module again: commands start under a guard only."""
    for name in COMMANDS:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        calls = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        assert calls == []


def test_files_have_plain_names_and_no_links() -> None:
    """Windows knows no symbolic links, and neither case nor some characters in names."""
    root = PACKAGE.parent
    tracked = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-s"], capture_output=True, text=True
    )
    if tracked.returncode or not tracked.stdout:
        pytest.skip("no checkout")
    modes, names = zip(
        *(line.split(maxsplit=1) for line in tracked.stdout.splitlines()), strict=True
    )
    assert "120000" not in modes
    paths = [name.split("\t")[1] for name in names]
    assert len({path.lower() for path in paths}) == len(paths)
    assert not any(set(path) & set('<>:"|?*\\') for path in paths)
