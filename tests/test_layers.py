"""Imports go one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anomaly_lit
import hydra_plugins.anomaly_lit_launcher

PACKAGE = Path(anomaly_lit.__file__).parent
PLUGINS = Path(hydra_plugins.anomaly_lit_launcher.__file__).parents[1]
LAYERS = [  # the house from the ground up; a part imports from those below it
    {"types", "files"},
    {"config", "calibration", "folders"},
    {"nn", "losses", "masks", "optim", "schedules", "synthesis"},
    {"data", "metrics", "methods", "drawing"},
    {"inference", "reporting"},
    {"callbacks", "loggers"},
    {"runs"},
    {"hydra_plugins"},
    {"commands"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
COMMANDS = {file.stem for file in (PACKAGE / "commands").glob("[!_]*.py")} - {"entry"}
MOST_LINES, MOST_ENTRIES = 350, 24


def name_of(file: Path) -> str:
    """``anomaly_lit.nn.backbone`` of nn/backbone.py; of a package's ``__init__.py``, its own."""
    root = PLUGINS.parent if file.is_relative_to(PLUGINS) else PACKAGE.parent
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(file): file for root in (PACKAGE, PLUGINS) for file in sorted(root.rglob("*.py"))
}


def part_of(module: str) -> str:
    """``nn`` of anomaly_lit.nn.backbone; ``hydra_plugins`` of all plugins."""
    parts = module.split(".")
    return parts[0] if parts[0] == "hydra_plugins" else (*parts, "")[1]


def imports(file: Path, also_for_types: bool = False) -> list[str]:
    """Names that a file imports, at the top or within functions, as ``module.name``."""
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


def module_of(name: str) -> str | None:
    """The module of this house behind an imported name."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    part = part_of(module)
    if not part:
        return
    for name in imports(MODULES[module], also_for_types=True):
        other = part_of(module_of(name) or module)
        if other and other != part:
            assert RANK[other] < RANK[part], f"{module} imports {name}"


def test_the_picture_of_the_house_is_right() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("<!-- layers:")[2].split("```")[1]
    drawn = [set(re.split(r"\s{3,}", line)[0].split()) for line in picture.strip().splitlines()]
    assert drawn[::-1] == LAYERS


def test_every_part_has_a_layer() -> None:
    assert {part_of(module) for module in MODULES} - {""} == set(RANK)


def test_no_module_imports_itself_through_others() -> None:
    """Not within functions either."""
    graph = {
        module: {other for name in imports(file) if (other := module_of(name)) and other != module}
        for module, file in MODULES.items()
    }
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}
    lazy = {module for module in packages if "__getattr__" in MODULES[module].read_text()}
    for module in lazy:  # they import what they are asked for
        graph[module] = set()
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle


def test_files_and_rooms_stay_small() -> None:
    lengths = {module: len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert {module: n for module, n in lengths.items() if n > MOST_LINES} == {}
    entries = [p.name for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "conf")]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_methods_do_not_import_each_other() -> None:
    for file in (PACKAGE / "methods").rglob("*.py"):
        if file.name == "__init__.py" and file.parent.name == "methods":
            continue
        own = file.relative_to(PACKAGE / "methods").parts[0].removesuffix(".py")
        for module in imports(file):
            if module.startswith("anomaly_lit.methods."):
                assert module.split(".")[2] in (own, "base"), f"{file.name} imports {module}"


def test_only_config_the_plugins_and_the_commands_know_hydra() -> None:
    knowing = {
        module
        for module, file in MODULES.items()
        if any(m.split(".")[0] in ("hydra", "omegaconf") for m in imports(file, True))
    }
    parts = {part_of(module) for module in knowing - {"anomaly_lit.config.hydra"}}
    assert parts <= {"hydra_plugins", "commands"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a new process after ``code``."""
    shown = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "numpy", "pytorch_lightning", "timm", "kornia", "scipy", "matplotlib", "PIL"}


def test_modules_that_fail_early_import_nothing_heavy() -> None:
    light = ["types", "config.hydra", "config.validate", "config.trust", "files", "nn.weights"]
    light += [f"commands.{name}" for name in sorted(COMMANDS)]
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
        tree = ast.parse((PACKAGE / "commands" / f"{name}.py").read_text())
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
