"""What is wrong with a data set, or should be known of it, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from anomaly_lit.data.images import check_sizes, read_header
from anomaly_lit.data.progress import in_threads
from anomaly_lit.types import Sample, UserError


def raise_all(problems: Sequence[str], limit: int = 10) -> None:
    """Raise one UserError that lists the first problems and counts all of them."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = f"\n  and {len(problems) - limit} more" if len(problems) > limit else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:limit])
        raise UserError(f"{len(problems)} problems with the data set:{lines}{more}")


def too_small(settings: Mapping[str, tuple[int, int]]) -> list[str]:
    """Say which settings are too small: each has a value and the least that it may be."""
    return [
        f"dataset.{name}={value}: it must be a whole number of at least {least}"
        for name, (value, least) in settings.items()
        if value < least
    ]


def check_headers(samples: Sequence[Sample]) -> list[str]:
    """Open all files without decoding them: one line for each that is unreadable or does not fit.

    A mask must have its image's size. Pixel data that breaks off is found only on decoding.
    """
    outcomes = in_threads(_check_header, samples, "Checking files")
    return sorted(outcome for outcome in outcomes if outcome is not None)


def missing_masks(without: Sequence[Sample], total: int, place: str) -> list[str]:
    """Say which anomalous images have no mask.

    Args:
        without: These images.
        total: Anomalous images in all.
        place: Where masks are expected.
    """
    if not without:
        return []
    return [
        f"{len(without)} of {total} anomalous test images have no mask ({place}): "
        f"{_first(sample.path for sample in without)}; add the masks or set dataset.masks=none to "
        "do without pixel metrics"
    ]


def missing_kinds(category: str, labels: set[bool], root: object) -> list[str]:
    """Say which metrics are undefined because a category has no test image of a kind.

    Args:
        category: Its name.
        labels: Of its test images, true where anomalous.
        root: Folder of the data set.
    """
    kinds = (
        (True, "anomalous", "image and pixel metrics are"),
        (False, "normal", "image AUROC is"),
    )
    return [
        f"{category}: no {name} test image in {root}, so its {metrics} undefined"
        for label, name, metrics in kinds
        if label not in labels
    ]


def _check_header(sample: Sample) -> str | None:
    try:
        size, _ = read_header(sample.path)
        if sample.mask_path is not None:
            check_sizes(sample, size, read_header(sample.mask_path)[0])
    except UserError as error:
        return str(error)
    return None


def _first(paths: Iterable[str], limit: int = 10) -> str:
    listed = list(paths)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
