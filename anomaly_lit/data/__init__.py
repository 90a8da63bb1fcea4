"""Data sets and data modules.

The classes are imported when they are first asked for, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_lit.data.caches.disk import DiskCache
    from anomaly_lit.data.caches.features import FeatureCache
    from anomaly_lit.data.caches.features_on_disk import DiskFeatureCache
    from anomaly_lit.data.caches.memory import DeviceCache, HostCache
    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.data.demo.datamodule import Demo
    from anomaly_lit.data.layouts.avenue import AvenueLayout
    from anomaly_lit.data.layouts.base import Layout, Listing
    from anomaly_lit.data.layouts.btad import BTAD
    from anomaly_lit.data.layouts.cifar import CIFAR10Layout, CIFAR100Layout
    from anomaly_lit.data.layouts.classes import ClassesLayout
    from anomaly_lit.data.layouts.clips import ClipsLayout
    from anomaly_lit.data.layouts.folder import Folder
    from anomaly_lit.data.layouts.idx import MNISTLayout
    from anomaly_lit.data.layouts.ksdd2 import KolektorSDD2
    from anomaly_lit.data.layouts.mvtec_ad import MVTecAD
    from anomaly_lit.data.layouts.ped2 import Ped2Layout
    from anomaly_lit.data.layouts.real_iad import RealIADLayout
    from anomaly_lit.data.layouts.shanghaitech import ShanghaiTechLayout
    from anomaly_lit.data.layouts.visa import VisA

__all__ = [
    "BTAD",
    "AnomalyDataModule",
    "AvenueLayout",
    "CIFAR10Layout",
    "CIFAR100Layout",
    "ClassesLayout",
    "ClipsLayout",
    "Demo",
    "DeviceCache",
    "DiskCache",
    "DiskFeatureCache",
    "FeatureCache",
    "Folder",
    "HostCache",
    "KolektorSDD2",
    "Layout",
    "Listing",
    "MNISTLayout",
    "MVTecAD",
    "Ped2Layout",
    "RealIADLayout",
    "ShanghaiTechLayout",
    "VisA",
]
FILES = {
    "BTAD": "layouts.btad",
    "AnomalyDataModule": "datamodule",
    "CIFAR10Layout": "layouts.cifar",
    "CIFAR100Layout": "layouts.cifar",
    "ClassesLayout": "layouts.classes",
    "AvenueLayout": "layouts.avenue",
    "ClipsLayout": "layouts.clips",
    "Ped2Layout": "layouts.ped2",
    "ShanghaiTechLayout": "layouts.shanghaitech",
    "Demo": "demo.datamodule",
    "DeviceCache": "caches.memory",
    "DiskCache": "caches.disk",
    "DiskFeatureCache": "caches.features_on_disk",
    "FeatureCache": "caches.features",
    "Folder": "layouts.folder",
    "HostCache": "caches.memory",
    "KolektorSDD2": "layouts.ksdd2",
    "Layout": "layouts.base",
    "Listing": "layouts.base",
    "MNISTLayout": "layouts.idx",
    "MVTecAD": "layouts.mvtec_ad",
    "RealIADLayout": "layouts.real_iad",
    "VisA": "layouts.visa",
}


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
