"""A data set of one's own: a layout of about 25 lines and an option file of a few."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.data import AnomalyDataModule, Layout, Listing
from anomaly_lit.data.inspect import inspect_data
from anomaly_lit.types import Sample, UserError


class PairsLayout(Layout):
    """Items that were photographed from both sides, `<item>_<side>.png`; bad ones end in `_bad`."""

    licence = "free to use"
    train_hint = "<category>/good"
    mask_hint = "no masks were drawn"

    def find_categories(self, root: Path) -> list[str]:
        """Name the folders that hold good images."""
        return sorted(path.parent.name for path in root.glob("*/good"))

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images; both sides of an item stay together."""
        listing = Listing([], [])
        for path in sorted((root / category).rglob("*.png")):
            item = path.stem.split("_")[0]
            if path.parent.name == "good":
                listing.train.append(Sample(str(path), category, "good", False, group=item))
            else:
                listing.test.append(Sample(str(path), category, "bad", True, group=item))
        return listing


@pytest.fixture
def pairs_root(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for kind, items in (("good", range(8)), ("bad", range(8, 10))):
        for item in items:
            for side in ("front", "back"):
                path = tmp_path / "pairs" / "screw" / kind / f"{item:02d}_{side}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return tmp_path / "pairs"


OPTION = f"""
# @package dataset
defaults:
  - base/categories
  - _self_

_target_: anomaly_lit.data.AnomalyDataModule
masks: none
layout:
  _target_: {__name__}.PairsLayout
"""


def test_a_layout_is_enough_for_a_data_set(pairs_root: Path) -> None:
    assert len(inspect.getsource(PairsLayout).splitlines()) <= 25
    datamodule = AnomalyDataModule(
        str(pairs_root), image_size=32, batch_size=4, holdout=0.3, masks="none",
        layout=PairsLayout(),
    )  # fmt: skip
    datamodule.setup()
    assert datamodule.counts() == {"screw": {"train": 12, "holdout": 4, "test bad": 4}}
    assert datamodule.summary().startswith(f"Pairs in {pairs_root}")
    assert "licence: free to use" in datamodule.summary()
    sides = [
        {sample.group for sample in split}
        for split in (datamodule.train_samples, datamodule.holdout_samples)
    ]
    assert [len(sides[0]), len(sides[1]), len(sides[0] & sides[1])] == [6, 2, 0]
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert torch.isfinite(batch["image"]).all()
    report = inspect_data(datamodule)
    assert report.ok
    assert report.dataset == "Pairs"


def test_an_option_file_of_a_few_lines_configures_it(pairs_root: Path, tmp_path: Path) -> None:
    option = tmp_path / "conf" / "dataset" / "pairs.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(OPTION.lstrip())
    overrides = [
        "dataset=pairs", f"dataset.root={pairs_root}", f"hydra.searchpath=[file://{tmp_path}/conf]",
    ]  # fmt: skip
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config: dict[str, Any] = plain(compose("data", overrides=overrides))
    validate(config)
    datamodule = instantiate(config["dataset"])
    datamodule.setup()
    assert len(datamodule.samples()) == 20


def test_a_data_module_without_a_layout_is_refused(pairs_root: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.layout is not set"):
        AnomalyDataModule(str(pairs_root))
