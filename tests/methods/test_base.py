"""What the base of all methods does on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomaly_lit.callbacks.run import FillFeatureCache
from anomaly_lit.data import FeatureCache, HostCache, MVTecAD
from anomaly_lit.methods import base
from anomaly_lit.methods.base import Method
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError


class Steep(Method):
    """A loss whose gradient is 8, minimised by plain gradient descent."""

    def __init__(self, gradient_clip: float | None) -> None:
        super().__init__(lambda p: torch.optim.SGD(p, lr=1.0), gradient_clip=gradient_clip)
        self.weight = nn.Parameter(torch.zeros(()))

    def losses(self, batch: dict) -> dict[str, Tensor]:
        return {"steep": -8 * self.weight}


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
@pytest.mark.parametrize(
    ("own", "trainer_s", "expected"),
    [(None, None, 8), (0.5, None, 0.5), (0.5, 2.0, 2), (None, 3.0, 3)],
)
def test_gradients_are_clipped_at_the_trainer_s_norm_else_the_method_s(
    own: float | None, trainer_s: float | None, expected: float
) -> None:
    method = Steep(own)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        gradient_clip_val=trainer_s,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, DataLoader([{"image": torch.zeros(1, 3, 8, 8)}], batch_size=None))
    assert method.weight.item() == pytest.approx(expected, rel=1e-4)


class Counted(Steep):
    """Notes in a buffer what was computed from images."""

    def __init__(self) -> None:
        super().__init__(None)
        self.register_buffer("seen", torch.zeros(()))

    def learn(self) -> None:
        self.seen.fill_(1)

    def calibrate(self) -> None:
        self.seen.fill_(2)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_ranks_take_over_what_the_first_has_learned_and_calibrated(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[tuple[float, bool]] = []

    def note(module: Any, parameters: bool = True) -> None:
        shared.append((float(module.seen), parameters))

    monkeypatch.setattr(base, "copy_first", note)
    fit(Counted(), {"image": torch.zeros(1, 3, 8, 8), "category": ["bolt"]}, 1)
    assert shared == [(1, True), (2, False)]


@pytest.mark.parametrize(
    ("images", "key"), [("image", "features"), ("outlier", "outlier_features")]
)
def test_features_of_any_images_are_those_of_the_cache_or_else_computed(
    images: str, key: str
) -> None:
    def backbone(image: Tensor) -> list[Tensor]:
        return [image + 1]

    method: Any = Steep(None)
    batch: Any = {"image": torch.zeros(1), "outlier": torch.full((1,), 5.0)}
    assert torch.equal(method.features(backbone, batch, of=images)[0], batch[images] + 1)
    batch[key] = {"backbone": [torch.full((1,), 9.0)]}
    assert method.features(backbone, batch, of=images)[0] == 9


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_statistics_need_a_data_module() -> None:
    class Curious(Steep):
        def learn(self) -> None:
            list(self.normal_batches("train"))

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="datamodule="):
        trainer.fit(
            Curious(None), DataLoader([{"image": torch.zeros(1, 3, 8, 8)}], batch_size=None)
        )


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*")
@pytest.mark.parametrize(("name", "kept"), [("uniad_small", "head.bias"), ("mfrnet_small", "high")])
def test_statistics_of_training_images_read_the_feature_cache(
    name: str,
    kept: str,
    small_method: Callable[..., Any],
    mvtec_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit what the backbone gives, which is asked once for each image."""
    seen: list[int] = []
    forward = Backbone.forward

    def counting(self: Backbone, image: Tensor) -> list[Tensor]:
        seen.append(len(image))
        return forward(self, image)

    monkeypatch.setattr(Backbone, "forward", counting)
    found = []
    for cache in (None, FeatureCache()):
        seen.clear()
        datamodule = MVTecAD(
            str(mvtec_folder), image_size=64, batch_size=2, cache=HostCache(), feature_cache=cache
        )
        method = small_method(name)
        monkeypatch.setattr(type(method), "calibrate", lambda self: None)  # which asks it, too
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=1,
            limit_val_batches=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FillFeatureCache()],
        )
        torch.manual_seed(0)
        trainer.fit(method, datamodule=datamodule)
        found.append(method.state_dict()[kept].clone())
    count = len(datamodule.train_samples) + len(datamodule.holdout_samples)
    assert sum(seen) == count
    assert torch.equal(found[0], found[1])
    assert found[0].any()
