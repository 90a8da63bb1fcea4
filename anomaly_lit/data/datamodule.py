"""The data module: how the images of a data set become batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

from anomaly_lit.data.batches import Images
from anomaly_lit.data.caches.features import FeatureCache, add_features
from anomaly_lit.data.caches.memory import DeviceCache, ImageCache
from anomaly_lit.data.catalogue import Catalogue
from anomaly_lit.data.checks import raise_all, too_small
from anomaly_lit.data.companions import (
    Companion,
    Frames,
    Partner,
    Pool,
    Seen,
    rows_by_category,
    wrong_needs,
)
from anomaly_lit.data.images import Resize
from anomaly_lit.data.layouts.base import Layout
from anomaly_lit.data.opening import MAX_PIXELS
from anomaly_lit.data.progress import warn_once
from anomaly_lit.data.sampler import (
    ShardSampler,
    TrainBatches,
    WithSteps,
    batch_seed,
    equal_weights,
    fitting_batch,
)
from anomaly_lit.data.workers import loader_of
from anomaly_lit.types import Batch, Sample, UserError


class AnomalyDataModule(Catalogue, pl.LightningDataModule):
    """Images of one or several categories: normal ones to learn from, others to test on.

    The layout finds categories and their images. Hashes of names and the seed choose what is held
    out, so that the same folder gives the same splits on every machine.

    After `setup`: `categories`, `train_samples`, `holdout_samples`, `test_samples`, `has_masks`
    (false: no truth for pixel metrics) and `digest`.

    Args:
        root: Folder of the data set.
        categories: Names, or `all`; several are learned by one model.
        image_size: Height and width that a method sees, or one number for both.
        resize: `stretch` or `pad`, see `Resize`.
        interpolation: `bilinear`, `bicubic` or `lanczos`.
        center_crop: Height and width cut from the middle after resizing.
        mask_resize: Which pixels of a resized truth mask are true, see `Resize`.
        batch_size: Images per training step.
        eval_batch_size: Images per step of validation and test.
        num_workers: Processes that read images; 0 is fastest with a cache.
        holdout: Share of the normal training images of each category, in [0, 1), that is never
            trained on; at least one image where there are two.
        shots: Train on this many images of each category only, drawn from what is not held out.
        balanced: Draw every category equally often, however many images it has.
        drop_last: Whether training images that do not fill a batch wait for the next epoch;
            otherwise the last batch of an epoch is smaller.
        seed: Chooses the held-out images and the shots, and shuffles.
        masks: `required` (an anomalous image without a mask is an error), `optional` (all or
            none of them have one) or `none` (masks are not read; no pixel metrics).
        outlier_dir: Folder of pictures that show something else, for methods that learn from
            outliers; searched to any depth.
        seen: Anomalous test images of each type of defect to learn from, for methods that can;
            drawn by the seed, they leave the test set. 0: none.
        max_pixels: Pixels of the largest picture that is read; None sets no limit.
        cache: Where decoded images are kept; None decodes them each time.
        feature_cache: Where features of frozen backbones are kept; None computes them each time.
        synthesis: Turns `(image, generator, category)` of training images into `(corrupted,
            corruption)`, images with synthetic anomalies and their masks; None makes none.
        validate_on_synthesis: Also score held-out images after synthesis, as `val/synthetic_*`.
        needs: What the method reads in a training batch besides the image: `prompt` (another
            training image of the category), `outlier` (a picture of `outlier_dir`), `corrupted`,
            `seen` (a real defect, if `seen` is above 0), `frames` (those before the image in its
            clip, in every batch).
        validate_on_test: Also score the test images in each validation, in its last loader; an
            oracle, for comparison only.
        pin_memory: Put batches in page-locked memory, which a GPU copies faster; None: if there is
            a GPU.
        persistent_workers: Keep worker processes from one epoch to the next; None: yes.
        layout: How the data set is laid out on disk; None: the layout of the class.

    Raises:
        UserError: An argument is out of range; from `setup`, everything found wrong at once.
    """

    layout_class: ClassVar[type[Layout] | None] = None

    def __init__(
        self,
        root: str | None,
        categories: str | list[str] = "all",
        image_size: int | list[int] = 256,
        resize: Literal["stretch", "pad"] = "stretch",
        interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear",
        center_crop: int | list[int] | None = None,
        mask_resize: Literal["keep", "nearest", "area", "any"] = "keep",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        holdout: float = 0.1,
        shots: int | None = None,
        balanced: bool = False,
        drop_last: bool = True,
        seed: int = 0,
        masks: Literal["required", "optional", "none"] = "required",
        outlier_dir: str | None = None,
        seen: int = 0,
        max_pixels: int | None = MAX_PIXELS,
        cache: ImageCache | None = None,
        feature_cache: FeatureCache | None = None,
        synthesis: nn.Module | None = None,
        validate_on_synthesis: bool = False,
        needs: Collection[str] = (),
        validate_on_test: bool = False,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        layout: Layout | None = None,
    ) -> None:
        pl.LightningDataModule.__init__(self)
        geometry = Resize(image_size, resize, center_crop, interpolation, mask_resize)
        if layout is None:
            if self.layout_class is None:
                raise UserError("dataset.layout is not set: name a class such as ClipsLayout")
            layout = self.layout_class()
        chosen = (categories, holdout, shots, seed, masks, outlier_dir, seen)
        Catalogue.__init__(self, layout, root, *chosen, geometry, max_pixels)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.balanced = balanced
        self.drop_last = drop_last
        self.cache = cache
        self.feature_cache = feature_cache
        self.synthesis = synthesis
        self.validate_on_synthesis = validate_on_synthesis
        self.needs = frozenset(needs)
        self.validate_on_test = validate_on_test
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.persistent_workers = True if persistent_workers is None else persistent_workers
        counts = {"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1)}
        counts["num_workers"] = (num_workers, 0)
        wrong = wrong_needs(self.needs, outlier_dir, layout.frames)
        raise_all(self.wrong_settings() + too_small(counts) + wrong)
        self.digest = ""
        self._shrunk = False

    def setup(self, stage: str | None = None) -> None:
        """List, check and, with a cache, decode the images of a stage; a second call is free.

        Args:
            stage: Lightning's `fit`, `validate`, `test` or `predict`; None is all of them.
        """
        if not self.digest:
            self.list_and_check(stage)
            self.digest = self.files_digest()
        elif stage in (None, "fit"):
            raise_all(self.find_gaps(stage))
        if self.cache is not None:
            files = self.samples_of(stage, self.validate_on_test)
            raise_all(self.cache.fill(files, self.resize))

    def companions(self) -> list[Companion]:
        """Return the streams of further images that the method needs in a training batch."""
        train, seed = self.train_samples, self.seed
        streams: dict[str, Callable[[], Companion]] = {
            "prompt": lambda: Partner("prompt", train, seed),
            "outlier": lambda: Pool("outlier", self.outlier_samples, seed),
            "seen": lambda: Seen(train, self.seen_samples, seed),
        }
        needed = self.needs if self.seen else self.needs - {"seen"}
        made = [make() for name, make in streams.items() if name in needed]
        return made + self.history_of(train)

    def history_of(self, samples: Sequence[Sample]) -> list[Companion]:
        """Return the companion of the frames before images, if the method needs it."""
        clips, frames = self.clip_samples, self.layout.frames
        return [Frames(clips, samples, frames)] if "frames" in self.needs else []

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches; see `drop_last` for images that do not fill one.

        If the split is smaller than a batch, the batch shrinks to its size.
        """
        count, (rank, world_size) = len(self.train_samples), self._world()
        batch_size = fitting_batch(self.batch_size, count, world_size)
        if batch_size < self.batch_size and not self._shrunk:
            self._shrunk = True
            warn_once(
                f"{count} training images do not fill dataset.batch_size={self.batch_size} on "
                f"{world_size} device(s): batches of {batch_size}"
            )
        weights = equal_weights(self.train_samples) if self.balanced else None
        batches = TrainBatches(
            count, batch_size, self.seed, self._position, weights, rank, world_size, self.drop_last
        )
        companions = self.companions()
        indices = WithSteps(batches) if companions else batches
        return self._loader(self.train_samples, indices, companions)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return a loader for each of `validation_names`, in order."""
        samples = {"test": self.test_samples}
        loaders = [
            self._evaluation_loader(samples.get(name, self.holdout_samples))
            for name in self.validation_names()
        ]
        return loaders if len(loaders) > 1 else loaders[0]

    def validation_names(self) -> list[str]:
        """Return what a validation sees: `holdout`, and where asked `synthetic` and `test`."""
        asked = {"synthetic": self.validate_on_synthesis, "test": self.validate_on_test}
        return ["holdout", *(name for name, wanted in asked.items() if wanted)]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test images, in order."""
        return self._evaluation_loader(self.test_samples)

    def normal_batches(
        self, split: Literal["train", "holdout"], most: int | None = 256
    ) -> Iterator[Batch]:
        """Return batches of normal images of a split, the same on every rank.

        Args:
            split: What is trained on, or what is held out.
            most: Largest number of images, the same for each category (at least one) and spread
                evenly over its images; None gives all.

        Returns:
            Batches whose `index` is the position in the split.
        """
        samples = self.train_samples if split == "train" else self.holdout_samples
        share = len(samples) if most is None else max(1, most // max(1, len(self.categories)))
        rows: list[int] = []
        for own in rows_by_category(samples).values():  # in the order of the categories
            rows += own[:: -(-len(own) // share)]
        return self._in_batches(samples, rows)

    def batches_of(self, samples: list[Sample]) -> Iterator[Batch]:
        """Return batches of some images in order, the same on every rank."""
        return self._in_batches(samples, range(len(samples)))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Add cached features, and corrupted images if there is a synthesis.

        Only during training and validation. The validation loader `synthetic` replaces the clean
        images by corrupted ones, with their truth.
        """
        trainer = self.trainer
        if trainer is None:
            return batch
        if trainer.training:
            batch = self.with_features(batch)
            return batch if self.synthesis is None else self.corrupt(batch, self._position())
        if not (trainer.validating or trainer.sanity_checking):
            return batch
        split = self.validation_names()[dataloader_idx]
        if split == "holdout":
            batch = self.with_features(batch)
        if split == "test" or self.synthesis is None:
            return batch
        batch = self.corrupt(batch)
        if split == "holdout":
            return batch
        truth = batch["corruption"]
        label = truth.flatten(1).any(dim=1)
        return {**batch, "image": batch["corrupted"], "gt_mask": truth, "label": label}

    def with_features(self, batch: Batch) -> Batch:
        """Add the cached features of a batch's images and of its companions."""
        if self.feature_cache is None:
            return batch
        return add_features(batch, self.feature_cache)

    def feature_samples(self) -> list[Sample]:
        """Return the images of which a method reads backbone features in training."""
        pools = [stream.samples for stream in self.companions() if stream.features]
        listed = [self.train_samples, self.holdout_samples, *pools]
        return list({sample.path: sample for samples in listed for sample in samples}.values())

    def corrupt(self, batch: Batch, step: int = 0) -> Batch:
        """Add `corrupted` and `corruption`; the draw depends only on seed, step and images.

        Raises:
            UserError: There is no synthesis.
        """
        if self.synthesis is None:
            raise UserError("corrupted images are needed, and synthesis=none makes none")
        image, names = batch["image"], [self.name_of(path) for path in batch["path"]]
        generator = torch.Generator(image.device).manual_seed(batch_seed(self.seed, step, names))
        corrupted, corruption = self.synthesis(image, generator, batch["category"])
        return {**batch, "corrupted": corrupted, "corruption": corruption}

    def _world(self) -> tuple[int, int]:
        """Rank and number of the processes that share the work."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _device(self) -> torch.device | None:
        strategy = getattr(self.trainer, "strategy", None)
        return None if strategy is None else strategy.root_device

    def _position(self) -> int:
        """Batches that training has consumed, also before it was interrupted."""
        if self.trainer is None:
            return 0
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)  # type: ignore[attr-defined]

    def _in_batches(self, samples: list[Sample], rows: Sequence[int]) -> Iterator[Batch]:
        images = Images(samples, self.resize, self.cache, self.history_of(samples))
        for start in range(0, len(rows), self.eval_batch_size):
            yield images.batch(list(rows[start : start + self.eval_batch_size]))

    def _evaluation_loader(self, samples: list[Sample]) -> DataLoader[Batch]:
        rank, world_size = self._world()
        batches = BatchSampler(
            ShardSampler(len(samples), rank, world_size), self.eval_batch_size, drop_last=False
        )
        return self._loader(samples, batches, self.history_of(samples))

    def _loader(
        self,
        samples: list[Sample],
        batch_sampler: Sampler[Any],
        companions: Sequence[Companion] = (),
    ) -> DataLoader[Batch]:
        if self.cache is not None:
            self.cache.prepare(self._device(), self.num_workers)
        return loader_of(
            Images(samples, self.resize, self.cache, companions),
            batch_sampler,
            self.num_workers,
            self.pin_memory and not isinstance(self.cache, DeviceCache),
            self.persistent_workers,
            max(self.batch_size, self.eval_batch_size),
        )
