"""What the linters do not see."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *(file for name in ("anomaly_lit", "hydra_plugins") for file in (ROOT / name).rglob("*.py")),
    *(ROOT / "conf").rglob("*.yaml"),
]


def test_code_in_docstrings_has_single_backticks() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in sorted(SOURCES)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if "``" in line
    ]
    assert found == []
