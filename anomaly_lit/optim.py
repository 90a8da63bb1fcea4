"""Optimisers that torch does not have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anomaly_lit.types import check_range


class StableAdamW(Optimizer):
    """AdamW with a smaller step where the gradients of a tensor outgrow their history.

    Let r be the root mean square of a tensor's gradients over their running deviation. If r exceeds
    `clip`, the tensor's step is divided by r / clip: a sudden large gradient then moves the weights
    no further than a usual one (Wortsman et al., 2023, arXiv:2304.13013). As in Dinomaly's code, r
    takes the gradient of the current step and, with `amsgrad`, the largest deviation so far.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Shares of the running mean and of the running square that a step keeps.
        eps: Added to the deviation.
        weight_decay: Each weight first shrinks by the share `lr * weight_decay` of its value.
        amsgrad: Divide by the largest deviation so far rather than by the current one.
        clip: Largest r at which the step is not made smaller.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        clip: float = 1.0,
    ) -> None:
        check_range("method.optimizer", "[0, inf)", lr=lr, eps=eps, weight_decay=weight_decay)
        check_range("method.optimizer", "[0, 1)", betas=betas)
        check_range("method.optimizer", "(0, inf)", clip=clip)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "clip": clip,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return what the closure, which computes the gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take the step of one tensor."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
            if group["amsgrad"]:
                state["largest"] = torch.zeros_like(parameter)
        state["step"] += 1
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        square = state["square"]
        if group["amsgrad"]:
            square = torch.maximum(state["largest"], square, out=state["largest"])
        deviation = square.sqrt() / math.sqrt(1 - beta2 ** state["step"]) + group["eps"]
        ratio = (gradient / deviation).square().mean().sqrt() / group["clip"]
        mean = state["mean"] / (1 - beta1 ** state["step"])
        parameter.sub_(group["lr"] / ratio.clamp(min=1) * mean / deviation)
