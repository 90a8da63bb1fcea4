"""FastFlow: normalising flows on feature maps (Yu et al., 2021, arXiv:2111.07677).

For each stage of a frozen backbone, an invertible network of coupling steps turns the maps of
normal images into white noise; it is convolutional, so that a position sees its neighbours. An
image is anomalous where its noise is unlikely.

The authors published no code, so this follows the text and public re-implementations. Differences:

- Maps are normalised as a whole before the flow, without trainable weights unless `affine` is
  set: the published results need the normalisation, and it is more stable without weights.
- Scoring uses a moving average of the trained weights (`average`), and the learning rate falls:
  re-implementations with a constant rate lose a point of pixel AUROC from their best epoch to their
  last, and only the last is reported here.
- A transformer's maps pass through its last layer normalisation (the backbone's `final_norm`).

With WideResNet-50-2, eight steps and alternating kernels there are 41.3 million parameters. For the
paper's transformers, the steps as described have 7.1 million instead of the published 14.8;
`double_coupling` gives 14.1, which may be what the authors used.

Paper: Yu et al.: FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing
Flows. arXiv:2111.07677.
Status: works; measured small (experiments/fastflow), not yet at the paper's size.
Note: no code by the authors; written from the text and facts of public re-implementations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import grid_of, smooth
from anomaly_lit.nn.averaging import MovingAverage
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

SIDES = {"3-1": (3, 1), "3-3": (3, 3)}  # of the kernels of two successive steps
LARGEST_LOG_SCALE = 2.0


class FastFlow(Method):
    """Two-dimensional normalising flows, one for each stage of the backbone.

    Args:
        backbone: Frozen feature extractor.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients, which grows with the size of the maps.
        image_size: Height and width of the images, or one number for both; only used if `affine`.
        steps: Coupling steps of each flow.
        kernels: `3-1` alternates between 3 x 3 and 1 x 1 kernels; `3-3` uses 3 x 3 only.
        hidden_ratio: Hidden channels of a step divided by the channels it reads.
        double_coupling: Whether a step changes both halves of the channels instead of one.
        affine: Whether the normalisation before a flow has trainable weights, for each value of a
            map.
        average: Decay of the moving average of the weights used for scoring, in [0, 1); 0 uses the
            trained weights themselves. The decay is lower in early steps.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: A stage has only one channel, or a value is out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        image_size: int | Sequence[int] = 256,
        steps: int = 8,
        kernels: Literal["3-1", "3-3"] = "3-1",
        hidden_ratio: float = 1.0,
        double_coupling: bool = False,
        affine: bool = False,
        average: float = 0.999,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[0, 1)", average=average)
        check_range("method", "[1, inf)", steps=steps)
        check_range("method", "(0, inf)", hidden_ratio=hidden_ratio)
        check_range("method", "[0, inf)", smoothing=smoothing)
        check_choice("method", SIDES, kernels=kernels)
        if min(backbone.channels) < 2:
            raise UserError(f"a flow needs two channels; the stages have {backbone.channels}")
        self.backbone = backbone
        self.smoothing = smoothing
        sides = [SIDES[kernels][step % 2] for step in range(steps)]
        self.flows = nn.ModuleList()
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True):
            shape = (channels, *grid_of(image_size, stride)) if affine else None
            self.flows.append(Flow(channels, sides, hidden_ratio, double_coupling, shape))
        self.averaged = MovingAverage(self.flows, average) if average else None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return negative log likelihoods up to a constant; log them per value as `stage<i>`."""
        features = self.features(self.backbone, batch)
        flows = self.flows.children() if self.training else self.scoring_flows()
        terms = {}
        with torch.autocast(self.device.type, enabled=False):  # sums of up to 1e6 terms
            for number, (flow, map_) in enumerate(zip(flows, features, strict=True)):
                noise, log_det = flow(map_.float())
                unlikely = (0.5 * noise.square().sum(dim=(1, 2, 3)) - log_det).mean()
                terms[f"likelihood{number}"] = unlikely
                self.report({f"stage{number}": unlikely / noise[0].numel()})
        return terms

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the average after the weights, before a checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            self.averaged.update_parameters(self.flows)

    def scoring_flows(self) -> Iterable[nn.Module]:
        """Return the averaged flows, or the trained ones if no average is kept."""
        return (self.flows if self.averaged is None else self.averaged.module).children()

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class. A map's values lie in [0, 1]."""
        maps = []
        for flow, features in zip(self.scoring_flows(), self.backbone(image), strict=True):
            noise, _ = flow(features.float())
            unlikely = -torch.expm1(-0.5 * noise.square().mean(dim=1, keepdim=True))
            maps.append(F.interpolate(unlikely, image.shape[-2:], mode="bilinear"))
        anomaly_map = smooth(torch.stack(maps).mean(dim=0), self.smoothing)  # (B, 1, H, W)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


class Flow(nn.Module):
    """Normalisation and coupling steps for maps with a fixed number of channels.

    Args:
        channels: Channels C of the map.
        kernels: Side of the kernels of each step.
        hidden_ratio: See `FastFlow`.
        double_coupling: See there.
        affine: (C, h, w) for weights in the normalisation; None for none.
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int],
        hidden_ratio: float,
        double_coupling: bool,
        affine: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.norm = None if affine is None else nn.LayerNorm(list(affine))
        self.steps = nn.ModuleList(
            CouplingStep(channels, kernel, hidden_ratio, double_coupling) for kernel in kernels
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, h, w) to noise of the same shape and (B,) log determinants.

        The determinants are those of the steps: the normalisation before them counts as part of the
        data.
        """
        noise = self.normalise(features)
        log_det = features.new_zeros(len(features))
        for step in self.steps:
            noise, step_log_det = step(noise)
            log_det = log_det + step_log_det
        return noise, log_det

    def normalise(self, features: Tensor) -> Tensor:
        """Give each map zero mean and unit variance over all values; then apply weights, if any."""
        if self.norm is not None:
            return self.norm(features)
        return F.layer_norm(features, features.shape[1:])

    def inverse(self, noise: Tensor) -> Tensor:
        """Map noise to normalised features, (B, C, h, w)."""
        for step in reversed(self.steps):
            assert isinstance(step, CouplingStep)
            noise = step.inverse(noise)
        return noise


class CouplingStep(nn.Module):
    """Changes one half of the channels by what the other half says, then scales and permutes all.

    Args:
        channels: Channels C of the map, at least 2.
        kernel: Side of the kernels.
        hidden_ratio: See `FastFlow`.
        double_coupling: See there.
    """

    permutation: Tensor

    def __init__(
        self, channels: int, kernel: int, hidden_ratio: float, double_coupling: bool
    ) -> None:
        super().__init__()
        first, second = channels - channels // 2, channels // 2
        self.halves = (first, second)
        self.subnet = _subnet(first, second, kernel, hidden_ratio)
        self.other_subnet = (
            _subnet(second, first, kernel, hidden_ratio) if double_coupling else None
        )
        # 0.1 * softplus(scale, beta=0.5) is 1
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 2 * math.log(math.expm1(5.0))))
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("permutation", torch.randperm(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, h, w) to the same and the (B,) log determinant."""
        kept, changed = x.split(self.halves, dim=1)
        log_scale, shift = _change(self.subnet, kept)
        changed = changed * log_scale.exp() + shift
        log_det = log_scale.sum(dim=(1, 2, 3))
        if self.other_subnet is not None:
            log_scale, shift = _change(self.other_subnet, changed)
            kept = kept * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(dim=(1, 2, 3))
        scale = self._scale()
        y = torch.cat([kept, changed], dim=1) * scale + self.offset
        log_det = log_det + x.shape[-2] * x.shape[-1] * scale.log().sum()
        return y[:, self.permutation], log_det

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`."""
        y = (y[:, self.permutation.argsort()] - self.offset) / self._scale()
        kept, changed = y.split(self.halves, dim=1)
        if self.other_subnet is not None:
            log_scale, shift = _change(self.other_subnet, changed)
            kept = (kept - shift) * (-log_scale).exp()
        log_scale, shift = _change(self.subnet, kept)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], dim=1)

    def _scale(self) -> Tensor:
        return 0.1 * F.softplus(self.scale, beta=0.5)


def _subnet(read: int, changed: int, kernel: int, hidden_ratio: float) -> nn.Sequential:
    hidden = max(int(read * hidden_ratio), 1)
    return nn.Sequential(
        nn.Conv2d(read, hidden, kernel, padding="same"),
        nn.ReLU(),
        nn.Conv2d(hidden, 2 * changed, kernel, padding="same"),
    )


def _change(subnet: nn.Module, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log scale and the shift of one half of the channels, from the other half."""
    raw, shift = (0.1 * subnet(read)).chunk(2, dim=1)
    return LARGEST_LOG_SCALE * torch.tanh(raw), shift
