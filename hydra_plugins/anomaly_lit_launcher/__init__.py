"""Launchers of a sweep: jobs as processes of our own, or by launchers of other packages.

Hydra looks for plugins in packages below `hydra_plugins`; this one imports nothing heavy.
"""

from hydra_plugins.anomaly_lit_launcher.processes import ProcessLauncher

__all__ = ["ProcessLauncher"]
