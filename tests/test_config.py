from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from anomaly_lit.commands.entry import quoted
from anomaly_lit.config.build import differences, moved, nodes
from anomaly_lit.config.hydra import check_own_options, config_dir, job_folder, plain
from anomaly_lit.config.validate import HINTS, Command, fits, validate
from anomaly_lit.types import UserError

FOLDER = Path(config_dir())
GROUPS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = sorted(
    path.relative_to(FOLDER).with_suffix("").as_posix()
    for group in GROUPS
    for path in (FOLDER / group).rglob("*.yaml")
    if path.parent.name != "base"  # what options of a group share is no option itself
)
EXPERIMENTS = [option for option in OPTIONS if option.startswith("experiment/")]
METHODS = [option.removeprefix("method/") for option in OPTIONS if option.startswith("method/")]


def composed(*overrides: str, name: str = "train") -> dict[str, Any]:
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return plain(compose(name, ["output_dir=unused", *overrides]))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return composed()


# -------------------------------------------------------------------------------- what is shipped


def test_files_are_found_at_every_depth() -> None:
    assert len(OPTIONS) > 30
    assert {"method/ami_net", "method/ami_net_small", "backbone/resnet18"} <= set(OPTIONS)


def test_groups_are_the_documented_ones() -> None:
    assert set(GROUPS) - {"__pycache__"} == {
        "method", "backbone", "mask", "loss", "dataset", "synthesis", "cache", "trainer",
        "callbacks", "logger", "experiment", "debug",
    }  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_fits_the_code(option: str) -> None:
    group, _, name = option.partition("/")
    validate(composed(f"{group}={name}"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_begins_with_its_command(experiment: str) -> None:
    text = (FOLDER / f"{experiment}.yaml").read_text()
    assert f"experiment={experiment.removeprefix('experiment/')}" in text.split("\n\n")[0]


@pytest.mark.parametrize("name", ["test", "predict", "data"])
def test_roots_of_the_other_commands_compose(name: str) -> None:
    assert composed(name=name)["output_dir"] == "unused"


def test_two_interpolations_wire_the_parts() -> None:
    """``output_dir`` and ``image_size``; what is set at the top level reaches the parts."""
    known = {"output_dir", "image_size", "seed", "threshold.fpr"}
    for option in OPTIONS:
        text = (FOLDER / f"{option}.yaml").read_text()
        assert set(re.findall(r"\$\{([^}]*)\}", text)) <= known, option


@pytest.mark.parametrize("method", METHODS)
def test_every_key_of_a_method_is_a_parameter_and_every_parameter_a_key(method: str) -> None:
    """So that ``--cfg job`` shows all that can be set."""
    node = composed(f"method={method}")["method"]
    from anomaly_lit.config.build import import_target

    parameters = inspect.signature(import_target(node["_target_"])).parameters
    assert set(node) - {"_target_"} == set(parameters)


@pytest.mark.parametrize(
    "dataset", ["mvtec_ad", "btad", "visa", "ksdd2", "cifar10", "mnist", "folder", "demo"]
)
def test_data_sets_follow_the_image_size_and_the_seed(dataset: str) -> None:
    found = composed(f"dataset={dataset}", "image_size=[96,128]", "seed=7")["dataset"]
    assert found["image_size"] == [96, 128]
    assert found["seed"] == 7


def test_a_group_that_a_method_does_not_list_is_an_error() -> None:
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException):
        composed("teacher=resnet18")


def test_debug_takes_three_steps() -> None:
    config = composed("debug=default")
    assert config["trainer"]["max_steps"] == 3
    assert config["logger"] is None


# -------------------------------------------------------------------------------- validation


def problems(config: dict[str, Any]) -> str:
    with pytest.raises(UserError, match="the config does not fit the code") as error:
        validate(config)
    return str(error.value)


def test_all_misfits_are_listed_at_once_with_path_and_suggestion(config: dict[str, Any]) -> None:
    wrong = OmegaConf.to_container(OmegaConf.create(config))
    assert isinstance(wrong, dict)
    wrong["method"]["dims"] = 3
    wrong["method"]["optimizer"]["learning"] = 0.1
    wrong["method"]["depth"] = "deep"
    wrong["trainer"]["max_epoch"] = 3
    wrong["dataset"]["batch_size"] = 2.5
    wrong["seed"] = "zero"
    wrong["selection"] = "first"
    text = problems(wrong)
    for line in (
        "method: anomaly_lit.methods.AMINet has no parameter 'dims'; did you mean 'dim'?",
        "method.optimizer: torch.optim.AdamW has no parameter 'learning'",
        "method.depth: expected int, found 'deep'",
        "has no parameter 'max_epoch'; did you mean 'max_epochs'?",
        "dataset.batch_size: expected int, found 2.5",
        "seed: expected int from 0 to 4294967295, found 'zero'",
        "selection: expected one of ",
        "last, best, synthetic, oracle",
    ):
        assert line in text


def test_absent_target_and_missing_parameter_are_named() -> None:
    text = problems({"method": {"_target_": "anomaly_lit.losses.Nothing"}})
    assert "method: cannot import 'anomaly_lit.losses.Nothing'" in text
    text = problems({"method": {"_target_": "anomaly_lit.methods.AMINet"}})
    assert "needs 'backbone'" in text


def test_a_partial_may_lack_what_the_caller_adds() -> None:
    validate({"method": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}}, None)


def test_node_where_a_number_is_expected_is_taken_for_built() -> None:
    validate(
        {"method": {"_target_": "torch.nn.L1Loss", "reduction": {"_target_": "builtins.str"}}}, None
    )


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (True, float, False),
        ("3", float, False),
        (True, bool, True),
        (1, bool, False),
        (None, int | None, True),
        (None, int, False),
        ("best", Literal["last", "best"], True),
        ("first", Literal["last", "best"], False),
        ([1, 2], int | list[int], True),
        ([1, "a"], list[int], False),
        ([1, 2], Sequence[int], True),
        (5, Sequence[int], False),
        ({"a": 1}, dict[str, int], True),
        ([1], dict[str, int], False),
        ("mse", nn.Module, False),
        (None, nn.Module, False),
        ({"_target_": "torch.nn.L1Loss"}, nn.Module, True),
        (object(), Any, True),
    ],
)
def test_plain_data_is_compared_with_annotations(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_nodes_are_found_in_lists_and_at_any_depth() -> None:
    config = {"a": {"_target_": "x", "b": [{"_target_": "y"}]}, "c": ({"_target_": "z"},)}
    assert [path for path, _ in nodes(config)] == ["a", "a.b[0]", "c[0]"]


# -------------------------------------------------------------------------------- own keys

COMMANDS: list[Command] = ["train", "test", "predict", "data"]
PARTS_OF_OTHERS = {"trainer", "callbacks", "logger", "dataset", "method", "step", "pruning"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_command_has_a_type(command: Command) -> None:
    shipped = yaml.safe_load((FOLDER / f"{command}.yaml").read_text())
    keys = set(shipped) - {"hydra", "defaults"}
    typed = {path.partition(".")[0] for path in HINTS[command]}
    assert keys - PARTS_OF_OTHERS == typed - PARTS_OF_OTHERS
    for path in HINTS[command]:
        section, _, key = path.rpartition(".")
        assert key in (shipped[section] if section else shipped)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_shipped_has_the_right_types(command: Command) -> None:
    validate(composed(name=command), command)


@pytest.mark.parametrize(
    ("command", "key", "values"),
    [
        ("train", "seed", [-1, 2**40, 0.5, "zero", None, True]),
        ("train", "image_size", ["abc", None, [64, "x"], 2.5]),
        ("train", "selection", ["first", None]),
        ("train", "threshold.fpr", ["much", None]),
        ("train", "checkpoint.every_minutes", ["often", None]),
        ("train", "checkpoint.every_steps", ["many", 2.5]),
        ("train", "optimized_metric", [3, ["val/loss"]]),
        ("train", "when_changed", ["ask", None, True]),
        ("test", "trust", ["no", "off", "None", None, 0, 1, []]),
        ("test", "ckpt_path", [5, ["a", "b"]]),
        ("test", "method", [3, "uniad"]),
        ("test", "dataset.batch_size", ["many", 2.5]),
        ("test", "dataset.root", [7]),
        ("test", "max_images", [-1, "all", None]),
        ("test", "accelerator", [7, None]),
        ("predict", "trust", ["no", "off", "None", None, 0, 1]),
        ("predict", "exit_code", ["maybe", 1, None]),
        ("predict", "save_maps", [7, "yes", None]),
        ("predict", "batch_size", [-1, 0, 2.5, "many", None]),
        ("predict", "input", [["a", "b"], 5]),
        ("predict", "category", [5, ["a"]]),
        ("predict", "device", [0, ["cpu"]]),
        ("predict", "engine", ["tensorrt", None]),
        ("data", "columns", ["x", 0, -1, 2.5, None]),
        ("data", "clear_cache", ["no", 1, None]),
        ("data", "seed", [-1, "zero"]),
    ],
)
def test_a_wrong_value_of_an_own_key_is_refused(
    command: Command, key: str, values: list[Any]
) -> None:
    config = composed(name=command)
    section, _, name = key.rpartition(".")
    for value in values:
        (config[section] if section else config)[name] = value
        with pytest.raises(UserError) as error:
            validate(config, command)
        found = rf"\n  {re.escape(key)}: expected .+, found {re.escape(repr(value))}$"
        assert re.search(found, str(error.value))
        assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    ("command", "argument", "text"),
    [
        ("predict", "trust=no", "trust: expected bool (true or false), found 'no'"),
        ("predict", "exit_code=maybe", "exit_code: expected bool (true or false), found 'maybe'"),
        ("predict", "save_maps=7", "save_maps: expected bool (true or false), found 7"),
        ("predict", "batch_size=-1", "batch_size: expected int of at least 1, found -1"),
        ("test", "trust=off", "trust: expected bool (true or false), found 'off'"),
        ("test", "trust=None", "trust: expected bool (true or false), found 'None'"),
        ("data", "columns=x", "columns: expected int from 1 to 64, found 'x'"),
        ("data", "seed=-1", "seed: expected int from 0 to 4294967295, found -1"),
    ],
)
def test_commands_check_their_own_keys_first(
    run_here: Callable[..., Any], tmp_path: Path, command: str, argument: str, text: str
) -> None:
    outcome = run_here(command, argument, f"output_dir={tmp_path / 'out'}")
    assert outcome.code
    assert text in outcome.err
    assert not [path for path in (tmp_path / "out").glob("*") if path.suffix != ".log"]  # Hydra's


# -------------------------------------------------------------------------------- small helpers


def test_job_folder_is_short_and_safe_for_every_file_system() -> None:
    assert job_folder("") == "default"
    assert job_folder("seed=1,method.dim=2") == "seed=1,method.dim=2"
    assert job_folder('a=/b\\c:d*"e?<>|') == "a=_b_c_d__e____"
    long = [job_folder("x=" + "y" * 200 + end) for end in "ab"]
    assert len(set(long)) == 2
    many = [job_folder(",".join(f"group.name{i}={'z' * 30}" for i in range(n))) for n in (9, 40)]
    assert all(len(name) <= 120 for name in [*long, *many])
    data = (
        "dataset.categories=[a,b],dataset.root=/a/very/long/way/to/some/images,trainer.max_steps=3"
    )
    name = job_folder(f"{data},backbone=resnet18,backbone.weights=random,method=uniad_small,seed=0")
    assert name.startswith("categories=_a,b_,root=_a_very_long_way,max_steps=3,backbone=resnet18")
    assert "method=uniad_small" in name


@pytest.mark.parametrize(
    "argument",
    ["seed=1", "-m", "method=a,b", "x=[a/b c]", "x='a/b c'", "x=/a/b", "a=/b c/d,/e", "x=${y}/a b"],
)
def test_what_hydra_understands_is_left_alone(argument: str) -> None:
    assert quoted(argument) == argument


def test_empty_value_is_left_alone() -> None:
    assert quoted("x=") == "x="
    assert quoted("~callbacks") == "~callbacks"


@given(st.text("abc /\\()=:{}'\"%é.-", min_size=1).map(lambda text: f"/{text}"))
@example("/it's (1).png")
@example("/a b\\")
@example("/a\\'b c")
@example("C:\\parts (1)\\it's\\")
def test_quoted_paths_come_out_of_hydra_as_they_went_in(path: str) -> None:
    override = OverridesParser.create().parse_override(quoted(f"input={path}"))
    if quoted(f"input={path}") != f"input={path}":
        assert override.value() == path


def test_differences_name_keys_with_both_values() -> None:
    before = {"seed": 0, "method": {"dim": 32, "old": 1}, "list": [1, 2]}
    now = {"seed": 1, "method": {"dim": 64, "new": None}, "list": [1, 3]}
    assert differences(before, now) == [
        "seed: 0 there, 1 now",
        "method.dim: 32 there, 64 now",
        "method.old: 1 there, absent now",
        "method.new: absent there, null now",
        "list: [1, 2] there, [1, 3] now",
    ]
    assert differences(before, before) == []


def test_a_renamed_folder_changes_what_refers_to_it() -> None:
    config = {"output_dir": "/a/run", "logger": {"csv": {"save_dir": "/a/run"}}, "seed": 1}
    assert moved(config, "/b") == {
        "output_dir": "/b", "logger": {"csv": {"save_dir": "/b"}}, "seed": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/a/run/logs", "/b\\1/logs"),
        ("sqlite:////a/run/mlflow.db", "sqlite:///" + "/b\\1/mlflow.db"),
        ("/a/run_data", "/a/run_data"),
        ("/a/run2/x", "/a/run2/x"),
        ("/more/a/run", "/more/a/run"),
        ("./a/run", "./a/run"),
    ],
)
def test_only_whole_paths_move_with_a_folder(value: str, expected: str) -> None:
    config = {"output_dir": "/a/run", "dataset": {"root": value}}
    assert moved(config, "/b\\1")["dataset"]["root"] == expected


@pytest.mark.parametrize(
    ("command", "config", "words"),
    [
        ("train", {"ckpt_path": "x"}, "ckpt_path: anomaly-train has no such key"),
        ("train", {"treshold": {"fpr": 1}}, "did you mean 'threshold'"),
        ("train", {"threshold": {"fpt": 0.1}}, "threshold.fpt: .*did you mean 'fpr'"),
        ("train", {"checkpoint": {"every": 1}}, "checkpoint.every: checkpoint has no such key"),
        ("train", {"callbacks": {"mine": {"x": 1}}}, "callbacks.mine: it has no _target_"),
        ("train", {"logger": {"csv": None}}, "logger.csv: it has no _target_"),
        ("predict", {"threshold": 1.0}, "threshold: anomaly-predict has no such key"),
        ("predict", {"exit_codes": True}, "did you mean 'exit_code'"),
        ("test", {"selection": "last"}, "anomaly-test has no such key"),
        ("data", {"column": 3}, "did you mean 'columns'"),
    ],
)
def test_keys_that_nobody_reads_are_refused(command: Any, config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(config, command)


@pytest.mark.parametrize("form", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_an_own_option_with_a_name_of_the_package_is_refused(
    form: list[str], tmp_path: Path
) -> None:
    arguments = [part.format(tmp_path) for part in form]
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").touch()
    check_own_options(["seed=1", *arguments])
    (tmp_path / "method" / "uniad.yaml").touch()
    with pytest.raises(UserError, match=r"uniad\.yaml would never be used: .*method/uniad too"):
        check_own_options([*arguments, "seed=1"])
