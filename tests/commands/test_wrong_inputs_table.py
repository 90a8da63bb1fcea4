"""Some 500 wrong inputs to the six commands: the rows of `wrong/train.txt` and `wrong/others.txt`.

What is wrong for one method alone lies beside that method's test, in `tests/methods/wrong/`: a line
with the arguments of a run that would work, then the rows.

Each ends with the stated exit code and a sentence that names key, value and way out, without a
traceback, and leaves nothing behind. Rows run in this process. Hydra composes each base once, and
the overrides of a row are applied to a copy; some rows run through Hydra as a whole.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from anomaly_lit.commands import entry
from anomaly_lit.config.hydra import config_dir

Run = Callable[..., Any]

TABLES = Path(__file__).parent / "wrong"
OF_METHODS = sorted((Path(__file__).parents[1] / "methods" / "wrong").glob("*.txt"))
CODES = {"train": 1, "test": 1, "predict": 3, "data": 1, "report": 1, "status": 1}
USAGE = 2  # of the two commands that argparse serves
LONGEST = 700  # letters of a line
WHOLE = 25  # each of so many rows runs through Hydra as a whole
SMALL = "method.optimizer.lr=1e-3 trainer=cpu trainer.max_steps=1 trainer.val_check_interval=1 "
SMALL += "trainer.precision=32-true logger=none image_size=64 dataset.batch_size=2 output_dir=$OUT"
DATA = "dataset=mvtec_ad dataset.root=$ROOT dataset.categories=[bolt]"
AMI = (
    "method=ami_net_small method.grid=8 method.dim=32 method.heads=2 method.depth=1 "
    "method.backbone.weights=random"
)
BASES = {  # arguments of a run that would work
    "ami": f"{AMI} {DATA}",
    "folder": f"{AMI} dataset=folder dataset.root=$ROOT/bolt dataset.normal_dir=train",
    "demo": f"{AMI} dataset=demo dataset.root=$TMP/unseen",
    "ksdd2": f"{AMI} dataset=ksdd2",
    "visa": f"{AMI} dataset=visa",
    "btad": f"{AMI} dataset=btad",
    "synthesis": "method=onenip_small method.refiner_dim=8 method.backbone.weights=random "
    "method.dim=32 method.heads=2 method.feedforward=32 method.window=3 "
    f"method.encoder_depth=1 method.decoder_depth=1 {DATA}",
    "test": "output_dir=$OUT accelerator=cpu",
    "predict": "output_dir=$OUT device=cpu",
    "data": "dataset.root=$ROOT output_dir=$OUT image_size=64",
    "report": "",
    "status": "",
}


def lines_of(file: Path) -> list[str]:
    lines = file.read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


BASES |= {file.stem: f"{lines_of(file)[0]} {DATA}" for file in OF_METHODS}


class Row(NamedTuple):
    """A wrong input."""

    base: str
    arguments: str
    words: list[str]  # of the message
    begun: bool = False  # refused by the first batch or step only, so the folder is there

    @property
    def command(self) -> str:
        return self.base if self.base in CODES else "train"


def row_of(line: str, base: str | None = None) -> Row:
    """A line of a table: the base stands first in it, unless the whole table has one."""
    begun = line.startswith("begun ")
    parts = [part.strip() for part in line.removeprefix("begun ").split("|")]
    base = base or parts.pop(0)
    return Row(base, parts[0], parts[1:], begun)


ROWS = [row_of(line) for name in ("train", "others") for line in lines_of(TABLES / f"{name}.txt")]
ROWS += [row_of(line, file.stem) for file in OF_METHODS for line in lines_of(file)[1:]]


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, mvtec_folder: Path, run_here: Run
) -> dict[str, Path]:
    """What the placeholders of the tables stand for: a data set, a run, wrong files, an output."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("these are notes")
    shutil.copytree(mvtec_folder / "bolt", folder / "damaged" / "bolt")
    picture = folder / "damaged" / "bolt" / "train" / "good" / "000.png"
    picture.write_bytes(picture.read_bytes()[:1000])
    (folder / "badplan").mkdir()
    (folder / "badplan" / "sweep.json").write_text("[1, 2]")
    found = {"ROOT": mvtec_folder, "TMP": folder, "OUT": folder / "out", "RUN": folder / "run"}
    found["CKPT"] = found["RUN"] / "checkpoints" / "last.ckpt"
    arguments = f"{BASES['ami']} {SMALL} output_dir=$RUN"
    outcome = run_here("train", *Template(arguments).substitute(found).split())
    assert outcome.code == 0, outcome.err
    content = found["CKPT"].read_bytes()
    (folder / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (folder / "zero.ckpt").touch()
    return found


def arguments_of(row: Row, places: dict[str, Path]) -> list[str]:
    """The row's arguments, and those of its base that it does not replace."""
    text = f"{BASES[row.base]} {SMALL if row.command == 'train' else ''}"
    own = Template(row.arguments).safe_substitute(places).split()
    keys = {argument.lstrip("~+").partition("=")[0] for argument in own}
    gone = tuple(f"{key}." for key in keys) if "~" in row.arguments else ()
    base = Template(text).safe_substitute(places).split()
    key_of = {argument: argument.partition("=")[0] for argument in base}
    return [a for a in base if key_of[a] not in keys and not key_of[a].startswith(gone)] + own


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*")}


class Composer:
    """In place of `hydra.main`: composes groups once, and applies other overrides to a copy."""

    def __init__(self) -> None:
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.parser = OverridesParser.create()

    def main(self, config_name: str, **_: Any) -> Callable[..., Any]:
        """Return a decorator as `hydra.main` does."""

        def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
            return lambda: self.run(task, config_name)

        return decorate

    def run(self, task: Callable[[DictConfig], Any], name: str) -> None:
        """Compose, make the folder as Hydra does, and call the task."""
        cfg = self.config(name, sys.argv[1:])
        folder = Path(cfg.hydra.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open_dict(cfg.hydra):
            cfg.hydra.runtime.output_dir = str(folder.resolve())
            cfg.hydra.job.name = name
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            task(cfg)
        finally:
            HydraConfig.instance().cfg = None

    def config(self, name: str, arguments: list[str]) -> DictConfig:
        """Return the configuration of a command with its arguments."""
        overrides = self.parser.parse_overrides(arguments)
        if any(override.is_sweep_override() for override in overrides):
            argument = next(o.input_line for o in overrides if o.is_sweep_override())
            raise ConfigCompositionException(f"Ambiguous value for argument '{argument}'\n1. ...")
        groups = tuple(o.input_line for o in overrides if is_group(o))
        key = (name, *groups)
        if key not in self.composed:
            with initialize_config_dir(config_dir(), version_base="1.3"):
                self.composed[key] = compose(name, [*groups], return_hydra_config=True)
        cfg = copy.deepcopy(self.composed[key])
        OmegaConf.set_struct(cfg, True)
        others = [override for override in overrides if not is_group(override)]
        ConfigLoaderImpl._apply_overrides_to_config(others, cfg)
        return cfg


def is_group(override: Override) -> bool:
    """Return whether an override chooses an option, or would."""
    name = override.key_or_group.partition("@")[0]
    there = Path(config_dir(), name)
    return "@" in override.get_key_element() or (there.is_dir() and "." not in name)


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.base} {row.arguments}" for row in ROWS])
def test_wrong_input(
    row: Row,
    places: dict[str, Path],
    run_here: Run,
    composer: Composer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if ROWS.index(row) % WHOLE:
        monkeypatch.setattr(entry.hydra, "main", composer.main)
    monkeypatch.setenv("ANOMALY_LIT_CACHE", str(places["TMP"] / "cache"))
    before = [files_below(places[name]) for name in ("TMP", "ROOT")]
    try:
        outcome = run_here(row.command, *arguments_of(row, places))
        after = [files_below(places[name]) for name in ("TMP", "ROOT")]
    finally:
        for name in ("out", "cache", "unseen"):
            shutil.rmtree(places["TMP"] / name, ignore_errors=True)
    check_message(outcome.err, [Template(word).safe_substitute(places) for word in row.words])
    usage = row.command in ("report", "status") and outcome.err.startswith("usage: ")
    assert outcome.code == (USAGE if usage else CODES[row.command])
    assert row.begun or before == after


def check_message(shown: str, words: list[str]) -> None:
    """One sentence, or a heading and one line for each problem; every word is in it."""
    assert "Traceback" not in shown
    assert "error: " in shown, shown
    message = shown.rpartition("error: ")[2].rstrip()
    first, *others = message.splitlines()
    assert not others or (first.endswith(":") and all(o.startswith("  ") for o in others)), shown
    assert max(map(len, [first, *others])) < LONGEST
    for word in words:
        assert word in message, shown
