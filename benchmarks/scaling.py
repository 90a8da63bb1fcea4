"""How cost grows: with images, resolution, tokens and categories; a power law is fitted to each.

    python benchmarks/scaling.py --output experiments/benchmarks/scaling.json
    python benchmarks/scaling.py --only images tokens
    python benchmarks/scaling.py --table experiments/benchmarks/scaling.json >> table.md

- images: a data set of 100 to 10,000 files of 64 x 64 and one category: listing and checking
  (set-up), caches, an epoch of a method that costs nothing, the test with all metrics.
- resolution: forward pass and training step, with the backbone, of three methods. The exponent is
  that of the side, so that 2 is the growth of the number of pixels.
- tokens: the training step without the backbone, on 14 x 14 to 64 x 64 tokens. The exponent is that
  of the number of tokens; attention alone would have 2.
- categories: 1,200 files in 1 to 30 categories that one model learns.
- vectors: a bank of 10,000 to 1,000,000 vectors of length 128: drawing from a stream, a coreset of
  100 rows, one of 1 % of what was drawn, the nearest items of 1,000 queries; in CPU time.

Every figure is taken in a process of its own, so that no memory was used before; a round measures
all of them in turns. The exponent is the slope of a least-squares line through the logarithms of
the medians: 0 does not grow, 1 grows in proportion. Fixed costs flatten it at small sizes, so the
exponent of the last two sizes stands beside it. A size that should need more than 0.6 of the free
memory, by the slope of the two sizes before, is left out, with the reason. Linux only; with
--output a plot is written beside the result.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
from data import as_table, spread
from metrics import memory

from anomaly_lit.files import environment

PARTS = ("images", "resolution", "tokens", "categories", "vectors")
AXES = {"images": "images", "resolution": "side of the image, pixels",
        "tokens": "tokens", "categories": "categories of 1,200 images",
        "vectors": "vectors of length 128"}  # fmt: skip
SIZES = {"images": [100, 300, 1000, 3000, 10_000], "resolution": [224, 320, 448, 640, 1024],
         "tokens": [14, 20, 28, 40, 64], "categories": [1, 5, 15, 30],
         "vectors": [10_000, 30_000, 100_000, 300_000, 1_000_000]}  # fmt: skip
QUICK = {"images": [50, 100, 200], "resolution": [128, 192, 256],
         "tokens": [8, 14, 20], "categories": [1, 3, 5],
         "vectors": [3000, 10_000, 30_000]}  # fmt: skip
METHODS = {"resolution": ["fastflow_small", "uniad_small", "ami_net_small"],
           "tokens": ["uniad_small", "ami_net_small"]}  # fmt: skip
SHARE = 0.6  # of the free memory that may be used
SMALL = 32.0  # MiB; peaks below this say nothing about growth
ALL = 1200  # images of `categories`


def cases_of(
    part: str, sizes: Sequence[int], root: Path, batch: int
) -> dict[str, Callable[[int], Any]]:
    """Return what to call with a size, by the case's name; write the data sets."""
    if part == "images":
        folders = {size: cases.write_set(root, 1, size) for size in sizes}
        return {"": lambda size: cases.images(folders[size])}
    if part == "categories":
        folders = {size: cases.write_set(root, size, ALL) for size in sizes}
        return {"": lambda size: cases.categories(folders[size])}
    if part == "vectors":
        return {"": cases.vectors}
    measure = cases.resolution if part == "resolution" else cases.tokens
    return {name: partial(measure, name, batch) for name in METHODS[part]}


def measure(
    part: str, sizes: Sequence[int], root: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure all sizes of all cases, one after the other, round by round."""
    calls = cases_of(part, sizes, root, arguments.batch)
    xs = [size**2 if part == "tokens" else size for size in sizes]
    found: dict[str, dict[str, dict[int, list[float]]]] = {name: {} for name in calls}
    skipped: dict[str, str] = {}
    for number in range(arguments.rounds):
        for name, call in calls.items():
            for size, x in zip(sizes, xs, strict=True):
                title = f"{name or part} at {x}"
                if title in skipped:
                    continue
                outcome: Any = too_much(found[name], x)
                if outcome is None:
                    outcome = cases.apart(partial(call, size), arguments.threads)
                if isinstance(outcome, str):
                    skipped[title] = outcome
                    continue
                for quantity, value in outcome.items():
                    found[name].setdefault(quantity, {}).setdefault(x, []).append(value)
        print(f"{part}: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    rows = [
        row_of(f"{name}: {quantity}" if name else quantity, values, xs)
        for name, quantities in found.items()
        for quantity, values in quantities.items()
    ]
    return {"axis": AXES[part], "sizes": xs, "rows": rows, "skipped": skipped}


def too_much(quantities: dict[str, dict[int, list[float]]], x: int) -> str | None:
    """Return why a size is left out, by the memory of the two sizes before; None runs it."""
    for quantity, values in quantities.items():
        smaller = sorted(size for size in values if size < x)[-2:]
        if not quantity.endswith(cases.PEAK) or len(smaller) < 2 or x in values:
            continue
        peaks = {k: max(SMALL, *values[k]) for k in smaller}
        last, slope = peaks[smaller[1]], exponent(peaks)
        expected = last * (x / smaller[1]) ** max(slope, 0.0)
        free = memory("MemAvailable", "/proc/meminfo")
        if expected > SHARE * free:
            return f"about {expected:.0f} MiB expected, {free:.0f} MiB free"
    return None


def exponent(values: dict[int, float]) -> float:
    """Return the slope of the least-squares line through the logarithms; NaN below two sizes."""
    if len(values) < 2:
        return math.nan
    x, y = np.log(list(values)), np.log(list(values.values()))
    return float(np.polyfit(x, y, 1)[0])


def row_of(title: str, values: dict[int, list[float]], xs: Sequence[int]) -> dict[str, Any]:
    """Return median and spread at each size, and the exponent of the medians."""
    spreads = {x: spread(values[x]) for x in xs if x in values}
    middle = {x: max(found[0], 1e-9) for x, found in spreads.items()}
    cells = {str(x): spreads.get(x, "left out") for x in xs}
    last = exponent(dict(list(middle.items())[-2:]))
    return {
        "what": title,
        **cells,
        "exponent": f"{exponent(middle):.2f}",
        "of the last two": f"{last:.2f}",
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw a panel per quantity with a line per method, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    panels: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for part, found in result["parts"].items():
        for row in found["rows"]:
            name, _, quantity = row["what"].rpartition(": ")
            panels.setdefault((part, quantity), []).append((name, row))
    across = 4
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4 * across, 3 * down), layout="constrained", squeeze=False
    )
    for place, ((part, quantity), rows) in zip(axes.flat, panels.items(), strict=False):
        for name, row in rows:
            points = [(x, row[str(x)]) for x in result["parts"][part]["sizes"]]
            points = [(x, value) for x, value in points if isinstance(value, list)]
            middle = [value[0] for _, value in points]
            label = f"{name} exponent {row['exponent']}".strip()
            place.plot([x for x, _ in points], middle, "o-", label=label)
            low, high = ([value[k] for _, value in points] for k in (1, 2))
            place.fill_between([x for x, _ in points], low, high, alpha=0.2)
        place.set_xscale("log")
        place.set_yscale("log")
        low, high = place.get_ylim()
        if high < 10 * low:  # noise is not to look like growth
            place.set_ylim(math.sqrt(low * high / 10), math.sqrt(low * high * 10))
        xs = result["parts"][part]["sizes"]
        place.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=7)
        place.xaxis.set_minor_locator(NullLocator())
        place.yaxis.set_major_formatter("{x:g}")
        place.yaxis.set_minor_formatter(NullFormatter())
        place.set_xlabel(result["parts"][part]["axis"], fontsize=8)
        place.set_title(f"{part}: {quantity}", fontsize=9)
        place.legend(fontsize=7)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(f"{result['hardware']}, commit {result['commit']}", fontsize=9)
    figure.savefig(file, dpi=110)


def tables(result: dict[str, Any]) -> str:
    """Return a markdown table for each part, with the conditions below the last."""
    texts, note = [], ""
    for part, found in result["parts"].items():
        table, note = as_table({**result, "rows": found["rows"]}).rsplit("\n\n", 1)
        texts.append(f"**{part}**, by {found['axis']}\n\n{table}")
        texts += [f"Left out: {name}: {why}." for name, why in found["skipped"].items()]
    return "\n\n".join([*texts, note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a result and stop")
    parser.add_argument("--batch", type=int, default=1, help="images, of resolution and tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: a trial")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a new one")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(json.loads(arguments.table.read_text())))
        return
    if arguments.quick:
        arguments.rounds = 1
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)  # before forks: those set their own
    load, began, parts = round(os.getloadavg()[0], 1), time.perf_counter(), {}
    for part in arguments.only:
        sizes = (QUICK if arguments.quick else SIZES)[part]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            parts[part] = measure(part, sizes, Path(folder), arguments)
    result = {
        **environment(),
        "threads": arguments.threads,
        "load": load,
        "rounds": arguments.rounds,
        "batch": arguments.batch,
        "command": " ".join(["python", *sys.argv]),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "parts": parts,
    }
    print(tables(result))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
