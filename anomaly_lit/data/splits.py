"""Which images are trained on, held out and tested.

Every choice follows from a hash of the seed and of names, never from the order of files, so that
the same folder gives the same splits on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from anomaly_lit.data.layouts.base import Listing
from anomaly_lit.files import name_bytes
from anomaly_lit.types import Sample, UserError


class Splits(NamedTuple):
    """The images of one category, each list in the order of the listing."""

    train: list[Sample]
    holdout: list[Sample]
    test: list[Sample]


def name_below(path: str, root: Path | None) -> str:
    """Return a file's path relative to the root, which is the same on every machine."""
    try:
        return Path(path).relative_to(root or "").as_posix()
    except ValueError:  # a folder outside the root, given by an absolute path
        return Path(path).as_posix()


class Draw:
    """Draws images by the hash of seed, purpose and name; a group is drawn as a whole.

    Args:
        seed: Decides every draw.
        root: Names are relative to this folder.
    """

    def __init__(self, seed: int, root: Path | None) -> None:
        self.seed = seed
        self.root = root

    def __call__(
        self, samples: Sequence[Sample], count: int, purpose: str
    ) -> tuple[list[Sample], list[Sample]]:
        """Draw as many whole groups as fit into `count` images, or else the smallest group.

        An image without a group is a group of its own, so that exactly `count` images are drawn
        where no image has one.

        Args:
            samples: What to draw from, images of one category.
            count: How many images.
            purpose: Two purposes give independent draws.

        Returns:
            The chosen images and the others, both in the given order.
        """
        sizes: dict[str, int] = {}
        for sample in samples:
            sizes[self.key(sample)] = sizes.get(self.key(sample), 0) + 1
        order = sorted(sizes, key=lambda key: self._rank(purpose, key))
        chosen, left = set[str](), count
        for key in order:
            if sizes[key] <= left:
                chosen.add(key)
                left -= sizes[key]
        if count > 0 and order and not chosen:
            chosen.add(min(order, key=lambda key: sizes[key]))
        return (
            [sample for sample in samples if self.key(sample) in chosen],
            [sample for sample in samples if self.key(sample) not in chosen],
        )

    def key(self, sample: Sample) -> str:
        """Name what an image is drawn together with: its group, or else itself."""
        return sample.group or name_below(sample.path, self.root)

    def _rank(self, purpose: str, key: str) -> bytes:
        return hashlib.sha256(name_bytes(f"{self.seed}/{purpose}/{key}")).digest()


def split_category(
    listing: Listing, draw: Draw, holdout: float, shots: int | None, test_share: float = 0.0
) -> Splits:
    """Split the images of one category.

    Args:
        listing: The images of the category.
        draw: Draws from them.
        holdout: Share of the normal training images to hold out.
        shots: Images to train on, out of those that are not held out; None takes all.
        test_share: Share of the normal training images to test on instead.

    Raises:
        UserError: There are fewer images than shots.
    """
    kept, train = draw(listing.train, round(test_share * len(listing.train)), "test")
    held, rest = draw(train, _holdout_count(train, draw, holdout), "holdout")
    if shots is not None:
        if shots > len(rest) > 0:
            raise UserError(
                f"dataset.shots={shots}: {rest[0].category} has {len(rest)} training images that "
                "are not held out: lower it, or dataset.holdout"
            )
        rest, _ = draw(rest, shots, "shots")
    return Splits(rest, held, kept + listing.test)


def draw_seen(test: Sequence[Sample], draw: Draw, count: int) -> tuple[list[Sample], list[Sample]]:
    """Draw anomalous test images that a method may learn from, which leave the test set.

    Args:
        test: The test images of one category.
        draw: Draws from them.
        count: Images of each type of defect; 0 draws none.

    Returns:
        The drawn images, and what is left to test on: without images of their groups.

    Raises:
        UserError: A type has fewer images, or the category has no anomalous one.
    """
    if count == 0:
        return [], [*test]
    kinds: dict[str, list[Sample]] = {}
    for sample in test:
        if sample.label:
            kinds.setdefault(sample.defect_type, []).append(sample)
    few = [f"{len(own)} of {kind}" for kind, own in kinds.items() if len(own) < count]
    if few or not kinds:
        found = f"has only {', '.join(few)}" if few else "has no anomalous test image"
        category = test[0].category if test else "a category"
        raise UserError(
            f"dataset.seen={count} draws as many test images of each type of defect, and "
            f"{category} {found}: lower it, set it to 0, or take other categories"
        )
    seen = [sample for own in kinds.values() for sample in draw(own, count, "seen")[0]]
    taken = {draw.key(sample) for sample in seen}
    return seen, [sample for sample in test if draw.key(sample) not in taken]


def _holdout_count(train: list[Sample], draw: Draw, share: float) -> int:
    """At least one image and never all, where there are two groups to divide."""
    if share == 0 or len({draw.key(sample) for sample in train}) < 2:
        return 0
    return min(max(1, round(share * len(train))), len(train) - 1)
