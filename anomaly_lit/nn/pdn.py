"""The patch description network of EfficientAD, and the file that holds a distilled one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from anomaly_lit.files import replace_file
from anomaly_lit.types import UserError, check_choice, check_range

Kind = Literal["small", "medium"]
FORMAT = "PDN teacher of anomaly_lit, 1"
LOST = 4  # positions of the map that each border of an image loses without padding


class ImageNetNorm(nn.Module):
    """Normalises images in [0, 1] by mean and standard deviation of ImageNet's channels."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) to the same."""
        return (image - self.mean) / self.std


class PDN(nn.Sequential):
    """Describes each patch of 33 x 33 pixels: a few convolutions, without a last ReLU.

    Images of side n, a multiple of 4, give maps of side n / 4 with padding and n / 4 - 8 without.

    Args:
        kind: `small` has four convolutions, `medium` six.
        width: Channels of the first convolution; the inner ones have twice as many. The paper takes
            128 for `small` and 256 for `medium`.
        channels: Channels of the map.
        padding: Whether the image is padded with zeros.
    """

    def __init__(self, kind: Kind, width: int, channels: int, padding: bool = False) -> None:
        check_range("method", "[1, inf)", width=width, channels=channels)
        check_choice("method", ("small", "medium"), pdn=kind)
        one, three = (1, 3) if padding else (0, 0)
        w = width
        first = [
            ImageNetNorm(),
            nn.Conv2d(3, w, 4, padding=three),
            nn.ReLU(),
            nn.AvgPool2d(2, padding=one),
            nn.Conv2d(w, 2 * w, 4, padding=three),
            nn.ReLU(),
            nn.AvgPool2d(2, padding=one),
        ]
        mixed = [nn.Conv2d(2 * w, 2 * w, 1), nn.ReLU()]
        middle = [nn.Conv2d(2 * w, 2 * w, 3, padding=one), nn.ReLU()]
        last: list[nn.Module] = [nn.Conv2d(2 * w, channels, 4)]
        if kind == "small":
            super().__init__(*first, *middle, *last)
        else:
            last += [nn.ReLU(), nn.Conv2d(channels, channels, 1)]
            super().__init__(*first, *mixed, *middle, *last)
        self.sizes = {"pdn": kind, "width": str(width), "channels": str(channels)}


def channel_statistics(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of many maps, both (1, C, 1, 1).

    Args:
        maps: (B, C, h, w) each; at least one.
    """
    count, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for values in maps:
        wide = values.transpose(0, 1).flatten(1).double()  # (C, B * h * w)
        count += wide.shape[1]
        sums = sums.to(wide) + wide.sum(dim=1)
        squares = squares.to(wide) + wide.square().sum(dim=1)
    mean = sums / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def write_teacher(file: str | Path, teacher: PDN, facts: Mapping[str, str]) -> None:
    """Write a distilled network with its sizes and with where it comes from.

    Args:
        file: A `.safetensors` file, which is replaced once the new one is complete.
        teacher: The network.
        facts: Where it comes from, as text; `held_out_error` is the mean squared error on images
            that it was not trained on.
    """
    from safetensors.torch import save

    state = {name: value.cpu().contiguous() for name, value in teacher.state_dict().items()}
    content = save(state, {"format": FORMAT, **teacher.sizes, **facts})
    with replace_file(file, "wb") as opened:
        opened.write(content)


def load_teacher(file: str | Path, teacher: PDN, key: str) -> dict[str, str]:
    """Load a distilled network from the file that `write_teacher` wrote.

    Args:
        file: The file.
        teacher: Gets the weights.
        key: Setting that names the file, for messages.

    Returns:
        Where the network comes from, see `write_teacher`.

    Raises:
        UserError: There is no such file, it holds no distilled network or one of other sizes, or
            that network is no better than a constant answer.
    """
    path = Path(file).expanduser()
    state, facts = _read(path, key)
    wrong = [f"{name}={facts[name]}" for name, own in teacher.sizes.items() if facts[name] != own]
    if wrong:
        raise UserError(
            f"{key}={path} holds a teacher with {', '.join(wrong)}, other than method."
            f"{', method.'.join(f'{name}={own}' for name, own in teacher.sizes.items())}: set "
            "these to the teacher's, or give another file"
        )
    if not float(facts["held_out_error"]) < 1:
        raise UserError(
            f"{key}={path}: the teacher's error on held-out images is {facts['held_out_error']}, "
            "and a constant answer has 1: distil it from more images or in more steps"
        )
    teacher.load_state_dict(state)
    return facts


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{key}={path}: no such file")
    try:
        with safe_open(path, framework="pt") as opened:
            facts = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}={path} cannot be read: {error}; give another file") from error
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{key}={path} holds no teacher: give a file that a run of method=pdn_teacher wrote"
        )
    return state, facts
