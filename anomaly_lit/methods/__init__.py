"""Methods, one file or folder each; found by listing the files, and imported on first use."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_lit.methods.base import Method

    __all__ = ["Method"]

CLASS = re.compile(r"^class (\w+)\(Method\):$", re.MULTILINE)


@cache
def files() -> dict[str, str]:
    """Return the file or folder name of each method's class, without importing any."""
    folder = Path(__file__).parent
    found: dict[str, str] = {}
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        own = path.parent if path.name == "__init__.py" else path
        if own != folder and own.stem != "base":
            found |= dict.fromkeys(CLASS.findall(path.read_text(encoding="utf-8")), own.stem)
    return found


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*files(), "Method"})
    file = "base" if name == "Method" else files().get(name)
    if file is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{file}"), name)


def __dir__() -> list[str]:
    return [*globals(), *files(), "Method"]
