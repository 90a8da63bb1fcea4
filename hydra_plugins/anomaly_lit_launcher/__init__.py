"""Launchers of a sweep: jobs as processes of our own, as jobs of SLURM, or by other packages.

Hydra looks for plugins in packages below `hydra_plugins`; this one imports nothing heavy.
"""

from hydra_plugins.anomaly_lit_launcher.processes import ProcessLauncher
from hydra_plugins.anomaly_lit_launcher.slurm import SlurmLauncher

__all__ = ["ProcessLauncher", "SlurmLauncher"]
