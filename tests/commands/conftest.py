from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def whole(
    run_command: Callable[..., Any], line: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of a module's `line`, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed") / "whole"
    outcome = run_command("train", *line, f"output_dir={folder}")
    assert outcome.code == 0, outcome.err
    return folder
