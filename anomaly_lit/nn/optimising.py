"""How a method's parameters are updated: optimisers, learning rates, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomaly_lit.types import UserError, check_range

OptimizerFn = Callable[[Iterable[Any]], Optimizer]  # parameters, or groups of them
ScheduleFn = Callable[[float], float]


def check_optimizer(optimizer: OptimizerFn) -> None:
    """Build the optimiser for a single number, to see whether it takes its settings.

    Raises:
        UserError: It does not, or a setting is not finite.
    """
    settings = getattr(optimizer, "keywords", {})
    numbers = {k: v for k, v in settings.items() if isinstance(v, int | float)}
    check_range("method.optimizer", "(-inf, inf)", **numbers)
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, IndexError) as error:
        values = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise UserError(
            f"method.optimizer takes no such values ({values}): {str(error).splitlines()[0]}"
        ) from error


class Optimised(pl.LightningModule):
    """One optimiser over all trainable parameters, or several that a subclass steps itself.

    Args:
        optimizer: Builds the optimiser from the trainable parameters.
        schedule: Factor of the learning rate at a share of training, in [0, 1]; None keeps it.
        gradient_clip: Largest norm of all gradients together; `trainer.gradient_clip_val` has
            precedence.

    Raises:
        UserError: `gradient_clip` is not above 0.
    """

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__()
        check_range("method", "(0, inf)", gradient_clip=gradient_clip)
        self.optimizer = optimizer
        self.schedule = schedule
        self.gradient_clip = gradient_clip

    def configure_callbacks(self) -> list[pl.Callback]:
        """Raise if settings of the trainer cannot act; no earlier hook knows the trainer.

        Raises:
            UserError: The trainer is set to clip or accumulate gradients, but the method steps its
                optimisers itself.
        """
        if not self.automatic_optimization and self.trainer.state.fn == "fit":
            settings = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
            for name, off in settings.items():
                value = getattr(self.trainer, name)
                if value and value != off:
                    raise UserError(
                        f"trainer.{name}={value} cannot act, since {type(self).__name__} steps "
                        f"its optimisers itself: set it to {'null' if off is None else off}"
                    )
        return []

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        """Take a step with one of several optimisers, and update its learning rate.

        For a `training_step` with `automatic_optimization` off.

        Args:
            optimizer: One of `self.optimizers()`.
            loss: A scalar; its gradients for the parameters of other optimisers are dropped when
                these take their step.
        """
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        for scheduler in self.trainer.lr_scheduler_configs:
            if scheduler.scheduler.optimizer is optimizer.optimizer:
                scheduler.scheduler.step()

    def configure_optimizers(self) -> Any:
        """Return one optimiser for all trainable parameters, with its schedule."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return self.scheduled(self.optimizer(parameters)) if parameters else None

    def scheduled(
        self, optimizer: Optimizer, factors: ScheduleFn | Sequence[ScheduleFn] | None = None
    ) -> dict[str, Any]:
        """Pair an optimiser with the factors of its learning rates over training.

        Args:
            optimizer: One of those that `configure_optimizers` returns, as a list if several.
            factors: One for all groups of parameters, or one for each; None uses the schedule.
        """
        factors = self.schedule if factors is None else factors
        if factors is None:
            return {"optimizer": optimizer}
        total_steps = self.trainer.estimated_stepping_batches
        several = factors if isinstance(factors, Sequence) else [factors]
        by_step = [_by_step(factor, total_steps) for factor in several]
        by_step *= len(optimizer.param_groups) // len(several)
        scheduler = {"scheduler": LambdaLR(optimizer, by_step), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimiser, or all; only steps of the first count as steps of training."""
        found = super().optimizers(use_pl_optimizer)
        for other in found[1:] if isinstance(found, list) and use_pl_optimizer else []:
            other._on_before_step = other._on_after_step = _nothing  # type: ignore[union-attr]
        return found

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip at the trainer's value, or else at the method's."""
        limit = gradient_clip_val or self.gradient_clip
        self.clip_gradients(optimizer, limit, gradient_clip_algorithm or "norm")


def _by_step(factor: ScheduleFn, steps: float) -> Callable[[int], float]:
    """Turn a function of the share of training into one of the step."""
    return lambda step: factor(step / steps)


def _nothing() -> None:
    """Do nothing."""
