"""Options of a training step: the same training up to rounding, in one checkpoint format."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from anomaly_lit.callbacks import FastStep, StepSeeds
from anomaly_lit.callbacks import step as module
from anomaly_lit.callbacks.step import ON, compile_error, networks
from anomaly_lit.methods import files
from anomaly_lit.methods.base import Method
from anomaly_lit.runs.folder import state_of
from anomaly_lit.types import Batch, UserError

SMALL = sorted(f"{name}_small" for name in set(files().values()))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*"),
]
ADAMW = partial(torch.optim.AdamW, lr=0.01)


class Paint(Method):
    """Two convolutions and dropout, whose draw over a map follows its layout."""

    def __init__(
        self, optimizer: Any = ADAMW, gradient_clip: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__(optimizer, gradient_clip=gradient_clip)
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"paint": (self.network(batch["image"]) - batch["image"]).square().mean()}


class Moody(nn.Sequential):
    """Computes by what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else x


def need_compiler() -> None:
    try:
        module.check_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def losses_of(fit: Callable[..., Any], make_batch: Callable[..., Any]) -> Callable[..., Any]:
    """Trains two steps with some options and gives the last losses and the method."""

    def train(method: Any, steps: int = 2, **options: Any) -> dict[str, float]:
        trainer = fit(method, make_batch(), steps, callbacks=[StepSeeds(0), FastStep(**options)])
        return {key: float(value) for key, value in trainer.callback_metrics.items()}

    return train


@pytest.mark.parametrize("name", SMALL)
def test_layout_and_fused_optimiser_change_losses_by_rounding_alone(
    name: str, small_method: Callable[..., Any], losses_of: Callable[..., Any]
) -> None:
    expected = losses_of(small_method(name))
    method = small_method(name)
    keys = list(method.state_dict())
    fused = "fused" in inspect.signature(method.optimizer).parameters  # others refuse it in words
    found = losses_of(method, channels_last=True, fused=fused or None)
    # A perplexity counts nearest codes: rounding that moves one vector across a border of two
    # codes (its error is then equal to either) changes the count by a whole vector.
    counts = {key for key in expected if "perplexity" in key}
    for key, value in expected.items():
        assert found.pop(key) == pytest.approx(value, rel=5e-2 if key in counts else 2e-3, abs=1e-5)
    assert not found
    assert list(method.state_dict()) == keys
    assert all(value.is_contiguous() for value in method.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastflow_small", "uniad_small"])
def test_compiled_networks_change_losses_by_rounding_alone(
    name: str, small_method: Callable[..., Any], losses_of: Callable[..., Any]
) -> None:
    """Random draws included."""
    need_compiler()
    expected = losses_of(small_method(name))
    method = small_method(name)
    keys = list(method.state_dict())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert losses_of(method, compile=True) == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert list(method.state_dict()) == keys
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert all(part._compiled_call_impl is None for part in method.modules())


FAST = {"channels_last": True, "fused": True}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (FAST, {}),
        ({}, FAST),
        ({"fused": True}, FAST),
        pytest.param({"compile": True}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"compile": True}, marks=pytest.mark.slow),
        pytest.param({}, {"compile": True, **FAST}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_with_other_options(
    before: dict[str, bool],
    after: dict[str, bool],
    fit: Callable[..., Any],
    make_batch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Moments in another layout would go to other weights: a fused step looks at neither."""
    if before.get("compile") or after.get("compile"):
        need_compiler()
    batch, seeds, file = make_batch(), StepSeeds(0), tmp_path / "a.ckpt"
    make = partial(Paint, dropout=0.0 if FAST.items() <= (before | after).items() else 0.5)
    whole = make()
    fit(whole, batch, 6, callbacks=[seeds])
    halved = make()
    fit(halved, batch, 3, callbacks=[seeds, FastStep(**before)]).save_checkpoint(file)
    resumed = make()
    assert torch.load(file, weights_only=True)["state_dict"].keys() == resumed.state_dict().keys()
    trainer = fit(resumed, batch, 6, callbacks=[seeds, FastStep(**after)], ckpt_path=file)
    assert trainer.global_step == 6
    for group in trainer.optimizers[0].param_groups:
        assert bool(group["fused"]) == bool(after.get("fused"))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_fused_optimiser_is_clipped_in_bfloat16(
    fit: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    norms = []

    class Norms(FastStep):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))

    fit(Paint(gradient_clip=1e-3), make_batch(), 3, "bf16-mixed", [Norms(fused=True)])
    assert max(norms) == pytest.approx(1e-3, rel=0.02)


def test_what_is_null_is_as_the_device_has_it() -> None:
    assert {name for name, on in FastStep().chosen("cpu").items() if on} == ON["cpu"]
    assert not FastStep(pin_memory=False).chosen("cuda")["pin_memory"]
    assert FastStep(compile=True).chosen("mps")["compile"]


@pytest.mark.parametrize(
    ("optimizer", "precision", "options", "words"),
    [
        (
            partial(torch.optim.RMSprop, lr=0.1),
            "32-true",
            {"fused": True},
            "RMSprop has no fused form",
        ),
        (partial(ADAMW, foreach=True), "32-true", {"fused": True}, "step.fused=true:.*foreach"),
        (ADAMW, "32-true", {"pin_memory": True}, "training runs on cpu"),
        (ADAMW, "32-true", {"persistent_workers": True}, "dataset.num_workers=2"),
    ],
)
def test_what_cannot_be_had_is_refused(
    optimizer: Any,
    precision: str,
    options: dict[str, bool],
    words: str,
    fit: Callable[..., Any],
    make_batch: Callable[..., Any],
) -> None:
    with pytest.raises(UserError, match=words):
        fit(Paint(optimizer), make_batch(), 1, precision, [FastStep(**options)])


def test_a_scaler_bars_a_fused_optimiser() -> None:
    class Trainer:
        precision, precision_plugin = "16-mixed", nn.Module()

    Trainer.precision_plugin.scaler = object()
    optimizer = ADAMW(Paint().parameters())
    problem = module.why_not_fused(optimizer, Trainer())  # type: ignore[arg-type]
    assert problem is not None
    assert "16-mixed scales gradients" in problem


def test_a_machine_without_a_compiler_is_told_before_training(
    fit: Callable[..., Any], make_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"step.compile=true: .*C\+\+ compiler found\. Install"):
        fit(Paint(), make_batch(), 1, callbacks=[FastStep(compile=True)])


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_is_no_silent_fallback(
    fit: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    need_compiler()
    method = Paint()
    method.network = Moody(*method.network)
    with pytest.raises(Exception, match=r"(?i)data.dependent") as raised:
        fit(method, make_batch(), 1, callbacks=[FastStep(compile=True)])
    assert "step.compile=false" in str(compile_error(raised.value))
    assert compile_error(RuntimeError("another")) is None


def test_only_what_is_called_as_a_whole_is_compiled(small_method: Callable[..., Any]) -> None:
    method = small_method("fastflow_small")
    names = [name for name, part in method.named_modules() if part in set(networks(method))]
    assert names == ["backbone", "flows.0", "flows.1", "flows.2", "averaged"]


def test_a_run_may_go_on_with_other_options_but_not_with_another_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = {"output_dir": str(tmp_path), "seed": 0, "step": {"compile": None}}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    for before in ({}, {"step": config["step"]}):
        old = {k: v for k, v in config.items() if k != "step"} | before
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
        assert state_of(tmp_path, config) == "unfinished"
        assert "step" not in capsys.readouterr().out
    assert state_of(tmp_path, config | {"step": {"compile": True}}) == "unfinished"
    assert "step.compile: null there, true now" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        state_of(tmp_path, config | {"seed": 1})
