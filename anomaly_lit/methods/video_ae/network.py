"""The auto-encoder of clips: time shifts, then memories, then channel attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.methods.video_ae.memory import Memory, Recall


class ClipNetwork(nn.Module):
    """Predicts a frame from T frames.

    Args:
        frames: T.
        channels: Channels of the four levels, finest first.
        shift: `conv`, `plain` or `none`, see `VideoAE`.
        causal: See `VideoAE`.
        attention: Whether the decoder has residual channel attention.
        memory: Items of the memory at the coarsest level.
        skip_memory: Items of the memories of the finer levels, coarsest first; 0 drops a level.
    """

    def __init__(
        self,
        frames: int,
        channels: Sequence[int],
        shift: str,
        causal: bool,
        attention: bool,
        memory: int,
        skip_memory: Sequence[int],
    ) -> None:
        super().__init__()
        self.frames = frames
        self.plain = shift == "plain"
        before = [3, *channels[:-1]]
        self.encoder = nn.ModuleList(
            block(given, made, bare=n == len(channels) - 1)
            for n, (given, made) in enumerate(zip(before, channels, strict=True))
        )
        self.shifts = nn.ModuleList(
            TemporalShift(count, frames, causal) if shift == "conv" else nn.Identity()
            for count in channels
        )
        coarse_first = list(reversed(channels))
        counts = [memory, *skip_memory]
        self.memories = nn.ModuleList(
            Memory(items, count) if items else nn.Identity()
            for items, count in zip(counts, coarse_first, strict=True)
        )
        self.kept = [bool(items) for items in counts]
        self.fuse = nn.ModuleList(
            nn.Conv2d(frames * count, count, 1) if kept else nn.Identity()
            for count, kept in zip(channels, reversed(self.kept), strict=True)
        )
        self.first = block(2 * coarse_first[0], coarse_first[0])
        self.up = nn.ModuleList()
        self.join = nn.ModuleList()
        self.attention = nn.ModuleList()
        for coarse, fine, items in zip(coarse_first, coarse_first[1:], skip_memory, strict=False):
            self.up.append(
                nn.Sequential(
                    nn.ConvTranspose2d(coarse, fine, 3, 2, 1, output_padding=1),
                    nn.BatchNorm2d(fine),
                    nn.ReLU(),
                )
            )
            self.join.append(block(2 * fine if items else fine, fine))
            self.attention.append(ChannelAttention(fine) if attention else nn.Identity())
        self.last = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, clip: Tensor) -> tuple[Tensor, list[Recall]]:
        """Map (B, T, 3, H, W) in [-1, 1] to a frame (B, 3, H, W) and the memories' recalls.

        Recalls come coarsest first, without the levels that are dropped.
        """
        levels = self.encode(clip)
        recalls = [
            memory(level)
            for memory, level, kept in zip(self.memories, reversed(levels), self.kept, strict=True)
            if kept
        ]
        read = iter(recalls)
        first = next(read)
        x = self.first(torch.cat([F.normalize(levels[-1], dim=1), first.out], dim=1))
        for up, join, attention, kept in zip(
            self.up, self.join, self.attention, self.kept[1:], strict=True
        ):
            x = up(x)
            x = attention(join(torch.cat([x, next(read).out], dim=1) if kept else x))
        return self.last(x).tanh(), recalls

    def encode(self, clip: Tensor) -> list[Tensor]:
        """Map (B, T, 3, H, W) to one map for each level, finest first, fused over time."""
        x = clip.flatten(0, 1)  # (B * T, 3, H, W): each frame by itself, with the same weights
        levels = []
        for number, (encode, shift, fuse) in enumerate(
            zip(self.encoder, self.shifts, self.fuse, strict=True)
        ):
            x = shift(encode(F.max_pool2d(x, 2) if number else x))
            levels.append(fuse(x.unflatten(0, (-1, self.frames)).flatten(1, 2)))
        if self.plain:
            levels[-1] = levels[-1] + shift_segments(levels[-1], self.frames)
        return levels


class TemporalShift(nn.Module):
    """Residual temporal shift: x + convolution(features of neighbouring frames).

    Args:
        channels: Channels of the map.
        frames: Frames T of a clip.
        causal: Whether frames see earlier ones only.
    """

    def __init__(self, channels: int, frames: int, causal: bool) -> None:
        super().__init__()
        self.frames = frames
        self.causal = causal
        self.convolution = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B * T, C, h, w) to the same."""
        clip = x.unflatten(0, (-1, self.frames))
        return x + self.convolution(shift_frames(clip, self.causal).flatten(0, 1))


def shift_frames(clip: Tensor, causal: bool) -> Tensor:
    """Take an eighth of the channels from the next frame, and an eighth from the one before.

    Args:
        clip: (B, T, C, h, w). What lies outside of it is 0; a single frame stays as it is.
        causal: Take none from the next frame.
    """
    if clip.shape[1] == 1:
        return clip
    fold = clip.shape[2] // 8
    later, earlier = clip[:, 1:, :fold], clip[:, :-1, fold : 2 * fold]
    nothing = torch.zeros_like(clip[:, :1, :fold])
    first = clip[:, :, :fold] if causal else torch.cat([later, nothing], dim=1)
    second = torch.cat([nothing, earlier], dim=1)
    return torch.cat([first, second, clip[:, :, 2 * fold :]], dim=2)


def shift_segments(x: Tensor, frames: int) -> Tensor:
    """Shift a fused map (B, C, h, w), seen as T segments of channels.

    A sixteenth of each segment's channels comes from the next segment, and 0 from behind the last.
    """
    segments = x.unflatten(1, (frames, -1))
    fold = segments.shape[2] // 16
    later = torch.cat([segments[:, 1:, :fold], torch.zeros_like(segments[:, :1, :fold])], dim=1)
    return torch.cat([later, segments[:, :, fold:]], dim=2).flatten(1, 2)


class ChannelAttention(nn.Module):
    """Residual channel attention (RCAN): x + a convolution whose channels are weighted.

    Args:
        channels: Channels of the map.
        reduction: By how much the weighting narrows them.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        narrow = max(1, channels // reduction)
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.weights = nn.Sequential(
            nn.Conv2d(channels, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        y = self.convolutions(x)
        return x + y * self.weights(y.mean(dim=(2, 3), keepdim=True))


def block(given: int, made: int, bare: bool = False) -> nn.Sequential:
    """Return two 3 x 3 convolutions with normalisation and ReLU; `bare` has none at its end."""
    layers: list[nn.Module] = [
        nn.Conv2d(given, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU(),
        nn.Conv2d(made, made, 3, padding=1),
    ]  # fmt: skip
    return nn.Sequential(*layers, *([] if bare else [nn.BatchNorm2d(made), nn.ReLU()]))
