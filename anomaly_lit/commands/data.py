"""`anomaly-data`: check a data set before training on it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_lit.files import printable, write_json
from anomaly_lit.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from anomaly_lit.data.datamodule import AnomalyDataModule
    from anomaly_lit.data.inspect import Report


DEMO_KEYS = ("max_steps", "val_check_interval")  # below trainer, in conf/dataset/demo.yaml


def main() -> None:
    """Run `anomaly-data dataset=NAME dataset.root=DIR`."""
    from anomaly_lit.commands.entry import run_command

    run_command(run, "data")


def run(config: DictConfig) -> None:
    """Check the configured data set, show and write the report; exit with 1 if it has errors."""
    from anomaly_lit.config.build import instantiate
    from anomaly_lit.config.hydra import plain
    from anomaly_lit.config.validate import validate

    validate(without_demo_keys(plain(config)), "data")
    if config.clear_cache:
        clear_cache()
        return
    datamodule = instantiate(config.dataset)
    datamodule.prepare_data()
    folder = Path(config.output_dir)
    datamodule.check_apart(folder)
    report = check_data(datamodule, folder, columns=config.columns)
    show(report, folder)
    if not report.ok:
        sys.exit(1)


def without_demo_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without the length of training, which dataset=demo sets."""
    trainer = config.get("trainer") or {}
    left = {key: value for key, value in trainer.items() if key not in DEMO_KEYS}
    rest = {key: value for key, value in config.items() if key != "trainer"}
    return {**rest, "trainer": left} if left else rest


def clear_cache() -> None:
    """Delete the files of `cache=disk` in ANOMALY_LIT_CACHE or the user's cache folder."""
    from anomaly_lit.data.caches.store import cache_folder, clear

    folder = cache_folder(None)
    print(f"{clear(folder):.2f} GB freed in {folder}")


def check_data(datamodule: AnomalyDataModule, output_dir: str | Path, columns: int = 6) -> Report:
    """Check a data set, and write `report.json` and `sample_grid.png`.

    The grid shows rows of `columns` images as a method would see them, with true defects outlined.

    Raises:
        UserError: The data set does not exist, or `output_dir` cannot be written.
    """
    from anomaly_lit.data.inspect import decode_all, inspect_data, read_resized, sample_rows
    from anomaly_lit.drawing.png import save_image
    from anomaly_lit.drawing.samples import sample_sheet, sample_tile

    pictures = decode_all(datamodule)
    report = inspect_data(datamodule, pictures)
    folder = Path(output_dir)
    try:
        write_json(folder / "report.json", asdict(report))
    except OSError as error:
        raise UserError(f"output_dir={folder} cannot be written: {error.strerror}") from error
    tiles = [
        [
            sample_tile(*read_resized(datamodule, sample), f"{caption}\n{Path(sample.path).name}")
            for sample in samples
        ]
        for caption, samples in sample_rows(datamodule, pictures, columns)
    ]
    if tiles:
        save_image(sample_sheet(tiles, columns), folder / "sample_grid.png")
    return report


def show(report: Report, folder: Path, limit: int = 10) -> None:
    """Print a report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{report.dataset} in {report.root}", title_justify="left")
    for heading in ("category", "split", "images", "size", "mode"):
        table.add_column(heading, justify="right" if heading == "images" else "left")
    for category, counts in report.counts.items():
        sizes, modes = (_most(facts.get(category, {})) for facts in (report.sizes, report.modes))
        for row, (split, count) in enumerate(counts.items() or [("nothing", 0)]):
            first = (category, sizes, modes) if row == 0 else ("", "", "")
            table.add_row(first[0], printable(split), str(count), *first[1:])
        table.add_section()
    console.print(table)
    if report.licence:
        console.print(f"licence: {report.licence}")
    colours = {"error": "bold red", "warning": "yellow"}
    for finding in sorted(report.findings, key=lambda finding: finding.level):
        console.print(f"{finding.level}: ", style=colours[finding.level], end="")
        console.print(printable(finding.text), markup=False, soft_wrap=True)
        for path in finding.paths[:limit]:
            console.print(f"  {printable(path)}", markup=False, soft_wrap=True)
        if len(finding.paths) > limit:
            console.print(f"  and {len(finding.paths) - limit} more, see report.json")
    errors = sum(finding.level == "error" for finding in report.findings)
    verdict = f"{errors} errors: training or evaluation would be wrong" if errors else "fit for use"
    console.print(verdict, style="bold red" if errors else "bold green")
    console.print(f"report and sample grid: {folder}", markup=False, soft_wrap=True)


def _most(counts: dict[str, int], limit: int = 3) -> str:
    common = [name for name, _ in Counter(counts).most_common(limit)]
    more = f" and {len(counts) - limit} more" if len(counts) > limit else ""
    return ", ".join(common) + more


if __name__ == "__main__":
    main()
