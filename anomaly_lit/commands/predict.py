"""``anomaly-predict``: verdicts, overlays and maps for a picture or a folder of pictures."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from anomaly_lit.commands.entry import run_command
from anomaly_lit.config.hydra import output_folder, plain
from anomaly_lit.types import UserError

GOOD, DEFECT, UNREADABLE = 0, 1, 2  # exit codes with exit_code=true


def main() -> None:
    """Entry point of the command; exits 0, 1 or 2 with ``exit_code=true``, see the help."""
    outcome: list[int] = []
    run_command(lambda cfg: outcome.append(predict(cfg)), "predict", UNREADABLE)
    sys.exit(max(outcome, default=GOOD))  # of all jobs with -m


def predict(cfg: DictConfig) -> int:
    """Judges every picture; one that cannot be read is reported and does not stop the others.

    Returns:
        The exit code.
    """
    config = plain(cfg)
    directory = output_folder()
    for key in ("ckpt_path", "input"):
        if config[key] is None:
            raise UserError(f"{key} is not set: anomaly-predict ckpt_path=FILE input=FILE|DIR")
    if (directory / "predictions.csv").exists():
        raise UserError(f"{directory / 'predictions.csv'} exists; choose another output_dir")
    paths, root = pictures_in(Path(config["input"]).expanduser())

    from rich.progress import track

    from anomaly_lit.callbacks.outputs import write_rows
    from anomaly_lit.inference.detector import load

    detector = load(config["ckpt_path"], config["device"], config["trust"], config["engine"])
    if config["engine"] == "openvino":
        print("Compiling for OpenVINO and comparing with torch, 5 to 10 s ...", flush=True)
    rows: list[dict[str, Any]] = []
    size = config["batch_size"]
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    for part in track(parts, "Judging", disable=len(parts) < 2 or not sys.stdout.isatty()):
        rows += judge(detector, part, root, config, directory)
    write_rows(directory / "predictions.csv", rows)
    counts = {name: sum(row["verdict"] == name for row in rows) for name in
              ("good", "defect", "unknown", "unreadable")}  # fmt: skip
    for row in rows:
        if row["verdict"] == "unreadable":
            print(f"unreadable: {row['error']}", file=sys.stderr)
    print(", ".join(f"{count} {name}" for name, count in counts.items() if count))
    print(f"Overlays: {directory / 'overlays'}\nVerdicts: {directory / 'predictions.csv'}")
    if not config["exit_code"]:
        return GOOD
    return UNREADABLE if counts["unreadable"] else DEFECT if counts["defect"] else GOOD


def pictures_in(source: Path) -> tuple[list[Path], Path]:
    """The picture, or all pictures below a folder, and the folder that names are relative to.

    Raises:
        UserError: There is no such file, or no picture in the folder.
    """
    from anomaly_lit.data.images import SUFFIXES

    if source.is_file():
        return [source], source.parent
    if not source.is_dir():
        raise UserError(f"input={source} does not exist; give a picture or a folder of pictures")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"input={source} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return found, source


def judge(
    detector: Any, paths: list[Path], root: Path, config: dict[str, Any], directory: Path
) -> list[dict[str, Any]]:
    """Rows of one batch; writes its overlays and, if asked for, its maps."""
    import numpy as np

    from anomaly_lit.calibration import colour_range, limits_of, outline_of
    from anomaly_lit.data.images import read_image
    from anomaly_lit.drawing.pictures import overlay, save_image

    rows, readable, read = [], [], []
    for path in paths:
        try:
            read.append(read_image(path))
            readable.append(path)
        except UserError as error:
            rows.append(_row(path, "", None, None, "unreadable", str(error)))
    findings = detector.predict(read, config["category"], config["batch_size"]) if read else []
    category = config["category"] or (
        detector.categories[0] if len(detector.categories) == 1 else None
    )
    limits = limits_of(detector.calibration, category)
    if config["save_maps"]:
        (directory / "maps").mkdir(exist_ok=True)

    def save(path: Path, finding: Any) -> None:
        name = path.relative_to(root).as_posix().replace("/", "__")
        low, high = colour_range(limits, finding.anomaly_map)
        outline = outline_of(finding.verdict, finding.anomaly_map, limits)
        shown = overlay(finding.image, finding.anomaly_map, low, high, outline)
        save_image(shown, directory / "overlays" / f"{name}.png")
        if config["save_maps"]:
            np.save(directory / "maps" / f"{name}.npy", finding.anomaly_map.astype(np.float16))

    with ThreadPoolExecutor() as pool:  # pictures take longer to write than to judge
        list(pool.map(save, readable, findings))
    for path, finding in zip(readable, findings, strict=True):
        threshold = finding.threshold if finding.threshold == finding.threshold else None
        rows.append(_row(path, category or "", finding.score, threshold, finding.verdict, ""))
    order = {path: position for position, path in enumerate(paths)}
    return sorted(rows, key=lambda row: order[Path(row["path"])])


def _row(
    path: Path,
    category: str,
    score: float | None,
    threshold: float | None,
    verdict: str,
    error: str,
) -> dict[str, Any]:
    return {"path": str(path), "category": category, "score": score, "threshold": threshold,
            "verdict": verdict, "error": error}  # fmt: skip


if __name__ == "__main__":
    main()
