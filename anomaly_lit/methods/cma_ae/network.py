"""Encoder, memories and decoder of CMA-AE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recall(NamedTuple):
    """What a memory makes of an encoding (B, C, h, w)."""

    out: Tensor  # (B, C, h, w)
    forget: Tensor  # (B, C, h, w) in [0, 1], the share of the encoding that is kept
    attention: Tensor | None  # (B, h * w, items), rows sum to 1
    written: Tensor | None  # (B, C, h, w), the memory's part of `out`

    def entropy(self) -> Tensor:
        """Return the mean entropy of the attention, in nats; 0 if there is no memory."""
        if self.attention is None:
            return self.out.new_zeros(())
        weight = self.attention.float()
        return -(weight * (weight + 1e-12).log()).sum(dim=-1).mean()

    def share(self) -> Tensor:
        """Return the norm of the memory's part over the sum of both parts' norms, in [0, 1]."""
        if self.written is None:
            return self.out.new_zeros(())
        written = self.written.float().norm()
        return written / (written + (self.out - self.written).float().norm()).clamp(min=1e-12)


class ClearMemory(nn.Module):
    """Replaces part of an encoding by what a memory of normal encodings holds.

    Args:
        channels: C of the encoding.
        items: Vectors in the memory.
        temperature: Temperature of the softmax.
        gates: See `CMAAE`.
    """

    def __init__(self, channels: int, items: int, temperature: float, gates: str) -> None:
        super().__init__()
        self.temperature = temperature
        self.gates = gates
        if gates != "none":
            self.items = nn.Parameter(torch.randn(items, channels) / channels**0.5)
        if gates in ("lstm", "convex"):
            count = 2 if gates == "lstm" else 1
            self.gate = nn.Conv2d(2 * channels, count * channels, 3, padding=1)
            nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]
            nn.init.ones_(self.gate.bias[:channels])  # type: ignore[index]  # near a plain auto-encoder

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Draw the items from encodings (B, C, h, w), so that both have the same scale.

        With items of another scale the memory would carry next to no signal, whatever the gates do.
        """
        if self.gates == "none":
            return
        tokens = z.float().transpose(0, 1).flatten(1).T  # (B * h * w, C)
        place = torch.randint(
            len(tokens), (len(self.items),), generator=generator, device=tokens.device
        )
        self.items.copy_(tokens[place])

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, h, w) to the memory's version of it and the (B, h * w, items) attention.

        The attention is a softmax over cosines, then hard shrinkage at 1 / items and normalisation
        (MemAE).
        """
        tokens = z.flatten(2).mT.float()  # (B, h * w, C)
        items = self.items.float()
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(items, dim=-1).T
        attention = (cosine / self.temperature).softmax(dim=-1)
        above = attention - 1 / len(items)
        attention = F.normalize(above.relu() * attention / (above.abs() + 1e-12), p=1, dim=-1)
        return (attention @ items).mT.reshape(z.shape).to(z.dtype), attention

    def forward(self, z: Tensor) -> Recall:
        """Map (B, C, h, w) to the cleared encoding, with the gate and attention behind it."""
        if self.gates == "none":
            return Recall(z, torch.ones_like(z), None, None)
        remembered, attention = self.read(z)
        if self.gates == "memory":
            return Recall(remembered, torch.zeros_like(z), attention, remembered)
        gates = self.gate(torch.cat([z, remembered], dim=1)).sigmoid()
        forget = gates[:, : z.shape[1]]
        write = gates[:, z.shape[1] :] if self.gates == "lstm" else 1 - forget
        written = write * remembered
        return Recall(forget * z + written, forget, attention, written)


def cover(corruption: Tensor, size: Sequence[int]) -> Tensor:
    """Map (B, 1, H, W) bool to (B, 1, *size) in {0., 1.}: 1 where a position covers any of it."""
    return F.adaptive_max_pool2d(corruption.float(), (size[0], size[1]))
