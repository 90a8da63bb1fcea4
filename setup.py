"""Finds the packages, so that none is listed by hand; all else is in pyproject.toml."""

from setuptools import find_packages, setup

# conf/ stands at the top of a checkout, and is installed inside the package
setup(
    packages=[
        *find_packages(include=["anomaly_lit*"]),
        "anomaly_lit.conf",
        *(f"hydra_plugins.{name}" for name in find_packages("hydra_plugins")),
    ]
)
