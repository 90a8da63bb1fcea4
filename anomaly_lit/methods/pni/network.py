"""Patch features and the neighbourhood network of PNI."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def describe(maps: Sequence[Tensor], patch: int, dim: int, grid: Sequence[int]) -> Tensor:
    """Describe each position by the patches around it in several maps (PatchCore).

    The values of a patch, channel by channel, are averaged in groups until `dim` are left; the same
    then happens to the joined values of all maps. Coarser maps are resized to the grid after the
    first average, which gives the same numbers as before it and takes less memory.

    Args:
        maps: (B, C_i, h_i, w_i), finest first.
        patch: Side of a patch, in positions, odd; zeros lie beyond the border.
        dim: Length of a feature vector.
        grid: Rows and columns of the result.

    Returns:
        (B, rows, columns, dim) float32.
    """
    size = (grid[0], grid[1])
    layers = []
    for values in maps:
        patches = F.unfold(values, patch, padding=patch // 2).mT  # (B, h * w, C * patch^2)
        pooled = F.adaptive_avg_pool1d(patches, dim).mT.unflatten(2, values.shape[-2:])
        layers.append(F.interpolate(pooled, size, mode="bilinear", align_corners=False))
    joined = torch.cat(layers, dim=1).flatten(2).mT  # (B, rows * columns, maps * dim)
    return F.adaptive_avg_pool1d(joined, dim).unflatten(1, size).float()


def describe_channels(maps: Sequence[Tensor], patch: int, grid: Sequence[int]) -> Tensor:
    """Describe each position by the mean of the patch around it, in each channel of several maps.

    Args:
        maps: (B, C_i, h_i, w_i), finest first; coarser ones are resized to the grid.
        patch: Side of a patch, in positions, odd; zeros lie beyond the border, and count.
        grid: Rows and columns of the result.

    Returns:
        (B, rows, columns, sum of C_i) float32.
    """
    size = (grid[0], grid[1])
    means = [F.avg_pool2d(values, patch, 1, patch // 2) for values in maps]
    layers = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in means]
    return torch.cat(layers, dim=1).permute(0, 2, 3, 1).float()


class NeighbourNetwork(nn.Module):
    """Guesses the code of a patch from the patches around it, p(code | neighbourhood).

    Args:
        dim: Length E of a feature vector.
        classes: Number of codes.
        reach: Positions that the neighbourhood reaches to each side.
        width: Width of the hidden layers.
        depth: Number of linear layers, at least 2.
        dropout: Share of hidden values that is dropped.
        neighbour_dim: Length to which a fixed random matrix projects each neighbour first; None
            keeps the vectors as they are.
        include_center: Let the network see the patch itself too.
    """

    cells: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        reach: int,
        width: int,
        depth: int,
        dropout: float,
        neighbour_dim: int | None,
        include_center: bool,
    ) -> None:
        super().__init__()
        self.reach = reach
        cells = torch.cartesian_prod(*[torch.arange(2 * reach + 1)] * 2)  # (window^2, 2)
        seen = (cells != reach).any(dim=1) | include_center
        self.register_buffer("cells", cells[seen], persistent=False)
        self.project: nn.Module = nn.Identity()
        if neighbour_dim is not None:
            self.project = nn.Linear(dim, neighbour_dim, bias=False).requires_grad_(False)
            nn.init.normal_(self.project.weight, std=neighbour_dim**-0.5)
        given = len(self.cells) * (dim if neighbour_dim is None else neighbour_dim)
        layers: list[nn.Module] = []
        for number in range(depth - 1):
            layers += [nn.Linear(width if number else given, width), nn.BatchNorm1d(width)]
            layers += [nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))

    def neighbours(self, patches: Tensor, index: Tensor) -> Tensor:
        """Return (M, neighbours, E) vectors around positions; zeros lie beyond the border.

        Args:
            patches: (B, h, w, E).
            index: (M,) positions, counted through all images row by row.
        """
        _, height, width, _ = patches.shape
        reach = self.reach
        padded = F.pad(patches, (0, 0, reach, reach, reach, reach))
        image, place = index // (height * width), index % (height * width)
        row = (place // width)[:, None] + self.cells[:, 0]
        column = (place % width)[:, None] + self.cells[:, 1]
        return padded[image[:, None], row, column]

    def forward(self, patches: Tensor, index: Tensor) -> Tensor:
        """Return (M, classes) logits of the codes at some positions; see `neighbours`."""
        return self.layers(self.neighbours(self.project(patches), index).flatten(1))
