"""The command anomaly-data: looks at a data set before anything is trained on it."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from anomaly_lit.types import Sample, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL.Image import Image

    from anomaly_lit.data.datamodule import AnomalyDataModule

GREY_BITS = 4096  # a 16-bit picture that stays below uses less than 12 of its bits
CLASSES = 16  # masks with more values than this are no class indices
SOFT_SHARE = 0.05  # of a mask's true pixels that may be darker than half of its maximum


class Picture(NamedTuple):
    """What is known of one file after decoding it."""

    sample: Sample
    split: str  # train, holdout or test
    size: tuple[int, int] | None = None  # (H, W); None: unreadable
    mode: str = ""  # Pillow's name
    fingerprint: str = ""  # hash of the decoded pixels
    problem: str = ""
    remarks: tuple[tuple[str, str], ...] = ()  # (kind of finding, text)


@dataclass
class Finding:
    """One kind of thing that is wrong or odd, with the files concerned."""

    level: str  # error: training or evaluation would be wrong; warning: should be known
    kind: str
    text: str
    paths: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that a check found."""

    dataset: str
    root: str
    licence: str | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)  # "WxH" by category
    modes: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether a training on this data set would be right."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: str, kind: str, text: str, paths: list[str] | None = None) -> None:
        """Note a finding."""
        self.findings.append(Finding(level, kind, text, paths or []))


def main() -> None:
    """Run `anomaly-data dataset=NAME dataset.root=DIR`."""
    from anomaly_lit.commands.entry import run_command

    run_command(run, "data")


def run(config: DictConfig) -> None:
    """Check the configured data set, show and write the report; exit with 1 where it is wrong."""
    from anomaly_lit.config.build import instantiate
    from anomaly_lit.config.hydra import plain
    from anomaly_lit.config.validate import validate

    validate(plain(config))
    if config.clear_cache:
        clear_cache()
        return
    datamodule = instantiate(config.dataset)
    datamodule.prepare_data()
    folder = Path(config.output_dir)
    report = check_data(datamodule, folder, columns=config.columns)
    show(report, folder)
    if not report.ok:
        sys.exit(1)


def clear_cache() -> None:
    """Delete the files of `cache=disk` in ANOMALY_LIT_CACHE or the user's cache folder."""
    from anomaly_lit.data.caches.store import cache_folder, clear

    folder = cache_folder(None)
    print(f"{clear(folder):.2f} GB freed in {folder}")


def check_data(datamodule: AnomalyDataModule, output_dir: str | Path, columns: int = 6) -> Report:
    """Decode every image and mask of a data set and gather what is wrong with it.

    Writes `report.json` and `sample_grid.png` (rows of `columns` images as a method would see
    them, truth outlined) into `output_dir`.

    Raises:
        UserError: where there is no such data set at all or the folder cannot be written.
    """
    datamodule.list_samples()
    name, root, licence = type(datamodule).__name__, str(datamodule.root), datamodule.licence
    report = Report(name, root, licence, datamodule.counts())
    for gap in datamodule.find_gaps():
        report.add("error", "incomplete", gap)
    for note in datamodule.notes():
        report.add("warning", "note", note)
    pictures = _decode(datamodule)
    _describe(report, pictures)
    _gather_problems(report, pictures)
    _find_duplicates(report, pictures)
    _find_unused(report, datamodule)
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir={folder} cannot be written: {error.strerror}") from error
    _draw_grid(datamodule, [picture for picture in pictures if picture.size], folder, columns)
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
            table.add_row(first[0], split, str(count), *first[1:])
        table.add_section()
    console.print(table)
    if report.licence:
        console.print(f"licence: {report.licence}")
    colours = {"error": "bold red", "warning": "yellow"}
    for finding in sorted(report.findings, key=lambda finding: finding.level):
        console.print(f"{finding.level}: ", style=colours[finding.level], end="")
        console.print(finding.text, markup=False, soft_wrap=True)
        for path in finding.paths[:limit]:
            console.print(f"  {path}", markup=False, soft_wrap=True)
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


def _decode(datamodule: AnomalyDataModule) -> list[Picture]:
    from anomaly_lit.data.caches.memory import in_threads

    splits = {
        "train": datamodule.train_samples,
        "holdout": datamodule.holdout_samples,
        "test": datamodule.test_samples,
    }
    files = [(sample, split) for split, samples in splits.items() for sample in samples]
    return in_threads(_inspect, files, "Decoding every file")


def _inspect(item: tuple[Sample, str]) -> Picture:
    import hashlib

    from anomaly_lit.data.images import read_header, read_image

    sample, split = item
    try:
        _, mode = read_header(sample.path)
        pixels = read_image(sample.path)
    except UserError as error:
        return Picture(sample, split, problem=str(error))
    remarks = [*_mode_remarks(sample.path, mode)]
    size = (pixels.shape[0], pixels.shape[1])
    if sample.mask_path is not None:
        remarks += _mask_remarks(sample, size)
    mark = hashlib.sha256(f"{size}".encode() + pixels.tobytes()).hexdigest()
    return Picture(sample, split, size, mode, mark, remarks=tuple(remarks))


def _mode_remarks(path: str, mode: str) -> list[tuple[str, str]]:
    import numpy as np
    from PIL import Image

    if mode == "F":
        return [("float", f"{path}: floating-point values, taken as [0, 1] if none is above 1")]
    if mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        return [("alpha", f"{path}: the alpha channel is dropped")]
    if mode.startswith("I"):
        with Image.open(path) as file:
            highest = int(np.asarray(file).max())
        if highest < GREY_BITS:
            return [("dark", f"{path}: 16 bits, but no value above {highest}")]
    return []


def _mask_remarks(sample: Sample, size: tuple[int, int]) -> list[tuple[str, str]]:
    import numpy as np
    from PIL import Image

    from anomaly_lit.data.images import check_sizes, read_mask

    path = str(sample.mask_path)
    try:
        mask = read_mask(path)
        check_sizes(sample, size, mask.shape)
    except UserError as error:
        return [("mask", str(error))]
    if not mask.any():
        return [("empty", f"{path}: nothing is marked")]
    with Image.open(path) as file:
        values = np.asarray(file)
    positive = values[values > 0]
    count, soft = len(np.unique(positive)), float((positive < positive.max() / 2).mean())
    if count > CLASSES and soft > SOFT_SHARE:
        return [("soft", f"{path}: {soft:.0%} of its pixels are above 0 but below half")]
    return [("values", f"{path}: {count} values above 0")] if count > 1 else []


def _describe(report: Report, pictures: list[Picture]) -> None:
    """Count sizes and modes per category; note what a method will not like to see mixed."""
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    modes: dict[str, Counter[str]] = defaultdict(Counter)
    shapes: dict[str, list[float]] = defaultdict(list)
    for picture in pictures:
        if picture.size is not None:
            height, width = picture.size
            sizes[picture.sample.category][f"{width}x{height}"] += 1
            modes[picture.sample.category][picture.mode] += 1
            shapes[picture.sample.category].append(width / height)
    report.sizes = {category: dict(counts.most_common()) for category, counts in sizes.items()}
    report.modes = {category: dict(counts.most_common()) for category, counts in modes.items()}
    for category, ratios in shapes.items():
        if max(ratios) > 1.2 * min(ratios):
            report.add(
                "warning",
                "shapes",
                f"{category}: width / height runs from {min(ratios):.2f} to {max(ratios):.2f}; "
                "dataset.resize=stretch distorts them unequally, dataset.resize=pad does not",
            )
        if len(modes[category]) > 1:
            kinds = ", ".join(f"{mode} {count}" for mode, count in modes[category].most_common())
            report.add("warning", "modes", f"{category}: pictures of several modes ({kinds})")


def _gather_problems(report: Report, pictures: list[Picture]) -> None:
    broken = [picture.problem for picture in pictures if picture.problem]
    if broken:
        report.add("error", "unreadable", f"{len(broken)} images cannot be read", broken)
    kinds = {
        "mask": ("error", "masks are unreadable or of another size than their image"),
        "empty": ("error", "masks of anomalous images are empty"),
        "soft": ("error", "masks are not binary: faint values count as defects, so threshold them"),
        "values": ("warning", "masks hold several values; all above 0 count as defects"),
        "dark": ("warning", "16-bit images use less than 12 bits and will be nearly black"),
        "float": ("warning", "images hold floating-point values"),
        "alpha": ("warning", "images have an alpha channel, which is dropped"),
    }
    for kind, (level, text) in kinds.items():
        lines = [line for picture in pictures for name, line in picture.remarks if name == kind]
        if lines:
            report.add(level, kind, f"{len(lines)} {text}", lines)


def _find_duplicates(report: Report, pictures: list[Picture]) -> None:
    """Compare decoded pixels, so that a copy in another format is found as well."""
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.fingerprint:
            groups[picture.fingerprint].append(picture)
    across: list[str] = []
    contrary: list[str] = []
    train: list[str] = []
    test: list[str] = []
    for group in groups.values():
        if len(group) < 2:
            continue
        line = " = ".join(picture.sample.path for picture in group)
        tested = {picture.split == "test" for picture in group}
        if len(tested) == 2:
            across.append(line)
        elif len({picture.sample.label for picture in group}) == 2:
            contrary.append(line)
        else:
            (test if tested == {True} else train).append(line)
    for level, kind, text, lines in (
        ("error", "leak", "images are both in train and in test", across),
        ("error", "contradiction", "images are both normal and anomalous in test", contrary),
        ("warning", "duplicates in train", "images occur several times in train", train),
        ("warning", "duplicates in test", "images occur several times in test", test),
    ):
        if lines:
            report.add(level, kind, f"{len(lines)} {text}, by content", lines)


def _find_unused(report: Report, datamodule: AnomalyDataModule) -> None:
    """List pictures that lie in the data set's folders and belong to no split."""
    from anomaly_lit.data.layouts.folders import walk_images

    used: set[Path] = set()
    for category in datamodule.categories:
        for samples in datamodule.list_category(Path(str(datamodule.root)), category):
            for sample in samples:
                used |= {Path(path) for path in (sample.path, sample.mask_path) if path}
    folders = datamodule.folders()
    unused = sorted({str(path) for top in folders for path in walk_images(top)} - {*map(str, used)})
    if unused:
        report.add(
            "warning", "unused", f"{len(unused)} pictures are neither image nor mask", unused
        )


def _draw_grid(
    datamodule: AnomalyDataModule, pictures: list[Picture], folder: Path, columns: int
) -> None:
    """Write some images of each category and kind, resized, with their truth outlined."""
    from anomaly_lit.drawing.panels import contact_sheet
    from anomaly_lit.drawing.png import save_image

    rows: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for category in datamodule.categories:
        for picture in pictures:
            if picture.sample.category == category and picture.split != "holdout":
                kind = picture.sample.defect_type
                name = "train" if picture.split == "train" else f"test {kind}"
                rows[category, name].append(picture.sample)
    tiles = []
    for (category, name), samples in rows.items():
        chosen = [samples[len(samples) * i // columns] for i in range(min(columns, len(samples)))]
        row = [_tile(datamodule, sample, f"{category}: {name}") for sample in chosen]
        tiles += row + [_blank()] * (columns - len(row))
    if tiles:
        save_image(contact_sheet(tiles, columns), folder / "sample_grid.png")


def _tile(datamodule: AnomalyDataModule, sample: Sample, caption: str, side: int = 160) -> Image:
    from PIL import Image, ImageDraw

    from anomaly_lit.data.images import read_image, read_sample
    from anomaly_lit.drawing.outline import draw_outline

    try:
        pixels, mask = read_sample(sample, datamodule.resize)
    except UserError:  # reported already; show the image without its mask
        pixels, mask = datamodule.resize.image(read_image(sample.path)), None
    drawn = pixels if mask is None else draw_outline(pixels, mask)
    picture = Image.fromarray(drawn)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    picture = picture.resize((width, height))
    tile = Image.new("RGB", (side, side + 26), (255, 255, 255))
    tile.paste(picture, (0, 26))
    lines = f"{caption}\n{Path(sample.path).name}"
    ImageDraw.Draw(tile).text((1, 0), lines, fill=(40, 40, 40), font_size=10, spacing=1)
    return tile


def _blank() -> Image:
    from PIL import Image

    return Image.new("RGB", (1, 1), (255, 255, 255))


if __name__ == "__main__":
    main()
