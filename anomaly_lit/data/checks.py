"""What is wrong with a data set, or should be known of it, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from anomaly_lit.data.images import Header, check_sizes, read_header
from anomaly_lit.data.progress import in_threads
from anomaly_lit.data.truth import look_at_mask
from anomaly_lit.types import Sample, UserError

SEVERAL_PAGES = "have several pages or frames, of which only the first is read"


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


def check_headers(samples: Sequence[Sample], max_pixels: int | None) -> tuple[list[str], list[str]]:
    """Open all files without decoding them.

    A mask must have its image's size and, where the picture does not show which way up it was
    drawn, its orientation. Pixel data that breaks off is found only on decoding.

    Args:
        samples: Images with their masks.
        max_pixels: Larger pictures do not fit; None sets no limit.

    Returns:
        One line for each file that is unreadable or does not fit, and what a user should know.
    """

    def check(sample: Sample) -> tuple[str, list[str]]:
        try:
            header = read_header(sample.path, max_pixels)
            several = several_pages(sample.path, header)
            if sample.mask_path is not None:
                mask = read_header(sample.mask_path, max_pixels)
                several += several_pages(sample.mask_path, mask)
                check_headers_agree(sample, header, mask)
        except UserError as error:
            return str(error), []
        return "", several

    outcomes = in_threads(check, samples, "Checking files")
    several = sorted({line for _, lines in outcomes for line in lines})
    text = f"{len(several)} files {SEVERAL_PAGES}: {_first(several, limit=1)}"
    return sorted(problem for problem, _ in outcomes if problem), [text] if several else []


def several_pages(path: str, header: Header) -> list[str]:
    """Return a line on a file with several pages or frames; none for other files."""
    return [f"{path} ({header.pages} pages)"] if header.pages > 1 else []


def check_headers_agree(sample: Sample, image: Header, mask: Header) -> None:
    """Raise UserError where an image and its mask may be turned differently when they are read.

    A mask may have been drawn on an image as it is stored, or as its EXIF orientation shows it. The
    mask's size tells which only if a quarter turn exchanges sides of different length.
    """
    tags = image.orientation, mask.orientation
    tells = (tags[0] > 4) != (tags[1] > 4) and image.size[0] != image.size[1]
    as_stored = mask.size == (image.size[::-1] if tells else image.size)
    if tags[0] != tags[1] and as_stored:
        raise UserError(
            f"{sample.path} has EXIF orientation {tags[0]} and its mask {sample.mask_path} has "
            f"{tags[1]} (1: not turned), so marks may lie in the wrong place; save both upright"
        )
    check_sizes(sample, image.size, mask.size)


def mask_notes(samples: Sequence[Sample]) -> list[str]:
    """Say of which masks a user should know, a line for each kind; every mask is decoded.

    Args:
        samples: Images, some with masks; files that cannot be read are passed over.
    """
    texts = {
        "empty": "mark nothing; a mask has to be brighter than black where the defect is",
        "most": "mark more than half of their image; a mask is bright where the defect is, so "
        "invert those that are black on white",
        "lossy": "are in a lossy format, which blurs edges: what is above half of the largest "
        "value counts; PNG is exact",
        "soft": "have many faint values, which count as defects; threshold them",
    }
    masked = [sample for sample in samples if sample.mask_path is not None]
    doubts = in_threads(_doubts, masked, "Reading masks")
    lines = []
    for kind, text in texts.items():
        found = [
            f"{sample.mask_path} ({own[kind]})"
            for sample, own in zip(masked, doubts, strict=True)
            if kind in own
        ]
        if found:
            lines.append(f"{len(found)} of {len(masked)} masks {text}: {_first(found, limit=3)}")
    return lines


def shared_masks(samples: Sequence[Sample]) -> list[str]:
    """Say which masks serve several images.

    Args:
        samples: Images, some with masks.
    """
    images: dict[str, list[str]] = {}
    for sample in samples:
        if sample.mask_path is not None and sample.path not in images.get(sample.mask_path, []):
            images.setdefault(sample.mask_path, []).append(sample.path)
    return [
        f"{mask} is the mask of {' and of '.join(paths)}; give each a mask of its own, at the same "
        "relative place as its image"
        for mask, paths in images.items()
        if len(paths) > 1
    ]


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


def _doubts(sample: Sample) -> dict[str, str]:
    try:
        return look_at_mask(str(sample.mask_path)).doubts()
    except UserError:  # reported when it is decoded with its image
        return {}


def _first(paths: Iterable[str], limit: int = 10) -> str:
    listed = list(paths)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
