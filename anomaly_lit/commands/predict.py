"""`anomaly-predict`: verdicts, overlays and maps for an image, a video or a folder of images."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.hydra import output_folder, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.files import note, note_origin, printable, tell
from anomaly_lit.types import UserError

GOOD, DEFECT, NOT_JUDGED, FAILED = 0, 1, 2, 3  # 1 and 2: with exit_code=true only
QUIET_SECONDS = 15.0  # between two lines about progress where there is no terminal


def main() -> None:
    """Run the command, and exit with one of the codes above."""
    outcome: list[int] = []
    run_command(lambda cfg: outcome.append(predict(cfg)), "predict", FAILED)
    sys.exit(max(outcome, default=GOOD))  # over all jobs of a multirun (-m)


def predict(cfg: DictConfig) -> int:
    """Judge every image.

    Returns:
        The exit code.
    """
    config = plain(cfg)
    validate(config, "predict")
    directory = output_folder()
    for key in ("ckpt_path", "input"):
        if config[key] is None:
            raise UserError(f"{key} is not set: anomaly-predict ckpt_path=FILE input=FILE|DIR")
    if (directory / "predictions.csv").exists():
        raise UserError(f"{directory / 'predictions.csv'} exists; choose another output_dir")

    from rich.progress import track

    from anomaly_lit.data.opening import checked_pixels
    from anomaly_lit.inference.clips import frames_before, save_scores
    from anomaly_lit.inference.detector import load
    from anomaly_lit.inference.folder import (
        Judge,
        batches_of,
        find_pictures,
        headers_of,
        names_of,
    )

    max_pixels = checked_pixels(config["max_pixels"], "max_pixels")
    found = find_pictures(Path(config["input"]).expanduser(), directory, max_pixels)
    if found.others:
        print(found.others)
    for folder in found.results:
        print(f"skipped: earlier results in {printable(folder)}")
    detector = load(config["ckpt_path"], config["device"], config["trust"], config["engine"])
    note_origin()
    if not detector.calibration:
        tell(
            "this checkpoint has no threshold, since no image was held out in training: "
            "images get a score but no verdict",
            warning=True,
        )
    if config["engine"] == "openvino":
        print("Compiling for OpenVINO and comparing with torch, 5 to 10 s ...", flush=True)
    paths, before = found.paths, None
    if detector.frames:
        before = frames_before(found.paths, detector.frames)
        paths = list(before)
        print(
            f"{len(found.paths) - len(paths)} frames are not judged: the first {detector.frames} "
            "of each folder, which have too few before them"
        )
    headers = {} if found.film else headers_of(paths)
    batches = list(batches_of(paths, config["batch_size"], found.film, headers))
    quiet = len(batches) < 2 or not sys.stdout.isatty()
    start = told = time.perf_counter()
    judge = Judge(
        detector,
        names_of(paths, found.root),
        directory,
        config["category"],
        config["save_maps"],
        max_pixels,
        before,
        found.film,
        headers,
    )
    with judge:
        for batch in track(batches, "Judging", disable=quiet):
            judge.judge(batch)
            if quiet and time.perf_counter() - told > QUIET_SECONDS:
                told = time.perf_counter()
                done = sum(judge.counts.values())
                each = (told - start) / done
                print(f"{done} of {len(paths)} judged, {each:.3g} s per image", flush=True)
    if before:
        threshold = judge.limits.get("threshold", math.nan)
        save_scores(directory / "timeline.png", judge.scores, found.root, threshold)
        print(f"Scores over time: {directory / 'timeline.png'}")
    show(judge, directory, (time.perf_counter() - start) / len(paths))
    if not config["exit_code"]:
        return GOOD
    return NOT_JUDGED if not judge.all_judged else DEFECT if judge.counts.get("defect") else GOOD


def show(judge: Any, directory: Path, seconds: float) -> None:
    """Print what was found, the seconds that an image took, and where it was written."""
    for error in judge.errors:
        print(error, file=sys.stderr)
        note(error, logging.WARNING)
    order = ("good", "defect", "unknown", "unreadable")
    counts = ", ".join(f"{judge.counts[name]} {name}" for name in order if judge.counts.get(name))
    tell(f"{counts}; {judge.in_part} in part, by their first page" if judge.in_part else counts)
    tell(f"{seconds:.3g} s per image")
    tell(f"Overlays: {directory / 'overlays'}\nVerdicts: {directory / 'predictions.csv'}")


if __name__ == "__main__":
    main()
