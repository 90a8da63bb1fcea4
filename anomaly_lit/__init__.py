"""Reconstruction-based industrial anomaly detection with PyTorch Lightning and Hydra.

>>> import anomaly_lit
>>> detector = anomaly_lit.load("last.ckpt")  # doctest: +SKIP
>>> detector.predict(["part.png"])[0].verdict  # doctest: +SKIP
'good'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_lit.inference.detector import Detector, load

__version__ = "0.2.0"
__all__ = ["Detector", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in ("Detector", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from anomaly_lit.inference import detector

    return getattr(detector, name)
