"""Companions: further images that go beside each image of a training batch.

A method names those that it needs, such as `needs = frozenset({"prompt"})`. A training batch then
holds `prompt` (B, 3, H, W) and `prompt_path`, and `prompt_features` if the feature cache has them.
The choice depends only on the seed, the number of the batch and the image, so that a resumed run
sees the same ones.

To add one, list its images in `AnomalyDataModule.list_samples`, give it a name in
`AnomalyDataModule.companions`, and add its keys to `Batch`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

from anomaly_lit.data.sampler import mixed_seed
from anomaly_lit.folders import walk_images
from anomaly_lit.types import Sample, UserError

NAMES = ("prompt", "outlier")
FEATURES = {  # keys of images in a batch, and of the features of these images
    "image": "features",
    **{name: f"{name}_features" for name in NAMES},
}


class Companion(ABC):
    """A stream of images, one or several beside each image of a training batch.

    Args:
        name: Key in the batch; its files' paths are `<name>_path`.
        samples: What is drawn from.
        seed: Decides every draw.
        masks: Whether the batch holds their masks too, as `<name>_mask` (B, 1, H, W).
        features: Whether methods read backbone features of these images, so that the feature
            cache keeps them.

    Attributes:
        steady: Whether every image has one, in evaluations too, and always the same.
    """

    def __init__(
        self,
        name: str,
        samples: list[Sample],
        seed: int,
        masks: bool = False,
        features: bool = True,
    ) -> None:
        self.name = name
        self.samples = samples
        self.seed = seed
        self.masks = masks
        self.features = features

    steady = False

    @abstractmethod
    def draw(self, step: int, index: int) -> int | tuple[int, ...]:
        """Choose the companion of a training image.

        Args:
            step: Batches that training has consumed before this one.
            index: Position of the image in the training split.

        Returns:
            A position in `samples`. Several, as many each time, give (B, n, 3, H, W).
        """


class Partner(Companion):
    """Another training image of the same category; the image itself if it is the only one.

    Args:
        name: Key in the batch.
        samples: The training images.
        seed: Decides every draw.
    """

    def __init__(self, name: str, samples: list[Sample], seed: int) -> None:
        super().__init__(name, samples, seed)
        rows = rows_by_category(samples)
        self.members = [rows[sample.category] for sample in samples]
        self.places = [0] * len(samples)  # of each image among those of its category
        for members in rows.values():
            for place, row in enumerate(members):
                self.places[row] = place

    def draw(self, step: int, index: int) -> int:
        """Choose uniformly among the others of the category."""
        members, own = self.members[index], self.places[index]
        if len(members) == 1:
            return index
        place = mixed_seed(self.seed, step, index) % (len(members) - 1)
        return members[place + (place >= own)]  # skips its own place without a list of the others


class Pool(Companion):
    """Images that are not trained on as normal ones, whatever the category of the training image.

    Args:
        name: Key in the batch; two names give independent draws.
        samples: The images.
        seed: Decides every draw.
        masks: As for `Companion`.
        features: As for `Companion`.
    """

    def __init__(
        self,
        name: str,
        samples: list[Sample],
        seed: int,
        masks: bool = False,
        features: bool = True,
    ) -> None:
        super().__init__(name, samples, seed, masks, features)
        self.salt = zlib.crc32(name.encode())

    def draw(self, step: int, index: int) -> int:
        """Choose uniformly among all."""
        return mixed_seed(self.seed, self.salt, step, index) % len(self.samples)


class Seen(Companion):
    """A real defect of the same category with its mask; it is tested on no more.

    Args:
        train: The training images.
        samples: The defects, at least one of each category.
        seed: Decides every draw.
    """

    def __init__(self, train: list[Sample], samples: list[Sample], seed: int) -> None:
        super().__init__("seen", samples, seed, masks=True, features=False)
        rows = rows_by_category(samples)
        self.members = [rows[sample.category] for sample in train]
        self.salt = zlib.crc32(b"seen")

    def draw(self, step: int, index: int) -> int:
        """Choose uniformly among the defects of the category."""
        members = self.members[index]
        return members[mixed_seed(self.seed, self.salt, step, index) % len(members)]


class Frames(Companion):
    """The frames before an image within its clip, in order of time: (B, frames, 3, H, W).

    Args:
        every: All frames of all clips, in order of time.
        samples: The images that have enough frames before them, see `with_history`.
        frames: How many.
    """

    steady = True

    def __init__(self, every: list[Sample], samples: Sequence[Sample], frames: int) -> None:
        super().__init__("frames", every, seed=0, features=False)
        places = {sample.path: place for place, sample in enumerate(every)}
        self.places = [places[sample.path] for sample in samples]
        self.frames = frames

    def draw(self, step: int, index: int) -> tuple[int, ...]:
        """Choose those right before the image."""
        place = self.places[index]
        return tuple(range(place - self.frames, place))


def with_history(samples: Sequence[Sample], frames: int) -> list[Sample]:
    """Return the images that have enough frames before them in their clip.

    Args:
        samples: Whole clips, in order of time.
        frames: How many frames are enough.
    """
    return [
        sample
        for sample, before in zip(samples[frames:], samples, strict=False)
        if (sample.category, sample.group) == (before.category, before.group)
    ]


def wrong_needs(needs: Collection[str], outlier_dir: str | None, frames: int) -> list[str]:
    """Say what a method needs in a batch that the data module cannot give.

    Args:
        needs: Keys of the batch.
        outlier_dir: `dataset.outlier_dir`.
        frames: Earlier frames that the layout gives.
    """
    wrong = []
    known = ("corrupted", *NAMES, "seen", "frames")
    unknown = sorted(set(needs) - {*known})
    if unknown:
        wrong.append(
            f"the method needs {', '.join(unknown)} in a batch, which no data module gives; known "
            f"are {', '.join(known)}"
        )
    if "outlier" in needs and outlier_dir is None:
        wrong.append("the method learns from outliers: set dataset.outlier_dir to a folder of them")
    if "frames" in needs and not frames:
        wrong.append(
            "the method reads the frames before an image: choose a data set of clips, such as "
            "dataset=clips"
        )
    return wrong


def rows_by_category(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the positions of the images of each category."""
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(sample.category, []).append(row)
    return rows


def list_pool(name: str, folder: str | Path) -> list[Sample]:
    """List the pictures at any depth below a folder.

    Args:
        name: Of the companion; also that of the setting, `dataset.<name>_dir`.
        folder: Where the pictures are.

    Raises:
        UserError: There is no such folder, or no picture in it.
    """
    path = Path(folder).expanduser()
    samples = [Sample(str(file), name, name, True) for file in walk_images(path)]
    if not samples:
        found = "holds no picture" if path.is_dir() else "is not a folder"
        raise UserError(
            f"dataset.{name}_dir={folder} {found}; set dataset.{name}_dir to a folder of pictures"
        )
    return samples
