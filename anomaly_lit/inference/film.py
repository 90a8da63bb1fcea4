"""A video file whose frames are judged like the pictures of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_lit.data.images import Pixels
from anomaly_lit.data.opening import MAX_PIXELS, check_pixels
from anomaly_lit.types import UserError

SUFFIXES = frozenset(
    {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)


def is_film(path: Path) -> bool:
    """Return whether a path is that of a file with the suffix of a video."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


class Film:
    """The frames of a video, decoded one after the other; no more than one is held.

    A frame has a path like any other picture: that of the video, with its number as the last part,
    such as `line.mp4/000017`.

    Args:
        path: The video.
        max_pixels: Larger frames are refused; None sets no limit.

    Attributes:
        paths: The paths of all frames, in order.
        pixels: Height times width of a frame.

    Raises:
        UserError: The package that decodes is missing, the file is damaged or no video, or its
            frames are too large.
    """

    def __init__(self, path: Path, max_pixels: int | None = MAX_PIXELS) -> None:
        if find_spec("av") is None:
            raise UserError(f"{path} is a video, which needs av: pip install 'anomaly-lit[video]'")
        self.path = path
        try:
            count = self._open_and_count()
            check_pixels((self._stream.width, self._stream.height), max_pixels)
        except Exception as error:  # a decoder may raise anything on malformed bytes
            raise UserError(f"{path}: {error}") from error
        self.pixels = self._stream.width * self._stream.height
        self.paths = [path / f"{number:06d}" for number in range(count)]
        self._frames = self._decoded()
        self._next = 0  # number of the frame that comes next
        self._error = ""

    def read(self, path: Path) -> Pixels:
        """Return a frame as 8-bit RGB, (H, W, 3), upright as a player shows it.

        Ask for frames in rising order; those in between are skipped.

        Raises:
            UserError: The video cannot be decoded as far as this.
        """
        wanted = int(path.name)
        assert wanted >= self._next or self._error, "a frame that has passed"
        while not self._error:
            try:
                frame = next(self._frames)
            except StopIteration:
                self._error = f"the video ends after {self._next} frames"
            except Exception as error:  # see above
                self._error = f"frame {self._next} cannot be decoded: {error}"
            else:
                self._next += 1
                if self._next > wanted:
                    return upright(frame.to_ndarray(format="rgb24"), frame.rotation)
        raise UserError(f"{path}: {self._error}")

    def _open_and_count(self) -> int:
        """Open the video and count its frames, without decoding them."""
        import av

        self._container: Any = av.open(str(self.path))
        if not self._container.streams.video:
            raise UserError("it has no picture")
        count = sum(packet.size > 0 for packet in self._container.demux(video=0))
        self._container.close()
        if not count:
            raise UserError("it has no frame")
        self._container = av.open(str(self.path))
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        return count

    def _decoded(self) -> Iterator[Any]:
        yield from self._container.decode(self._stream)


def upright(pixels: Pixels, rotation: int) -> Pixels:
    """Turn a frame by the file's rotation, in degrees anticlockwise, rounded to quarter turns."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90)))
