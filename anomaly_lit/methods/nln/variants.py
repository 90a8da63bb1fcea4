"""How the auto-encoders of NLN are trained, and how their errors are measured.

Each kind has phases. In a training step every phase takes one step, in order, with an optimiser and
loss of its own. Codes are (N, latent), patches (N, 3, p, p) in [0, 1]. Discriminators give logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.latent import LatentAutoencoder


class Phase(NamedTuple):
    """A part of a training step."""

    parts: list[nn.Module]  # what it trains
    rate: float | None  # the published learning rate; None is that of the optimiser


class Plain(nn.Module):
    """A plain auto-encoder; errors are measured between pixels."""

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def phases(self) -> dict[str, Phase]:
        """Return the phases of a training step by name; the first one is `reconstruct`."""
        return {"reconstruct": Phase([self], None)}

    def encode(self, patches: Tensor) -> Tensor:
        """Return the codes among which neighbours are sought."""
        return self.autoencoder.encoder(patches).float()

    def decode(self, codes: Tensor) -> Tensor:
        """Return the patches rebuilt from codes."""
        return self.autoencoder.decoder(codes).float().sigmoid()

    def losses(self, phase: str, patches: Tensor) -> dict[str, Tensor]:
        """Return the terms of a phase."""
        logits = self.autoencoder.decoder(self.encode(patches)).float()
        return {"reconstruction": F.binary_cross_entropy_with_logits(logits, patches)}

    def error(self, patches: Tensor, code: Tensor, near: Tensor, rebuilt: Tensor) -> Tensor:
        """Return one error for each patch, (N,).

        Args:
            patches: The patches.
            code: Their codes.
            near: (N, k, latent), the codes of their neighbours.
            rebuilt: (N, k, 3, p, p), the patches rebuilt from those.
        """
        return (patches[:, None] - rebuilt).abs().mean(dim=(1, 2, 3, 4))


class Variational(Plain):
    """A variational auto-encoder; its codes are the means.

    As published, mean and variance are read from 32 values, and the cross entropy counts 32 x 32
    times whatever the patch.
    """

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__(autoencoder)
        self.narrow = nn.Sequential(nn.Linear(autoencoder.latent, 32), nn.ReLU())
        self.mean = nn.Linear(32, autoencoder.latent)
        self.log_variance = nn.Linear(32, autoencoder.latent)

    def encode(self, patches: Tensor) -> Tensor:
        """Return the means."""
        return self.mean(self.narrow(self.autoencoder.encoder(patches))).float()

    def losses(self, phase: str, patches: Tensor) -> dict[str, Tensor]:
        """Return the weighted cross entropy and the divergence."""
        found = self.narrow(self.autoencoder.encoder(patches))
        mean, log_variance = self.mean(found).float(), self.log_variance(found).float()
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        logits = self.autoencoder.decoder(code).float()
        wrong = F.binary_cross_entropy_with_logits(logits, patches)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        return {"reconstruction": 32 * 32 * wrong, "divergence": divergence.mean()}


class Adversarial(Plain):
    """An adversarial auto-encoder: a discriminator tells codes from normal noise."""

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__(autoencoder)
        layers: list[nn.Module] = []
        for given, made in ((autoencoder.latent, 64), (64, 128), (128, 256)):
            layers += [nn.Linear(given, made), nn.LeakyReLU(0.2), nn.Dropout(0.3)]
        self.discriminator = nn.Sequential(*layers, nn.Linear(256, 1))

    def phases(self) -> dict[str, Phase]:
        """Return the phases: rebuild patches, tell codes from noise, pass codes off as noise."""
        return {
            "reconstruct": Phase([self.autoencoder], 1e-5),
            "discriminate": Phase([self.discriminator], 1e-5),
            "fool": Phase([self.autoencoder.encoder], 1e-5),
        }

    def losses(self, phase: str, patches: Tensor) -> dict[str, Tensor]:
        """Return the terms of a phase."""
        if phase == "reconstruct":
            return super().losses(phase, patches)
        code = self.encode(patches)
        if phase == "fool":
            return {"fooled": verdict(self.discriminator(code), real=True)}
        noise = torch.randn_like(code)
        seen = self.discriminator(torch.cat([noise, code.detach()])).chunk(2)
        return {"told_apart": verdict(seen[0], real=True) + verdict(seen[1], real=False)}


class Residual(Plain):
    """A discriminator tells images from rebuilt ones; errors are measured between its features."""

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__(autoencoder)
        self.describe = autoencoder.new_encoder()
        self.judge = nn.Linear(autoencoder.latent, 1)

    def phases(self) -> dict[str, Phase]:
        """Return the phases: rebuild patches, tell them from images, pass them off as images."""
        return {
            "reconstruct": Phase([self.autoencoder], None),
            "discriminate": Phase([self.describe, self.judge], 1e-5),
            "fool": Phase([self.autoencoder], 1e-5),
        }

    def losses(self, phase: str, patches: Tensor) -> dict[str, Tensor]:
        """Return the terms of a phase."""
        if phase == "reconstruct":
            return super().losses(phase, patches)
        rebuilt = self.decode(self.encode(patches))
        if phase == "fool":
            return {"fooled": verdict(self.judge(self.describe(rebuilt)), real=True)}
        seen = self.judge(self.describe(torch.cat([patches, rebuilt.detach()]))).chunk(2)
        return {"told_apart": verdict(seen[0], real=True) + verdict(seen[1], real=False)}

    def error(self, patches: Tensor, code: Tensor, near: Tensor, rebuilt: Tensor) -> Tensor:
        """Return the mean absolute difference of the discriminator's features."""
        there = self.describe(rebuilt.flatten(0, 1)).unflatten(0, rebuilt.shape[:2])
        return (self.describe(patches)[:, None] - there).abs().mean(dim=(1, 2))


class Consistent(Residual):
    """As GANomaly: a second encoder reads rebuilt patches; errors are measured between codes."""

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__(autoencoder)
        self.second = autoencoder.new_encoder()

    def phases(self) -> dict[str, Phase]:
        """Return the phases: rebuild patches, encode them again, tell them from images."""
        return {
            "reconstruct": Phase([self.autoencoder], 1e-4),
            "encode": Phase([self.second], 1e-4),
            "discriminate": Phase([self.describe, self.judge], 1e-4),
        }

    def losses(self, phase: str, patches: Tensor) -> dict[str, Tensor]:
        """Return the terms of a phase."""
        if phase == "discriminate":
            return super().losses(phase, patches)
        code = self.encode(patches)
        logits = self.autoencoder.decoder(code).float()
        rebuilt = logits.sigmoid()
        if phase == "encode":
            again = self.second(rebuilt.detach()).float()
            return {"code": F.mse_loss(again, code.detach())}
        return {
            "reconstruction": 50 * F.binary_cross_entropy_with_logits(logits, patches),
            "fooled": verdict(self.judge(self.describe(rebuilt)), real=True),
            "consistency": F.mse_loss(self.second(rebuilt).float(), code),
        }

    def error(self, patches: Tensor, code: Tensor, near: Tensor, rebuilt: Tensor) -> Tensor:
        """Return the mean absolute difference of neighbours' codes to that of the rebuilt patch."""
        again = self.second(self.decode(code)).float()
        return (near - again[:, None]).abs().mean(dim=(1, 2))


VARIANTS: dict[str, type[Plain]] = {
    "plain": Plain,
    "variational": Variational,
    "adversarial": Adversarial,
    "residual": Residual,
    "consistent": Consistent,
}


def verdict(logits: Tensor, real: bool) -> Tensor:
    """Return the binary cross entropy of a discriminator's verdicts."""
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
