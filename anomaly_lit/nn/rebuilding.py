"""Parts of methods that rebuild the blocks of a vision transformer (Dinomaly, INP-Former)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.aggregate import resize, smooth, top_mean
from anomaly_lit.types import Prediction, UserError

SCORED_SIDE = 256  # pixels of the shorter side of the map from which scores are taken
GAUSSIAN = (4.0, 2)  # standard deviation and radius of the filter on that map, in pixels


def to_tokens(maps: Tensor) -> Tensor:
    """Turn (B, C, h, w) into (B, h w, C)."""
    return maps.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Turn (B, h w, C) into (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (grid[0], grid[1]))


def mirrored_groups(outputs: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Return the means of groups of a decoder's blocks, the last blocks first.

    The last block of a decoder rebuilds the first of the encoder.

    Args:
        outputs: One tensor per block, in the order of the decoder; a multiple of `groups`.
        groups: Number of groups.
    """
    size = len(outputs) // groups
    last_first = list(reversed(outputs))
    starts = range(0, len(outputs), size)
    return [torch.stack(last_first[i : i + size]).mean(dim=0) for i in starts]


def check_depth(depth: int, groups: int) -> None:
    """Check that a decoder's blocks can be compared with groups of the backbone's.

    Raises:
        UserError: The depth is not a multiple of the groups.
    """
    if depth < 1 or depth % groups:
        raise UserError(
            f"method.depth={depth} must be a multiple of the {groups} maps that the backbone "
            "returns (method.backbone.groups)"
        )


def heads_of(dim: int, heads: int | None) -> int:
    """Return the number of heads: as given, or those of a ViT of this width (64 channels each).

    Raises:
        UserError: The number does not divide the width.
    """
    found = max(1, dim // 64) if heads is None else heads
    if found < 1 or dim % found:
        raise UserError(f"method.heads={heads} must divide the {dim} channels of the backbone")
    return found


def init_truncated(module: nn.Module) -> None:
    """Set weights of linear layers to a narrow normal distribution, 0.01 wide, cut at 0.03."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def gap(given: Tensor, rebuilt: Tensor) -> Tensor:
    """Return one minus the cosine of channel vectors: (B, C, h, w) twice to (B, 1, h, w)."""
    return 1 - F.cosine_similarity(given, rebuilt, dim=1)[:, None]


def scored(
    gaps: Sequence[Tensor], image_size: Sequence[int], align_corners: bool = True
) -> Prediction:
    """Return the mean of maps at the image's size, smoothed, and the mean of its top 1 %.

    As in Dinomaly's code, the smoothing and the score belong to a map whose shorter side has 256
    pixels. Unlike there, the Gaussian filter (5 x 5) reflects the borders in place of zeros, and
    the map is brought back to the image's size.

    Args:
        gaps: (B, 1, h, w) each.
        image_size: Height and width.
        align_corners: How maps are brought to the image's size; see `nn.aggregate.resize`. The
            value of a patch belongs to its centre, where only false puts it.
    """
    mean = torch.stack([resize(each, image_size, align_corners) for each in gaps]).mean(dim=0)
    height, width = image_size
    shorter = min(height, width)
    size = (round(SCORED_SIDE * height / shorter), round(SCORED_SIDE * width / shorter))
    smoothed = smooth(F.interpolate(mean, size, mode="bilinear"), *GAUSSIAN)
    anomaly_map = F.interpolate(smoothed, (height, width), mode="bilinear")
    return Prediction(anomaly_map, top_mean(smoothed))
