"""EfficientNet-B4 as UniAD and OneNIP use it, against UniAD's code (`tests/golden/uniad.json`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

DEPTHS = (2, 4, 4, 6, 6)  # blocks of the five stages that are run
PARTS = {
    r"conv_dw\.(.*)": r"_depthwise_conv.\1",
    r"se\.conv_(.*)": r"_se_\1",
}
FIRST = {  # the blocks of the first stage expand nothing
    **PARTS,
    r"bn1\.(.*)": r"_bn1.\1",
    r"bn2\.(.*)": r"_bn2.\1",
    r"conv_pw\.(.*)": r"_project_conv.\1",
}
LATER = {
    **PARTS,
    r"bn1\.(.*)": r"_bn0.\1",
    r"bn2\.(.*)": r"_bn1.\1",
    r"bn3\.(.*)": r"_bn2.\1",
    r"conv_pw\.(.*)": r"_expand_conv.\1",
    r"conv_pwl\.(.*)": r"_project_conv.\1",
}
NAMES = {
    r"mean|std|network\.blocks\.[56]\..*": "",  # the last two stages are not run
    r"network\.conv_stem\.(.*)": r"backbone._conv_stem.\1",
    r"network\.bn1\.(.*)": r"backbone._bn0.\1",
    **{
        rf"network\.blocks\.{stage}\.{number}\.{ours}": (
            f"backbone._blocks.{sum(DEPTHS[:stage]) + number}.{theirs}"
        )
        for stage, depth in enumerate(DEPTHS)
        for number in range(depth)
        for ours, theirs in (LATER if stage else FIRST).items()
    },
}


@pytest.fixture(scope="module")
def golden(rule: Any) -> Any:
    return rule.Golden("uniad")


@pytest.fixture(scope="module")
def maps(golden: Any, rule: Any, published_method: Callable[..., Any]) -> Callable[..., Any]:
    backbone = published_method("uniad", 224).backbone
    rule.fill_ours(backbone, NAMES, golden.scales("backbone 224"))

    def run(size: int) -> list[torch.Tensor]:
        image = rule.tensor(f"backbone image {size}", (1, 3, size, size), 0.5) + 0.5
        with torch.no_grad():
            return backbone(image)

    return run


@pytest.mark.parametrize("size", [224, 256, 320])
def test_first_two_stages_are_the_authors(size: int, golden: Any, maps: Any) -> None:
    stages = maps(size)
    golden.check(f"backbone {size}", stage0=stages[0], stage1=stages[1])


@pytest.mark.parametrize("size", [224, 256, 320])
def test_last_two_stages_are_the_authors(size: int, golden: Any, maps: Any) -> None:
    stages = maps(size)
    golden.check(f"backbone {size}", stage2=stages[2], stage3=stages[3])
