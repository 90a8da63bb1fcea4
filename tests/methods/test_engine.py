"""OpenVINO in the place of torch: the same maps, or a refusal."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anomaly_lit.data.images import Resize
from anomaly_lit.inference import openvino as engine
from anomaly_lit.inference.detector import Detector
from anomaly_lit.methods import files
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Prediction, UserError

METHODS = sorted(set(files().values()))
Build = Callable[..., Any]
DYNAMIC = {"img_size": 518, "dynamic_img_size": True}  # as that of DINOv2

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")


@pytest.fixture(autouse=True)
def _installed() -> None:
    for name in engine.NEEDED:
        pytest.importorskip(name)


@pytest.fixture
def detect(small_method: Build, fit: Build, make_batch: Build) -> Build:
    """Builds detectors with either engine around one method, trained for a step."""
    methods: dict[str, Any] = {}

    def build(name: str, chosen: str) -> Detector:
        if name not in methods:
            methods[name] = small_method(f"{name}_small")
            fit(methods[name], make_batch(), 1)
        return Detector(methods[name], Resize(64), {}, chosen)  # type: ignore[arg-type]

    return build


@pytest.fixture
def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, size, np.uint8) for size in ((64, 64, 3), (80, 48, 3))]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_openvino_finds_what_torch_finds_or_refuses(
    name: str, detect: Build, pictures: list[np.ndarray]
) -> None:
    expected = detect(name, "torch").predict(pictures)
    try:
        found = detect(name, "openvino").predict(pictures)
    except UserError as error:
        assert "engine=torch" in str(error)  # noqa: PT017
        return
    for one, other in zip(expected, found, strict=True):
        assert one.anomaly_map.shape == other.anomaly_map.shape
        away = np.abs(one.anomaly_map - other.anomaly_map).max()
        assert away <= 1e-3 * np.ptp(one.anomaly_map)
        assert other.score == pytest.approx(one.score, rel=1e-3)


class Tokens(nn.Module):
    """A transformer's last map, as a method gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone("vit_small_patch14_dinov2", (0,), "random", options=DYNAMIC)

    def predict_batch(self, batch: Any) -> Prediction:
        anomaly_map = self.backbone(batch["image"])[0].mean(dim=1, keepdim=True)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


def test_position_codes_are_resized_as_torch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method: Any = Tokens().eval()
    position = next(p for n, p in method.named_parameters() if n.endswith("pos_embed"))
    nn.init.normal_(position)
    image, scoring = torch.rand(1, 3, 56, 56), engine.Scoring(method, "bolt")
    engine.export(scoring, image, tmp_path / "model.onnx")
    found = engine.compiled(tmp_path / "model.onnx", 1)(image.numpy())
    with torch.no_grad():
        expected = scoring(image)[0].numpy()
    assert np.abs(found[0] - expected).max() < 1e-4 * np.ptp(expected)


@pytest.mark.slow
def test_another_result_than_torchs_is_refused(
    detect: Build, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of DSR, whose nearest codes depend on the last digit."""
    detector = detect("uniad", "openvino")
    detector.predict(pictures)  # compiled once, and not compared again
    monkeypatch.setattr(engine, "FURTHEST", -1.0)
    detector.predict(pictures)
    detector._compiled.clear()
    with pytest.raises(UserError, match=r"differ from torch's by 0\.0.*engine=torch only"):
        detector.predict(pictures)


def test_what_cannot_be_exported_is_named(
    detect: Build, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"UniAD cannot be exported .*: no such operator\. Use"):
        detect("uniad", "openvino").predict(pictures)


def test_engines_that_cannot_be_had_are_refused_at_once(
    detect: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no engine=tensorrt; choose torch or openvino"):
        detect("uniad", "tensorrt")
    with pytest.raises(UserError, match="on a CPU, not on device=cuda"):
        detect("uniad", "openvino").to("cuda")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs openvino, onnx, onnxscript: pip install"):
        detect("uniad", "openvino")


def test_openvino_reports_to_nobody() -> None:
    """Its import does, through another package."""
    loaded = "openvino_telemetry" in sys.modules
    assert engine.silent_openvino().Core().available_devices
    assert ("openvino_telemetry" in sys.modules) == loaded
    assert importlib.util.find_spec("openvino") is not None


def test_probes_are_eight_different_pictures_in_range() -> None:
    shown = engine.probes(torch.rand(1, 3, 8, 12))
    assert shown.shape == (8, 3, 8, 12)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert len(shown.flatten(1).unique(dim=0)) == 8
