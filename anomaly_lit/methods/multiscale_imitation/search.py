"""The search for the modules that matter: their weights, the side task, cost and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from anomaly_lit.methods.multiscale_imitation.network import at_size
from anomaly_lit.nn.ranks import mean_of_marked
from anomaly_lit.types import Batch, UserError, check_range

Score = Callable[[Tensor, Sequence[int], Tensor], Tensor]  # images, modules, weights of all: maps


class Fusion(nn.Module):
    """How the maps of the modules become one, and what the search found.

    Args:
        count: Number of modules.
        keep: A module is kept if its weight exceeds `keep` / `count`, in [0, 1).

    Attributes:
        alpha: The numbers that the search learns; their softmax gives the weights of the modules.
        slope: Logarithm of the factor k that turns maps into logits.
        bias: The map's value b at which a pixel is as likely normal as not.
        mean: Mean distance of each module on normal images, which puts the maps on one scale.
        weights: Of each module; they sum to 1, and those that are not kept have 0.
        kept: Numbers of the modules that are kept, in order.
    """

    mean: Tensor
    weights: Tensor

    def __init__(self, count: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.alpha = nn.Parameter(torch.zeros(count))
        self.slope = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.full((), 2.0))  # normal pixels have 1 on average
        self.register_buffer("mean", torch.ones(count))
        self.register_buffer("weights", torch.full((count,), 1 / count))
        self.kept = list(range(count))

    def settle(self, weights: Tensor) -> None:
        """Keep the modules with enough weight, and scale their weights to sum to 1."""
        chosen = weights > self.keep / len(weights)
        self.kept = chosen.nonzero().flatten().tolist()
        self.weights.copy_(torch.where(chosen, weights, 0) / weights[chosen].sum())

    def on_one_scale(self, maps: Mapping[int, Tensor], size: torch.Size) -> dict[int, Tensor]:
        """Return some modules' maps, by number, divided by their means, at the image's size."""
        return {n: at_size(map_ / self.mean[n], size) for n, map_ in maps.items()}

    def weighted_sum(self, maps: Mapping[int, Tensor], size: torch.Size, weights: Tensor) -> Tensor:
        """Return the weighted sum, (B, 1, H, W).

        Args:
            maps: (B, 1, h, w) of some modules, by number.
            size: H and W.
            weights: Of all modules.
        """
        parts = [weights[n] * map_ for n, map_ in self.on_one_scale(maps, size).items()]
        return torch.stack(parts).sum(dim=0)

    def product(self, maps: Mapping[int, Tensor], size: torch.Size, levels: int) -> Tensor:
        """Return the sum over scales of the product over levels, (B, 1, H, W); no weights.

        Args:
            maps: As for `weighted_sum`, in order of their numbers.
            size: H and W.
            levels: Modules of a scale.
        """
        scales: dict[int, Tensor] = {}
        for n, map_ in self.on_one_scale(maps, size).items():
            before = scales.get(n // levels)
            scales[n // levels] = map_ if before is None else before * map_
        return torch.stack(list(scales.values())).sum(dim=0)

    def logits(self, fused: Tensor) -> Tensor:
        """Return logits of pixels that are anomalous: k (A - b)."""
        return self.slope.exp() * (fused - self.bias)

    def entropy(self) -> Tensor:
        """Return the entropy of the weights, a scalar; it is small if few modules have weight."""
        return -(self.alpha.softmax(0) * self.alpha.log_softmax(0)).sum()

    def get_extra_state(self) -> dict[str, list[int]]:
        """Return which modules are kept."""
        return {"kept": self.kept}

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        """Restore what `get_extra_state` returned."""
        self.kept = list(state["kept"])


def balanced_bce(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the cross entropy with equal weight for anomalous and for normal pixels, a scalar.

    Pixels are those of the batches of all ranks; see `mean_of_marked`.

    Args:
        logits: Any shape.
        truth: Bool, the same shape; if one kind is missing, half the mean of the other is left.
    """
    each = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
    return (mean_of_marked(each, truth) + mean_of_marked(each, ~truth)) / 2


def defects_in_some(
    image: Tensor, corrupted: Tensor, corruption: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a batch in which about a share of the images has its defect, and the true masks."""
    draw = torch.rand(len(image), 1, 1, 1, generator=generator, device=image.device)
    return torch.where(draw < share, corrupted, image), corruption & (draw < share)


def auroc(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the chance that an anomalous pixel outranks a normal one; a tie counts one half."""
    anomalous, normal = scores[truth], scores[~truth].sort().values
    below = torch.searchsorted(normal, anomalous, right=False)
    not_above = torch.searchsorted(normal, anomalous, right=True)
    return (below + not_above).double().mean() / (2 * len(normal))


def cost(score: Score, image: Tensor, chosen: Sequence[int], weights: Tensor) -> tuple[int, int]:
    """Return the parameters that scoring an image uses, and its multiply-adds.

    Only convolutions and products of matrices count.
    """
    used: dict[int, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        used.update({id(p): p.numel() for p in module.parameters(recurse=False)})

    handle = register_module_forward_hook(note)
    try:
        with FlopCounterMode(display=False) as counter:
            score(image, chosen, weights)
    finally:
        handle.remove()
    return sum(used.values()), counter.get_total_flops() // 2


def compare(
    score: Score,
    arms: Mapping[str, tuple[Sequence[int], Tensor]],
    batches: Sequence[Batch],
) -> dict[str, float]:
    """Return what several choices of modules cost, and how well they find synthetic defects.

    Args:
        score: Makes maps from images, numbers of modules, and weights of all modules.
        arms: Modules and weights, by a name, with which the names of its results end.
        batches: Normal images; accuracy is measured if they come with synthetic defects.
    """
    found: dict[str, float] = {}
    for name, (chosen, weights) in arms.items():
        one = batches[0]["image"][:1]
        parameters, products = cost(score, one, chosen, weights)
        found |= {f"parameters_{name}": parameters, f"multiply_adds_{name}": products}
        if "corrupted" in batches[0]:
            maps = torch.cat([score(batch["corrupted"], chosen, weights) for batch in batches])
            truth = torch.cat([batch["corruption"] for batch in batches])
            found[f"pixel_auroc_{name}"] = float(auroc(maps, truth))
    return found


def told(names: Sequence[str], weights: Sequence[float]) -> str:
    """Return the names of modules with their weights, largest first."""
    pairs = sorted(zip(weights, names, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} ({weight:.2f})" for weight, name in pairs)


def check_shares(shares: Sequence[float], searches: bool) -> None:
    """Raise UserError unless there is a share for the students, and one for a search."""
    check_range("method", "[0, inf)", shares=shares)
    if len(shares) != 2 or not shares[0] > 0 or (searches and not shares[1] > 0):
        raise UserError(
            f"method.shares={list(shares)}: give a share of training for the students and one for "
            "the search, both above 0; method.search=none has no search"
        )
