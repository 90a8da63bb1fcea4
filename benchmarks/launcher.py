"""What the process launcher adds to a job, and how long the report of many runs takes.

    python benchmarks/launcher.py --output experiments/benchmarks/launcher.json
    python benchmarks/launcher.py --quick

A trivial job prints a word. The launcher's overhead is its time for such a job less that of the
same process started by hand. To compare, a process that imports what anomaly-train imports is timed
too: every real job pays for this, whoever starts it. The report reads made-up folders with the
files that runs leave behind, without pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from anomaly_lit.commands import report
from anomaly_lit.files import environment
from hydra_plugins.anomaly_lit_launcher import ProcessLauncher
from hydra_plugins.anomaly_lit_launcher.jobs import Job

TRIVIAL = "print('done')"
IMPORTS = "import anomaly_lit.commands.train, pytorch_lightning, timm, torch, anomaly_lit.data"
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")


def by_hand(code: str) -> float:
    """Return the seconds of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def launched(code: str, count: int, folder: Path) -> float:
    """Return the seconds a job, of `count` jobs one after the other."""
    config = OmegaConf.create({"hydra": {"job": {"config_name": "other"}}})
    jobs = [
        Job(n, [f"n={n}"], f"n={n}", folder / f"{n}", [sys.executable, "-c", code], config)
        for n in range(count)
    ]
    launcher = ProcessLauncher(jobs=1, gpus=[])
    start = time.perf_counter()
    launcher.run(jobs, launcher.slots())
    taken = time.perf_counter() - start
    assert all(job.state == "done" for job in jobs)
    return taken / count


def measure_jobs(count: int, rounds: int) -> dict[str, object]:
    """Measure seconds a job, in turns, round by round; about `count` jobs in all."""
    times: dict[str, list[float]] = {"launched": [], "by hand": [], "imports": []}
    each = max(1, count // rounds)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, quiet():
            times["launched"].append(launched(TRIVIAL, each, Path(folder)))
        times["by hand"].append(statistics.fmean(by_hand(TRIVIAL) for _ in range(each)))
        times["imports"].append(by_hand(IMPORTS))
    overhead = [a - b for a, b in zip(times["launched"], times["by hand"], strict=True)]
    return {
        "jobs": each * rounds,
        "rounds": rounds,
        "trivial job, launched, s": spread(times["launched"]),
        "trivial job, by hand, s": spread(times["by hand"]),
        "overhead of the launcher, s": spread(overhead),
        "imports of a real job, s": spread(times["imports"]),
    }


class quiet:  # noqa: N801
    """Leaves out the launcher's line for each job."""

    def __enter__(self) -> None:
        self.out, sys.stdout = sys.stdout, open(os.devnull, "w")

    def __exit__(self, *error: object) -> None:
        sys.stdout.close()
        sys.stdout = self.out


def write_runs(folder: Path, count: int) -> None:
    """Write folders of runs: every learning rate with every seed and every category."""
    for number in range(count):
        category, seed, rate = f"c{number % 5}", number // 5 % 4, number // 20
        run = folder / f"{number:05d}"
        run.mkdir(parents=True)
        config = {
            "output_dir": str(run),
            "seed": seed,
            "method": {"_target_": "anomaly_lit.methods.AMINet", "optimizer": {"lr": rate / 1e5}},
            "dataset": {"root": "data", "categories": [category]},
            "trainer": {"max_steps": 500},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        values = {f"test/{category}/{name}": (number % 97) / 97 for name in METRICS}
        values |= {f"test/{name}": (number % 97) / 97 for name in METRICS}
        facts = {"seed": seed, "setting": "one-class", "selection": "last step"}
        (run / "metrics.json").write_text(json.dumps(values | facts))


def measure_report(count: int, rounds: int) -> dict[str, object]:
    """Measure the seconds of `anomaly-report` for a folder of `count` runs."""
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder) / "runs", count)
        line = [f"{folder}/runs", f"--output={folder}/report"]

        def once() -> None:
            report.main(line)

        times = [timed(once) for _ in range(rounds)]
        size = (Path(folder) / "report" / "report.html").stat().st_size
    return {"runs": count, "rounds": rounds, "report, s": spread(times), "page, kB": size // 1000}


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> list[float]:
    """Return median, least and greatest."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="few jobs and runs: does it work?")
    arguments = parser.parse_args()
    jobs, rounds, runs = (4, 2, 20) if arguments.quick else (100, 10, 1000)
    result = {
        **environment(),
        "load_at_start": os.getloadavg()[0],
        "command": " ".join(["python", *sys.argv]),
        "values": "median, least, greatest",
        "launcher": measure_jobs(jobs, rounds),
        "report": measure_report(runs, 1 if arguments.quick else 3),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
