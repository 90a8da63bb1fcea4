"""SGSF: self-supervised guided segmentation framework (Xing et al., 2022, arXiv:2209.12440).

Trained on normal images and forged anomalies: textures laid over what is salient in the image, as
irregular masks (`synthesis=saliency`). A segmenter trained on those alone would learn to find
forgeries. So a guidance network, which sees the same image, learns to restore the normal one, and
the features of its decoder tell the segmenter what is normal here: at each scale it compares its
own features with them and marks what differs.

No code was published, and we had only the abstract of the paper. The rest follows NIGSF (Xing et
al., IEEE TCSVT 34, 2024), the same authors' next paper, in the variant of its ablation that
restores the forged image itself, without the normal images that it retrieves:

- guidance from the four coarser scales of the decoder, joined to the segmenter's own features by a
  3 x 3 convolution, whose result goes to the next scale and over the skip connection;
- losses and their weights, learning rate and its drops, the smoothed map's maximum as the score.

Our own choices: the widths of both networks; guidance takes no gradient of the segmentation loss
(`detach_guidance`); guidance features of the forged image are pulled to those of the clean one
(`consistency_weight`); what is salient is the image's foreground, where the authors run a network
trained for saliency; normal images of textures are not turned. Do not report results as those of
the published SGSF. There are 52.65 million trainable parameters.

Paper: Xing, Sun, Li: Self-Supervised Guided Segmentation Framework for Unsupervised Anomaly
Detection. arXiv:2209.12440.
Status: works; measured small, 300 steps on toothbrush at 128 x 128 (experiments/small): image AUROC
76.7, pixel AUROC 88.0, pixel AP 19.6. With fewer than 100 steps it finds nothing. One seed; not yet
at the paper's size.
Note: no code was published; what the abstract leaves open follows the authors' NIGSF. Set
`dataset.synthesis.saliency=none` for textures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.losses import focal_loss, loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import check_multiple
from anomaly_lit.nn.unet import conv3, doubled
from anomaly_lit.types import Batch, Prediction, UserError, check_range

convs = partial(conv3, norm=nn.BatchNorm2d)  # 3 x 3 convolutions with batch normalisation and ReLU


class SGSF(Method):
    """Self-supervised guided segmentation framework.

    Args:
        loss: Distance of the restored to the clean image.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients.
        widths: Channels of both networks' stages, finest first; each halves the image.
        restoration_weight: Weight of the restoration loss against the segmentation loss.
        consistency_weight: Weight of 1 - cosine between guidance features of the forged and of the
            clean image; 0 leaves the term out.
        detach_guidance: Keep the gradient of the segmentation loss out of the guidance network.
        gamma: Exponent of the focal loss.
        window: Side of the window whose largest mean is the score, in pixels, odd.

    Raises:
        UserError: A number is out of range.
    """

    needs = frozenset({"corrupted"})

    def __init__(
        self,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        restoration_weight: float = 1.0,
        consistency_weight: float = 0.1,
        detach_guidance: bool = True,
        gamma: float = 2.0,
        window: int = 21,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", widths=widths, window=window)
        check_range("method", "[0, inf)", restoration_weight=restoration_weight, gamma=gamma)
        check_range("method", "[0, inf)", consistency_weight=consistency_weight)
        if len(widths) < 2 or window % 2 == 0:
            raise UserError(
                f"method.widths={list(widths)} must name at least two stages, and "
                f"method.window={window} be odd"
            )
        self.loss = loss
        self.restoration_weight = restoration_weight
        self.consistency_weight = consistency_weight
        self.detach_guidance = detach_guidance
        self.gamma = gamma
        self.window = window
        self.multiple = 2 ** (len(widths) - 1)
        self.guide = GuidanceNetwork(widths)
        self.segmenter = GuidedSegmenter(widths)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of restoring forged images, of segmenting them, and of consistency."""
        forged, clean = batch["corrupted"], batch["image"]
        restored, guidance = self.guide(forged)
        logits = self.segmenter(
            forged, [g.detach() for g in guidance] if self.detach_guidance else guidance
        )
        terms = {
            name: self.restoration_weight * value
            for name, value in loss_terms(self.loss, restored.float(), clean).items()
        }
        terms["segmentation"] = focal_loss(logits.float(), batch["corruption"].float(), self.gamma)
        if self.consistency_weight:
            terms["consistency"] = self.consistency_weight * self.inconsistency(guidance, clean)
        return terms

    def inconsistency(self, guidance: Sequence[Tensor], clean: Tensor) -> Tensor:
        """Return 1 - cosine of guidance features to those of the clean image, a mean over all."""
        with torch.no_grad():
            _, wanted = self.guide(clean)
        gaps = [
            (1 - F.cosine_similarity(g.float(), w.float(), dim=1)).mean()
            for g, w in zip(guidance, wanted, strict=True)
        ]
        return torch.stack(gaps).mean()

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class. A map's values lie in [0, 1].

        Raises:
            UserError: The networks cannot halve the image as often as they have to.
        """
        check_multiple(image.shape[-2:], self.multiple, "the stride of SGSF's coarsest map")
        _, guidance = self.guide(image)
        anomaly_map = self.segmenter(image, guidance).sigmoid()
        around = F.avg_pool2d(anomaly_map, self.window, stride=1, padding=self.window // 2)
        return Prediction(anomaly_map, around.amax(dim=(1, 2, 3)))


class GuidanceNetwork(nn.Module):
    """Restores normal images; without skip connections, so that a defect cannot pass by.

    Args:
        widths: Channels of the stages, finest first.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            convs(given, made, made) for given, made in pairwise([3, *widths])
        )
        coarse_first = [widths[-1], *reversed(widths)]
        self.up = nn.ModuleList(convs(given, made, made) for given, made in pairwise(coarse_first))
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, 3, H, W) to the restored image and the guidance, finest first.

        The guidance is the map of each stage of the decoder except the finest.
        """
        x = image
        for number, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if number else x)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.up):
            x = stage(doubled(x) if number else x)
            maps.append(x)
        return self.head(x), maps[-2::-1]


class GuidedSegmenter(nn.Module):
    """A U-Net that joins the guidance to its own features at every scale except the finest.

    Args:
        widths: Channels of the stages, finest first; those of the guidance network.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            convs(given, made, made) for given, made in pairwise([3, *widths])
        )
        self.join = nn.ModuleList(convs(2 * width, width) for width in widths[1:])
        coarse_first = list(reversed(widths))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in pairwise(coarse_first)
        )
        self.up = nn.ModuleList(convs(2 * fine, fine, fine) for fine in coarse_first[1:])
        self.head = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, image: Tensor, guidance: Sequence[Tensor]) -> Tensor:
        """Map (B, 3, H, W) and the guidance to (B, 1, H, W) logits.

        A logit is the difference of the two that the paper puts into a softmax.
        """
        x = self.down[0](image)
        stages = [x]
        for stage, join, normal in zip(self.down[1:], self.join, guidance, strict=True):
            x = join(torch.cat([stage(F.max_pool2d(x, 2)), normal], dim=1))
            stages.append(x)
        for grow, up, shortcut in zip(self.grow, self.up, stages[-2::-1], strict=True):
            x = up(torch.cat([grow(x), shortcut], dim=1))
        return self.head(x)
