"""A finished run is trained again where the code that made its numbers changed, and only there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import anomaly_lit
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.runs import code as used_code


def config_of(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return plain(compose("train", [*overrides, "output_dir=unused"]))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, from which the code is read."""
    copy = tmp_path / "anomaly_lit"
    kept = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(Path(anomaly_lit.__file__).parent, copy, ignore=kept)
    monkeypatch.setattr(anomaly_lit, "__file__", str(copy / "__init__.py"))
    return copy


def append(file: Path, text: str) -> None:
    assert file.is_file()
    file.write_text(f"{file.read_text()}\n{text}\n")


@pytest.fixture
def digest_after(package: Path) -> Callable[..., bool]:
    """Whether `digest_after(config, file, text)` is that from before the text was added."""

    def same(config: dict[str, Any], file: str, text: str) -> bool:
        before = used_code.code_digest(config)
        append(package / file, text)
        return used_code.code_digest(config) == before

    return same


def test_comments_and_docstrings_change_nothing(digest_after: Callable[..., bool]) -> None:
    config = config_of("method=fastflow")
    assert digest_after(config, "losses.py", "# of no number")
    assert digest_after(config, "methods/fastflow.py", "\n\n# of no number")


def test_code_that_is_used_changes_it(digest_after: Callable[..., bool]) -> None:
    config = config_of("method=uniad")
    for file in ("methods/uniad.py", "losses.py", "methods/base.py", "metrics/functional.py"):
        assert not digest_after(config, file, "added = 1"), file


def test_code_that_is_not_used_changes_nothing(digest_after: Callable[..., bool]) -> None:
    config = config_of("method=uniad", "synthesis=none")
    for file in ("methods/fastflow.py", "synthesis/nsa.py", "masks.py", "loggers.py"):
        assert digest_after(config, file, "added = 1"), file


def test_only_the_recipe_that_makes_the_anomalies_counts(
    digest_after: Callable[..., bool],
) -> None:
    config = config_of("method=dsr")
    assert digest_after(config, "synthesis/nsa.py", "added = 1")
    assert not digest_after(config, "synthesis/perlin.py", "added = 1")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('"""A text."""\nx = 1', '"""Another."""\nx = 1', True),
        ("x = 1  # why", "x = (\n    1\n)", True),
        ('def f():\n    """Say."""\n    return 1', "def f():\n    return 1", True),
        ("def f():\n    return 1", "def f():\n    return 2", False),
        ("x = 'a'", 'x = "a"', True),
        ("x = None", "x = ...", False),
        ("x = 1", "x = 1.0", False),
        ("x = [1, []]", "x = [1]", False),
        ("f(a=None)", "f(b=None)", False),
    ],
)
def test_a_digest_sees_what_code_does_alone(
    one: str, other: str, same: bool, tmp_path: Path
) -> None:
    (tmp_path / "one.py").write_text(one)
    (tmp_path / "other.py").write_text(other)
    first, second = (used_code.tree_digest(tmp_path / f"{n}.py") for n in ("one", "other"))
    assert (first == second) == same


def test_a_method_of_ones_own_counts_with_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text("SIZE = 1")
    (tmp_path / "own_other.py").write_text("SIZE = 1")
    (tmp_path / "own_code.py").write_text("import own_parts\nclass Own:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"method": {"_target_": "own_code.Own"}, "dataset": {}, "callbacks": None}
    before = used_code.code_digest(config)
    append(tmp_path / "own_other.py", "SIZE = 2")
    assert used_code.code_digest(config) == before
    append(tmp_path / "own_parts.py", "SIZE = 2")
    assert used_code.code_digest(config) != before
