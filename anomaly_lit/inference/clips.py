"""Frames of clips: which come before which, and their scores over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from anomaly_lit.drawing.timeline import Timeline, save_timeline
from anomaly_lit.folders import in_time
from anomaly_lit.types import UserError


def frames_before(paths: Sequence[Path], frames: int) -> dict[Path, list[Path]]:
    """Return the frames before each frame, in order of time; a folder is a clip.

    The first frames of each folder have too few before them and are left out.

    Args:
        paths: All frames of all clips.
        frames: How many come before each.

    Raises:
        UserError: No clip is long enough.
    """
    clips: dict[Path, list[Path]] = {}
    for path in paths:
        clips.setdefault(path.parent, []).append(path)
    found = {}
    for own in map(in_time, clips.values()):
        for place in range(frames, len(own)):
            found[own[place]] = own[place - frames : place]
    if not found:
        raise UserError(
            f"none of {len(clips)} folders holds more than {frames} frames, and this method reads "
            f"{frames} frames before each that it judges: give a folder of frames of a clip"
        )
    return found


def save_scores(path: Path, scores: Mapping[Path, float], root: Path, threshold: float) -> None:
    """Draw the scores of each folder over time.

    Args:
        path: The PNG file.
        scores: By frame, in order of time.
        root: Names of clips are relative to it.
        threshold: Drawn as a line; NaN draws none.
    """
    clips: dict[Path, list[float]] = {}
    for frame, score in scores.items():
        clips.setdefault(frame.parent, []).append(score)
    lines = [
        Timeline(str(clip.relative_to(root)), np.array(own), None, math.nan, threshold)
        for clip, own in clips.items()
    ]
    if lines:
        save_timeline(path, lines)
