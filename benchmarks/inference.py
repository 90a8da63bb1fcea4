"""From a picture's file to a verdict: what each stage takes, and what other engines would gain.

    python benchmarks/inference.py --output experiments/benchmarks/inference.json
    python benchmarks/inference.py --methods fastflow_small --variants openvino compile
    python benchmarks/inference.py --table experiments/benchmarks/inference.json >> table.md

Every method is trained for a step on 1024 x 1024 PNG files, drawn by data.py, with random weights
in its backbones, which do not change the times; its checkpoint is loaded as anomaly-predict does.
Images are scored one at a time (latency) and in batches (throughput), at 256 x 256. All times are
per image. The stages:

- decode, resize: the file to pixels, pixels to the tensor that the method sees;
- forward, split into backbone, head and map: what handles maps at the image's size
  (upsampling, smoothing, the score);
- verdict: the threshold, and the map brought to the picture's size;
- whole: all of these at once, `Detector.predict`; "overlay" is the time that anomaly-predict adds
  to write the overlay of an image.

Variants change the forward pass alone: see engines.py. A round measures every variant and stage of
a method once, in turns; ratios are taken within a round. A variant pays where the median of its
ratios to eager is at least 1.05. "off" is the largest distance of a map from eager's, divided by
the range of eager's map; above 0.001 it counts as another result. With --output a plot is written
beside the result.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from data import as_table, make_pictures, small_presets, spread
from engines import EAGER, VARIANTS, Engines, MissingError, furthest
from stages import STAGES, as_batch, stages_of, timed, trained

from anomaly_lit import load
from anomaly_lit.data.images import read_image
from anomaly_lit.files import environment

METHODS = small_presets()
AROUND = ("decode", "resize", "verdict")  # what no variant changes
PAYS = 1.05
ANOTHER = ", another result"
SAME = 1e-3  # largest distance from eager, over the map's range, of the same result
OURS = "fastflow_small"  # beside the peers
FEW = 3  # rounds of batches, which take long
Figures = dict[str, list[dict[str, float]]]  # of each contender, a record a round


def rounds_of(calls: dict[str, Callable[[], dict[str, float]]], rounds: int) -> Figures:
    """Call all once per round, in turns."""
    found: Figures = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return found


def measure(
    name: str, root: Path, folder: Path, batch: int, rounds: int, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of the stages and of the variants of one method, in batches of one size."""
    option, *settings = name.split(",")
    name = " ".join([option, *(text for text in settings if "/" not in text)])  # without folders
    own = folder / "_".join(name.split())
    checkpoint = own / f"{option}.ckpt"
    if not checkpoint.exists():
        own.mkdir()
        trained(option, root, own, arguments.size, settings)
    detector = load(checkpoint, arguments.device)
    engines = Engines(checkpoint, folder, arguments.device, arguments.threads)
    paths = sorted(root.glob("part/train/good/*.png"))[:batch]
    image = as_batch(detector, [read_image(path) for path in paths])["image"]
    title, missing, prepared, off = f"{name}, batch {batch}", {}, {}, {}
    expected = torch.inference_mode()(engines.scoring())(image)
    calls: dict[str, Any] = {"stages": lambda: stages_of(detector, paths, folder)}
    for variant in (EAGER, *arguments.variants):
        try:
            if variant == "compile" and batch > 1 and not arguments.compile_batches:
                raise MissingError("left out without --compile-batches: it takes long")
            run, prepared[variant] = engines.prepare(variant, image)
        except MissingError as error:
            missing[variant] = str(error)
            continue
        with torch.inference_mode():
            off[variant] = furthest(expected, run(image))
        calls[variant] = lambda run=run: {"forward": timed(run, image) / batch}
    stages_of(detector, paths, folder)  # a warm-up: some work is done only once
    found = rounds_of(calls, rounds)
    rows = []
    for variant in (EAGER, *arguments.variants):
        if variant in missing:
            rows.append({"what": f"{title}, {variant}", "missing": missing[variant]})
        else:
            note = f"{off[variant]:.1e}" + (ANOTHER if off[variant] > SAME else "")
            seconds = {"seconds to prepare": round(prepared[variant], 1)}
            figures = {**compared(found, variant), **seconds, "off": note}
            rows.append({"what": f"{title}, {variant}", **figures})
    print(title, file=sys.stderr, flush=True)
    return [stage_row(title, found["stages"], STAGES)], rows


def compared(found: Figures, variant: str) -> dict[str, list[float]]:
    """Return milliseconds of the forward pass, and how many times as fast as eager a variant is."""
    eager = [record["forward"] for record in found[EAGER]]
    own = [record["forward"] for record in found[variant]]
    rest = [sum(r[stage] for stage in AROUND) for r in found["stages"]]
    return {
        "forward, ms": spread([1000 * value for value in own]),
        "times eager": spread([a / b for a, b in zip(eager, own, strict=True)]),
        "whole, times eager": spread(
            [(r + a) / (r + b) for r, a, b in zip(rest, eager, own, strict=True)]
        ),
    }


def stage_row(title: str, records: list[dict[str, float]], stages: Sequence[str]) -> dict[str, Any]:
    """Return milliseconds of each stage, and images a second of the whole."""
    row: dict[str, Any] = {"what": title}
    for stage in stages:
        values = [1000 * record[stage] for record in records if stage in record]
        row[f"{stage}, ms"] = spread(values) if values else "-"
    row["images a second"] = spread([1 / record["whole"] for record in records])
    return row


def measure_peers(
    root: Path, folder: Path, batch: int, rounds: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure our FastFlow and the peers in turns, in the stages that both sides have."""
    if not (folder / f"{OURS}.ckpt").exists():
        trained(OURS, root, folder, arguments.size)
    detector = load(folder / f"{OURS}.ckpt", arguments.device)
    paths = sorted(root.glob("part/train/good/*.png"))[:batch]
    calls: dict[str, Any] = {OURS: lambda: stages_of(detector, paths, folder)}
    modules, missing = peers.build_all(arguments.size, arguments.device)
    for name, module in modules.items():
        calls[name] = lambda m=module: peers.stages_of(m, paths, arguments.device)
    rounds_of(calls, 1)
    found = rounds_of(calls, rounds)
    rows = []
    for name in (OURS, *peers.PEERS):
        title = f"{'ours' if name == OURS else 'anomalib'}, {name}, batch {batch}"
        if name in missing:
            rows.append({"what": title, "missing": missing[name]})
            continue
        row = stage_row(title, found[name], ("decode", "resize", "forward", "verdict", "whole"))
        pairs = list(zip(found[OURS], found[name], strict=True))
        for stage in ("forward", "whole"):
            row[f"{stage}, times ours"] = spread([b[stage] / a[stage] for a, b in pairs])
        rows.append(row)
    return rows


def conclusion(rows: list[dict[str, Any]], variants: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for each variant and batch size, for which methods it pays."""
    table = []
    for variant in variants:
        for batch in dict.fromkeys(row["what"].split(", ")[1] for row in rows):
            chosen = {
                row["what"].split(", ")[0]: row
                for row in rows
                if row["what"].endswith(f", {batch}, {variant}")
            }
            ratios = {k: row["times eager"][0] for k, row in chosen.items() if "off" in row}
            same = [name for name in ratios if ANOTHER not in chosen[name]["off"]]
            mean = statistics.fmean(math.log(x) for x in ratios.values()) if ratios else math.nan
            table.append(
                {
                    "what": f"{variant}, {batch}",
                    "geometric mean, times eager": f"{math.exp(mean):.3g}" if ratios else "-",
                    f"pays (>= {PAYS})": listed(n for n in ratios if ratios[n] >= PAYS),
                    "does not pay": listed(n for n in ratios if ratios[n] < PAYS),
                    "another result": listed(n for n in ratios if n not in same),
                    "not measured": listed(n for n in chosen if n not in ratios),
                }
            )
    return table


def listed(names: Iterator[str]) -> str:
    found = [name.removesuffix("_small") for name in names]
    return f"{len(found)}: {', '.join(found)}" if found else "-"


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the stages at batch 1, and how many times as fast as eager the variants are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = [row for row in result["rows"] if row["what"].endswith("batch 1")][::-1]
    names, start = [row["what"].split(", ")[0] for row in rows], np.zeros(len(rows))
    for stage in ("decode", "resize", "backbone", "head", "map", "verdict"):
        width = np.array([row[f"{stage}, ms"][0] for row in rows])
        left.barh(names, width, left=start, label=stage)
        start += width
    left.set_xlabel("ms an image, one at a time")
    left.legend(fontsize=8)
    for row in result["variants"]:
        name, batch, variant = row["what"].split(", ")
        if "missing" in row or variant == EAGER or name not in names:
            continue
        shift, mark = (0.15, "o") if batch == "batch 1" else (-0.15, "s")
        colour = f"C{list(VARIANTS).index(variant)}"
        right.plot(row["times eager"][0], names.index(name) + shift, mark, color=colour)
    for variant in result["conclusion"]:
        name, batch = variant["what"].split(", ")
        if batch == "batch 1":
            right.plot([], [], "o", color=f"C{list(VARIANTS).index(name)}", label=name)
    right.axvline(PAYS, color="black", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(names)), names)
    right.set_xscale("log")
    for level in (right.xaxis.set_major_formatter, right.xaxis.set_minor_formatter):
        level("{x:g}")
    right.set_xlabel("forward, times as fast as eager; circles: batch 1, squares: larger")
    right.legend(fontsize=8)
    figure.suptitle(f"{result['hardware']}, commit {result['commit']}", fontsize=9)
    figure.savefig(file, dpi=120)


def tables(result: dict[str, Any]) -> str:
    """Return all tables as markdown, with the conditions below the last."""
    parts = []
    for key in ("rows", "variants", "peers", "conclusion"):
        if result[key]:
            parts.append(as_table({**result, "rows": result[key]}).rsplit("\n\n", 1))
    return "\n\n".join(part[0] for part in parts) + "\n\n" + parts[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS,
                        help="options of conf/method, each with more settings after commas: "
                        "efficient_ad_small,image_size=128")  # fmt: skip
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS)[1:],
                        default=list(VARIANTS)[1:])  # fmt: skip
    parser.add_argument("--no-peers", action="store_true", help="leave anomalib out")
    parser.add_argument("--compile-batches", action="store_true", help="compile for batches, too")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a result and stop")
    parser.add_argument("--size", type=int, default=256, help="side of what a method sees")
    parser.add_argument("--batch", type=int, default=8, help="images at once, for throughput")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help=f"of batch 1; of batches {FEW}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="two rounds, batches of two: a trial")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a new one")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(json.loads(arguments.table.read_text())))
        return
    if arguments.quick:
        arguments.batch, arguments.rounds = 2, 2
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(arguments.threads)
    load_before, began = round(os.getloadavg()[0], 1), time.perf_counter()
    rows, variants, beside = [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root, folder = Path(name) / "pictures", Path(name)
        make_pictures(root, max(8, arguments.batch))
        sizes = {1: arguments.rounds, arguments.batch: min(arguments.rounds, FEW)}
        for method in arguments.methods:
            for batch, rounds in sizes.items():
                more, others = measure(method, root, folder, batch, rounds, arguments)
                rows, variants = rows + more, variants + others
        for batch, rounds in () if arguments.no_peers else sizes.items():
            beside += measure_peers(root, folder, batch, rounds, arguments)
    result = {
        **environment(),
        "threads": arguments.threads,
        "load": load_before,
        "rounds": f"{arguments.rounds} (of batches {FEW})",
        "device": arguments.device,
        "command": " ".join(["python", *sys.argv]),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "rows": rows,
        "variants": variants,
        "peers": beside,
        "conclusion": conclusion(variants, arguments.variants),
    }
    print(tables(result))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
