"""Data sets and data modules.

The classes are imported when they are first asked for, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_lit.data.cache import HostCache
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.data.demo import Demo
    from anomaly_lit.data.sets import BTAD, Folder, MVTecAD, VisA

__all__ = ["BTAD", "AnomalyDataModule", "Demo", "Folder", "HostCache", "MVTecAD", "VisA"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    files = {"AnomalyDataModule": "datamodule", "Demo": "demo", "HostCache": "cache"}
    return getattr(import_module(f"{__name__}.{files.get(name, 'sets')}"), name)
