"""The decomposition of an image into background, sparse and smooth defect, and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 0.248  # of Chambolle's iteration; it converges below 1 / 4


class Decomposition(NamedTuple):
    """What an image Y consists of: Y = background + defect + noise."""

    background: Tensor  # (B, 3, H, W)
    defect: Tensor  # (B, 3, H, W)
    iterations: Tensor  # (B,) int64


def decompose(
    image: Tensor,
    prior: Callable[[Tensor], Tensor],
    sparsity: float | Tensor,
    smoothness: float | Tensor,
    weight: float,
    growth: float,
    most_weight: float,
    iterations: int,
    tolerance: float,
    region: Tensor | None = None,
    smoothing_iterations: int = 10,
) -> Decomposition:
    """Split images by minimising an energy over background B and defect S in turn.

    The energy is

    1/2 |Y - B - S|^2 + sparsity sum_u |S(u)| + smoothness TV(S) + weight / 2 |B - P(B)|^2.

    Its last term supposes that P is a projection, so that P(B) is the normal image nearest to B.
    Then the best B for a given S is a mean of Y - S and P(Y - S), which is what each iteration
    takes. P never sees its own output, so that B stays between the image without its defect and one
    reconstruction of it, also where P is no projection.

    Each image stops by itself, so that its result does not depend on the others, and not before the
    prior has its full weight: a defect has to exceed `sparsity` (1 + 1 / weight).

    Args:
        image: Y, (B, 3, H, W).
        prior: P, brings images (n, 3, H, W) near to normal ones.
        sparsity: Weight of the number of pixels with a defect; (1, 1, H, W) if it differs by place.
        smoothness: Weight of the total variation of each channel.
        weight: Weight of the prior.
        growth: Factor of `weight` after each iteration.
        most_weight: Largest weight of the prior, where it stops growing.
        iterations: Largest number of iterations.
        tolerance: Relative change of S below which an image is done, once `weight` has grown.
        region: (1, 1, H, W) bool, where a defect may be; None: everywhere.
        smoothing_iterations: Iterations within each step of S.
    """
    background, defect = prior(image).clone(), torch.zeros_like(image)
    spent = torch.zeros(len(image), dtype=torch.long, device=image.device)
    moving = torch.arange(len(image), device=image.device)
    for _ in range(iterations):
        y, b, s = image[moving], background[moving], defect[moving]
        new = defect_in(y - b, sparsity, smoothness, smoothing_iterations)
        if region is not None:
            new = new * region
        rest = y - new
        background[moving] = (rest + weight * prior(rest)) / (1 + weight)
        defect[moving] = new
        spent[moving] += 1
        change = (new - s).flatten(1).norm(dim=1) / (s.flatten(1).norm(dim=1) + 1e-8)
        grown = min(weight * growth, most_weight)
        if grown == weight:
            moving = moving[change >= tolerance]
        if not len(moving):
            break
        weight = grown
    return Decomposition(background, defect, spent)


def defect_in(
    residual: Tensor, sparsity: float | Tensor, smoothness: float | Tensor, iterations: int = 10
) -> Tensor:
    """Return the sparse and smooth part of what differs from the background, (B, 3, H, W)."""
    return shrink_colours(reduce_variation(residual, smoothness, iterations), sparsity)


def shrink_colours(x: Tensor, amount: float | Tensor) -> Tensor:
    """Shorten the colour of every pixel of (B, 3, H, W) by `amount`, down to 0.

    The proximal map of `amount` times the sum of the colours' norms.
    """
    length = x.norm(dim=1, keepdim=True)
    return x * (1 - amount / length.clamp(min=1e-12)).clamp(min=0)


def reduce_variation(x: Tensor, amount: float | Tensor, iterations: int) -> Tensor:
    """Smooth each channel of (B, C, H, W), and keep its edges.

    The proximal map of `amount` times the total variation, by Chambolle's dual iteration (2004).
    """
    if not float(amount):
        return x
    dual = x.new_zeros(2, *x.shape)
    for _ in range(iterations):
        slope = gradient(divergence(dual) - x / amount)
        steepness = slope.square().sum(dim=0).sqrt()
        dual = (dual + STEP * slope) / (1 + STEP * steepness)
    return x - amount * divergence(dual)


def gradient(x: Tensor) -> Tensor:
    """Return the differences to the pixels below and right, (2, B, C, H, W); 0 at the end."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    right[..., :-1] = x[..., 1:] - x[..., :-1]
    return torch.stack([down, right])


def divergence(dual: Tensor) -> Tensor:
    """Return the negative adjoint of `gradient`, (B, C, H, W)."""
    down, right = dual[0].clone(), dual[1].clone()
    down[..., -1, :] = 0
    right[..., -1] = 0
    down[..., 1:, :] -= dual[0][..., :-1, :]
    right[..., 1:] -= dual[1][..., :-1]
    return down + right
