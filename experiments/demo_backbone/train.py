"""Train the demo's backbone on pictures drawn by this script, and measure what that brings.

    python experiments/demo_backbone/train.py
    python experiments/demo_backbone/train.py --measure   only the numbers of the shipped file

draws collages of procedural textures and teaches a small network to tell, at every position and
from every stage, which texture lies there and with which parameters. No photograph, no other
network's weights and no picture of the demo takes part in training. The demo's pictures serve only
to measure: the nearest-neighbour distance between the features of test and training images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.data.demo.datamodule import CATEGORIES, generate_demo

NETWORK = "test_resnet"
STAGES = (1, 2, 3)
TILE = 64  # side of a texture and of a training image, in pixels
MEAN, STD = 0.5, 0.25
OUTPUT = Path(__file__).parents[2] / "anomaly_lit" / "weights" / "demo_backbone.safetensors"

Array = NDArray[np.float64]
Rng = np.random.Generator


# ---------------------------------------------------------------- textures


class Texture(NamedTuple):
    """A grey tile and what the network shall read from it."""

    values: Array  # (TILE, TILE) in [0, 1]
    family: int
    direction: float  # radians, modulo pi
    wavelength: float  # pixels


def smooth(rng: Rng, sigma_y: float, sigma_x: float) -> Array:
    """Return filtered noise of zero mean and unit deviation."""
    field = ndimage.gaussian_filter(rng.standard_normal((TILE, TILE)), (sigma_y, sigma_x))
    return (field - field.mean()) / (field.std() + 1e-9)


def turned(rng: Rng, direction: float) -> tuple[Array, Array]:
    """Pixel coordinates along and across a direction, slightly warped."""
    y, x = np.mgrid[:TILE, :TILE].astype(float) + rng.uniform(0, TILE, (2, 1, 1))
    bend = rng.choice([0.0, 0.0, 1.0]) * rng.uniform(0.3, 1.5)
    x, y = x + bend * smooth(rng, 8, 8), y + bend * smooth(rng, 8, 8)
    cos, sin = np.cos(direction), np.sin(direction)
    return cos * x + sin * y, cos * y - sin * x


def squash(field: Array) -> Array:
    """Map a field of about unit deviation into [0, 1]."""
    return 1 / (1 + np.exp(-1.7 * field))


def flat(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    return np.full_like(u, 0.5)


def grains(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    return squash(smooth(rng, wave / 4, wave / 4))


def fibres(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    field = smooth(rng, wave / 5, wave * 2)
    rows, columns = v % TILE, u % TILE
    return squash(ndimage.map_coordinates(field, [rows, columns], order=1, mode="grid-wrap"))


def stripes(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    return squash((1.0, 4.0)[rng.integers(2)] * np.sin(2 * np.pi * v / wave))


def checks(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    return squash(5 * np.sin(2 * np.pi * u / wave) * np.sin(2 * np.pi * v / wave))


def mesh(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    line = rng.uniform(0.15, 0.35)
    return np.clip(4 * (np.maximum(ramp(u, wave), ramp(v, wave)) - 1 + line) / line, 0, 1)


def ramp(axis: Array, wave: float) -> Array:
    """Distance to the middle between two lines, in [0, 1]."""
    return np.abs(2 * ((axis / wave) % 1) - 1)


def weave(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    half = wave / 2
    over = (np.floor(u / half) + np.floor(v / half)) % rng.choice([2, 3, 4])
    across = np.where(over < 1, u, v)
    crown = np.sqrt(1 - ramp(across, half) ** 2 + 1e-9)
    return np.clip(crown * np.where(over < 1, 1.0, 0.55), 0, 1)


def dots(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    u = u + wave / 2 * rng.integers(2) * (np.floor(v / wave) % 2)
    away = np.hypot((u / wave) % 1 - 0.5, (v / wave) % 1 - 0.5)
    return np.clip((rng.uniform(0.2, 0.4) - away) * wave / 1.5 + 0.5, 0, 1)


def cells(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    count = int(np.clip((TILE / wave) ** 2, 4, 120))
    points = rng.uniform(0, TILE, (count, 2))
    y, x = np.mgrid[:TILE, :TILE]
    away = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    nearest = np.partition(away, 1, axis=-1)[..., :2]
    edge = np.clip((nearest[..., 1] - nearest[..., 0]) / 2, 0, 1)
    return edge if rng.random() < 0.5 else rng.random(count)[away.argmin(axis=-1)]


def rings(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    return squash(2 * np.sin(2 * np.pi * np.hypot(u - u.mean(), v - v.mean()) / wave))


def relief(rng: Rng, u: Array, v: Array, wave: float) -> Array:
    slope_y, slope_x = np.gradient(smooth(rng, wave / 4, wave / 4))
    return squash((slope_x + slope_y) * wave / 4)


FAMILIES = (flat, grains, fibres, stripes, checks, mesh, weave, dots, cells, rings, relief)


def draw_texture(rng: Rng) -> Texture:
    family = int(rng.integers(len(FAMILIES)))
    direction, wavelength = rng.uniform(0, np.pi), float(np.exp(rng.uniform(np.log(4), np.log(20))))
    values = FAMILIES[family](rng, *turned(rng, direction), wavelength)
    return Texture(values, family, direction, wavelength)


# ---------------------------------------------------------------- collages


class Palette(NamedTuple):
    """All textures, stacked."""

    values: Tensor  # (n, TILE, TILE)
    family: Tensor  # (n,)
    numbers: Tensor  # (n, 3) direction as cosine and sine of twice the angle, log wavelength


def draw_palette(seed: int, count: int) -> Palette:
    rng = np.random.default_rng(seed)
    textures = [draw_texture(rng) for _ in range(count)]
    angle = torch.tensor([texture.direction for texture in textures])
    wave = torch.tensor([texture.wavelength for texture in textures])
    family = torch.tensor([texture.family for texture in textures])
    directed = torch.tensor([name in ("fibres", "stripes", "checks", "mesh", "weave", "dots")
                             for name in (f.__name__ for f in FAMILIES)])[family]  # fmt: skip
    numbers = torch.stack(
        [directed * (2 * angle).cos(), directed * (2 * angle).sin(), (wave / 9).log()], dim=1
    )
    values = torch.from_numpy(np.stack([texture.values for texture in textures])).float()
    return Palette(values, family, numbers.float())


class Collage(NamedTuple):
    """A batch of training images and the truth at every pixel."""

    image: Tensor  # (B, 3, TILE, TILE)
    piece: Tensor  # (B, TILE, TILE) int, which of the image's pieces lies on top
    family: Tensor  # (B, pieces) int
    numbers: Tensor  # (B, pieces, 9) direction, wavelength, two colours
    edge: Tensor  # (B, TILE, TILE) in [0, 1], 1 on the border of two pieces


def shapes(batch: int, generator: torch.Generator) -> Tensor:
    """Signed distances to random ellipses, boxes, half planes and strips, (B, TILE, TILE)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, generator=generator)

    axis = torch.arange(TILE).float()
    y, x = axis[:, None] - uniform(0, TILE), axis[None, :] - uniform(0, TILE)
    angle = uniform(0, 2 * torch.pi)
    u, v = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    width, height = uniform(2, 8).square() / 2, uniform(2, 8).square() / 2
    ellipse = ((u / width).square() + (v / height).square()).sqrt() - 1
    ellipse = ellipse * torch.minimum(width, height)
    box = torch.maximum(u.abs() - width, v.abs() - height)
    bent = v + 3 * (u / uniform(4, 12) + uniform(0, 6)).sin()
    strip = torch.maximum(bent.abs() - uniform(0.6, 3), u.abs() - uniform(8, 40))
    kind = torch.randint(5, (batch, 1, 1), generator=generator)
    distance = torch.where(kind == 0, ellipse, box)
    distance = torch.where(kind == 2, v, distance)
    return torch.where(kind >= 3, strip, distance)


def draw_collage(palette: Palette, batch: int, pieces: int, generator: torch.Generator) -> Collage:
    """Lay textured, coloured pieces over each other, then photograph them in uneven light."""
    pick = torch.randint(len(palette.family), (batch, pieces), generator=generator)
    colours = torch.rand(batch, pieces, 2, 3, generator=generator)
    near = 0.25 + 0.75 * torch.rand(batch, pieces, 1, generator=generator)  # often one hue
    colours[:, :, 1] = colours[:, :, 0].lerp(colours[:, :, 1], near)
    image = torch.zeros(batch, 3, TILE, TILE)
    top = torch.zeros(batch, TILE, TILE, dtype=torch.long)
    edge = torch.zeros(batch, TILE, TILE)
    for index in range(pieces):
        low, high = colours[:, index, :, :, None, None].unbind(1)
        layer = low + (high - low) * palette.values[pick[:, index]][:, None]
        if index == 0:
            image = layer
            continue
        distance = shapes(batch, generator)
        border = torch.exp(-distance.square() / 2)
        dark = 0.5 * torch.rand(batch, 1, 1, generator=generator)  # a bevel or a shadow
        image = torch.lerp(
            image * (1 - dark * border)[:, None], layer, (0.5 - distance).clamp(0, 1)[:, None]
        )
        top[distance < 0] = index
        edge[distance < 0] = 0
        edge = torch.maximum(edge, border)
    numbers = torch.cat([palette.numbers[pick], colours.flatten(2) * 2 - 1], dim=2)
    return Collage(photograph(image, generator), top, palette.family[pick], numbers, edge)


def photograph(image: Tensor, generator: torch.Generator) -> Tensor:
    """Vary strength, direction and colour of the light; add the sensor's noise."""
    batch = len(image)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator)

    axis = torch.linspace(-1, 1, TILE)
    slope = normal(1, 1, 1) * axis[:, None] + normal(1, 1, 1) * axis
    light = 1 + 0.12 * normal(1, 1, 1) + 0.06 * slope + 0.03 * normal(3, 1, 1)
    noise = 0.02 * torch.rand(batch, 1, 1, 1, generator=generator) * normal(3, TILE, TILE)
    return (image * light + noise).clamp(0, 1)


# ---------------------------------------------------------------- training


class Reader(nn.Module):
    """The backbone, and for each of its stages a linear read-out of the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = timm.create_model(NETWORK, features_only=True, out_indices=STAGES)
        outputs = len(FAMILIES) + 9 + 1
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, outputs, 1) for channels in self.network.feature_info.channels()
        )

    def loss(self, collage: Collage) -> Tensor:
        """Sum over stages of how badly texture, its parameters and borders were read."""
        features = self.network((collage.image - MEAN) / STD)
        losses = []
        for head, stage in zip(self.heads, features, strict=True):
            stride = TILE // stage.shape[-1]
            spot = slice((stride - 1) // 2, None, stride)  # the pixel in the middle of a cell
            piece = collage.piece[:, spot, spot].flatten(1)  # (B, h * w)
            rows = torch.arange(len(piece))[:, None]
            answer = head(stage).flatten(2).transpose(1, 2)  # (B, h * w, outputs)
            family, numbers, edge = answer.split([len(FAMILIES), 9, 1], dim=2)
            near = F.max_pool2d(collage.edge[:, None], stride).flatten(1)
            losses += [
                F.cross_entropy(family.transpose(1, 2), collage.family[rows, piece]),
                2 * F.mse_loss(numbers, collage.numbers[rows, piece]),
                F.binary_cross_entropy_with_logits(edge[..., 0], near),
            ]
        return torch.stack(losses).sum()


def train(seed: int, steps: int, batch: int, palette_size: int) -> nn.Module:
    """Train the network and give it back in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    palette = draw_palette(seed, palette_size)
    print(f"{palette_size} textures drawn in {time.perf_counter() - start:.0f} s")
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    total = 0.0
    for step in range(1, steps + 1):
        loss = reader.loss(draw_collage(palette, batch, 6, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 200 == 0:
            print(f"step {step}: loss {total / 200:.3f}, {time.perf_counter() - start:.0f} s")
            total = 0.0
    return reader.network.eval()


# ---------------------------------------------------------------- measuring


def read(paths: list[Path]) -> Tensor:
    """Images as (n, 3, H, W) in [0, 1]."""
    arrays = [np.asarray(Image.open(path)) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def describe(network: nn.Module, images: Tensor, side: int) -> Tensor:
    """Stacked features of all stages on one map, (n, side, side, C)."""
    maps = []
    for part in images.split(20):
        stages = [
            F.interpolate(stage, size=(side, side), mode="bilinear", align_corners=True)
            for stage in network((part - MEAN) / STD)
        ]
        maps.append(F.avg_pool2d(torch.cat(stages, dim=1), 3, 1, 1, count_include_pad=False))
    return torch.cat(maps).permute(0, 2, 3, 1)


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Chance that an anomalous image outranks a normal one."""
    above = scores[labels][:, None] - scores[~labels][None]
    return float(((above > 0) + 0.5 * (above == 0)).double().mean())


@torch.no_grad()
def measure(network: nn.Module, root: Path, side: int = 16) -> dict[str, float]:
    """Image AUROC per category: largest distance to the nearest feature of a training image."""
    results = {}
    for category in CATEGORIES:
        tests = sorted((root / category / "test").rglob("*.png"))
        labels = torch.tensor([path.parent.name != "good" for path in tests])
        normal = describe(network, read(sorted((root / category / "train").rglob("*.png"))), side)
        found = describe(network, read(tests), side)
        memory = normal.flatten(0, 2)
        distance = torch.stack([torch.cdist(one.flatten(0, 1), memory).amin(1) for one in found])
        results[category] = auroc(distance.amax(dim=1), labels)
    return results


def mean_image(root: Path) -> dict[str, float]:
    """Image AUROC per category of the plain squared distance to the mean training image."""
    results = {}
    for category in CATEGORIES:
        tests = sorted((root / category / "test").rglob("*.png"))
        labels = torch.tensor([path.parent.name != "good" for path in tests])
        mean = read(sorted((root / category / "train").rglob("*.png"))).mean(dim=0)
        results[category] = auroc((read(tests) - mean).square().mean(dim=(1, 2, 3)), labels)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: one row per network."""
    rows = [["weights", *CATEGORIES, "mean"]]
    rows.append(["---"] * len(rows[0]))
    for name, values in results.items():
        mean = sum(values.values()) / len(values)
        rows.append([name, *(f"{value:.3f}" for value in (*values.values(), mean))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="train the demo's backbone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--textures", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--measure", action="store_true", help="do not train, measure the file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.measure:
        start = time.perf_counter()
        network = train(options.seed, options.steps, options.batch, options.textures)
        state = {key: value.half() for key, value in network.state_dict().items() if value.ndim}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, options.output, metadata={"architecture": NETWORK})
        seconds = time.perf_counter() - start
        size = options.output.stat().st_size / 1e6
        print(f"{options.output}: {size:.2f} MB, {seconds:.0f} s on {options.threads} thread(s)")
    torch.manual_seed(options.seed)
    random = timm.create_model(NETWORK, features_only=True, out_indices=STAGES).eval()
    trained = timm.create_model(NETWORK, features_only=True, out_indices=STAGES).eval()
    weights = {key: value.float() for key, value in load_file(options.output).items()}
    trained.load_state_dict(weights, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        root = generate_demo(Path(folder) / "demo")
        results = {
            f"{name}, {side} x {side}": measure(network, root, side)
            for side in (16, 32)
            for name, network in (("random", random), ("trained", trained))
        }
        print(table({"mean image": mean_image(root)} | results))


if __name__ == "__main__":
    main()
