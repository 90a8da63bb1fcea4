"""Textures, from a folder of images or drawn at random."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anomaly_lit.folders import walk_images
from anomaly_lit.synthesis.base import pixel_grid
from anomaly_lit.synthesis.noise import fractal_noise
from anomaly_lit.types import UserError


class TextureFolder:
    """Images of a folder, read and resized on first use, then kept on the device.

    Args:
        folder: Folder to search, with all its sub-folders.
        most: Largest number of images to keep, spread evenly over the folder; None keeps all. Each
            takes 3 bytes per pixel, so 500 images of 256 x 256 take 98 MB.

    Raises:
        UserError: The folder does not exist or has no image.
    """

    def __init__(self, folder: str, most: int | None = 500) -> None:
        path = Path(folder).expanduser()
        files = walk_images(path)
        if not files or (most is not None and most < 1):
            found = "no image" if path.is_dir() else "no folder"
            raise UserError(
                f"dataset.synthesis.texture_dir={folder}: {found} there (of which "
                f"max_textures={most} are taken); null draws textures instead"
            )
        self.files = files if most is None else files[:: -(-len(files) // most)]
        self.bank: dict[tuple[int, int, str], Tensor] = {}  # by height, width and device

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw (B, 3, H, W) float32 in [0, 1], with replacement."""
        device = generator.device
        key = (height, width, str(device))
        if key not in self.bank:
            self.bank[key] = self._read(height, width).to(device)
        bank = self.bank[key]
        pick = torch.randint(len(bank), (batch,), generator=generator, device=device)
        return bank[pick].float() / 255

    def _read(self, height: int, width: int) -> Tensor:
        bank = torch.empty(len(self.files), 3, height, width, dtype=torch.uint8)
        for row, file in enumerate(self.files):
            try:
                with Image.open(file) as image:
                    resized = image.convert("RGB").resize(
                        (width, height), Image.Resampling.BILINEAR
                    )
            except OSError as error:
                raise UserError(
                    f"the texture {file} cannot be read ({error}); replace it, or take it out of "
                    "dataset.synthesis.texture_dir"
                ) from error
            bank[row] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return bank


def procedural_textures(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw (B, 3, H, W) float32 in [0, 1]: noise, stripes, spots or a ramp in two colours."""
    device = generator.device

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, generator=generator, device=device)

    rows, columns = pixel_grid(height, width, device)
    angle, waves, phase = draw(0, 2 * math.pi), draw(3, 30), draw(0, 2 * math.pi)
    along = (angle.cos() * columns / width + angle.sin() * rows / height) * 2 * math.pi
    across = (angle.cos() * rows / height - angle.sin() * columns / width) * 2 * math.pi
    fields = torch.stack(
        [
            fractal_noise(batch, height, width, generator)[:, 0],
            0.5 + 0.5 * torch.sin(waves * along + phase),
            (torch.sin(waves * along + phase) * torch.sin(waves * across)).abs(),
            0.5 + along / (4 * math.pi),
        ]
    )  # (4, B, H, W)
    kind = torch.randint(len(fields), (batch,), generator=generator, device=device)
    field = fields[kind, torch.arange(batch, device=device)][:, None].clamp(0, 1)
    one, other = torch.rand(2, batch, 3, 1, 1, generator=generator, device=device)
    grain = torch.rand(batch, 1, height, width, generator=generator, device=device) - 0.5
    return (one + field * (other - one) + 0.15 * grain).clamp(0, 1)
