"""The README's table of methods is what the methods say of themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from anomaly_lit.methods import files

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "scripts" / "methods_table.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8")


def test_it_is_current() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_every_method_has_a_row() -> None:
    rows = run().stdout.splitlines()[2:]
    assert len(rows) == len(set(files().values()))
    assert all(row.count("|") == 6 for row in rows)


def test_a_row_links_to_what_was_measured() -> None:
    rows = {line.split("|")[1].strip(): line.split("|")[3] for line in run().stdout.splitlines()}
    own, small = "[uniad](experiments/uniad/README.md)", "[small](experiments/small/README.md)"
    assert rows["UniAD"].strip() == f"{own}, {small}"
    for cell in rows.values():
        for page in re.findall(r"\((.*?)\)", cell):
            assert (ROOT / page).is_file(), page
