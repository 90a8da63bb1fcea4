"""`anomaly-train`: train, calibrate and test one method on one data set."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.hydra import in_sweep, output_folder, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.reporting.terminal import print_results
from anomaly_lit.runs.build import find_all_weights
from anomaly_lit.runs.claim import claimed
from anomaly_lit.runs.failures import noted
from anomaly_lit.runs.folder import (
    check_holds_no_data,
    is_current,
    put_aside,
    read_metrics,
    state_of,
)
from anomaly_lit.runs.objective import check_objective, objective
from anomaly_lit.runs.ranks import check_tasks, told_once


def main() -> None:
    """Run the command."""
    run_command(train, "train")


def train(cfg: DictConfig) -> float | None:
    """Run what the configuration describes, or go on where an earlier run of it stopped.

    Returns:
        The metric that `optimized_metric` names, for a sweeper; None without one.
    """
    directory = output_folder()
    with noted(directory) if in_sweep() else nullcontext():
        return train_in(directory, cfg)


def train_in(directory: Path, cfg: DictConfig) -> float | None:
    """Check the configuration, then train in a folder or go on there."""
    cfg.output_dir = str(directory)  # and with it what refers to it, also in a job of a sweep
    config = plain(cfg)
    with told_once():
        validate(config)
        pruning, when_changed = config.pop("pruning"), config.pop("when_changed")
        check_objective(config)
        check_tasks(config["trainer"].get("devices"), config["trainer"].get("num_nodes", 1))
        check_holds_no_data(directory, config)
    with claimed(directory):
        return run_or_show(config, directory, pruning, when_changed)


def run_or_show(
    config: dict[str, Any],
    directory: Path,
    pruning: dict[str, Any] | None,
    when_changed: Literal["rerun", "keep"],
) -> float | None:
    """Train in a folder that this process has claimed, or show the results of a finished run."""
    state = state_of(directory, config)
    if state == "finished" and not is_current(directory, config, when_changed):
        put_aside(directory)
        state = "new"
    if state == "finished":
        metrics = read_metrics(directory)
        print_results(metrics, directory)
        print("already finished; choose another output_dir to train again")
        return objective(config, metrics)
    if state == "new":
        find_all_weights(config)

    from anomaly_lit.runs.fit import run

    metrics = run(config, directory, state == "unfinished", pruning)
    return objective(config, metrics)


if __name__ == "__main__":
    main()
