"""What every method shares: prediction steps, logging of losses, the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError

OptimizerFn = Callable[[Iterable[Any]], Optimizer]  # parameters, or groups of them
ScheduleFn = Callable[[float], float]


class Method(pl.LightningModule):
    """Base of all methods. A method writes ``losses`` and ``forward``; the rest is optional.

    Args:
        optimizer: Builds the optimiser from the trainable parameters.
        schedule: Factor of the learning rate at a share of training, in [0, 1]; None keeps it.
        gradient_clip: Greatest norm of all gradients together, where a method cannot do without;
            ``trainer.gradient_clip_val`` has precedence.

    Attributes:
        needs: Keys of the batch that training reads although not every batch has them:
            ``corrupted`` (with ``corruption``) and ``prompt``.
        oracle: What scoring takes from the test set, to be said in every table; empty is nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    oracle: str = ""
    localises: bool = True

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.schedule = schedule
        self.gradient_clip = gradient_clip

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, each a scalar; ``loss`` is what training lowers."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Prediction:
        """Scores images, (B, 3, H, W) in [0, 1]; the one place that computes anomaly maps."""
        raise NotImplementedError

    def predict_batch(self, batch: Batch) -> Prediction:
        """Scores a batch; a method that needs more than the image overrides this."""
        return self(batch["image"])

    def setup(self, stage: str) -> None:
        """Reads the weights of backbones that have none yet."""
        for module in self.modules():
            if isinstance(module, Backbone):
                module.load_weights()

    def training_backbones(self) -> dict[str, Backbone]:
        """Backbones whose features of clean images training reads, by attribute path.

        All of them; a method that asks one only when it scores overrides this.
        """
        return {name: m for name, m in self.named_modules() if isinstance(m, Backbone)}

    def features(
        self,
        backbone: Backbone,
        batch: Batch,
        name: str = "backbone",
        of: Literal["image", "prompt"] = "image",
    ) -> list[Tensor]:
        """Features of the batch's clean images or prompts: from the cache where there is one.

        Args:
            backbone: Computes them otherwise.
            batch: Its images, and what the cache holds of them.
            name: The backbone's attribute path in this module, such as ``teacher``.
            of: Which images.
        """
        cached = batch.get("features", {}) if of == "image" else batch.get("prompt_features", {})
        return cached[name] if name in cached else backbone(batch[of])

    def normal_batches(
        self, split: Literal["train", "holdout"], most: int = 256
    ) -> Iterator[Batch]:
        """Normal images for statistics of features or maps, on this device, in a fixed order.

        The same on every rank. To be called from a hook such as ``on_fit_start`` (statistics of
        ``train``) or ``on_validation_start`` (of ``holdout``, once the weights moved).

        Images of ``train`` bring what the cache holds of their features, for ``features``: those
        that training reads, so computed in its precision (bfloat16 under ``bf16-mixed``) and
        rounded where ``dataset.feature_cache.dtype`` says so. Without a cache the backbone computes
        them in float32, unless the caller asks for autocast.

        Args:
            split: What is trained on, or what is held out.
            most: Images to give at most, as many of each category (at least one).

        Raises:
            UserError: The trainer has no data module to ask.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise UserError(
                f"{type(self).__name__} takes statistics of normal images: hand the trainer a data "
                "module, trainer.fit(method, datamodule=...)"
            )
        for batch in datamodule.normal_batches(split, most):
            moved = self.transfer_batch_to_device(batch, self.device, 0)
            if split == "train":
                moved = datamodule.with_features(moved)
            yield datamodule.corrupt(moved) if "corrupted" in self.needs else moved

    def generator(self) -> torch.Generator:
        """A generator on this module's device, seeded by torch's global state."""
        seed = int(torch.randint(2**62, ()))
        return torch.Generator(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logs every term as ``train/<term>``; not with ``prog_bar``, which waits in each step."""
        losses = self.losses(batch)
        for name, value in losses.items():
            self.log(f"train/{name}", value, batch_size=len(batch["image"]))
        return losses["loss"]

    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Logs ``val/loss``, the training loss on held-out normal images.

        Further data loaders, such as the test set of ``selection=oracle``, are predicted only.
        """
        if dataloader_idx == 0:
            self.log(
                "val/loss",
                self.losses(batch)["loss"],
                prog_bar=True,
                sync_dist=True,
                batch_size=len(batch["image"]),
                add_dataloader_idx=False,
            )
        return self.score_batch(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Predicts; the ``Evaluation`` callback scores what comes back."""
        return self.score_batch(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        """Predicts."""
        return self.score_batch(batch)

    def score_batch(self, batch: Batch) -> Prediction:
        """Predicts in float32, whatever precision training has, so that thresholds carry over."""
        with torch.autocast(self.device.type, enabled=False):
            return self.predict_batch(batch)

    def configure_optimizers(self) -> Any:
        """One optimiser over all parameters that take a gradient, with its schedule if any."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        schedule = self.schedule
        if schedule is None:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        scheduler = LambdaLR(optimizer, lambda step: schedule(step / total))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips at the trainer's value, else at the method's."""
        limit = gradient_clip_val or self.gradient_clip
        self.clip_gradients(optimizer, limit, gradient_clip_algorithm or "norm")
