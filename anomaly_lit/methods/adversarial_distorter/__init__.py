"""Adversarial Distorter: an auto-encoder against learned perturbations (Khazaie et al., 2022).

Two networks compete. The Distorter looks at the image and perturbs its encoding so that the
decoder fails; the auto-encoder learns to rebuild the image from the perturbed encoding all the
same. Encodings near those of normal images then all lead back to normal images, and what is
anomalous is rebuilt badly. Scoring perturbs nothing.

Only the abstract was at hand. It fixes the two networks, that the perturbation acts on the
encoding, and the opposed aims. Everything else is ours:

- A perturbation has a hard bound relative to its encoding; without one it would grow without
  limit. The encoding is normalised, or the encoder would outgrow the bound.
- The clean image is rebuilt too, since scoring uses that path, and perturbations of different
  images should differ, or one direction would serve for all. Their similarity counts in units of
  the clean error, or it would soon outweigh the small errors that the Distorter is to raise.
- Both networks take steps in turn (`adversary=alternating`), or one step whose gradient is
  reversed on its way to the Distorter (`adversary=reversal`).
- Where the decoder rebuilds perturbed encodings it sees the clean ones in the same batch, also in
  the Distorter's step, so that batch normalisation has one kind of statistics.
- With several processes, networks that step in turn need
  `trainer.strategy=ddp_find_unused_parameters_true`.
- `mode=mask` passes gradients through its hard gate as if it were a sigmoid.

There are 2.71 million parameters that score and 0.69 million of the Distorter at 256 x 256; 1.07
and 0.30 million with three stages, for images of 32 x 32.

Paper: Khazaie, Wong, Jewell, Mohsenzadeh: Anomaly Detection with Adversarially Learned
Perturbations of Latent Space. arXiv:2207.01106.
Status: works; measured small (experiments/small), three minutes each: image AUROC 100 on
hazelnut_toy, 59.7 on solar cells. Not yet at the size of the experiment.
Note: no code was published and its text was not at hand: only the idea is the paper's, sizes and
weights are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.methods.adversarial_distorter.network import (
    PERTURB,
    Decoder,
    NormalisedMap,
    Reversed,
    down,
)
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.nn.aggregate import check_multiple, pooled_maximum, smooth
from anomaly_lit.nn.averaging import MovingAverage
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

STRENGTHS = {"additive": 0.3, "multiplicative": 0.8, "mask": 0.125}


class AdversarialDistorter(Method):
    """Auto-encoder with adversarially perturbed encodings.

    Args:
        optimizer: Builds the optimiser of each network.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients; only for `adversary=reversal`.
        channels: Channels of the encoder's stages, each half the size of the one before. The
            Distorter has half as many, except in its last stage.
        mode: `additive`: a vector is added, whose norm is `strength` times that of the encoding.
            `multiplicative`: values lose a share of up to `strength`. `mask`: a share `strength`
            of the positions is set to zero.
        strength: How strong a perturbation may be; None takes 0.3, 0.8 or 0.125.
        warmup: Share of training over which the strength rises from 0, in [0, 1].
        clean_weight: Weight of the error of the unperturbed reconstruction.
        similarity_weight: Weight of the squared mean cosine between the perturbations of different
            images, which the Distorter lowers, relative to the clean error.
        adversary: `alternating` or `reversal`, see above.
        distorter_every: The Distorter takes one step in this many; `alternating` only.
        average: Decay of the moving average of the weights that score, in [0, 1); 0 keeps none.
        values: Range of the images that the networks see: `unit`, [0, 1], or `signed`, [-1, 1].
        score: `max` of the map after averaging over `pool` x `pool` pixels, for small defects, or
            the `mean` error, for images that are anomalous as a whole.
        pool: Side of that window, in pixels.
        smoothing: Standard deviation of a Gaussian filter on the map, in pixels.

    Raises:
        UserError: A value is unknown or out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        channels: Sequence[int] = (64, 128, 256, 256),
        mode: Literal["additive", "multiplicative", "mask"] = "additive",
        strength: float | None = None,
        warmup: float = 0.1,
        clean_weight: float = 1.0,
        similarity_weight: float = 0.1,
        adversary: Literal["alternating", "reversal"] = "alternating",
        distorter_every: int = 3,
        average: float = 0.999,
        values: Literal["unit", "signed"] = "unit",
        score: Literal["max", "mean"] = "max",
        pool: int = 11,
        smoothing: float = 4.0,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_choice("method", STRENGTHS, mode=mode)
        check_choice("method", ("alternating", "reversal"), adversary=adversary)
        check_choice("method", ("unit", "signed"), values=values)
        check_choice("method", ("max", "mean"), score=score)
        check_range("method", "[1, inf)", distorter_every=distorter_every)
        check_range("method", "[0, 1)", average=average)
        check_range("method", "[0, 1]", warmup=warmup)
        self.strength = STRENGTHS[mode] if strength is None else strength
        if self.strength < 0 or (mode != "additive" and self.strength > 1):
            raise UserError(f"method.strength={strength} is out of range for method.mode={mode}")
        self.automatic_optimization = adversary == "reversal"
        self.leaves_unused = adversary == "alternating"  # each step, the other network's
        self.adversary = adversary
        self.mode = mode
        self.warmup = warmup
        self.clean_weight = clean_weight
        self.similarity_weight = similarity_weight
        self.distorter_every = distorter_every
        self.multiple = 2 ** len(channels)
        self.signed = values == "signed"
        self.score = score
        self.pool = pool
        self.smoothing = smoothing
        self.encoder: nn.Module = nn.Sequential(down(channels), NormalisedMap())
        self.decoder: nn.Module = Decoder(list(reversed(channels)), self.signed)
        self.distorter = down([*(count // 2 for count in channels[:-1]), channels[-1]])
        self.averaged = MovingAverage(self.scoring_part(), average) if average else None

    # ----------------------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the auto-encoder's errors, of the perturbed and of the clean encoding.

        With `reversal`, also return the similarity of perturbations; all terms then train the
        Distorter as well. Log `ratio`, the perturbed error over the clean one: 1.2 to 3 is healthy;
        above 10 the Distorter is winning.
        """
        x = self.scaled(batch["image"])
        z = self.encoder(x)
        reversal = self.adversary == "reversal"
        with nullcontext() if reversal else torch.no_grad():
            answer = self.distorter(x)
        perturbed, clean = self.errors(x, z, Reversed.apply(answer) if reversal else answer)
        self.report({"ratio": perturbed.detach() / clean.detach()})
        terms = {"perturbed": perturbed, "clean": self.clean_weight * clean}
        return terms | self.similarity(z, answer, clean) if reversal else terms

    def distorter_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the Distorter lowers: the negative error, and the similarity."""
        x = self.scaled(batch["image"])
        with torch.no_grad():
            z = self.encoder(x)
        answer = self.distorter(x)
        perturbed, clean = self.errors(x, z, answer)
        return {"distorter": -perturbed} | self.similarity(z, answer, clean)

    def errors(self, x: Tensor, z: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared errors from the perturbed and from the clean encoding."""
        both = torch.cat([self.perturb(z, answer), z])
        squared = (self.decoder(both).float() - torch.cat([x, x])).square()
        perturbed, clean = squared.chunk(2)
        return perturbed.mean(), clean.mean()

    def similarity(self, z: Tensor, answer: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """Return the squared mean cosine between perturbations of different images, weighted.

        The clean error is part of the weight.
        """
        z = z.detach()
        direction = F.normalize((self.perturb(z, answer) - z).flatten(1).float(), dim=1)
        count = len(z)
        pairs = direction.sum(dim=0).square().sum() - direction.square().sum()
        mean = pairs / max(1, count * (count - 1))
        return {"similarity": self.similarity_weight * clean.detach() * mean.square()}

    def perturb(self, z: Tensor, answer: Tensor) -> Tensor:
        """Return the perturbed encoding, (B, C, h, w), as the Distorter's answer says."""
        share = min(1.0, self.done / self.warmup) if self.warmup else 1.0
        return PERTURB[self.mode](z, answer, self.strength * share)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Take a step of the auto-encoder and, now and then, one of the Distorter."""
        if self.adversary == "reversal":
            return super().training_step(batch, batch_idx)
        autoencoder, distorter = self.optimizers()
        distorts = self.trainer.global_step % self.distorter_every == 0
        self.toggle_optimizer(autoencoder)  # the other network gets no gradient
        loss = self.log_terms(self.losses(batch), batch)
        assert loss is not None
        self.descend(autoencoder, loss)
        self.untoggle_optimizer(autoencoder)
        self.move_average()
        if distorts:
            self.toggle_optimizer(distorter)
            terms = self.distorter_losses(batch)
            self.report(terms)
            self.descend(distorter, torch.stack(list(terms.values())).sum())
            self.untoggle_optimizer(distorter)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Move the average after a step with `reversal`, before a checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        self.move_average()

    def configure_optimizers(self) -> Any:
        """Return an optimiser for each network, or one for both with `reversal`."""
        if self.adversary == "reversal":
            return super().configure_optimizers()
        schedule, every = self.schedule, self.distorter_every
        slower = None if schedule is None else (lambda done: schedule(min(1.0, done * every)))
        return [
            self.scheduled(self.optimizer(self.scoring_part().parameters())),
            self.scheduled(self.optimizer(self.distorter.parameters()), slower),
        ]

    def move_average(self) -> None:
        """Update the average after the weights."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.scoring_part())

    # ------------------------------------------------------------------------------ scoring

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class."""
        x = self.scaled(image)
        encoder, decoder = self.scoring_networks()
        error = (decoder(encoder(x)) - x).square().mean(dim=1, keepdim=True)
        anomaly_map = smooth(error, self.smoothing)  # (B, 1, H, W)
        if self.score == "mean":
            return Prediction(anomaly_map, error.mean(dim=(1, 2, 3)))
        return Prediction(anomaly_map, pooled_maximum(anomaly_map, self.pool))

    def scoring_part(self) -> nn.ModuleList:
        """Return the encoder and the decoder."""
        return nn.ModuleList([self.encoder, self.decoder])

    def scoring_networks(self) -> Iterator[nn.Module]:
        """Return the averaged encoder and decoder, or the trained ones if no average is kept."""
        return (self.scoring_part() if self.averaged is None else self.averaged.module).children()

    def scaled(self, image: Tensor) -> Tensor:
        """Bring images to the range that the networks see.

        Raises:
            UserError: The stages cannot halve the images evenly.
        """
        check_multiple(image.shape[-2:], self.multiple, "the stride of the encoding")
        return 2 * image - 1 if self.signed else image
