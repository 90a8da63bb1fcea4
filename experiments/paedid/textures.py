"""The region that PAEDID finds of defects drawn on textures, beside simpler ways to find it.

    ANOMALY_LIT_DATA=DIR python experiments/paedid/textures.py [TEXTURE ...]

Five textures are formulas at any phase, five are the same at places that a smooth random field
moves by some pixels, as cloth is stretched, and five are pictures of DIR/textures; all get noise.
A texture that only shifts lies in few dimensions, which a low rank finds; a bent one does not.
Images are 96 x 96, cut from the left three fifths of a picture for training, from the upper half
of the rest as held-out images and from the lower half for testing. The small preset learns each
texture from `STEPS` batches of 8. Blobs are strong or faint, `CONTRASTS`. Per texture, of
`TESTED` images with a blob:

- IoU of the region, whose threshold follows from normal images,
- the best IoU of what the same auto-encoder leaves of the image, over all thresholds,
- likewise of what the principal components of 200 training images leave,
- the share of pixels that are marked in as many images without a defect, and the seconds an image
  takes.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, read_image

from anomaly_lit.methods import PAEDID

SIZE, NOISE = 96, 0.02
STEPS, HELD_OUT, TESTED = 1000, 20, 20
CONTRASTS = {"strong": (0.25, 0.5), "faint": (0.08, 0.16)}  # of the colour that changes most
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)  # of the low rank; the best one counts
FORMULAS = ("waves", "grid", "stripes", "dots", "cloth")
BENT, BENDS = 3.0, 3  # standard deviation in pixels, and how many random values along a side
PICTURES = ("banded/banded_0008", "banded/banded_0024", "braided/braided_0064",
            "chequered/chequered_0044", "crosshatched/crosshatched_0094")  # fmt: skip
Texture = Callable[[int, str], Tensor]  # how many images, and for what: training, holdout, test


def main(names: list[str]) -> None:
    """Print a table."""
    warnings.simplefilter("ignore")
    print("| texture | blobs | PAEDID | residual | low rank | normal pixels marked | s an image |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    shares: dict[tuple[str, str], list[list[float]]] = {}
    for name in names or [*FORMULAS, *(f"bent {name}" for name in FORMULAS), *PICTURES]:
        torch.manual_seed(0)
        texture = picture(name) if "/" in name else formula(name)
        method = trained(texture)
        with torch.inference_mode():
            method.measure(residual(method, texture(HELD_OUT, "holdout")))
            marked = float(
                method.segment(method.decompose(texture(TESTED, "test")).defect).float().mean()
            )
            for blobs, contrast in CONTRASTS.items():
                *found, seconds = compared(method, texture, contrast)
                for group in (kind_of(name), "all"):
                    shares.setdefault((group, blobs), []).append(found)
                cells = " | ".join(f"{100 * share:.1f}" for share in (*found, marked))
                print(f"| {name} | {blobs} | {cells} | {seconds:.2f} |", flush=True)
    print("\n| textures | blobs | PAEDID | residual | low rank |")
    print("| --- | --- | --: | --: | --: |")
    for (group, blobs), rows in sorted(shares.items(), key=lambda item: item[0][0] == "all"):
        means = " | ".join(f"{100 * sum(way) / len(way):.1f}" for way in zip(*rows, strict=True))
        print(f"| {group} ({len(rows)}) | {blobs} | {means} |")


def kind_of(name: str) -> str:
    """Return the group of a texture."""
    if "/" in name:
        return "pictures"
    return "bent formulas" if name.startswith("bent ") else "formulas"


def compared(
    method: PAEDID, texture: Texture, contrast: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Return the IoU of the three ways, and the seconds that a decomposition takes."""
    image, truth = with_blobs(texture(TESTED, "test"), contrast)
    start = time.perf_counter()
    found = method.segment(method.decompose(image).defect)
    seconds = (time.perf_counter() - start) / TESTED
    left = residual(method, image).norm(dim=1, keepdim=True)
    normal = texture(200, "training")
    return iou(found, truth), best_iou(left, truth), low_rank(normal, image, truth), seconds


def trained(texture: Texture) -> PAEDID:
    """Return the small preset, trained."""
    method = PAEDID(
        torch.optim.Adam,
        stride=16,
        channels=(16, 32, 64),
        latent=16,
        ssim_weight=0.0,
        sparsity=None,
        smoothness=None,
    )
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = torch.stack([*method.losses({"image": texture(8, "training")}).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return method.eval()


def residual(method: PAEDID, image: Tensor) -> Tensor:
    return image - method.prior(image)


# --------------------------------------------------------------------------------------- images


def picture(name: str) -> Texture:
    """Return crops of a picture; each use has its own part of it."""
    file = Path(os.environ["ANOMALY_LIT_DATA"], "textures", f"{name}.jpg")
    whole = read_image(str(file), ImageReadMode.RGB) / 255
    border, middle = 3 * whole.shape[2] // 5, whole.shape[1] // 2
    parts = {
        "training": whole[..., :border],
        "holdout": whole[:, :middle, border:],
        "test": whole[:, middle:, border:],
    }

    def crops(count: int, use: str) -> Tensor:
        part = parts[use]
        rows = torch.randint(part.shape[1] - SIZE + 1, (count,)).tolist()
        columns = torch.randint(part.shape[2] - SIZE + 1, (count,)).tolist()
        cut = [part[:, r : r + SIZE, c : c + SIZE] for r, c in zip(rows, columns, strict=True)]
        return noisy(torch.stack(cut))

    return crops


def formula(name: str) -> Texture:
    """Return a texture at any phase, and bent if its name says so."""
    axis, turn = torch.arange(float(SIZE)), 2 * math.pi
    bent, name = BENT * name.startswith("bent "), name.removeprefix("bent ")

    def images(count: int, use: str) -> Tensor:
        a, b = turn * torch.rand(2, count, 1, 1)
        shift = F.interpolate(torch.randn(count, 2, BENDS, BENDS), (SIZE, SIZE), mode="bicubic")
        rows, columns = axis[:, None] + bent * shift[:, 0], axis + bent * shift[:, 1]
        value = {
            "waves": lambda: (0.6 * rows + 0.4 * columns + a).sin(),
            "grid": lambda: (
                0.7 * ((turn * rows / 12 + a).sin() * (turn * columns / 12 + b).sin()).sign()
            ),
            "stripes": lambda: (4 * (turn * columns / 16 + a).sin()).clamp(-1, 1),
            "dots": lambda: (
                ((turn * rows / 10 + a).cos() + (turn * columns / 10 + b).cos()).clamp(min=0) - 0.8
            ),
            "cloth": lambda: (
                0.6 * (turn * (rows + columns) / 9 + a).sin()
                + 0.6 * (turn * (rows - columns) / 14 + b).sin()
            ),
        }[name]()
        colour = torch.tensor([1, 0.9, 0.7]).view(3, 1, 1)
        return noisy(0.45 + 0.2 * value[:, None] * colour)

    return images


def noisy(image: Tensor) -> Tensor:
    return (image + NOISE * torch.randn_like(image)).clamp(0, 1)


def with_blobs(image: Tensor, contrast: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Add a blob of any colour to each image, up to 24 to 48 pixels across; return the masks."""
    count = len(image)
    field = F.interpolate(torch.randn(count, 1, 10, 10), (SIZE, SIZE), mode="bicubic")
    radius = 12 + 12 * torch.rand(count, 1, 1, 1)
    centre = radius + (SIZE - 2 * radius) * torch.rand(count, 2, 1, 1)
    axis = torch.arange(float(SIZE))
    rows, columns = (axis[:, None] - centre[:, :1]), (axis - centre[:, 1:])
    mask = (rows.square() + columns.square() < radius.square()) & (field > -0.2)
    colour = 2 * torch.rand(count, 3, 1, 1) - 1
    most = colour.abs().amax(dim=1, keepdim=True)
    low, high = contrast
    colour = colour / most * (low + (high - low) * torch.rand(count, 1, 1, 1))
    return (image + colour * mask).clamp(0, 1), mask


# --------------------------------------------------------------------------------------- judging


def low_rank(normal: Tensor, image: Tensor, truth: Tensor) -> float:
    """Return the best IoU of what the principal components of normal images leave."""
    mean = normal.flatten(1).mean(dim=0)
    basis = torch.linalg.svd(normal.flatten(1) - mean, full_matrices=False).Vh
    flat = image.flatten(1) - mean
    best = 0.0
    for count in COMPONENTS:
        kept = basis[:count]
        left = (flat - flat @ kept.T @ kept).view_as(image).norm(dim=1, keepdim=True)
        best = max(best, best_iou(left, truth))
    return best


def iou(found: Tensor, truth: Tensor) -> float:
    """Return the mean over images of the intersection over the union."""
    both = (found & truth).flatten(1).sum(dim=1)
    either = (found | truth).flatten(1).sum(dim=1)
    return float((both / either.clamp(min=1)).mean())


def best_iou(left: Tensor, truth: Tensor) -> float:
    """Return the largest `iou` over thresholds that are the same for all images."""
    thresholds = torch.linspace(0, float(left.max()), 101)[:-1]
    return max(iou(left > threshold, truth) for threshold in thresholds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
