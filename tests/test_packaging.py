"""The program works installed as well as from a checkout, and is not heavier than promised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import anomaly_lit

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("anomaly_lit", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copy))
    return next(folder.glob("*.whl"))


def pip(*arguments: str, python: Path | None = None) -> None:
    target = ["--python", str(python)] if python else []
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", *target, *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Installs into a new environment that borrows the dependencies; gives its scripts' folder."""

    def make(*what: str) -> Path:
        environment = tmp_path / "environment"
        line = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
        subprocess.run(line, check=True)
        base = {"base": str(environment), "platbase": str(environment)}
        site = Path(sysconfig.get_path("purelib", "venv", vars=base))
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        python = environment / SCRIPTS / "python"
        pip("install", "--no-deps", "--no-build-isolation", "--no-index", *what, python=python)
        return environment / SCRIPTS

    return make


def run(*line: str | Path, cwd: Path) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in line], cwd=cwd, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def where_from(python: Path, cwd: Path) -> Path:
    code = "import anomaly_lit; print(anomaly_lit.__file__)"
    return Path(run(python, "-c", code, cwd=cwd).strip()).resolve()


def assert_works(scripts: Path, cwd: Path) -> None:
    """Every command helps, and the configuration composes with options from every group."""
    for command in ("train", "test", "predict", "data"):
        assert f"anomaly-{command}" in run(scripts / f"anomaly-{command}", "--help", cwd=cwd)
    shown = run(
        scripts / "python",
        "-m",
        "anomaly_lit.commands.train",
        "--cfg",
        "job",
        "logger=none",
        cwd=cwd,
    )
    line = ("-m", "anomaly_lit.commands.train", "hydra/launcher=process", "--cfg", "hydra")
    assert "ProcessLauncher" in run(scripts / "python", *line, cwd=cwd)
    config = yaml.safe_load(shown)
    assert config["method"]["_target_"] == "anomaly_lit.methods.AMINet"
    assert config["logger"] is None


@pytest.mark.slow
def test_wheel_holds_all_configuration_and_the_shipped_weights(wheel: Path) -> None:
    assert wheel.name.startswith(f"anomaly_lit-{anomaly_lit.__version__}-")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"anomaly_lit/{path.relative_to(ROOT).as_posix()}" in names
    for path in (ROOT / "anomaly_lit").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "hydra_plugins").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "anomaly_lit" / "weights").glob("*"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "anomaly_lit/py.typed" in names
    assert not any(name.startswith(("tests/", "conf/", "experiments/")) for name in names)


@pytest.mark.slow
def test_installed_wheel_works_outside_and_inside_the_checkout(
    wheel: Path, copy: Path, install: Callable[..., Path], tmp_path: Path
) -> None:
    scripts = install(str(wheel))
    assert where_from(scripts / "python", tmp_path).is_relative_to(tmp_path / "environment")
    assert_works(scripts, tmp_path)
    assert where_from(scripts / "python", copy).is_relative_to(copy)
    assert_works(scripts, copy)


@pytest.mark.slow
def test_editable_install_works_outside_and_inside_the_checkout(
    copy: Path, install: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("setuptools", minversion="77")
    scripts = install("--editable", str(copy))
    for cwd in (tmp_path, copy):
        assert where_from(scripts / "python", cwd).is_relative_to(copy)
        assert_works(scripts, cwd)


def closure(names: list[str]) -> set[str]:
    """The distributions that these and their requirements bring on this machine."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        waiting += [
            canonicalize_name(requirement.name)
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return found


def test_core_install_adds_few_distributions() -> None:
    common = closure(["torch", "torchvision", "timm", "pytorch-lightning"])
    added = closure(["anomaly-lit"]) - common - {"anomaly-lit"}
    assert len(added) <= 45, sorted(added)
    assert not added & {"scikit-learn", "pandas", "scikit-image", "optuna", "pytest"}


def test_everything_that_names_a_version_names_the_same() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    assert pyproject["project"]["dynamic"] == ["version"]
    source = pyproject["tool"]["setuptools"]["dynamic"]["version"]
    assert source == {"attr": "anomaly_lit.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == anomaly_lit.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {anomaly_lit.__version__}" in changelog
