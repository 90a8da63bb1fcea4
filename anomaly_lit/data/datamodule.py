"""Data modules: which images are trained on, held out and tested, and how they become batches."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

from anomaly_lit.data.batches import Images, as_it_is
from anomaly_lit.data.caches.features import FeatureCache
from anomaly_lit.data.caches.memory import DeviceCache, ImageCache, in_threads, tell
from anomaly_lit.data.images import Resize, check_sizes, read_header
from anomaly_lit.data.layouts.folders import Listing
from anomaly_lit.data.sampler import ShardSampler, TrainBatches, WithPartners, mixed_seed
from anomaly_lit.types import Batch, Sample, UserError


class AnomalyDataModule(pl.LightningDataModule):
    """Images of one or several categories: normal ones to learn from, others to test on.

    A subclass says which categories a root folder holds (`find_categories`) and which images a
    category holds (`list_category`). Everything is chosen by hashing names with the seed, never
    by the order of files, so that the same folder gives the same splits on every machine.

    After `setup`: `categories`, `train_samples`, `holdout_samples`, `test_samples`, `has_masks`
    (false: no truth for pixel metrics) and `digest`. With `validate_on_test` set, a validation
    sees the test images too, as its last loader: an oracle, for comparison only. With
    `with_prompts` set, a training batch has a `prompt` for each image, another training image
    of its category (the image itself where it is the only one), drawn anew each time.

    Args:
        root: Folder of the data set.
        categories: Names, or `all`; several are learned by one model.
        image_size: Height and width that a method sees, or one number for both.
        resize: `stretch` or `pad`, see `Resize`.
        interpolation: `bilinear`, `bicubic` or `lanczos`.
        center_crop: Height and width cut from the middle after resizing.
        batch_size: Images per training step.
        eval_batch_size: Images per step of validation and test.
        num_workers: Processes that read images; 0 is fastest with a cache.
        holdout: Share of the normal training images of each category, in [0, 1), that is never
            trained on; at least one image where there are two.
        shots: Train on this many images of each category only, drawn from what is not held out.
        balanced: Draw every category equally often, however many images it has.
        seed: Chooses the held-out images and the shots, and shuffles.
        masks: `required` (an anomalous image without a mask is an error), `optional` (all or
            none of them have one) or `none` (masks are not read; no pixel metrics).
        cache: Where decoded images are kept; None decodes them each time.
        feature_cache: Where features of frozen backbones are kept; None computes them each time.
        synthesis: Makes anomalies out of training images, `(image, generator, category)` to
            `(corrupted, corruption)` with the batch's shapes; None gives plain batches.
        validate_on_synthesis: Also score held-out images after synthesis, as `val/synthetic_*`.

    Raises:
        UserError: from `setup`, with everything found wrong at once.
    """

    licence: str | None = None  # one line
    mask_hint = "ROOT/<category>/ground_truth/<type>/<stem>_mask.png"
    train_hint = "<category>/train/good"

    def __init__(
        self,
        root: str | None,
        categories: str | list[str] = "all",
        image_size: int | list[int] = 256,
        resize: Literal["stretch", "pad"] = "stretch",
        interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear",
        center_crop: int | list[int] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        holdout: float = 0.1,
        shots: int | None = None,
        balanced: bool = False,
        seed: int = 0,
        masks: Literal["required", "optional", "none"] = "required",
        cache: ImageCache | None = None,
        feature_cache: FeatureCache | None = None,
        synthesis: nn.Module | None = None,
        validate_on_synthesis: bool = False,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root).expanduser()
        self.requested = categories
        self.resize = Resize(image_size, resize, center_crop, interpolation)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.holdout = holdout
        self.shots = shots
        self.balanced = balanced
        self.seed = seed
        self.masks = masks
        self.cache = cache
        self.feature_cache = feature_cache
        self.synthesis = synthesis
        self.validate_on_synthesis = validate_on_synthesis
        self._check_arguments()
        self.categories: list[str] = []
        self.train_samples: list[Sample] = []
        self.holdout_samples: list[Sample] = []
        self.test_samples: list[Sample] = []
        self.has_masks = False
        self.digest = ""
        self.validate_on_test = False
        self.with_prompts = False
        self.pin_memory = torch.cuda.is_available()
        self.persistent_workers = True
        self._shrunk = False

    def find_categories(self, root: Path) -> list[str]:
        """Name the categories that a root folder holds."""
        raise NotImplementedError

    def list_category(self, root: Path, category: str) -> Listing:
        """List the images of one category."""
        raise NotImplementedError

    def list_samples(self) -> None:
        """Fill `categories` and the sample lists without judging what is there.

        Raises:
            UserError: where the root or a named category does not exist.
        """
        root = self._existing_root()
        self.categories = self._chosen_categories(root)
        self.train_samples, self.holdout_samples, self.test_samples = [], [], []
        for category in self.categories:
            train, test = self.list_category(root, category)
            held = self._draw(train, self._holdout_count(len(train)), "holdout")
            rest = [sample for sample in train if sample not in held]
            if self.shots is not None:
                shots = self._draw(rest, self.shots, "shots")
                rest = [sample for sample in rest if sample in shots]
            self.train_samples += rest
            self.holdout_samples += [sample for sample in train if sample in held]
            self.test_samples += test
        if self.masks == "none":
            self.test_samples = [sample._replace(mask_path=None) for sample in self.test_samples]
        self.has_masks = any(sample.mask_path is not None for sample in self.test_samples)

    def setup(self, stage: str | None = None) -> None:
        """List, check and, with a cache, decode the images of a stage; twice costs nothing.

        Args:
            stage: Lightning's `fit`, `validate`, `test` or `predict`; None is all of them.
        """
        if not self.digest:
            self.list_samples()
            raise_all(self.find_gaps(stage))
            for note in self.notes():
                tell(note)
            raise_all(check_headers(self.samples()))
            self.digest = self._digest()
        elif stage in (None, "fit"):
            raise_all(self.find_gaps(stage))
        if self.cache is not None:
            raise_all(self.cache.fill(self._samples_of(stage), self.resize))

    def present_digest(self) -> str:
        """Digest of the files as they are now, without a judgement of them.

        Raises:
            UserError: where the root or a named category does not exist.
        """
        self.list_samples()
        return self._digest()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Give shuffled batches of the same size; what does not fill one is left to the next epoch.

        Where a split is smaller than a batch, the batch shrinks to it.
        """
        count, world_size = len(self.train_samples), self._world()[1]
        batch_size = max(1, min(self.batch_size, count // world_size))
        if batch_size < self.batch_size and not self._shrunk:
            self._shrunk = True
            tell(
                f"{count} training images do not fill dataset.batch_size={self.batch_size} on "
                f"{world_size} device(s): batches of {batch_size}"
            )
        rank, _ = self._world()
        batches = TrainBatches(
            count, batch_size, self.seed, self._position, self._weights(), rank, world_size
        )
        if not self.with_prompts:
            return self._loader(self.train_samples, batches)
        groups = [sample.category for sample in self.train_samples]
        return self._loader(self.train_samples, WithPartners(batches, groups))

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Give a loader for each of `validation_names`, in order."""
        samples = {"test": self.test_samples}
        loaders = [
            self._evaluation_loader(samples.get(name, self.holdout_samples))
            for name in self.validation_names()
        ]
        return loaders if len(loaders) > 1 else loaders[0]

    def validation_names(self) -> list[str]:
        """What a validation sees: `holdout`, and where asked `synthetic` and `test`."""
        asked = {"synthetic": self.validate_on_synthesis, "test": self.validate_on_test}
        return ["holdout", *(name for name, wanted in asked.items() if wanted)]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Give the test images, in order."""
        return self._evaluation_loader(self.test_samples)

    def normal_batches(self, split: Literal["train", "holdout"], most: int) -> Iterator[Batch]:
        """Give at most `most` images of a split, the same on every rank.

        Every category gives as many, spread evenly over its images.
        """
        samples = self.train_samples if split == "train" else self.holdout_samples
        share = max(1, most // max(1, len(self.categories)))
        rows: list[int] = []
        for category in self.categories:
            own = [row for row, sample in enumerate(samples) if sample.category == category]
            rows += own[:: max(1, -(-len(own) // share))]
        yield from self.batches_of([samples[row] for row in rows])

    def batches_of(self, samples: list[Sample]) -> Iterator[Batch]:
        """Give batches of some images in order, the same on every rank."""
        images = Images(samples, self.resize, self.cache)
        for start in range(0, len(samples), self.eval_batch_size):
            rows = range(start, min(start + self.eval_batch_size, len(samples)))
            yield images.batch(rows)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Add what is kept of the features, and corrupted images where synthesis is on.

        Both in training and validation alone. The loader `synthetic` of a validation gives the
        corrupted images in place of the clean ones, with their truth.
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
        label = batch["corruption"].flatten(1).any(dim=1)
        return {
            **batch,
            "image": batch["corrupted"],
            "gt_mask": batch["corruption"],
            "label": label,
        }

    def with_features(self, batch: Batch) -> Batch:
        """Add what the cache holds of the features of a batch's images and prompts, if all."""
        if self.feature_cache is None:
            return batch
        device = batch["image"].device
        features = self.feature_cache.get(batch["path"], device)
        if features is None:
            return batch
        batch = {**batch, "features": features}
        if "prompt_path" in batch:
            prompted = self.feature_cache.get(batch["prompt_path"], device)
            assert prompted is not None  # prompts are training images
            batch["prompt_features"] = prompted
        return batch

    def corrupt(self, batch: Batch, step: int = 0) -> Batch:
        """Add `corrupted` and `corruption`; the draw depends on seed, step and images alone.

        Raises:
            UserError: There is no synthesis.
        """
        if self.synthesis is None:
            raise UserError("corrupted images are asked for, and synthesis=none makes none")
        image, names = batch["image"], "\n".join(self._name(path) for path in batch["path"])
        seed = mixed_seed(self.seed, step, zlib.crc32(names.encode()))  # no wait for the device
        generator = torch.Generator(image.device).manual_seed(seed)
        corrupted, corruption = self.synthesis(image, generator, batch["category"])
        return {**batch, "corrupted": corrupted, "corruption": corruption}

    def samples(self) -> list[Sample]:
        """All images of all splits."""
        return [*self.train_samples, *self.holdout_samples, *self.test_samples]

    def counts(self) -> dict[str, dict[str, int]]:
        """Count images per category: `train`, `holdout`, `test good`, `test <defect type>`."""
        table: dict[str, Counter[str]] = {category: Counter() for category in self.categories}
        for name, samples in (("train", self.train_samples), ("holdout", self.holdout_samples)):
            for sample in samples:
                table[sample.category][name] += 1
        for sample in self.test_samples:
            table[sample.category][f"test {sample.defect_type}"] += 1
        return {category: dict(counts) for category, counts in table.items()}

    def summary(self) -> str:
        """Say what was found: a line per category, and the licence of a public data set."""
        lines = [f"{type(self).__name__} in {self.root}, {self.resize}"]
        for category, counts in self.counts().items():
            numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(f"  {category}: {numbers or 'nothing'}")
        if self.licence is not None:
            lines.append(f"  licence: {self.licence}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def find_gaps(self, stage: str | None = None) -> list[str]:
        """Say what the lists lack so that training or evaluation would be wrong.

        Args:
            stage: As for `setup`; only for `fit` and None are training images needed.
        """
        needed = self.train_samples if stage in (None, "fit") else self.samples()
        present = {sample.category for sample in needed}
        empty = [category for category in self.categories if category not in present]
        gaps = [self._no_training_images(empty)] if empty else []
        anomalous = [sample for sample in self.test_samples if sample.label]
        without = [sample for sample in anomalous if sample.mask_path is None]
        if self.masks == "required" or (self.masks == "optional" and len(without) < len(anomalous)):
            gaps += self._missing_masks(without, len(anomalous))
        return gaps

    def notes(self) -> list[str]:
        """Say what is allowed but should be known before training."""
        notes = []
        for category in self.categories:
            labels = {sample.label for sample in self.test_samples if sample.category == category}
            for label, name, metrics in (
                (True, "anomalous", "image and pixel metrics are"),
                (False, "normal", "image AUROC is"),
            ):
                if label not in labels:
                    notes.append(
                        f"{category}: no {name} test image in {self.root}, so its {metrics} "
                        "undefined"
                    )
        if not self.has_masks and any(sample.label for sample in self.test_samples):
            notes.append("no masks: pixel metrics are left out")
        return notes

    def folders(self) -> list[Path]:
        """Folders whose pictures should all belong to a split or be a mask."""
        return [Path(self.root or "") / category for category in self.categories]

    def _check_arguments(self) -> None:
        wrong = []
        if not 0 <= self.holdout < 1:
            wrong.append(f"dataset.holdout={self.holdout}: give a share from 0 up to, not with, 1")
        if self.masks not in ("required", "optional", "none"):
            wrong.append(f"dataset.masks={self.masks}: choose required, optional or none")
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
            ("shots", 1 if self.shots is None else self.shots, 1),
        ):
            if value < least:
                wrong.append(f"dataset.{name}={value}: give a whole number of at least {least}")
        raise_all(wrong)

    def _existing_root(self) -> Path:
        if self.root is None:
            raise UserError(
                "dataset.root is not set; name the folder of the data set with dataset.root=DIR"
            )
        if not self.root.is_dir():
            raise UserError(f"dataset.root={self.root} is not a folder; set dataset.root=DIR")
        return self.root

    def _chosen_categories(self, root: Path) -> list[str]:
        found = self.find_categories(root)
        if self.requested == "all":
            if not found:
                raise UserError(
                    f"no category below dataset.root={root}: no folder {self.train_hint}"
                    + self._tip(root)
                )
            return found
        wanted = [self.requested] if isinstance(self.requested, str) else list(self.requested)
        unknown = [name for name in wanted if name not in found and not (root / name).is_dir()]
        if unknown or not wanted:
            raise UserError(
                f"dataset.categories: no {', '.join(unknown) or 'name'} in {root}; it holds "
                f"{', '.join(found) or 'no category' + self._tip(root)}"
            )
        return list(dict.fromkeys(wanted))

    def _tip(self, root: Path) -> str:
        """Help where a category's own folder was given as the root."""
        if not (root / "train").is_dir():
            return ""
        return (
            "; for this category alone set "
            f"dataset.root={root.parent} dataset.categories=[{root.name}]"
        )

    def _no_training_images(self, categories: Sequence[str]) -> str:
        places = ", ".join(
            str((self.root or Path()) / self.train_hint.replace("<category>", category))
            for category in categories
        )
        return (
            f"no normal training images in {places}; put images there or set dataset.categories "
            "to others"
        )

    def _missing_masks(self, without: list[Sample], total: int) -> list[str]:
        if not without:
            return []
        paths = _first(sample.path for sample in without)
        hint = self.mask_hint.replace("ROOT", str(self.root))
        return [
            f"{len(without)} of {total} anomalous test images have no mask ({hint}): "
            f"{paths}; add the masks or set dataset.masks=none to do without pixel metrics"
        ]

    def _holdout_count(self, count: int) -> int:
        if self.holdout == 0 or count < 2:
            return 0
        return min(max(1, round(self.holdout * count)), count - 1)

    def _draw(self, samples: Sequence[Sample], count: int, purpose: str) -> set[Sample]:
        """Choose samples by the hash of seed, purpose and file name, whatever their order."""

        def rank(sample: Sample) -> bytes:
            return hashlib.sha256(
                f"{self.seed}/{purpose}/{self._name(sample.path)}".encode()
            ).digest()

        return set(sorted(samples, key=rank)[:count])

    def _name(self, path: str) -> str:
        """Path below the root, the same on every machine."""
        try:
            return Path(path).relative_to(self.root or "").as_posix()
        except ValueError:  # a folder given by an absolute path of its own
            return Path(path).as_posix()

    def _samples_of(self, stage: str | None) -> list[Sample]:
        """For `fit` all: better to learn of a broken test image before training than after."""
        if stage == "test":
            return self.test_samples
        if stage == "validate" and not self.validate_on_test:
            return self.holdout_samples
        return self.samples()

    def _weights(self) -> Tensor | None:
        if not self.balanced:
            return None
        counts = Counter(sample.category for sample in self.train_samples)
        return torch.tensor([1 / counts[sample.category] for sample in self.train_samples])

    def _world(self) -> tuple[int, int]:
        """Rank and number of the processes that share the work."""
        return (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )

    def _device(self) -> torch.device | None:
        strategy = getattr(self.trainer, "strategy", None)
        return None if strategy is None else strategy.root_device

    def _position(self) -> int:
        """Batches that training has consumed, also before it was interrupted."""
        if self.trainer is None:
            return 0
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)  # type: ignore[attr-defined]

    def _evaluation_loader(self, samples: list[Sample]) -> DataLoader[Batch]:
        rank, world_size = self._world()
        batches = BatchSampler(
            ShardSampler(len(samples), rank, world_size), self.eval_batch_size, drop_last=False
        )
        return self._loader(samples, batches)

    def _loader(self, samples: list[Sample], batch_sampler: Sampler[Any]) -> DataLoader[Batch]:
        if self.cache is not None:
            self.cache.prepare(self._device(), self.num_workers)
        return DataLoader(
            Images(samples, self.resize, self.cache),
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            pin_memory=self.pin_memory and not isinstance(self.cache, DeviceCache),
            persistent_workers=self.persistent_workers and self.num_workers > 0,
        )

    def _digest(self) -> str:
        """SHA-256 over names, sizes, ends and splits of all files."""
        lines = []
        for split, samples in (
            ("train", self.train_samples),
            ("holdout", self.holdout_samples),
            ("test", self.test_samples),
        ):
            paths = [path for sample in samples for path in (sample.path, sample.mask_path) if path]
            prints = in_threads(_fingerprint, paths, "Reading the data set's digest")
            lines += [
                f"{split} {self._name(path)} {mark}\n"
                for path, mark in zip(paths, prints, strict=True)
            ]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def check_headers(samples: Sequence[Sample]) -> list[str]:
    """Open all files without decoding them: one line for each that is unreadable or does not fit.

    A mask has to have its image's size. Pixel data that breaks off is found only on decoding.
    """
    outcomes = in_threads(_check_header, samples, "Checking files")
    return sorted(outcome for outcome in outcomes if outcome is not None)


def _check_header(sample: Sample) -> str | None:
    try:
        size, _ = read_header(sample.path)
        if sample.mask_path is not None:
            check_sizes(sample, size, read_header(sample.mask_path)[0])
    except UserError as error:
        return str(error)
    return None


def _fingerprint(path: str) -> str:
    """Size and a hash of the first and last 4 KiB of a file."""
    size, block = Path(path).stat().st_size, 4096
    with open(path, "rb") as file:
        ends = file.read(block)
        if size > block:
            file.seek(max(block, size - block))
            ends += file.read(block)
    return f"{size} {hashlib.sha256(ends).hexdigest()}"


def _first(paths: Iterable[str], limit: int = 10) -> str:
    listed = list(paths)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def raise_all(problems: Sequence[str], limit: int = 10) -> None:
    """Raise one UserError that lists the first problems and counts them all."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = f"\n  and {len(problems) - limit} more" if len(problems) > limit else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:limit])
        raise UserError(f"{len(problems)} problems with the data set:{lines}{more}")
