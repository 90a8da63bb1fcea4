"""A data set of one's own, as docs/datasets.md says: a layout and an option file of a few lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from anomaly_lit.config.build import import_target, instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.data import AnomalyDataModule
from anomaly_lit.data.inspect import inspect_data
from anomaly_lit.types import UserError

DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Eight good and two bad items, each from two sides."""
    generator = np.random.default_rng(0)
    for kind, items in (("good", range(8)), ("bad", range(8, 10))):
        for item in items:
            for side in ("front", "back"):
                path = tmp_path / "pairs" / "screw" / kind / f"{item:02d}_{side}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return tmp_path / "pairs"


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Do what the page says: the layout in a package, the option file in a folder of its own."""
    section = DOCS.read_text().split("## A data set of another layout")[1].split("\n## ")[0]
    code, option = (
        re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]
        for language in ("python", "yaml")
    )
    assert len(code.split("class ")[1].splitlines()) <= 25
    assert len(option.splitlines()) <= 10
    (tmp_path / "my_package.py").write_text(code)
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "pairs.yaml").write_text(option)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "conf"
    sys.modules.pop("my_package", None)


def test_a_layout_is_enough_for_a_data_set(pairs: Path, documented: Path) -> None:
    layout = import_target("my_package.PairsLayout")()
    datamodule = AnomalyDataModule(
        str(pairs), image_size=32, batch_size=4, holdout=0.3, masks="none", layout=layout
    )
    datamodule.setup()
    assert datamodule.counts() == {"screw": {"train": 12, "holdout": 4, "test bad": 4}}
    assert datamodule.summary().startswith(f"Pairs in {pairs}")
    assert "licence: free to use" in datamodule.summary()
    sides = [
        {sample.group for sample in split}
        for split in (datamodule.train_samples, datamodule.holdout_samples)
    ]
    assert [len(sides[0]), len(sides[1]), len(sides[0] & sides[1])] == [6, 2, 0]
    batches = list(datamodule.train_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(4, 3, 32, 32)] * 3
    report = inspect_data(datamodule)
    assert report.ok
    assert report.dataset == "Pairs"


def test_an_option_file_of_a_few_lines_configures_it(pairs: Path, documented: Path) -> None:
    overrides = [
        f"hydra.searchpath=[file://{documented}]",
        "dataset=pairs",
        f"dataset.root={pairs}",
    ]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config: dict[str, Any] = plain(compose("data", overrides=overrides))
    validate(config, "data")
    datamodule = instantiate(config["dataset"])
    datamodule.setup()
    assert len(datamodule.samples()) == 20


def test_a_data_module_without_a_layout_is_refused(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.layout is not set"):
        AnomalyDataModule(str(pairs))
