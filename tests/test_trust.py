"""What a checkpoint of unknown origin may build, and that building it touches nothing."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from torch import nn

from anomaly_lit.config.build import import_target, instantiate, nodes
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.config.trust import (
    BACKBONE,
    BACKBONE_OPTIONS,
    KINDS,
    KINDS_WITHIN,
    LOSSES,
    OPTIMISERS,
    Part,
    _alternatives,
    admit,
    found_class,
    names_file,
)
from anomaly_lit.data import DiskCache, HostCache, MVTecAD
from anomaly_lit.methods import DSR, AMINet
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

AUDITED = Path(__file__).with_name("audited.py")
FOLDER = Path(config_dir())
METHODS = sorted(path.stem for path in (FOLDER / "method").glob("*.yaml"))
DATASETS = sorted(path.stem for path in (FOLDER / "dataset").glob("*.yaml"))
SYNTHESES = sorted(path.stem for path in (FOLDER / "synthesis").glob("*.yaml"))
CACHES = sorted(path.stem for path in (FOLDER / "cache").glob("*.yaml"))
REVIEWED = {("Backbone", "name")}  # texts that are no file; timm's name is looked up in a table


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return plain(compose("train", ["output_dir=unused", *overrides]))


@pytest.fixture
def method() -> dict[str, Any]:
    node = composed("method=ami_net_demo")["method"]
    return {**node, "grid": 4, "dim": 16, "heads": 2, "depth": 1}


def dataset(**changes: Any) -> dict[str, Any]:
    return {"_target_": "anomaly_lit.data.MVTecAD", "root": "images", **changes}


def refusal(node: Any, part: Part = "method") -> str:
    with pytest.raises(UserError) as error:
        admit(node, part)
    text = str(error.value)
    assert text.startswith("the checkpoint may not be built as it asks: ")
    assert text.endswith("; set trust=true only if you know who made it")
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------ what is allowed


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_is_shipped_is_admitted(name: str) -> None:
    node = composed(f"method={name}")["method"]
    admitted = admit(node, "method")
    assert admitted["_target_"] == node["_target_"]
    assert [path for path, _ in nodes(admitted)] == [path for path, _ in nodes(node)]


@pytest.mark.parametrize("group", ["mask", "loss", "backbone"])
def test_every_option_that_is_shipped_is_admitted(group: str) -> None:
    for path in (FOLDER / group).glob("*.yaml"):
        base = "ami_net_small" if group != "loss" else "cma_ae_small"
        assert admit(composed(f"method={base}", f"{group}={path.stem}")["method"], "method")


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_that_is_shipped_is_admitted(name: str) -> None:
    for cache in CACHES:
        node = composed(f"dataset={name}", f"cache={cache}")["dataset"]
        assert admit(node, "dataset")["_target_"] == node["_target_"]


@pytest.mark.parametrize("name", SYNTHESES)
def test_every_synthesis_that_is_shipped_is_admitted(name: str) -> None:
    assert admit(composed(f"synthesis={name}")["dataset"], "dataset")


def test_the_evaluation_that_is_shipped_is_admitted() -> None:
    node = composed()["callbacks"]["evaluation"]
    assert admit(node, "evaluation") == node


def allowed() -> Iterator[tuple[Part, str, type]]:
    """Every class of the list, with its part and its path."""
    for part in typing.get_args(Part):
        for kind in (*KINDS[part], *KINDS_WITHIN[part]):
            module = __import__(kind.module, fromlist=["x"])
            for name in sorted({*dir(module), *getattr(module, "__all__", ())}):
                found = found_class(f"{kind.module}.{name}", (kind,))
                if found is not None:
                    yield part, f"{kind.module}.{name}", found


def test_torch_s_named_losses_and_optimisers_exist() -> None:
    paths = {path for _, path, _ in allowed()}
    assert {f"torch.nn.{name}" for name in LOSSES} <= paths
    assert {f"torch.optim.{name}" for name in OPTIMISERS} <= paths
    assert not [path for path in paths if "_" in path.rpartition(".")[2]]


@pytest.mark.parametrize(("part", "path", "found"), [pytest.param(*a, id=a[1]) for a in allowed()])
def test_an_allowed_class_spells_its_parameters(part: Part, path: str, found: type) -> None:
    """What cannot be compared with a type cannot be let through."""
    parameters = inspect.signature(found).parameters.values()
    hints = typing.get_type_hints(found.__init__)
    if found.__init__ is nn.Module.__init__:  # it takes *args and **kwargs, and refuses them
        hints, parameters = {}, ()
    assert not [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert import_target(path) is found
    if path.startswith("torch.") or found.__module__.startswith("anomaly_lit.data."):
        return  # torch's are named one by one; a data set reads its folder, and a cache is left out
    texts = [
        p.name
        for p in parameters
        if str in _alternatives(hints.get(p.name)) and not names_file(p.name)
    ]
    assert {(found.__name__, name) for name in texts} <= REVIEWED


# ------------------------------------------------------------------------------ what is refused

EXPLOITS: list[dict[str, Any]] = [
    {"_target_": "torch.nn.cpp.OrderedDictWrapper.cpp_dict.fget"},
    {"_target_": "torch.nn.cpp.OrderedDictWrapper.__getitem__"},
    {"_target_": "torch.nn.Sequential.forward"},
    {"_target_": "torch.nn.Sequential"},
    {"_target_": "torch.nn.modules.module.warnings.warn"},
    {"_target_": "torch.nn.modules.loss.MSELoss"},
    {"_target_": "torch.optim.lr_scheduler.LambdaLR"},
    {"_target_": "torch.nnx.A"},
    {"_target_": "torch.load", "f": "MARKER"},
    {"_target_": "os.system", "command": "touch MARKER"},
    {"_target_": "anomaly_lit.files.os.system", "command": "touch MARKER"},
    {"_target_": "anomaly_lit.files.subprocess.Popen", "args": ["touch", "MARKER"]},
    {"_target_": "anomaly_lit.files.write_json", "path": "MARKER", "content": {}},
    {"_target_": "anomaly_lit.config.build.import_target", "path": "os.system"},
    {"_target_": "anomaly_lit.config.build.instantiate", "config": {}},
    {"_target_": "anomaly_lit.data.caches.segments.Draft", "path": "MARKER", "subject": "x",
     "keys": [], "columns": []},
    {"_target_": "anomaly_lit.data.caches.segments.Segment", "path": "FIFO", "subject": "x",
     "columns": []},
    {"_target_": "anomaly_lit.data.DiskCache", "folder": "MARKER"},
    {"_target_": "anomaly_lit.data.MVTecAD", "root": "MARKER"},
    {"_target_": "anomaly_lit.synthesis.Perlin", "texture_dir": "MARKER"},
    {"_target_": "anomaly_lit.loggers.WandbRun", "save_dir": "MARKER"},
    {"_target_": "anomaly_lit.loggers.MLflowRun", "tracking_uri": "http://localhost:1"},
    {"_target_": "anomaly_lit.callbacks.Outputs", "directory": "MARKER"},
    {"_target_": "anomaly_lit.load", "path": "MARKER"},
    {"_target_": "anomaly_lit.methods.base.Method"},
    {"_target_": "anomaly_lit.losses.F.mse_loss"},
    {"_target_": "anomaly_lit_evil.run"},
    {"_target_": "L1Loss"},
    {"_target_": ""},
    {"_target_": None},
    {"_target_": ["torch.nn.MSELoss"]},
    {"_target_": {"_target_": "torch.nn.MSELoss"}},
]  # fmt: skip


@pytest.mark.parametrize("exploit", EXPLOITS, ids=lambda node: str(node["_target_"])[:60])
def test_a_foreign_class_is_refused_wherever_it_stands(
    exploit: dict[str, Any], method: dict[str, Any], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
    text = json.dumps(exploit).replace("MARKER", str(tmp_path / "made"))
    node = json.loads(text.replace("FIFO", str(pipe)))
    target = node["_target_"]
    places: list[tuple[Part, str, Any]] = [
        ("method", "method", node),
        ("method", "method.loss", {**method, "loss": node}),
        ("method", "method.optimizer", {**method, "optimizer": {**node, "_partial_": True}}),
        ("method", "method.grid[1]", {**method, "grid": [4, node]}),
        ("method", "method.extra.deep[0]", {**method, "extra": {"deep": [node]}}),
        ("method", "method.backbone.options.pad_type",
         {**method, "backbone": {**method["backbone"], "options": {"pad_type": node}}}),
        ("dataset", "dataset.synthesis", dataset(synthesis=node)),
        ("dataset", "dataset.root", dataset(root=node)),
        ("evaluation", "evaluation", node),
    ]  # fmt: skip
    own = {"dataset": "anomaly_lit.data.", "dataset.synthesis": "anomaly_lit.synthesis."}
    for part, path, whole in places:
        if str(target).startswith(own.get(path, "-")):
            continue
        assert path in refusal(whole, part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"] * pipe.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "http://localhost:1/a.pth"}},
        {"pretrained_cfg": {"file": "weights.pth"}},
        {"checkpoint_path": "weights.pth"},
        {"cache_dir": "folder"},
        {"scriptable": True},
        {"pad_type": "same", "in_chans": 3},
    ],
)
def test_options_of_a_backbone_that_could_fetch_are_refused(
    method: dict[str, Any], options: dict[str, Any]
) -> None:
    method["backbone"]["options"] = options
    bad = next(key for key in options if key not in BACKBONE_OPTIONS)
    assert f"method.backbone.options.{bad} is not among the options" in refusal(method)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"_args_": [1]}, "method._args_ is not allowed"),
        ({"loss": {"_target_": "anomaly_lit.losses.CosineLoss", "a": 1}}, "has no parameter 'a'"),
        ({"_convert_": "all"}, "method._convert_ is not allowed"),
        ({"_partial_": True}, "method: anomaly_lit.methods.AMINet takes no _partial_: true"),
        ({"loss": {"_target_": "torch.nn.MSELoss", "_partial_": True}}, "takes no _partial_"),
        ({"optimizer": {"_target_": "torch.optim.AdamW"}}, "needs _partial_: true"),
        ({"optimizer": {"_target_": "torch.optim.AdamW", "_partial_": 1}}, "needs _partial_"),
        ({"backbone": {"_target_": "torch.nn.MSELoss"}}, "not meant for this parameter"),
        ({"mask": {"_target_": "anomaly_lit.schedules.Cosine"}}, "not meant for this parameter"),
        ({"schedule": {"_target_": "anomaly_lit.masks.Mask"}}, None),
        ({"dim": "${image_size}"}, "method.dim: ${image_size} is an interpolation"),
        ({"${a}": 3}, "method: ${a} is an interpolation"),
        ({"dim": b"12"}, "method.dim is a bytes, not plain data"),
        ({3: 4}, "method has the key 3, which is not a string"),
    ],
)
def test_what_is_no_plain_argument_is_refused(
    method: dict[str, Any], change: dict[Any, Any], text: str | None
) -> None:
    if text is None:  # a callable of ours where a callable is asked for: harmless, if useless
        assert admit(method | change, "method")
    else:
        assert text in refusal(method | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dims": 3}, "method: anomaly_lit.methods.AMINet has no parameter 'dims'; did you mean"),
        ({"dim": "wide"}, "method.dim: expected int, found 'wide'"),
        ({"grid": ["a"]}, "method.grid: expected int | collections.abc.Sequence[int], found ['a']"),
        ({"score": "worst"}, "method.score: expected one of std, max, found 'worst'"),
        ({"backbone": "resnet18"}, "method.backbone: expected Backbone, found 'resnet18'"),
    ],
)
def test_arguments_are_compared_with_the_signature(
    method: dict[str, Any], change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError) as error:
        admit(method | change, "method")
    assert text in str(error.value)


@pytest.mark.parametrize("node", [None, 3, "torch.nn.MSELoss", [], {}, {"dim": 3}])
def test_a_part_that_is_no_class_is_refused(node: Any) -> None:
    assert "method names no class" in refusal(node)


def test_endless_and_inflated_configurations_are_refused(method: dict[str, Any]) -> None:
    endless: list[Any] = []
    endless.append(endless)
    inflated: list[Any] = [0] * 1000
    for _ in range(8):
        inflated = [inflated] * 1000  # 1e27 values in a few kilobytes
    for value in (endless, inflated):
        with pytest.raises(UserError, match="levels or 100000 values"):
            admit({**method, "grid": value}, "method")


@pytest.mark.parametrize("trust", ["no", "off", 1, None, [True]])
def test_only_true_is_trust(method: dict[str, Any], trust: Any) -> None:
    method["loss"] = {"_target_": "torch.nn.Identity"}
    with pytest.raises(UserError, match=r"method\.loss: torch\.nn\.Identity"):
        admit(method, "method", trust)
    assert admit(method, "method", True)["loss"] == method["loss"]


# ------------------------------------------------------------------------------ what is left out


@pytest.mark.parametrize("trust", [False, True])
def test_weights_of_a_backbone_are_never_looked_up(
    method: dict[str, Any], trust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method["backbone"] |= {"weights": "/nowhere/net.pth", "file_stem": "other"}
    built = instantiate(admit(method, "method", trust))
    assert isinstance(built, AMINet)
    monkeypatch.setattr("anomaly_lit.nn.backbone.find_weights", lambda *_: pytest.fail("looked up"))
    built.setup("test")
    assert method["backbone"]["weights"] == "/nowhere/net.pth"  # the checkpoint is left alone


def test_textures_and_other_files_of_training_are_not_needed(tmp_path: Path) -> None:
    node = composed("method=dsr_small")["method"]
    gone = str(tmp_path / "gone")
    small = {"hidden": 8, "residual": 4, "codes": 20, "detector": [4, 4, 4, 4]}
    built = instantiate(admit(node | small | {"texture_dir": gone, "latent_weights": gone},
                              "method"))  # fmt: skip
    assert isinstance(built, DSR)
    assert built.texture_folder is None
    synthesis = {"_target_": "anomaly_lit.synthesis.Perlin", "texture_dir": gone}
    mixed = {"_target_": "anomaly_lit.synthesis.Mixed", "recipes": {"a": synthesis},
             "weights": {"a": 1.0}}  # fmt: skip
    for recipe in (synthesis, mixed):
        assert instantiate(admit(dataset(synthesis=recipe), "dataset")).synthesis is not None


def test_a_cache_on_disk_is_left_out_and_the_folder_of_the_data_stays(tmp_path: Path) -> None:
    disk = {"_target_": "anomaly_lit.data.DiskCache", "folder": str(tmp_path / "cache")}
    features = {**disk, "_target_": "anomaly_lit.data.DiskFeatureCache"}
    node = dataset(root=str(tmp_path), cache=disk, feature_cache=features)
    built = instantiate(admit(node, "dataset"))
    assert isinstance(built, MVTecAD)
    assert (built.root, built.cache, built.feature_cache) == (tmp_path, None, None)
    host = dataset(cache={"_target_": "anomaly_lit.data.HostCache"})
    assert isinstance(instantiate(admit(host, "dataset")).cache, HostCache)
    assert not isinstance(built.cache, DiskCache)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ under an audit


def variants(tricks: list[Any]) -> list[tuple[Part, Any]]:
    """Every allowed constructor as it is shipped, and with each trick as each argument, once."""
    found: list[tuple[Part, Any]] = []
    done: set[tuple[str, str]] = set()
    wholes: list[tuple[Part, Any]] = [
        ("method", composed(f"method={name}")["method"]) for name in METHODS if "_small" in name
    ]
    for name in SYNTHESES:
        wholes.append(("dataset", composed(f"synthesis={name}", "cache=disk")["dataset"]))
    wholes += [("dataset", composed(f"dataset={name}")["dataset"]) for name in DATASETS]
    wholes.append(("evaluation", composed()["callbacks"]["evaluation"]))
    for part, whole in wholes:
        found.append((part, whole))
        for path, node in nodes(whole, part):
            for key in inspect.signature(import_target(node["_target_"])).parameters:
                if (node["_target_"], key) in done:
                    continue
                done.add((node["_target_"], key))
                for trick in tricks:
                    changed = copy.deepcopy({part: whole})
                    inner: Any = changed
                    for name in path.split("."):
                        inner = inner[name]
                    inner[key] = trick
                    found.append((part, changed[part]))
    return found


def run_audited(*arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(AUDITED), *arguments],
        capture_output=True, text=True, timeout=800, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_quiet(text: str, folder: Path, before: set[str]) -> dict[str, Any]:
    """Nothing was opened, made, started, imported or waited for."""
    told = json.loads(text)
    for outcome in told["outcomes"]:
        assert not outcome["seen"], outcome
    assert {path.name for path in folder.iterdir()} == before
    return told


def test_no_name_that_is_loaded_does_anything(tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    exploits = [("method", node) for node in EXPLOITS]
    given.write_text(json.dumps({"names": None, "nodes": exploits}))
    told = check_quiet(run_audited("try", str(given)), tmp_path, {"given.json"})
    assert told["count"] > 3000
    assert all(outcome["error"] for outcome in told["outcomes"][-len(EXPLOITS) :])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_argument_of_an_allowed_class_does_anything(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    os.mkfifo(tmp_path / "pipe")
    tricks = [
        str(tmp_path / "made"),
        str(tmp_path / "secret.png"),
        str(tmp_path / "pipe"),
        [str(tmp_path / "pipe")],
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "http://localhost:1/a.pth"}},
        "hf-hub:timm/resnet18.a1_in1k",
        f"local-dir:{tmp_path}",
    ]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"names": [], "nodes": variants(tricks)}))
    text = run_audited("try", str(given))
    told = check_quiet(text, tmp_path, {"given.json", "pipe", "secret.png"})
    built = {outcome["node"]["_target_"] for outcome in told["outcomes"] if not outcome["error"]}
    shipped = {composed(f"method={name}")["method"]["_target_"] for name in METHODS}
    assert shipped <= built


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_name_at_all_does_anything(tmp_path: Path) -> None:
    run_audited("names", str(tmp_path / "names.json"))
    names = json.loads((tmp_path / "names.json").read_text())
    assert len(names) > 500_000
    assert BACKBONE.base in names
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"names": names, "nodes": []}))
    told = check_quiet(run_audited("try", str(given)), tmp_path, {"names.json", "given.json"})
    assert told["count"] == len(names)


def test_the_constructor_of_a_backbone_keeps_to_itself() -> None:
    assert found_class("anomaly_lit.nn.backbone.Backbone", (BACKBONE,)) is Backbone
    assert not {"pretrained", "pretrained_cfg", "checkpoint_path"} & set(BACKBONE_OPTIONS)
