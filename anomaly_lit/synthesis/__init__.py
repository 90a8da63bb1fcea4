"""Synthetic anomalies: corrupted copies of normal images, with masks of what was changed."""

from anomaly_lit.synthesis.base import Mixed, Synthesis
from anomaly_lit.synthesis.cutpaste import CutPaste
from anomaly_lit.synthesis.general import GeneralAnomalies
from anomaly_lit.synthesis.nsa import NSA
from anomaly_lit.synthesis.perlin import Perlin, Smudge

__all__ = ["NSA", "CutPaste", "GeneralAnomalies", "Mixed", "Perlin", "Smudge", "Synthesis"]
