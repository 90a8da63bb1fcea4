"""Methods, one file each; imported when first asked for, so that the package stays light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_lit.methods.ami_net import AMINet
    from anomaly_lit.methods.base import Method
    from anomaly_lit.methods.cma_ae import CMAAE
    from anomaly_lit.methods.dsr import DSR
    from anomaly_lit.methods.fastflow import FastFlow
    from anomaly_lit.methods.mfrnet import MFRNet
    from anomaly_lit.methods.onenip import OneNIP
    from anomaly_lit.methods.rstpm import RSTPM
    from anomaly_lit.methods.uniad import UniAD

__all__ = ["CMAAE", "DSR", "RSTPM", "AMINet", "FastFlow", "MFRNet", "Method", "OneNIP", "UniAD"]
FILES = {
    "AMINet": "ami_net",
    "CMAAE": "cma_ae",
    "DSR": "dsr",
    "FastFlow": "fastflow",
    "MFRNet": "mfrnet",
    "Method": "base",
    "OneNIP": "onenip",
    "RSTPM": "rstpm",
    "UniAD": "uniad",
}


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
