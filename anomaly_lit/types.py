"""Types shared by data, methods, metrics and commands.

Nothing heavy is imported here: the commands read these types before they import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

RUN_AGAIN = 75  # exit code of a run that a signal stopped: EX_TEMPFAIL in sysexits.h
STOPPING = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # what schedulers send; Windows lacks the last two


class UserError(ValueError):
    """An error that the user can fix; the commands print it without a traceback.

    The message names what was found, where, and what to change.
    """


def no_holdout(what: str) -> UserError:
    """Return the error of something that needs held-out images where there are none."""
    return UserError(f"{what} needs held-out images: set dataset.holdout above 0")


def check_range(section: str, interval: str, **values: float | Sequence[float] | None) -> None:
    """Refuse numbers outside an interval, all of them in one error; NaN is always refused.

    Args:
        section: Where the values are set, such as `method`.
        interval: Written as in mathematics: `[1, inf)` includes 1, `(0, 1)` neither of its ends.
        values: By name. None passes. A list must not be empty, and each of its numbers is checked.

    Raises:
        UserError: Names each value outside the interval.

    >>> check_range("method", "[1, inf)", depth=3, dims=[1, 2])
    """
    low, high = (float(end) for end in interval[1:-1].split(","))

    def lies_in(value: float) -> bool:
        above = value >= low if interval[0] == "[" else value > low
        return above and (value <= high if interval[-1] == "]" else value < high)

    wrong = []
    for name, value in values.items():
        numbers = [value] if isinstance(value, int | float) else [] if value is None else value
        if value is not None and not (len(numbers) and all(map(lies_in, numbers))):
            shown = value if isinstance(value, int | float) else list(numbers)
            wrong.append(f"{section}.{name}={shown}")
    if wrong:
        words = f"in {interval}"
        if high == float("inf"):
            least = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
            words = "finite" if low == -high else least
        raise UserError(f"{', '.join(wrong)}: {'each' if wrong[1:] else 'it'} must be {words}")


def check_choice(section: str, known: Collection[Any], **values: Any) -> None:
    """Refuse values that are not among the known ones, all of them in one error.

    Args:
        section: Where the values are set, such as `method`.
        known: The values to choose from.
        values: By name. None passes. In a list, each entry is checked.

    Raises:
        UserError: Names each value that is not known, and those to choose from.

    >>> check_choice("method", ("max", "mean"), score="max")
    """
    wrong = []
    for name, value in values.items():
        entries = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(entry in known for entry in entries):
            shown = list(entries) if isinstance(value, list | tuple) else value
            wrong.append(f"{section}.{name}={shown}")
    if wrong:
        *others, last = map(str, known)
        raise UserError(f"{', '.join(wrong)}: choose {', '.join(others)} or {last}")


class Stopped(BaseException):
    """A scheduler's signal ended the run; the same command resumes it.

    This is not an error, and therefore not an `Exception`.
    """


class Sample(NamedTuple):
    """One image of a data set, not yet read."""

    path: str
    category: str
    defect_type: str  # "good" for normal images
    label: bool  # true where the image is anomalous
    mask_path: str | None = None  # None: a normal image, or nobody drew a mask
    group: str = ""  # what must not be split up, such as a clip; "": only the image itself


class Batch(TypedDict):
    """What a data loader yields and a method reads. Do not write into a batch."""

    image: Tensor  # (B, 3, H, W) in [0, 1], never normalised: the backbone does that
    index: Tensor  # (B,) position in the split
    label: Tensor  # (B,) bool, true where the image is anomalous
    gt_mask: Tensor  # (B, 1, H, W) bool
    category: list[str]
    defect_type: list[str]
    path: list[str]
    corrupted: NotRequired[Tensor]  # (B, 3, H, W), the image after synthesis
    corruption: NotRequired[Tensor]  # (B, 1, H, W) bool, true where synthesis changed it
    prompt: NotRequired[Tensor]  # (B, 3, H, W), a normal image of the same category
    prompt_path: NotRequired[list[str]]
    outlier: NotRequired[Tensor]  # (B, 3, H, W), an image of something else
    outlier_path: NotRequired[list[str]]
    seen: NotRequired[Tensor]  # (B, 3, H, W), a real defect of the same category
    seen_mask: NotRequired[Tensor]  # (B, 1, H, W) bool
    seen_path: NotRequired[list[str]]
    frames: NotRequired[Tensor]  # (B, T, 3, H, W), those before the image, in order of time
    frames_path: NotRequired[list[str]]  # (B * T)
    features: NotRequired[dict[str, list[Tensor]]]  # cached clean features, by backbone
    prompt_features: NotRequired[dict[str, list[Tensor]]]  # those of the prompts
    outlier_features: NotRequired[dict[str, list[Tensor]]]  # those of the outliers


class Prediction(NamedTuple):
    """What a method returns for a batch: unbounded values; larger means more anomalous."""

    anomaly_map: Tensor | None  # (B, 1, H, W) float; None from a method that scores images only
    score: Tensor  # (B,) float


class FramePrediction(NamedTuple):
    """What `test_step` returns for frames of clips, if their score is a sum of several parts.

    In a test of clips each part is scaled to [0, 1] within each clip. Then the parts are added with
    the weights in the method's `part_weights`.
    """

    anomaly_map: Tensor | None  # as in `Prediction`
    score: Tensor  # (B,) float
    parts: Tensor  # (B, number of parts) float, larger is more anomalous
