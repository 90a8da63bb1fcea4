"""What each switch of a training step gives: layout, fused optimiser, bfloat16, compiled networks.

    python benchmarks/step.py --output experiments/benchmarks/step.json
    python benchmarks/step.py --methods onenip_small --switches channels_last+bf16 compile+bf16
    python benchmarks/step.py --methods dinomaly_small,image_size=336 --switches bf16 --threads 2
    python benchmarks/step.py --table experiments/benchmarks/step.json >> table.md

Methods train as in training.py, with the caches that are on by default (`cache=host`), so a switch
is judged by the work that the caches leave; with `--cache cache=none` the work of decoding and of
the backbone counts, too. A figure is the median time between two steps of a round; rounds measure
everything in turns, and ratios are taken within a round. "until the first step's end" counts from
building the data module, in the first round, with nothing compiled before.

`persistent_workers` and `pin_memory` (the latter only on a GPU) are measured on epochs of two steps
with `cache=none` and two processes, by the mean time of a step, starts of epochs included.

A switch pays where its median ratio is at least 1.05. What pays on every method belongs in `ON` in
anomaly_lit/callbacks/step.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from data import as_table, finish, make_pictures, small_presets, spread
from training import WARM_UP, compose, train

from anomaly_lit.callbacks.step import FastStep
from anomaly_lit.files import environment

DEFAULTS = small_presets()
SWITCHES = ["channels_last", "fused", "bf16", "compile"]
PLAIN = "none"
PAYS = 1.05
LOADING = ["cache=none", "dataset.num_workers=2"]


def seconds(config: dict[str, Any], switch: str, steps: int, device: str) -> tuple[float, float]:
    """Return seconds of a step, and until the first one's end, with a switch's options."""
    names = set() if switch == PLAIN else set(switch.split("+"))
    options = {name: name in names for name in FastStep().options}
    config = {**config, "step": {**config["step"], **options}}  # the data module reads it, too
    precision = "bf16-mixed" if "bf16" in names else "32-true"
    clock = train(config, steps, device, precision, False, [FastStep(**options)])
    if config["dataset"]["num_workers"]:
        ends = clock.ends[WARM_UP:]
        return (ends[-1] - ends[0]) / (len(ends) - 1), clock.first
    return clock.step(), clock.first


def measure(
    title: str,
    config: dict[str, Any],
    switches: list[str],
    arguments: argparse.Namespace,
    steps: int,
) -> list[dict[str, Any]]:
    """Return a row for each switch, the plain step first."""
    times: dict[str, list[float]] = {switch: [] for switch in [PLAIN, *switches]}
    first: dict[str, float] = {}
    missing: dict[str, str] = {}
    for number in range(arguments.rounds):
        for switch in times:
            if switch in missing:
                continue
            try:
                step, until = seconds(config, switch, steps, arguments.device)
            except Exception as error:
                missing[switch] = (str(error).strip().splitlines() or [repr(error)])[0][:100]
                continue
            times[switch].append(step)
            first.setdefault(switch, until)
            print(f"{title}, round {number + 1}: {switch} {step:.3f} s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for switch, values in times.items():
        what = f"{title}, {switch}"
        if switch in missing:
            rows.append({"what": what, "missing": missing[switch]})
            continue
        ratios = spread([a / b for a, b in zip(times[PLAIN], values, strict=True)])
        rows.append(
            {
                "what": what,
                "times as fast": ratios,
                "seconds a step": spread(values),
                "until the first step's end, s": round(first[switch], 1),
                "pays": "" if switch == PLAIN else "yes" if ratios[0] >= PAYS else "no",
            }
        )
    return rows


def all_rows(root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for method in arguments.methods:
        name, *more = method.split(",")
        config = compose(name, root, [arguments.cache], arguments.batch, more)
        rows += measure(method, config, arguments.switches, arguments, arguments.steps)
    if arguments.loading:
        config = compose(arguments.loading, root, LOADING, arguments.images // 2)
        switches = ["persistent_workers"]
        if arguments.device == "gpu":
            switches += ["pin_memory", "persistent_workers+pin_memory"]
        title = f"{arguments.loading}, two workers"
        rows += measure(title, config, switches, arguments, arguments.steps)
    return rows


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say which switches pay, on how many of the methods that they were measured on."""
    counts: dict[str, list[bool]] = {}
    for row in rows:
        if row.get("pays"):
            switch = row["what"].rpartition(", ")[2]
            counts.setdefault(switch, []).append(row["pays"] == "yes")
    return "\n".join(
        f"{switch}: {PAYS} or more on {sum(paid)} of {len(paid)}" for switch, paid in counts.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=DEFAULTS,
                        help="options of conf/method, each with more settings after commas: "
                        "dinomaly_small,image_size=224")  # fmt: skip
    parser.add_argument("--switches", nargs="+", default=SWITCHES, help="joined by + for several")
    parser.add_argument("--loading", default="uniad_small", help="method for workers; '' for none")
    parser.add_argument("--cache", default="cache=host", help="an override of anomaly-train")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result and stop")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=WARM_UP + 4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="the trainer's accelerator: cpu or gpu")
    parser.add_argument("--quick", action="store_true", help="one method, few steps: a trial")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a new one")
    arguments = parser.parse_args()
    if arguments.table:
        result = json.loads(arguments.table.read_text())
        print(as_table(result), verdict(result["rows"]), sep="\n")
        return
    if arguments.quick:
        arguments.methods, arguments.images = ["fastflow_small"], 8
        arguments.steps, arguments.rounds, arguments.batch = WARM_UP + 2, 1, 4
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(arguments.threads)
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # a first run has none
        make_pictures(Path(folder), arguments.images)
        rows = all_rows(Path(folder), arguments)
    result = {
        **environment(),
        "threads": arguments.threads,
        "load": load,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "batch": arguments.batch,
        "device": arguments.device,
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    finish(result, arguments.output, f"Switches of a training step at 256 x 256, {arguments.cache}")
    print(verdict(rows))


if __name__ == "__main__":
    main()
