"""The commands that experiments begin with can be typed as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.config.validate import validate
from anomaly_lit.methods import files

FOLDER = Path(config_dir(), "experiment")


def commands(file: Path) -> list[list[str]]:
    """Arguments of each ``anomaly-train`` in the head of a file, of a sweep's values the first."""
    head = file.read_text().split("defaults:")[0]
    text = re.sub(r"^# ?", "", head, flags=re.MULTILINE).replace("\\\n", " ")
    lines = re.findall(r"^ +anomaly-train (.*)$", text, flags=re.MULTILINE)
    return [[first_value(word) for word in shlex.split(line, comments=True)] for line in lines]


def first_value(word: str) -> str:
    if word.startswith("-"):
        return ""
    key, _, value = word.partition("=")
    return f"{key}={re.split(r',(?![^[]*]|[^{]*})', value)[0]}"


COMMANDS = [
    pytest.param(words, id=f"{file.stem}-{number}")
    for file in sorted(FOLDER.glob("*.yaml"))
    for number, words in enumerate(commands(file))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_composes_and_fits_the_code(words: list[str]) -> None:
    given = [word for word in words if word]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose("train", ["output_dir=unused", *given]))
    validate(config)
    chosen = [word.partition("=")[2] for word in given if word.startswith("dataset=")]
    file = Path(config_dir(), "dataset", f"{chosen[0] if chosen else 'mvtec_ad'}.yaml")
    assert f"_target_: {config['dataset']['_target_']}\n" in file.read_text()


@pytest.mark.parametrize("name", sorted(set(files().values())))
def test_a_method_s_experiment_is_of_that_method_at_the_paper_s_size(name: str) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        line = ["output_dir=unused", f"experiment={name}", "dataset.root=unused"]
        config = plain(compose("train", line))
        paper = plain(compose("train", ["output_dir=unused", f"method={name}"]))
    assert config["method"].keys() == paper["method"].keys()
    assert files()[config["method"]["_target_"].rpartition(".")[2]] == name


@pytest.mark.parametrize("name", ["dinomaly", "inp_former", "reverse_distillation", "efficient_ad"])
def test_what_an_experiment_takes_and_gives_is_said(name: str) -> None:
    head = (FOLDER / f"{name}.yaml").read_text().split("defaults:")[0]
    assert "GPU hours" in head
    assert "not measured" in head
    for data in ("MVTec AD", "VisA", "Real-IAD"):
        assert head.count(data) >= 2, data  # what to expect, and the hours


@pytest.mark.parametrize("name", ["dinomaly", "inp_former"])
def test_the_published_numbers_are_of_the_centre(name: str) -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        line = ["output_dir=unused", f"experiment={name}", "dataset.root=unused"]
        config = plain(compose("train", line))
    assert (config["image_size"], config["dataset"]["center_crop"]) == (448, 392)
    assert config["dataset"]["mask_resize"] == "any"
