"""Every option of a group works for every method that lists the group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir
from anomaly_lit.losses import total

CONF = Path(config_dir())
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def listing(group: str) -> list[str]:
    """Methods whose own defaults list a group; presets inherit theirs."""
    return [
        file.stem
        for file in sorted((CONF / "method").glob("*.yaml"))
        if any(f"/{group}" in entry for entry in yaml.safe_load(file.read_text())["defaults"])
    ]


def pairs(group: str) -> list[tuple[str, str]]:
    options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    return [(method, option) for method in listing(group) for option in options]


def node(group: str, option: str) -> Any:
    return yaml.safe_load((CONF / group / f"{option}.yaml").read_text())


def test_the_named_methods_take_losses_and_masks() -> None:
    assert {"ami_net", "mfrnet", "onenip", "uniad"} <= set(listing("loss"))
    assert {"ami_net", "mfrnet"} <= set(listing("mask"))


@pytest.mark.parametrize(
    ("group", "name", "option"),
    [(group, *pair) for group in ("loss", "mask") for pair in pairs(group)],
)
def test_every_method_trains_with_every_option(
    group: str,
    name: str,
    option: str,
    small_method: Callable[..., Any],
    fit: Callable[[Any, Any, int], None],
    make_batch: Callable[..., Any],
) -> None:
    method = small_method(name, **{group: instantiate(node(group, option))})
    batch = make_batch()
    fit(method, batch, 1)
    assert total(method.losses(batch)).isfinite()
    assert method.eval().score_batch(batch).anomaly_map.isfinite().all()
