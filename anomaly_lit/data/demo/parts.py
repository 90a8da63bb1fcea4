"""What drawings are made of: coordinates, shapes given by signed distances, noise, light.

Lengths are in units of half the picture's side, so a drawing keeps its look at every size.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Rng = np.random.Generator
Colour = tuple[float, float, float]


def grid(size: int) -> tuple[Array, Array]:
    """Coordinates of the pixel centres, x to the right and y down, each (H, W) in (-1, 1)."""
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = np.meshgrid(axis, axis)
    return x, y


def pose(rng: Rng, size: int, angle: float, shift: float, scale: float) -> tuple[Array, Array]:
    """Coordinates on an object turned, moved and scaled by at most the given amounts."""
    x, y = grid(size)
    turn = rng.uniform(-angle, angle)
    dx, dy = rng.uniform(-shift, shift, 2)
    zoom = 1 + rng.uniform(-scale, scale)
    x, y = (x - dx) / zoom, (y - dy) / zoom
    return np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x


def cover(distance: Array, softness: float = 0.0) -> Array:
    """Share of each pixel inside a shape, in [0, 1], from its signed distance (< 0 inside)."""
    width = 2 / distance.shape[0] + softness
    return np.clip(0.5 - distance / width, 0, 1)


def paint(image: Array, colour: Array | Colour, where: Array) -> Array:
    """Lay a colour over an image with the given opacity."""
    opacity = where[..., None]
    return image * (1 - opacity) + np.asarray(colour) * opacity


def box(x: Array, y: Array, width: float, height: float, corner: float = 0.0) -> Array:
    """Signed distance to a rectangle around the origin."""
    dx, dy = np.abs(x) - width / 2 + corner, np.abs(y) - height / 2 + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def curve(x: Array, y: Array, points: Array) -> Array:
    """Distance to a polyline through `points` (n, 2)."""
    nearest = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in pairwise(points):
        ux, uy = bx - ax, by - ay
        along = ((x - ax) * ux + (y - ay) * uy) / max(ux * ux + uy * uy, 1e-12)
        along = np.clip(along, 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ux, y - ay - along * uy))
    return nearest


def noise(rng: Rng, size: int, scale: float, stretch: float = 1.0) -> Array:
    """Smooth periodic noise of unit deviation; `stretch` lengthens its grains along y."""
    sigma = scale * size / 2
    field = ndimage.gaussian_filter(
        rng.standard_normal((size, size)), (sigma * stretch, sigma), mode="wrap"
    )
    return (field - field.mean()) / field.std()


def sample(field: Array, x: Array, y: Array) -> Array:
    """Read a periodic field at coordinates in the units of `grid`."""
    size = field.shape[0]
    rows, columns = ((axis + 1) * size / 2 - 0.5 for axis in (y, x))
    return ndimage.map_coordinates(field, [rows, columns], order=1, mode="grid-wrap")


def blot(rng: Rng, x: Array, y: Array, centre: Array, radius: float, rough: float = 0.3) -> Array:
    """Signed distance to an irregular round patch."""
    dx, dy = x - centre[0], y - centre[1]
    angle = np.arctan2(dy, dx)
    edge = np.ones_like(angle)
    for wave in range(2, 7):
        edge += rough / wave * rng.uniform(-1, 1) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(dx, dy) - radius * edge


def stroke(rng: Rng, centre: Array, length: float, wobble: float, angle: float) -> Array:
    """Points (n, 2) of a wavering line around `centre`."""
    along = np.linspace(-0.5, 0.5, 9)
    across = np.cumsum(rng.uniform(-1, 1, 9)) * wobble
    across -= across.mean()
    cos, sin = np.cos(angle), np.sin(angle)
    x = length * along * cos - across * sin
    y = length * along * sin + across * cos
    return np.stack([centre[0] + x, centre[1] + y], axis=1)


def shade(albedo: Array, height: Array, gloss: float | Array, shininess: float = 20.0) -> Array:
    """Light a relief from the upper left: diffuse light and a highlight.

    Args:
        albedo: (H, W, 3) colour of the material.
        height: (H, W) relief in units of half the picture's side.
        gloss: Strength of the highlight.
        shininess: Exponent of the highlight; larger is smaller and sharper.
    """
    slope_y, slope_x = np.gradient(height * height.shape[0] / 2)
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
    light = np.array([-0.42, -0.52, 0.74])
    halfway = light + np.array([0.0, 0.0, 1.0])
    halfway /= np.linalg.norm(halfway)
    facing = (-slope_x * light[0] - slope_y * light[1] + light[2]) / norm
    mirror = (-slope_x * halfway[0] - slope_y * halfway[1] + halfway[2]) / norm
    diffuse = 0.32 + 0.85 * np.clip(facing, 0, 1)
    highlight = gloss * np.clip(mirror, 0, 1) ** shininess
    return albedo * diffuse[..., None] + highlight[..., None]


def shadow(image: Array, shape: Array, depth: float, strength: float) -> Array:
    """Darken the ground at the lower right of a shape, given by its coverage (H, W)."""
    size = shape.shape[0]
    shift = depth * size / 2
    soft = ndimage.gaussian_filter(ndimage.shift(shape, (shift, 0.8 * shift), order=1), shift * 0.7)
    return image * (1 - strength * soft * (1 - shape))[..., None]


def smooth_step(value: Array) -> Array:
    """Rise from 0 to 1 over [0, 1] with level ends."""
    value = np.clip(value, 0, 1)
    return value * value * (3 - 2 * value)
