"""Lightning callbacks, imported on first use so that importing the package stays fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_lit.callbacks.dashboard import Dashboard
    from anomaly_lit.callbacks.evaluation import Evaluation
    from anomaly_lit.callbacks.outputs import Outputs
    from anomaly_lit.callbacks.profile import Profile
    from anomaly_lit.callbacks.run import ResumeCheckpoint, StepSeeds, StopAtNaN
    from anomaly_lit.callbacks.step import FastStep
    from anomaly_lit.callbacks.training import LossCurves, TrainingPictures

__all__ = [
    "Dashboard",
    "Evaluation",
    "FastStep",
    "LossCurves",
    "Outputs",
    "Profile",
    "ResumeCheckpoint",
    "StepSeeds",
    "StopAtNaN",
    "TrainingPictures",
]
FILES = {
    "Dashboard": "dashboard",
    "Evaluation": "evaluation",
    "FastStep": "step",
    "LossCurves": "training",
    "Outputs": "outputs",
    "Profile": "profile",
    "TrainingPictures": "training",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES.get(name, 'run')}"), name)
