"""Synthetic anomalies: corrupted copies of normal images, with masks of what was changed."""

from anomaly_lit.synthesis.base import Mixed, Synthesis
from anomaly_lit.synthesis.confetti import Confetti
from anomaly_lit.synthesis.cutpaste import CutPaste
from anomaly_lit.synthesis.general import GeneralAnomalies
from anomaly_lit.synthesis.nsa import NSA
from anomaly_lit.synthesis.perlin import Perlin, Smudge
from anomaly_lit.synthesis.saliency import SaliencyPerlin

__all__ = [
    "NSA",
    "Confetti",
    "CutPaste",
    "GeneralAnomalies",
    "Mixed",
    "Perlin",
    "SaliencyPerlin",
    "Smudge",
    "Synthesis",
]
