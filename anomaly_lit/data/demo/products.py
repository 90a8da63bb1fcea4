"""Pictures of five procedural products, with and without a defect.

Each product is a function `draw(rng, defect, flaw, size)`. `rng` decides the scene (pose,
tolerance, texture), `flaw` decides where and how the defect lies, so the same `rng` state draws the
same object with and without it. The ground truth is then exact by construction: a pixel is
defective where the two drawings differ.

Lengths are in units of half the picture's side, so a drawing keeps its look at every size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_lit.data.demo.objects import capsule, circuit, gear
from anomaly_lit.data.demo.parts import Array, Mask, Rng, grid
from anomaly_lit.data.demo.textures import fabric, wood

Draw = Callable[[Rng, str, Rng, int], Array]

GOOD = "good"
VISIBLE = 0.06  # a change of less than this share of full scale is not part of a defect's mask


class Product(NamedTuple):
    """How a category is drawn and what can be wrong with it."""

    draw: Draw  # (rng, defect, flaw, size) -> (H, W, 3) in [0, 1]
    defects: tuple[str, ...]


PRODUCTS: dict[str, Product] = {
    "capsule": Product(capsule, ("contamination", "crack", "dent", "faulty_imprint")),
    "circuit": Product(
        circuit, ("cut_trace", "misplaced_component", "missing_component", "solder_bridge")
    ),
    "fabric": Product(fabric, ("broken_thread", "hole", "loose_thread", "stain")),
    "gear": Product(gear, ("blocked_hole", "missing_tooth", "rust", "scratch")),
    "wood": Product(wood, ("crack", "scratch", "stain", "worm_hole")),
}


def capture(rng: Rng, image: Array) -> NDArray[np.uint8]:
    """Photograph a drawing: uneven light of varying strength and colour, a lens, a noisy sensor."""
    size = image.shape[0]
    x, y = grid(size)
    turn, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2)
    light = rng.uniform(0.75, 1.15) + strength * (np.cos(turn) * x + np.sin(turn) * y)
    light = light - 0.05 * (x * x + y * y)
    image = image * light[..., None] * (1 + rng.uniform(-0.04, 0.04, 3))
    image = ndimage.gaussian_filter(image, (rng.uniform(0.3, 0.55), 0.45, 0))
    image = image + rng.normal(0, 0.012, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def picture(
    category: str, defect: str, seed: list[int], size: int
) -> tuple[NDArray[np.uint8], Mask]:
    """Draw and photograph one item.

    Args:
        category: A key of `PRODUCTS`.
        defect: `"good"` or one of the category's defects.
        seed: Decides everything that varies; the same seed gives the same bytes.
        size: Side of the square picture, in pixels.

    Returns:
        The image (H, W, 3) and the mask (H, W), true where the defect changed the item.
    """
    product = PRODUCTS[category]
    scene, flaw, camera = np.random.SeedSequence(seed).spawn(3)

    def draw(kind: str) -> Array:
        return product.draw(np.random.default_rng(scene), kind, np.random.default_rng(flaw), size)

    image = draw(defect)
    mask = np.zeros((size, size), dtype=bool)
    if defect != GOOD:
        changed = np.abs(image - draw(GOOD)).max(axis=-1) > VISIBLE
        gap = max(1, size // 128)  # closes pixels of a defect that happen to look as before
        mask = ndimage.binary_closing(np.pad(changed, gap), iterations=gap)[gap:-gap, gap:-gap]
        mask = ndimage.binary_fill_holes(mask)
    return capture(np.random.default_rng(camera), image), mask
