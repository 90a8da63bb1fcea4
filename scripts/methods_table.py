"""Writes the README's table of methods from what each method's docstring says of itself.

    python scripts/methods_table.py           prints the table
    python scripts/methods_table.py --write   puts it into README.md
    python scripts/methods_table.py --check   fails if README.md has a different table

The docstring of a method's file begins with its name and a colon, and ends with lines that begin
with Paper:, Status: and Note:, each up to the next. Folders of `experiments` that have its numbers
are linked.
"""

from __future__ import annotations

import argparse
import ast
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- scripts/methods_table.py writes this table -->", "<!-- end of the table -->"
COLUMNS = ("status", "paper", "note")
SHARED = ("small", "memory")  # folders of experiments on several methods


def facts_of(file: Path) -> dict[str, str] | None:
    """Return the name and the facts in a file's docstring; None where it has no paper.

    Raises:
        ValueError: A fact is missing.
    """
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    found = re.split(r"^(Paper|Status|Note): ", text, flags=re.MULTILINE)
    if len(found) == 1:
        return None
    facts = dict(zip([key.lower() for key in found[1::2]], found[2::2], strict=True))
    missing = [key for key in COLUMNS if key not in facts]
    if missing:
        raise ValueError(
            f"{file}: the docstring has no line that begins with {missing[0].title()}:"
        )
    lines = {key: " ".join(value.split()).removesuffix(".") for key, value in facts.items()}
    name = file.parent.name if file.stem == "__init__" else file.stem
    return {"method": found[0].partition(":")[0], "measured": measured(name), **lines}


def measured(name: str) -> str:
    """Return links to the folders of `experiments` that have numbers of a method."""
    folder = ROOT / "experiments"
    found = [name] if (folder / name / "README.md").exists() else []
    for shared in SHARED:
        with (folder / shared / "results.csv").open(encoding="utf-8", newline="") as lines:
            if any(row["method"] == name for row in csv.DictReader(lines)):
                found.append(shared)
    return ", ".join(f"[{each}](experiments/{each}/README.md)" for each in found) or "-"


def table() -> str:
    """Return the table in Markdown, sorted by name."""
    folder = ROOT / "anomaly_lit" / "methods"
    files = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    rows = [facts for file in files if (facts := facts_of(file))]
    head = ["method", "status", "measured", "paper", "note"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in sorted(rows, key=lambda row: row["method"].lower()):
        status = re.sub(r"\((experiments/\w+)\)", r"([\1](\1/README.md))", row["status"])
        lines.append(f"| {' | '.join({**row, 'status': status}[key] for key in head)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, write it or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    new = f"{before}{START}\n{table()}\n{END}{after}"
    if arguments.write:
        readme.write_text(new, encoding="utf-8")
    elif arguments.check:
        if new != text:
            sys.exit(
                "README.md has another table of methods: python scripts/methods_table.py --write"
            )
    else:
        print(table())


if __name__ == "__main__":
    main()
