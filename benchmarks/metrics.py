"""Pixel metrics side by side on the same maps: seconds, peak memory, values.

    python benchmarks/metrics.py --output experiments/benchmarks/metrics.json
    python benchmarks/metrics.py --table experiments/benchmarks/metrics.json >> table.md

scikit-learn and anomalib are measured where they are installed; nothing else needs them. Maps are
blurred noise with bumps that a mask covers, scaled to [0, 1] so that no contender squashes them.
Everything runs in one process, on one thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from anomaly_lit.metrics import PixelMetrics

Values = dict[str, float]
Contender = Callable[[Tensor, Tensor, float], Values]

SETS = {"160 x 256": (160, 256), "40 x 1024": (40, 1024), "1725 x 256": (1725, 256)}
BATCH = 32
BYTES_PER_PIXEL = 80  # the most that a contender was seen to take, with some room
SMALL = 2e7  # pixels; on larger sets the other libraries run only once
KEYS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")


def make_maps(images: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw maps and masks, (N, 1, S, S) float32 and bool; three of four images have defects."""
    numbers = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size].astype(np.float32) / size
    maps = np.empty((images, 1, size, size), np.float32)
    masks = np.zeros(maps.shape, bool)
    for index in range(images):
        noise = ndimage.zoom(numbers.standard_normal((size // 8, size // 8)), 8, order=1)
        maps[index, 0] = noise / noise.std()
        for _ in range(numbers.integers(1, 4) if index % 4 else 0):
            y, x = numbers.uniform(0.1, 0.9, 2)
            height, width = numbers.uniform(0.02, 0.09, 2)
            distance = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2
            masks[index, 0] |= distance < 1
            maps[index, 0] += numbers.uniform(1, 5) * np.exp(-distance / 3)
    low, high = maps.min(), maps.max()
    maps -= low
    maps /= high - low
    return torch.from_numpy(maps), torch.from_numpy(masks)


def batches(maps: Tensor, masks: Tensor, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(maps.split(size), masks.split(size), strict=True)


def ours(engine: str, curves: bool = True) -> Contender:
    def run(maps: Tensor, masks: Tensor, center: float) -> Values:
        metric = PixelMetrics(engine=engine, center=center)
        for part, mask in batches(maps, masks):
            metric.update(part, mask)
        values = metric.compute()
        if curves:
            metric.curves()
        return {key: float(value) for key, value in values.items()}

    return run


def plain_sort(maps: Tensor, masks: Tensor, center: float) -> Values:
    torch.sort(maps.flatten())
    return {}


def torchmetrics_pair(thresholds: int | None) -> Contender:
    def run(maps: Tensor, masks: Tensor, center: float) -> Values:
        options = {"thresholds": thresholds, "normalization": None}
        found = {
            "pixel_auroc": BinaryAUROC(**options),
            "pixel_ap": BinaryAveragePrecision(**options),
        }
        for metric in found.values():
            for part, mask in batches(maps, masks):
                metric.update(part.flatten(), mask.flatten().long())
        return {key: float(metric.compute()) for key, metric in found.items()}

    return run


def sklearn_pair(maps: Tensor, masks: Tensor, center: float) -> Values:
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, labels = maps.flatten().numpy(), masks.flatten().numpy()
    return {
        "pixel_auroc": float(roc_auc_score(labels, scores)),
        "pixel_ap": float(average_precision_score(labels, scores)),
    }


def anomalib_one(name: str, key: str) -> Contender:
    def run(maps: Tensor, masks: Tensor, center: float) -> Values:
        from anomalib import metrics as anomalib_metrics

        metric = getattr(anomalib_metrics, name)(fields=["anomaly_map", "gt_mask"])
        for part, mask in batches(maps[:, 0], masks[:, 0]):
            metric.update(types.SimpleNamespace(anomaly_map=part, gt_mask=mask.int()))
        return {key: float(metric.compute())}

    return run


def contenders() -> dict[str, Contender]:
    found = {
        "ours, streaming": ours("streaming"),
        "ours, exact": ours("exact"),
        "torch.sort": plain_sort,
        "torchmetrics AUROC + AP": torchmetrics_pair(None),
        "torchmetrics AUROC + AP, 200 bins": torchmetrics_pair(200),
    }
    if util.find_spec("sklearn"):
        found["scikit-learn AUROC + AP"] = sklearn_pair
    if util.find_spec("anomalib"):
        for name, key in zip(("AUROC", "AUPR", "F1Max", "AUPRO"), KEYS, strict=True):
            found[f"anomalib {name}"] = anomalib_one(name, key)
    return found


def memory(field: str, file: str = "/proc/self/status") -> float:
    """Return a field of a Linux status file in MiB."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{file} has no {field}")


def measure(runs: dict[str, Callable[[], Values]], repeats: dict[str, int]) -> dict[str, dict]:
    """Measure each run, all in turn, so that a busy moment of the machine hits all alike.

    CPU seconds leave out the time given to other programs; a peak counts from the start of a run.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    values: dict[str, Values] = {}
    for turn in range(max(repeats.values())):
        for name, run in runs.items():
            if turn >= repeats[name]:
                continue
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = memory("VmRSS")
            start, cpu = time.perf_counter(), time.process_time()
            values[name] = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - start
            found[name].append((wall, cpu, memory("VmHWM") - before))
            print(name, *found[name][-1], file=sys.stderr, flush=True)
    return {name: summed_up(rows) | {"values": values[name]} for name, rows in found.items()}


def summed_up(rows: list[tuple[float, float, float]]) -> dict:
    """Return medians, and the fastest and the slowest run."""
    wall, cpu, peak = zip(*rows, strict=True)
    return {
        "runs": len(rows),
        "seconds": statistics.median(wall),
        "fastest": min(wall),
        "slowest": max(wall),
        "cpu_seconds": statistics.median(cpu),
        "cpu_fastest": min(cpu),
        "cpu_slowest": max(cpu),
        "extra_mib": round(max(peak), 1),
    }


def compare(sets: list[str], repeats: int) -> dict:
    results: dict = {}
    for name in sets:
        maps, masks = make_maps(*SETS[name])
        center = float(maps[~masks.flatten(1).any(1)].median())
        runs, turns, skipped = {}, {}, {}
        for contender, run in contenders().items():
            alone = contender.startswith(("ours", "torch.sort"))
            needed = maps.numel() * BYTES_PER_PIXEL / 2**20
            if "bins" in contender and maps.numel() > SMALL:
                skipped[contender] = {"skipped": "too slow already on the small set"}
            elif not alone and memory("MemAvailable", "/proc/meminfo") < needed:
                skipped[contender] = {"skipped": f"needs up to {needed:.0f} MiB of memory"}
            else:
                runs[contender] = partial(run, maps, masks, center)
                turns[contender] = (
                    repeats if alone else min(repeats, 3 if maps.numel() < SMALL else 1)
                )
        print(name, file=sys.stderr, flush=True)
        results[name] = measure(runs, turns) | skipped
    return results


def growth(repeats: int) -> dict:
    """Measure streaming over 10 to 10,000 images, made of 100, and with one image a batch."""
    maps, masks = make_maps(100, 256)

    def run(images: int, size: int) -> Values:
        metric = PixelMetrics(engine="streaming", center=0.4)
        for first in range(0, images, size):
            rows = torch.arange(first, min(first + size, images)) % 100
            metric.update(maps[rows], masks[rows])
        state = sum(getattr(metric, name).nbytes for name in ("histogram", "pixels"))
        return {"state_mb": state / 1e6, "pixel_ap": float(metric.compute()["pixel_ap"])}

    cases = ((10, 32), (100, 32), (1000, 32), (10_000, 32), (1000, 1))
    names = [f"{images} images, batches of {size}" for images, size in cases]
    runs = {name: partial(run, *case) for name, case in zip(names, cases, strict=True)}
    turns = {
        name: 1 if case[0] > 5000 else repeats for name, case in zip(names, cases, strict=True)
    }
    return measure(runs, turns)


def conditions(threads: int) -> dict:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    packages = ("torch", "torchmetrics", "numpy", "scipy", "scikit-learn", "anomalib")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": "python benchmarks/metrics.py " + " ".join(sys.argv[1:]),
        "commit": commit,
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "threads": threads,
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
    }


def table(results: dict) -> str:
    """Return the results as markdown."""
    about = results["conditions"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    lines = [
        f"Commit `{about['commit'][:12]}`, {about['cpu']}, {about['threads']} thread, Python"
        f" {about['python']}, {versions}. Load of the shared machine at the start:"
        f" {about['load'][0]}. Command: `{about['command']}`. Times are medians (fastest to"
        " slowest); CPU seconds leave out what other programs took; memory is the peak over the"
        " start of the run.",
        "",
    ]
    for name, rows in results["sets"].items():
        lines += [
            f"**{name} x {name.split()[-1]} pixels**",
            "",
            "| what | CPU seconds | seconds | runs | extra MiB | AUROC | AP | F1-max | AUPRO |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for contender, row in rows.items():
            if "skipped" in row:
                lines.append(f"| {contender} | skipped: {row['skipped']} | | | | | | | |")
                continue
            values = " | ".join(
                f"{row['values'][key]:.5f}" if key in row["values"] else "" for key in KEYS
            )
            cpu = f"{row['cpu_seconds']:.3f} ({row['cpu_fastest']:.3f} to {row['cpu_slowest']:.3f})"
            lines.append(
                f"| {contender} | {cpu} | {row['seconds']:.2f} | {row['runs']} |"
                f" {row['extra_mib']:.0f} | {values} |"
            )
        lines += ["", *summary(rows), ""]
    lines += ["| streaming, 256 x 256 | CPU seconds | extra MiB | state MB |", "|---|---|---|---|"]
    for name, row in results["growth"].items():
        state = row["values"]["state_mb"]
        lines.append(
            f"| {name} | {row['cpu_seconds']:.3f} | {row['extra_mib']:.0f} | {state:.1f} |"
        )
    return "\n".join(lines)


def summary(rows: dict) -> list[str]:
    """Say how many times faster streaming is, and how far it is from the exact values."""
    own = rows["ours, streaming"]
    four = [row for name, row in rows.items() if name.startswith("anomalib")]
    share = own["cpu_seconds"] / rows["torch.sort"]["cpu_seconds"]
    text = [f"Streaming takes {share:.2f} of the CPU time of a torch.sort."]
    if four and all("seconds" in row for row in four):
        for kind, key in (("CPU seconds", "cpu_seconds"), ("seconds", "seconds")):
            total = sum(row[key] for row in four)
            text.append(
                f"anomalib's four take {total:.2f} {kind}: {total / own[key]:.0f} times streaming,"
                f" {total / rows['ours, exact'][key]:.0f} times exact."
            )
    exact = rows["ours, exact"]["values"]
    off = {
        key: abs(own["values"][key] - exact[key]) for key in exact if not key.endswith("threshold")
    }
    worst = max(off, key=lambda key: off[key])
    bound = max(value for key, value in own["values"].items() if key.endswith("_bound"))
    text.append(
        f"Largest distance of streaming from exact: {off[worst]:.1e} ({worst}); largest bound:"
        f" {bound:.1e}."
    )
    return [" ".join(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("experiments/benchmarks/metrics.json"))
    parser.add_argument("--table", type=Path, help="print the table of an earlier run, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    results = {
        "conditions": conditions(arguments.threads),
        "growth": growth(arguments.repeats),
        "sets": compare(arguments.sets, arguments.repeats),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
