from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomaly_lit.data import FeatureCache, HostCache, MVTecAD
from anomaly_lit.types import UserError


class Halves(nn.Module):
    """Two stages, and a count of its calls."""

    calls = 0

    def forward(self, image: Tensor) -> list[Tensor]:
        self.calls += 1
        return [image[:, :2, ::2, ::2], image[:, :1, ::4, ::4].bfloat16()]


def batches(*names: str, size: int = 2) -> list[dict[str, Any]]:
    made = []
    for start in range(0, len(names), size):
        paths = list(names[start : start + size])
        value = torch.tensor([float(sum(path.encode())) for path in paths])
        made.append({"path": paths, "image": value.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)})
    return made


def test_what_is_kept_equals_what_the_backbone_gives() -> None:
    cache, backbone = FeatureCache(), Halves()
    cache.fill({"teacher": backbone}, batches(*"abcde"), 5)
    assert len(cache) == 5
    kept = cache.get(["d", "a"], torch.device("cpu"))
    assert kept is not None
    for name, stages in kept.items():
        assert name == "teacher"
        for stage, expected in zip(stages, backbone(batches("d", "a")[0]["image"]), strict=True):
            assert torch.equal(stage, expected)
            assert stage.dtype == expected.dtype


def test_features_are_computed_once() -> None:
    cache, backbone = FeatureCache(), Halves()
    for _ in range(2):
        cache.fill({"backbone": backbone}, batches(*"abc"), 3)
    assert backbone.calls == 2


def test_an_unknown_image_has_none() -> None:
    cache = FeatureCache()
    assert cache.get(["a"], torch.device("cpu")) is None
    cache.fill({"backbone": Halves()}, batches("a", "b"), 2)
    assert cache.get(["a", "z"], torch.device("cpu")) is None


def test_too_little_memory_keeps_none_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(max_gb=1e-7)
    cache.fill({"backbone": Halves()}, batches(*"abc"), 3)
    assert cache.get(["a"], torch.device("cpu")) is None
    assert "dataset.feature_cache.max_gb" in caplog.text


def test_negative_memory_is_refused() -> None:
    with pytest.raises(UserError, match="max_gb=-1"):
        FeatureCache(max_gb=-1)


def test_a_training_batch_has_the_features_of_its_images_and_prompts(mvtec: Any) -> None:
    datamodule = MVTecAD(
        str(mvtec), image_size=32, batch_size=2, cache=HostCache(), feature_cache=FeatureCache()
    )
    datamodule.setup()
    datamodule.with_prompts = True
    backbone = Halves()
    samples = [*datamodule.train_samples, *datamodule.holdout_samples]
    assert datamodule.feature_cache is not None
    datamodule.feature_cache.fill(
        {"backbone": backbone}, datamodule.batches_of(samples), len(samples)
    )

    class Trainer:
        training = True
        global_rank, world_size = 0, 1

    datamodule.trainer = Trainer()  # type: ignore[assignment]
    datamodule._position = lambda: 0  # type: ignore[method-assign]
    for batch in datamodule.train_dataloader():
        whole = datamodule.on_after_batch_transfer(batch, 0)
        for key, image in (("features", "image"), ("prompt_features", "prompt")):
            for kept, expected in zip(whole[key]["backbone"], backbone(batch[image]), strict=True):
                assert torch.equal(kept, expected)
        assert "features" not in batch
