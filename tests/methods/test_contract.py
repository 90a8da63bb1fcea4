"""What holds for every method, whatever it does, with its tiny numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from anomaly_lit.callbacks.run import ResumeCheckpoint, StepSeeds
from anomaly_lit.config import build as build_module
from anomaly_lit.config.hydra import config_dir
from anomaly_lit.losses import total
from anomaly_lit.methods import files
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Prediction, UserError

METHODS = sorted(set(files().values()))
Build = MakeBatch = Fit = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


LEAST = {"sap2": 4}  # images of a batch, where of two each would have but one neighbour


@pytest.fixture
def make_batch(request: pytest.FixtureRequest, make_batch: MakeBatch) -> MakeBatch:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    least = LEAST.get(parameters.get("method", parameters.get("name", "")), 2)
    return lambda count=least, *size: make_batch(count, *size)


@pytest.fixture(params=METHODS)
def method(
    request: pytest.FixtureRequest,
    small_method: Callable[..., Any],
    fit: Fit,
    make_batch: MakeBatch,
) -> Any:
    """Trained for a step, so that it holds what a method takes of normal images."""
    method = small_method(request.param)
    fit(method, make_batch(), 1)
    return method


def loss_of(method: Any, batch: Any) -> float:
    torch.manual_seed(7)
    method.train()
    with torch.no_grad():
        return float(total(method.losses(batch)))


def same_map(one: Prediction, other: Prediction) -> bool:
    """Whether two predictions have the same map, or both have none."""
    if one.anomaly_map is None or other.anomaly_map is None:
        return one.anomaly_map is other.anomaly_map
    return torch.equal(one.anomaly_map, other.anomaly_map)


def test_there_are_methods() -> None:
    """Each has a configuration, numbers for a CPU, tiny ones and a test."""
    assert len(METHODS) >= 8
    folder = Path(__file__).parent
    for name in METHODS:
        for file in (
            Path(config_dir(), "method", f"{name}.yaml"),
            Path(config_dir(), "method", f"{name}_small.yaml"),
            Path(config_dir(), "experiment", f"{name}.yaml"),
            folder / "tiny" / f"{name}.yaml",
            folder / f"test_{name}.py",
        ):
            assert file.is_file(), file


@pytest.mark.parametrize("name", METHODS)
def test_constructor_leaves_the_weights_of_parts_that_it_is_handed(
    name: str, monkeypatch: pytest.MonkeyPatch, small_method: Build
) -> None:
    """Each part gets layers of the usual kinds, which a careless `apply` would initialise anew.

    A method may freeze a part that it is handed, or train it: their weights are what stays.
    """
    handed: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def weights_of(part: nn.Module) -> dict[str, Tensor]:
        tensors = [*part.named_parameters(), *part.named_buffers()]
        return {key: value.detach().clone() for key, value in tensors}

    def build(config: Any, path: str = "") -> Any:
        made = original(config, path)
        if path and isinstance(made, nn.Module):
            made.probe = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            nn.init.constant_(made.probe[0].bias, 7.0)
            handed.append((made, weights_of(made)))
        return made

    original = build_module.instantiate
    monkeypatch.setattr(build_module, "instantiate", build)
    small_method(name)
    for part, before in handed:
        after = weights_of(part)
        for key, value in before.items():
            assert torch.equal(after[key], value), key


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_refused_by_name(name: str, small_method: Build) -> None:
    hints = get_type_hints(type(small_method(name)).__init__)
    for option in (key for key, hint in hints.items() if get_origin(hint) is Literal):
        with pytest.raises(UserError, match=rf"method\.{option}=unheard: choose "):
            small_method(name, **{option: "unheard"})


def test_prediction_has_the_shapes_of_the_interface(method: Any, make_batch: MakeBatch) -> None:
    with torch.inference_mode():
        anomaly_map, score = method.eval().score_batch(make_batch(3))
    assert score.shape == (3,)
    assert score.dtype == torch.float32
    assert score.isfinite().all()
    assert (anomaly_map is not None) == method.localises
    if anomaly_map is not None:
        assert anomaly_map.shape == (3, 1, 64, 64)
        assert anomaly_map.dtype == torch.float32
        assert anomaly_map.isfinite().all()


def test_score_of_an_image_ignores_its_batch(method: Any, make_batch: MakeBatch) -> None:
    image = make_batch(4)["image"]
    with torch.inference_mode():
        together = method.eval()(image)
        alone = [method(image[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(
        together.score, torch.cat([p.score for p in alone]), rtol=1e-3, atol=1e-6
    )
    if method.localises:
        torch.testing.assert_close(
            together.anomaly_map, torch.cat([p.anomaly_map for p in alone]), rtol=1e-3, atol=1e-5
        )


def test_scoring_draws_nothing_at_random(method: Any, make_batch: MakeBatch) -> None:
    batch = make_batch()
    with torch.inference_mode():
        first = method.eval().score_batch(batch)
        second = method.score_batch(batch)
    assert torch.equal(first.score, second.score)
    assert same_map(first, second)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_scoring_is_one_graph_that_engines_can_take(method: Any, make_batch: MakeBatch) -> None:
    """Nothing in it breaks torch.compile or an export; what a compiler makes of it is not seen."""
    if method.optimises:
        pytest.skip("it solves a problem for each image, and ends when the image says so")
    batch = make_batch()
    method.eval()

    def score(image: Tensor) -> Any:
        found = method.predict_batch({"image": image, "category": batch["category"]})
        return tuple(part for part in found if part is not None)

    torch.compiler.reset()
    whole = torch.compile(score, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(whole(batch["image"]), score(batch["image"]))


@pytest.mark.slow
def test_loss_falls_on_one_batch(method: Any, fit: Fit, make_batch: MakeBatch) -> None:
    batch = make_batch()
    before = loss_of(method, batch)
    fit(method, batch, 40)
    assert loss_of(method, batch) < before


def test_losses_are_finite_scalars_that_depend_on_the_seed_alone(
    method: Any, make_batch: MakeBatch
) -> None:
    batch = make_batch()
    method.train()
    torch.manual_seed(3)
    first = method.losses(batch)
    torch.manual_seed(3)
    second = method.losses(batch)
    assert {name: float(v.detach()) for name, v in first.items()} == {
        name: float(v.detach()) for name, v in second.items()
    }
    assert all(value.ndim == 0 and value.isfinite() for value in first.values())


def test_frozen_parts_stay_as_they_are(method: Any, fit: Fit, make_batch: MakeBatch) -> None:
    averages = [k for k, m in method.named_modules() if isinstance(m, AveragedModel)]

    def frozen() -> dict[str, Tensor]:
        named = [(k, p) for k, p in method.named_parameters() if not p.requires_grad]
        parameters = {k: p for k, p in named if not k.startswith(tuple(averages))}
        backbones = {k: m for k, m in method.named_modules() if isinstance(m, Backbone)}
        buffers = {f"{k}.{n}": b for k, m in backbones.items() for n, b in m.named_buffers()}
        return copy.deepcopy({k: v.detach() for k, v in (parameters | buffers).items()})

    before = frozen()
    trained = {k: p.detach().clone() for k, p in method.named_parameters() if p.requires_grad}
    backbones = [module for module in method.modules() if isinstance(module, Backbone)]
    if any(
        isinstance(module, _BatchNorm) for backbone in backbones for module in backbone.modules()
    ):
        assert any("running_var" in name for name in before)
    fit(method, make_batch(), 3)
    after = frozen()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    moved = [k for k, p in method.named_parameters() if k in trained and not p.equal(trained[k])]
    assert len(moved) > len(trained) / 2


def test_state_dict_gives_the_same_map(
    request: pytest.FixtureRequest,
    method: Any,
    small_method: Callable[..., Any],
    fit: Fit,
    make_batch: MakeBatch,
) -> None:
    batch = make_batch()
    fit(method, batch, 2)
    with torch.inference_mode():
        expected = method.eval().score_batch(batch)
    name = request.node.callspec.params["method"]
    other = small_method(name)
    other.load_state_dict(method.state_dict())
    with torch.inference_mode():
        found = other.eval().score_batch(batch)
    assert same_map(found, expected)
    assert torch.equal(found.score, expected.score)


def test_trains_on_images_that_are_not_square(method: Any, fit: Fit, make_batch: MakeBatch) -> None:
    batch = make_batch(2, 64, 96)
    fit(method, batch, 1)
    with torch.inference_mode():
        anomaly_map, score = method.eval().score_batch(batch)
    assert score.isfinite().all()
    if method.localises:
        assert anomaly_map.shape == (2, 1, 64, 96)


@pytest.mark.parametrize("name", METHODS)
def test_trains_in_bfloat16(
    name: str,
    small_method: Callable[..., Any],
    fit: Callable[..., None],
    make_batch: MakeBatch,
) -> None:
    """Scoring is in float32 all the same."""
    method, batch = small_method(name), make_batch()
    fit(method, batch, 4, "bf16-mixed")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        anomaly_map, score = method.eval().score_batch(batch)
    assert score.dtype == torch.float32
    assert score.isfinite().all()
    if method.localises:
        assert anomaly_map.dtype == torch.float32
        assert anomaly_map.isfinite().all()


def test_nobody_writes_into_a_batch(method: Any, make_batch: MakeBatch) -> None:
    batch = make_batch()
    kept = copy.deepcopy(batch)
    total(method.train().losses(batch)).backward()
    with torch.inference_mode():
        method.eval().score_batch(batch)
    assert batch.keys() == kept.keys()
    for key, value in kept.items():
        same = torch.equal(batch[key], value) if isinstance(value, Tensor) else batch[key] == value
        assert same, key


class Stop(pl.Callback):
    """Ends training before a batch, as a failing machine would."""

    def on_train_batch_start(self, trainer: Any, method: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            raise ConnectionError


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(
    name: str, small_method: Build, fit: Fit, make_batch: MakeBatch, tmp_path: Path
) -> None:
    """All else that a method keeps included; what it learned is not learned again."""

    def run(folder: Path, *more: pl.Callback, resume: bool = False) -> dict[str, Any]:
        callbacks = [StepSeeds(0), ResumeCheckpoint(str(folder), every_steps=3), *more]
        method, path = small_method(name), folder / "last.ckpt"
        fit(method, make_batch(), 6, callbacks=callbacks, ckpt_path=path if resume else None)
        return method.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        run(tmp_path / "cut", Stop())
    again = run(tmp_path / "cut", resume=True)
    assert whole.keys() == again.keys()
    tensors = [key for key, value in whole.items() if isinstance(value, Tensor)]
    assert [key for key in tensors if not torch.equal(whole[key], again[key])] == []


def test_hooks_run_again_once_weights_have_moved(
    method: Any, fit: Fit, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which fails where a method overrides a hook and forgets the base's."""
    ran: list[str] = []
    monkeypatch.setattr(method, "learn", lambda: ran.append("learn"))
    monkeypatch.setattr(method, "calibrate", lambda: ran.append("calibrate"))
    assert method.learned
    assert method.calibrated
    fit(method, make_batch(), 2)
    assert ran == ["calibrate"]
