"""What all methods share: hooks, the sum of their losses, optimisers, prediction steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from anomaly_lit.files import tell
from anomaly_lit.losses import total
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.optimising import Optimised, OptimizerFn, ScheduleFn
from anomaly_lit.nn.ranks import copy_first
from anomaly_lit.types import Batch, Prediction, UserError, no_holdout

__all__ = ["Method", "OptimizerFn", "ScheduleFn"]


class Method(Optimised):
    """Base of all methods. A method defines `losses` and `forward`; everything else is optional.

    Args:
        optimizer: Builds the optimiser from the trainable parameters.
        schedule: Maps the share of training that is done, in [0, 1], to a factor of the learning
            rate; None keeps the rate constant.
        gradient_clip: Largest norm of all gradients together, for methods that need clipping;
            `trainer.gradient_clip_val` takes precedence.

    Attributes:
        needs: Keys of a training batch that the method reads besides the image: `corrupted` (with
            `corruption`), `prompt`, `outlier`, `seen` (with `seen_mask`; absent if `dataset.seen`
            is 0). Where they depend on an argument, `__init__` sets them. With `frames`, every
            batch has the frames that precede the image in its clip; the method's attribute
            `frames` says how many.
        needs_by_setting: Settings that add a key to `needs`, such as `method.penalty=true` for
            `outlier`; messages name them.
        localises: Whether predictions have an anomaly map; false for methods that score whole
            images only.
        optimises: Whether scoring solves an optimisation problem for each image. That takes
            seconds, more for some images than for others, and such a method cannot be exported.
        oracle: What scoring takes from the test set, shown in every results table; empty for
            nothing.
        oracle_criterion: Metrics of the test set, joined by `+`, whose largest sum
            `selection=oracle` chooses: those by which the paper chose its weights.
        multiple: Height and width of an image must be multiples of this.
        needs_holdout: Whether there must be held-out images.
        leaves_unused: Whether some training steps leave trainable parameters without a gradient.
            DistributedDataParallel must be told so.
        learned: Whether `learn` has run; part of the state dict.
        calibrated: Whether `calibrate` has run with the current weights; part of the state dict.
    """

    needs: frozenset[str] = frozenset()
    needs_by_setting: Mapping[str, str] = {}
    localises: bool = True
    optimises: bool = False
    oracle: str = ""
    multiple: int = 1
    needs_holdout: bool = False
    leaves_unused: bool = False
    oracle_criterion: str = "image_auroc+pixel_auroc"

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        self.learned = False
        self.calibrated = False

    # ------------------------------------------------------------------ what a method writes

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the loss, each a scalar; training lowers their sum.

        Returning no term in training skips the batch (on every rank). Pass numbers that are not
        part of the sum to `report`.
        """
        raise NotImplementedError

    def forward(self, image: Tensor) -> Prediction:
        """Score images, (B, 3, H, W) in [0, 1]; anomaly maps are computed only here."""
        raise NotImplementedError

    def check(self) -> None:
        """Read the files that `learn` needs, to refuse wrong ones before any image is read.

        Raises:
            UserError: A file is missing or does not fit.
        """

    def learn(self) -> None:
        """Compute from normal images what training starts from: statistics, first codes, a bank.

        Runs once in a new run, before the first step, without gradients, in evaluation mode and
        in the precision of training. Keep the result in parameters, buffers or a `Bank`: a
        checkpoint restores it, and a resumed run does not learn again. All ranks take over the
        first one's result.
        """

    def calibrate(self) -> None:
        """Compute from normal images what scoring with the current weights needs.

        Runs before every validation, after training if no images are held out, and before a test if
        the weights have changed since; without gradients, in evaluation mode and in float32, like
        scoring. Keep the result as for `learn`, but not in parameters.
        """

    def outcome(self) -> dict[str, Any]:
        """Return what else is worth knowing about the trained method: plain data, by name.

        Called after the test of a run, with the data module at hand. A run prints the facts and
        records them in `metrics.json`, as `method/<name>`.
        """
        return {}

    def predict_batch(self, batch: Batch) -> Prediction:
        """Score a batch; a method that needs more than the image overrides this."""
        return self(batch["image"])

    def training_backbones(self) -> dict[str, Backbone]:
        """Return the backbones whose features of clean images training reads, by attribute path.

        By default these are all; a method that uses one only for scoring overrides this.
        """
        return {name: m for name, m in self.named_modules() if isinstance(m, Backbone)}

    # ----------------------------------------------------------------- what a method may ask

    @property
    def done(self) -> float:
        """The share of training that is done, in [0, 1]; 1 outside of training.

        Counts optimiser steps; with several optimisers, those of the first.
        """
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit":
            return 1.0
        steps = trainer.estimated_stepping_batches
        return min(trainer.global_step / steps, 1.0) if steps else 1.0

    def features(
        self,
        backbone: Backbone,
        batch: Batch,
        name: str = "backbone",
        of: str = "image",
    ) -> list[Tensor]:
        """Return features of clean images of the batch, from the cache if there is one.

        Args:
            backbone: Computes them if they are not cached.
            batch: The images, and what the cache holds for them.
            name: The backbone's attribute path in this module, such as `teacher`.
            of: Key of the images in the batch, such as `prompt`.
        """
        values = cast(dict[str, Any], batch)
        cached = values.get("features" if of == "image" else f"{of}_features", {})
        return cached[name] if name in cached else backbone(values[of])

    def normal_batches(
        self, split: Literal["train", "holdout"], most: int | None = 256
    ) -> Iterator[Batch]:
        """Yield normal images for `learn` or `calibrate`, on this device, in a fixed order.

        They are the same on every rank. Images of `train` come with their cached features (see
        `features`): those that training reads, in training's precision, and rounded if
        `dataset.feature_cache.dtype` says so.

        Args:
            split: The images for training, or the held-out ones.
            most: Largest number of images, spread evenly over the categories (at least one each);
                None gives all.

        Raises:
            UserError: The trainer has no data module.
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
        """Return a generator on this module's device, seeded by torch's global state."""
        seed = int(torch.randint(2**62, ()))
        return torch.Generator(self.device).manual_seed(seed)

    def report(self, figures: Mapping[str, Tensor]) -> None:
        """Log what is no term of the loss as `train/<name>`; do nothing outside a training step."""
        if self._trainer is not None and self._trainer.training and self.training:
            self.log_dict({f"train/{name}": value.detach() for name, value in figures.items()})

    # ----------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        """Load the weights of backbones that have none yet.

        Raises:
            UserError: `gradient_clip` is set, but the method steps its optimisers itself.
        """
        for module in self.modules():
            if isinstance(module, Backbone):
                module.load_weights()
        if stage == "fit" and not self.automatic_optimization and self.gradient_clip is not None:
            raise UserError(
                f"method.gradient_clip={self.gradient_clip} cannot act, since "
                f"{type(self).__name__} steps its optimisers itself: set it to null"
            )

    def on_fit_start(self) -> None:
        """Call `learn` once; then calibrate a method that has no trainable parameters.

        Raises:
            UserError: The strategy needs a gradient for every parameter in every step, which this
                method does not give (`leaves_unused`), or there are no held-out images.
        """
        if self.leaves_unused:
            self._check_strategy()
        if self.needs_holdout and next(self.normal_batches("holdout", 1), None) is None:
            raise no_holdout(type(self).__name__)
        if not self.learned:
            with self._evaluating(), self.trainer.precision_plugin.forward_context():
                self.learn()
            copy_first(self)
            self.learned = True
        if not any(p.requires_grad for p in self.parameters()):
            if self.trainer.is_global_zero:
                tell(f"{type(self).__name__} has no trainable parameters: no step is taken")
            self.trainer.fit_loop.epoch_loop.max_steps = 0
            self._calibrate()

    def _check_strategy(self) -> None:
        """Raise if the strategy needs a gradient for every parameter in every step."""
        strategy: Any = self.trainer.strategy
        finds = getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters")
        if isinstance(strategy, DDPStrategy) and not finds:
            raise UserError(
                f"some training steps of {type(self).__name__} leave parameters unused: set "
                "trainer.strategy=ddp_find_unused_parameters_true"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note that weights are about to change; an override must call this."""
        self.calibrated = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss; None skips the batch."""
        return self.log_terms(self.losses(batch), batch)

    def log_terms(self, terms: dict[str, Tensor], batch: Batch) -> Tensor | None:
        """Log terms as `train/<term>` and their sum as `train/loss`; return the sum, if any."""
        if not terms:
            return None
        loss = total(terms)
        for name, value in {**terms, "loss": loss}.items():  # prog_bar=True would sync in each step
            self.log(f"train/{name}", value, batch_size=len(batch["image"]))
        return loss

    def on_train_end(self) -> None:
        """Calibrate the last weights if no validation does; an override must call this."""
        if not sum(self.trainer.num_val_batches):
            self._calibrate()

    # -------------------------------------------------------------------------------- scoring

    def on_validation_start(self) -> None:
        """Calibrate; an override must call this."""
        self._calibrate()

    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Log `val/loss`, the training loss on held-out normal images.

        Batches of further data loaders, such as the test set of `selection=oracle`, are only
        predicted.
        """
        if dataloader_idx == 0:
            terms = self.losses(batch)
            if terms:
                self.log(
                    "val/loss",
                    total(terms),
                    prog_bar=True,
                    sync_dist=True,
                    batch_size=len(batch["image"]),
                    add_dataloader_idx=False,
                )
        return self.score_batch(batch)

    def on_test_start(self) -> None:
        """Calibrate if the current weights are not; an override must call this."""
        self._calibrate()

    def test_step(self, batch: Batch, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Predict; the `Evaluation` callback scores the result."""
        return self.score_batch(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        """Predict."""
        return self.score_batch(batch)

    def score_batch(self, batch: Batch) -> Prediction:
        """Predict in float32, whatever the precision of training, so that thresholds stay valid."""
        with torch.autocast(self.device.type, enabled=False):
            return self.predict_batch(batch)

    # ---------------------------------------------------------------------------------- state

    def get_extra_state(self) -> dict[str, bool]:
        """Return which hooks have run."""
        return {"learned": self.learned, "calibrated": self.calibrated}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restore what `get_extra_state` returned."""
        self.learned, self.calibrated = state["learned"], state["calibrated"]

    def _calibrate(self) -> None:
        """Calibrate unless the current weights already are."""
        if self.calibrated:
            return
        with self._evaluating(), torch.autocast(self.device.type, enabled=False):
            self.calibrate()
        copy_first(self, parameters=False)
        self.calibrated = True

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Set evaluation mode without gradients; afterwards restore the mode of each part."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.inference_mode(False), torch.no_grad():  # so training can use the result
                yield
        finally:
            for module, mode in modes:
                module.training = mode
