"""Synthetic anomalies: our batched recipes beside the same recipes done image by image.

    python benchmarks/synthesis.py --output experiments/benchmarks/synthesis.json
    python benchmarks/synthesis.py --table experiments/benchmarks/synthesis.json >> table.md

The baseline is plain numpy and Pillow, one image at a time, as data loaders do it: the same
textures from the same folder, the same augmentations, noise and ranges. Both run in one process on
the same number of threads, taking turns, on images already decoded and resized. With --device cuda
ours runs there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from anomaly_lit.files import environment
from anomaly_lit.synthesis import CutPaste, Mixed, Perlin
from anomaly_lit.synthesis.textures import procedural_textures

Numbers = np.random.Generator
SIZE = 256


# ---------------------------------------------------------------------- one image at a time


def plain_noise(numbers: Numbers, low: int) -> np.ndarray:
    rows, columns = 2 ** numbers.integers(low, 6, 2)
    angle = 2 * math.pi * numbers.random((rows + 1, columns + 1))
    gradient = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    y, x = np.meshgrid(
        np.arange(SIZE) * rows / SIZE, np.arange(SIZE) * columns / SIZE, indexing="ij"
    )
    r, c = y.astype(int), x.astype(int)
    y, x = y - r, x - c

    def dot(a: int, b: int) -> np.ndarray:
        corner = gradient[r + a, c + b]
        return corner[..., 0] * (y - a) + corner[..., 1] * (x - b)

    v, u = (6 * t**5 - 15 * t**4 + 10 * t**3 for t in (y, x))
    top = dot(0, 0) + u * (dot(0, 1) - dot(0, 0))
    bottom = dot(1, 0) + u * (dot(1, 1) - dot(1, 0))
    return math.sqrt(2) * (top + v * (bottom - top))


def plain_mask(numbers: Numbers, low: int, turn: float) -> np.ndarray:
    noise = Image.fromarray(plain_noise(numbers, low).astype(np.float32))
    turned = noise.rotate(numbers.uniform(-turn, turn), Image.Resampling.BILINEAR)
    return np.array(turned) > 0.5


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    moved = (np.array(hue).astype(int) + round(255 * turn)) % 256
    parts = (Image.fromarray(moved.astype(np.uint8)), saturation, value)
    return Image.merge("HSV", parts).convert("RGB")


def plain_augment(picture: Image.Image, numbers: Numbers) -> Image.Image:
    def gamma() -> Image.Image:
        scaled = (np.array(picture) / 255) ** numbers.uniform(0.5, 2, 3)
        return Image.fromarray((scaled * 255).astype(np.uint8))

    def brightness() -> Image.Image:
        changed = np.array(picture) * numbers.uniform(0.8, 1.2) + numbers.uniform(-30, 30)
        return Image.fromarray(changed.clip(0, 255).astype(np.uint8))

    def solarize() -> Image.Image:
        return ImageOps.solarize(picture, int(numbers.uniform(32, 128)))

    changes: list[Callable[[], Image.Image]] = [
        gamma,
        brightness,
        lambda: ImageEnhance.Sharpness(picture).enhance(numbers.uniform(0, 3)),
        lambda: turn_hue(picture, numbers.uniform(-50, 50) / 360),
        lambda: solarize() if numbers.random() < 0.5 else picture,
        lambda: ImageOps.posterize(picture, int(numbers.integers(2, 7))),
        lambda: ImageOps.invert(picture),
        lambda: ImageOps.autocontrast(picture),
        lambda: ImageOps.equalize(picture),
        lambda: picture.rotate(numbers.uniform(-45, 45), Image.Resampling.BILINEAR),
    ]
    for number in numbers.permutation(len(changes))[:3]:
        picture = changes[number]()
    return picture


def plain_perlin(
    image: np.ndarray, files: list[Path], numbers: Numbers, low: int, turn: float
) -> tuple[np.ndarray, np.ndarray]:
    file = files[numbers.integers(len(files))]
    picture = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    texture = np.array(plain_augment(picture, numbers)).astype(np.float32) / 255
    mask = plain_mask(numbers, low, turn)[..., None]
    beta = numbers.uniform(0, 0.8)
    return image * ~mask + mask * (beta * image + (1 - beta) * texture), mask


def plain_cutpaste(image: np.ndarray, numbers: Numbers) -> tuple[np.ndarray, np.ndarray]:
    picture = Image.fromarray((image * 255).astype(np.uint8))
    scar = numbers.random() < 0.5
    if scar:
        height, width = numbers.uniform(10, 25), numbers.uniform(2, 16)
    else:
        low, high = numbers.uniform(0.3, 1), numbers.uniform(1, 3.3)
        aspect = low if numbers.random() < 0.5 else high
        area = numbers.uniform(0.02, 0.15) * SIZE * SIZE
        height, width = math.sqrt(area / aspect), math.sqrt(area * aspect)
    height, width = min(int(height), SIZE - 1), min(int(width), SIZE - 1)
    top, left = (int(numbers.integers(0, SIZE - side)) for side in (height, width))
    patch = picture.crop((left, top, left + width, top + height))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        patch = enhancer(patch).enhance(numbers.uniform(0.6, 1.4))
    patch = turn_hue(patch, numbers.uniform(-0.1, 0.1)).convert("RGBA")
    if scar:
        patch = patch.rotate(numbers.uniform(-45, 45), expand=True)
    place = tuple(int(numbers.integers(0, max(1, SIZE - side))) for side in patch.size)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(patch.split()[-1], place)
    picture.paste(patch, place, patch)
    return np.array(picture).astype(np.float32) / 255, np.array(mask)[..., None] > 0


def plain(recipe: str, images: np.ndarray, files: list[Path], numbers: Numbers) -> None:
    for image in images:
        if recipe == "draem":
            plain_perlin(image, files, numbers, 0, 90)
        elif numbers.random() < 0.5:
            plain_perlin(image, files, numbers, 1, 5)
        else:
            plain_cutpaste(image, numbers)


# ---------------------------------------------------------------------- measuring


def ours(recipe: str, folder: str) -> torch.nn.Module:
    if recipe == "draem":
        return Perlin(texture_dir=folder, probability=1.0)
    perlin = Perlin(
        texture_dir=folder, exponents=(1, 5), rotation=5.0, probability=1.0, allow_empty=True
    )
    pasted = CutPaste(aspect_scale="halves", jitter=0.4)
    return Mixed({"cutpaste": pasted, "perlin": perlin}, {"cutpaste": 0.5, "perlin": 0.5})


def measure(recipe: str, batch: int, folder: Path, device: str, rounds: int) -> dict[str, object]:
    """Measure milliseconds an image, in turns, after one round that does not count."""
    generator = torch.Generator(device).manual_seed(0)
    image = torch.rand(batch, 3, SIZE, SIZE, generator=generator, device=device)
    images = image.permute(0, 2, 3, 1).cpu().numpy()
    files, numbers = sorted(folder.glob("*.png")), np.random.default_rng(0)
    recipe_module = ours(recipe, str(folder))
    times: dict[str, list[float]] = {"ours": [], "image by image": []}
    for count in range(rounds + 1):
        for name in times:
            start = time.perf_counter()
            if name == "ours":
                recipe_module(image, generator)
                if device != "cpu":
                    torch.cuda.synchronize()
            else:
                plain(recipe, images, files, numbers)
            if count:
                times[name].append(1000 * (time.perf_counter() - start) / batch)
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    return {
        "recipe": recipe,
        "batch": batch,
        **{f"{name}, ms an image": spread(values) for name, values in times.items()},
        "ratio": spread(ratios),
    }


def spread(values: list[float]) -> list[float]:
    """Return median, least and greatest."""
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def as_table(result: dict[str, object]) -> str:
    rows: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    titles = list(rows[0])
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " --: |" * (len(titles) - 1)]
    for row in rows:
        cells = [
            f"{v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" if isinstance(v, list) else str(v)
            for v in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = ", ".join(f"{key} {result[key]}" for key in ("commit", "hardware", "threads", "command"))
    return (
        "\n".join(lines) + f"\n\nMedian (least to greatest) of {result['rounds']} rounds; {note}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result and stop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.table:
        print(as_table(json.loads(arguments.table.read_text())))
        return
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        drawn = procedural_textures(32, SIZE, SIZE, torch.Generator().manual_seed(1))
        for row, texture in enumerate(drawn):
            pixels = (texture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{row:02d}.png")
        rows = [
            measure(recipe, batch, Path(folder), arguments.device, arguments.rounds)
            for recipe in ("draem", "onenip")
            for batch in (8, 32)
        ]
    result = {
        **environment(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "device": arguments.device,
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    print(as_table(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
