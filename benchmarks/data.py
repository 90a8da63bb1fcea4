"""How fast images come: decoded each time, from memory, from disk; and what a batch costs.

    python benchmarks/data.py --output experiments/benchmarks/data.json
    python benchmarks/data.py --table experiments/benchmarks/data.json >> table.md

The pictures are 1024 x 1024 PNG files that this script draws, brought to 256 x 256. A round
measures everything once, in turns; ratios are taken within a round. The peer is anomalib's module,
where it is installed: the same files, resized likewise, no worker processes on either side. With
--output a plot is written beside the result.

"cold build" is what a first run pays for all images, "warm open" what a later one pays before its
first step, checks included. "batches" are passes over all images after that.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anomaly_lit.config.hydra import config_dir
from anomaly_lit.data import DeviceCache, DiskCache, HostCache, MVTecAD
from anomaly_lit.files import environment

SIDE = 1024
PLAIN = "decoded each time"


def small_presets() -> list[str]:
    """Return the methods' presets for CPUs, as `method=` takes them."""
    folder = Path(config_dir()) / "method"
    return sorted(path.stem for path in folder.glob("*_small.yaml"))


def make_pictures(root: Path, count: int) -> None:
    """Draw `root/part/train/good/*.png`: smooth structure with grain, as a camera gives it."""
    folder = root / "part" / "train" / "good"
    folder.mkdir(parents=True)
    for number in range(count):
        numbers = np.random.default_rng(number)
        coarse = Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        grain = numbers.integers(-6, 7, smooth.shape, dtype=np.int16)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def ready(root: Path, batch: int, cache: Any) -> MVTecAD:
    datamodule = MVTecAD(str(root), image_size=256, batch_size=batch, holdout=0, cache=cache)
    datamodule.setup("fit")
    return datamodule


def passes(datamodule: Any, count: int) -> Callable[[], int]:
    """Return a function that draws all batches `count` times and returns the number of images."""

    def run() -> int:
        return sum(images_in(datamodule.train_dataloader()) for _ in range(count))

    return run


def images_in(loader: Iterable[Any]) -> int:
    total = 0
    for batch in loader:
        image = batch["image"] if isinstance(batch, dict) else batch.image
        assert image.shape[-2:] == (256, 256)
        total += len(image)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return total


def peer(root: Path, batch: int) -> Any:
    """Return the data module of anomalib over the same files, or why there is none."""
    if find_spec("anomalib") is None:
        return "anomalib is not installed here"
    from anomalib.data import Folder
    from torchvision.transforms.v2 import Resize

    datamodule = Folder(
        name="part",
        root=root / "part",
        normal_dir="train/good",
        normal_split_ratio=0.0,
        train_batch_size=batch,
        num_workers=0,
        augmentations=Resize((256, 256), antialias=True),
        test_split_mode="none",
        val_split_mode="none",
    )
    datamodule.setup()
    return datamodule


def rounds_of(root: Path, batch: int, device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Return images a second of each contender, a number a round; or why one is missing."""
    count = len(list(root.glob("part/train/good/*.png")))
    repeat = 2 if quick else 20
    stored = root / "cache"
    on_device = DeviceCache()
    warm = {
        "host, batches": ready(root, batch, HostCache()),
        "disk, batches": ready(root, batch, DiskCache(str(stored))),
        "device, batches": ready(root, batch, on_device),
    }
    on_device.prepare(torch.device(device), 0)
    other = peer(root, batch)

    def build(cache: Callable[[Path], Any]) -> int:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            ready(root, batch, cache(Path(folder)))
        return count

    def reopen() -> int:
        ready(root, batch, DiskCache(str(stored)))
        return count

    runs: dict[str, Any] = {
        PLAIN: passes(ready(root, batch, None), 1),
        "host, cold build": lambda: build(lambda _: HostCache()),
        "disk, cold build": lambda: build(lambda folder: DiskCache(str(folder))),
        "disk, warm open": reopen,
        **{name: passes(datamodule, repeat) for name, datamodule in warm.items()},
        "anomalib": other if isinstance(other, str) else passes(other, 1),
    }
    return in_turns(runs, rounds)


def in_turns(runs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Call all once per round, after a round that does not count; return images a second."""
    speeds: dict[str, Any] = {k: run if isinstance(run, str) else [] for k, run in runs.items()}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if isinstance(run, str):
                continue
            start = time.perf_counter()
            images = run()
            if number:
                speeds[name].append(images / (time.perf_counter() - start))
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return speeds


def spread(values: list[float]) -> list[float]:
    """Return median, least and greatest."""
    return [float(f"{v:.4g}") for v in (statistics.median(values), min(values), max(values))]


def rows_of(speeds: dict[str, Any], base: str, unit: str) -> list[dict[str, Any]]:
    """Return a row for each contender, with its ratio to `base` within the rounds."""
    rows: list[dict[str, Any]] = []
    for name, values in speeds.items():
        if isinstance(values, str):
            rows.append({"what": name, "missing": values})
            continue
        ratios = [a / b for a, b in zip(values, speeds[base], strict=True)]
        rows.append({"what": name, unit: spread(values), f"times {base}": spread(ratios)})
    return rows


def as_table(result: dict[str, Any]) -> str:
    titles = list(result["rows"][0])
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " --: |" * (len(titles) - 1)]
    for row in result["rows"]:
        if "missing" in row:
            lines.append(f"| {row['what']} | {row['missing']} |" + " |" * (len(titles) - 2))
            continue
        cells = [
            f"{v[0]:.4g} ({v[1]:.4g} to {v[2]:.4g})" if isinstance(v, list) else str(v)
            for v in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    keys = ("commit", "hardware", "device", "threads", "load", "images", "batch", "command")
    note = ", ".join(f"{key} {result[key]}" for key in keys if key in result)
    rounds = f"Median (least to greatest) of {result['rounds']} rounds"
    return "\n".join(lines) + f"\n\n{rounds}; {note}.\n"


def draw(result: dict[str, Any], file: Path, title: str) -> None:
    """Draw bars of the medians with the spread; the axis is logarithmic if they differ much."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if "missing" not in row][::-1]
    unit = next(key for key in rows[0] if key != "what")
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    middle = [row[unit][0] for row in rows]
    errors = [[row[unit][0] - row[unit][1], row[unit][2] - row[unit][0]] for row in rows]
    axes.barh([row["what"] for row in rows], middle, xerr=np.transpose(errors), color="#4477aa")
    if max(middle) > 50 * min(middle):
        axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.set_xlabel(unit)
    axes.set_title(f"{title}\n{result['hardware']}, commit {result['commit']}", fontsize=9)
    figure.savefig(file, dpi=120)


def finish(result: dict[str, Any], output: Path | None, title: str) -> None:
    print(as_table(result))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, output.with_suffix(".png"), title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result and stop")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="of cache=device")
    parser.add_argument("--quick", action="store_true", help="few images and rounds: a trial")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a new one")
    arguments = parser.parse_args()
    if arguments.table:
        print(as_table(json.loads(arguments.table.read_text())))
        return
    if arguments.quick:
        arguments.images, arguments.rounds = 16, 2
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(arguments.threads)
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_pictures(Path(folder), arguments.images)
        measure = partial(rounds_of, Path(folder), arguments.batch, arguments.device)
        speeds = measure(arguments.rounds, arguments.quick)
    result = {
        **environment(),
        "threads": arguments.threads,
        "load": load,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "batch": arguments.batch,
        "device": arguments.device,
        "command": " ".join(["python", *sys.argv]),
        "rows": rows_of(speeds, PLAIN, "images a second"),
    }
    finish(result, arguments.output, f"{SIDE} x {SIDE} PNG to 256 x 256")


if __name__ == "__main__":
    main()
