"""Pictures of five procedural products, with and without a defect.

Each product is a function `draw(rng, defect, flaw, size)`. `rng` decides the scene (pose,
tolerance, texture), `flaw` decides where and how the defect lies, so the same `rng` state draws the
same object with and without it. The ground truth is then exact by construction: a pixel is
defective where the two drawings differ.

Lengths are in units of half the picture's side, so a drawing keeps its look at every size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Rng = np.random.Generator
Colour = tuple[float, float, float]
Draw = Callable[[Rng, str, Rng, int], Array]

GOOD = "good"
VISIBLE = 0.06  # a change of less than this share of full scale is not part of a defect's mask


class Product(NamedTuple):
    """How a category is drawn and what can be wrong with it."""

    draw: Draw  # (rng, defect, flaw, size) -> (H, W, 3) in [0, 1]
    defects: tuple[str, ...]


# ---------------------------------------------------------------- parts of a drawing


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


# ---------------------------------------------------------------- the products

TEETH = 14
BOLTS = 6


def gear(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """A turned steel gear on a dark mat."""
    u, v = pose(rng, size, angle=0.05, shift=0.025, scale=0.01)
    x, y = grid(size)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    tooth = np.clip(2.4 * np.cos(TEETH * angle), -1, 1)
    if defect == "missing_tooth":
        which = 2 * np.pi * flaw.integers(TEETH) / TEETH
        away = np.abs((angle - which + np.pi) % (2 * np.pi) - np.pi)
        tooth = np.where(away < 2 * np.pi / TEETH, -1 + 0.25 * flaw.random(), tooth)
    outline = radius - 0.73 - 0.075 * tooth
    bore = np.minimum(radius - 0.2, box(u, v + 0.2, 0.11, 0.17))
    holes = np.full_like(u, np.inf)
    blocked = flaw.integers(BOLTS) if defect == "blocked_hole" else -1
    for bolt in range(BOLTS):
        if bolt != blocked:
            turn = 2 * np.pi * (bolt + 0.5) / BOLTS
            spot = np.hypot(u - 0.47 * np.cos(turn), v - 0.47 * np.sin(turn))
            holes = np.minimum(holes, spot - 0.085)
    body = np.maximum(outline, np.maximum(-bore, -holes))  # signed distance to the steel

    cutter = np.random.default_rng(TEETH)  # all gears are turned with the same tool
    marks = ndimage.gaussian_filter1d(cutter.standard_normal(4 * size), 2.0)
    turned = np.interp(radius, np.linspace(0, 1.6, 4 * size), marks / marks.std())
    glint = np.cos(2 * (np.arctan2(y, x) - 0.7)) * np.clip(radius / 0.3, 0, 1)
    steel = (0.60 + 0.035 * turned + 0.07 * glint)[..., None] * np.array([0.97, 1.0, 1.05])
    recess = smooth_step((radius - 0.32) / 0.04) * smooth_step((0.61 - radius) / 0.04)
    relief = 0.05 * smooth_step(-body / 0.06) - 0.035 * recess
    if defect == "rust":
        turn, reach = flaw.uniform(0, 2 * np.pi), flaw.uniform(0.35, 0.6)
        centre = reach * np.array([np.cos(turn), np.sin(turn)])
        patch = cover(blot(flaw, u, v, centre, flaw.uniform(0.13, 0.2), 0.6), 0.05)
        grain = 0.75 + 0.25 * np.clip(noise(flaw, size, 0.02), -1.5, 1.5)
        steel = paint(steel, np.array([0.46, 0.22, 0.09]) * grain[..., None], 0.9 * patch)
    if defect == "scratch":
        turn, reach = flaw.uniform(0, 2 * np.pi), flaw.uniform(0.4, 0.55)
        centre = reach * np.array([np.cos(turn), np.sin(turn)])
        line = stroke(flaw, centre, flaw.uniform(0.6, 0.8), 0.02, turn + flaw.uniform(0.5, 2.6))
        groove = curve(u, v, line)
        steel = paint(steel, (0.95, 0.95, 0.98), 0.9 * cover(groove - 0.09, 0.01))
        steel = paint(steel, (0.16, 0.16, 0.18), 0.9 * cover(groove - 0.055, 0.01))

    mat = np.array([0.15, 0.17, 0.20]) * (1 + 0.08 * noise(rng, size, 0.03))[..., None]
    part = cover(body)
    return paint(shadow(mat, part, 0.06, 0.7), shade(steel, relief, 0.18, 30), part)


# Where things lie on the board: (x, y, upright, kind). Kinds differ in colour and size.
PARTS = (
    (-0.64, -0.52, False, "resistor"),
    (-0.64, -0.2, False, "capacitor"),
    (0.64, -0.3, True, "resistor"),
    (0.64, 0.3, True, "capacitor"),
    (-0.64, 0.32, False, "resistor"),
)
TRACES = (
    ((-0.9, -0.8), (-0.3, -0.8), (-0.2, -0.66), (-0.2, -0.4)),
    ((0.9, -0.72), (0.2, -0.72), (0.07, -0.6), (0.07, -0.4)),
    ((-0.5, -0.2), (-0.36, -0.2)),
    ((-0.48, 0.32), (-0.42, 0.2), (-0.36, 0.2)),
    ((0.36, -0.07), (0.5, -0.07), (0.64, -0.16)),
    ((0.36, 0.2), (0.52, 0.2), (0.62, 0.28)),
    ((0.07, 0.4), (0.07, 0.6), (0.24, 0.74)),
    ((-0.2, 0.4), (-0.2, 0.56), (-0.48, 0.76)),
)
VIAS = ((-0.9, -0.8), (0.9, -0.72), (-0.85, 0.05), (0.88, 0.0), (0.38, -0.5), (-0.42, 0.52))
PIN_ROW = (-0.2, -0.065, 0.07, 0.205)


def circuit(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """A populated printed circuit, placed with a little play."""
    u, v = pose(rng, size, angle=0.03, shift=0.03, scale=0.01)
    tint = 1 + 0.06 * rng.uniform(-1, 1)
    speckle = (1 + 0.03 * noise(rng, size, 0.02))[..., None]
    image = np.array([0.04, 0.30, 0.17]) * tint * speckle
    broken = int(flaw.choice([0, 1, 6, 7])) if defect == "cut_trace" else -1
    for index, points in enumerate(TRACES):
        line = curve(u, v, np.array(points)) - 0.03
        if index == broken:
            middle = np.array(points[0]) + flaw.uniform(0.3, 0.75) * (
                np.array(points[1]) - points[0]
            )
            gouge = blot(flaw, u, v, middle, 0.115, 0.5)
            line = np.maximum(line, -gouge)
            image = paint(image, (0.72, 0.66, 0.42), 0.8 * cover(gouge + 0.01, 0.03))
        image = paint(image, np.array([0.12, 0.47, 0.25]) * tint, cover(line))
    gold = (0.86, 0.68, 0.30)
    for x, y in VIAS:
        ring = np.hypot(u - x, v - y)
        image = paint(image, gold, cover(ring - 0.07))
        image = paint(image, (0.06, 0.06, 0.06), cover(ring - 0.03))
    for x in np.linspace(-0.62, 0.62, 7):
        image = paint(image, gold, cover(box(u - x, v - 0.88, 0.12, 0.2, 0.02)))

    faulty = int(flaw.integers(len(PARTS))) if defect.endswith("_component") else -1
    for index, (x, y, upright, kind) in enumerate(PARTS):
        du, dv = (v - y, u - x) if upright else (u - x, v - y)
        play = rng.uniform(-0.012, 0.012, 2)
        for side in (-1, 1):
            image = paint(image, (0.70, 0.70, 0.66), cover(box(du - 0.13 * side, dv, 0.11, 0.17)))
        if index == faulty and defect == "missing_component":  # some flux is left behind
            flux = blot(flaw, u, v, np.array([x, y]), 0.2, 0.4)
            image = paint(image, (0.62, 0.45, 0.16), 0.6 * cover(flux, 0.03))
            continue
        du, dv = du - play[0], dv - play[1]
        if index == faulty:  # misplaced
            turn = flaw.choice([-1, 1]) * flaw.uniform(0.8, 1.3)
            du, dv = (
                np.cos(turn) * du + np.sin(turn) * dv,
                np.cos(turn) * dv - np.sin(turn) * du - flaw.uniform(0.0, 0.05),
            )
        image = component(image, du, dv, kind)
    image = chip(image, u, v)
    if defect == "solder_bridge":
        gap = flaw.integers(3)
        along = (PIN_ROW[gap] + PIN_ROW[gap + 1]) / 2
        across = flaw.choice([-0.36, 0.36])
        centre = np.array([along, across] if flaw.random() < 0.5 else [across, along])
        lump = blot(flaw, u, v, centre, 0.15, 0.3)
        solder = np.broadcast_to(np.array([0.66, 0.67, 0.68]), image.shape)
        relief = 0.06 * np.sqrt(np.clip(-lump / 0.15, 0, 1))
        image = paint(image, shade(solder, relief, 0.4, 20), cover(lump))
    return np.clip(image, 0, 1)


def component(image: Array, x: Array, y: Array, kind: str) -> Array:
    """Solder a small two-ended part with its centre at the origin of x, y."""
    body, colour = {
        "resistor": ((0.2, 0.15), (0.11, 0.11, 0.12)),
        "capacitor": ((0.19, 0.16), (0.60, 0.42, 0.26)),
    }[kind]
    whole = box(x, y, body[0] + 0.12, body[1], 0.02)
    image = shadow(image, cover(whole), 0.03, 0.6)
    height = 0.03 * smooth_step(-whole / 0.05)
    ends = shade(np.broadcast_to(np.array([0.74, 0.74, 0.74]), image.shape), height, 0.2)
    image = paint(image, ends, cover(whole))
    middle = shade(np.broadcast_to(np.array(colour), image.shape), height, 0.08)
    image = paint(image, middle, cover(box(x, y, body[0], body[1])))
    if kind == "resistor":
        image = paint(image, (0.85, 0.85, 0.85), cover(box(x, y, 0.1, 0.035)))
    return image


def chip(image: Array, u: Array, v: Array) -> Array:
    """Place the integrated circuit in the middle of the board."""
    for along in PIN_ROW:
        for side in (-0.36, 0.36):
            for x, y, width, height in ((along, side, 0.06, 0.16), (side, along, 0.16, 0.06)):
                image = paint(image, (0.76, 0.76, 0.74), cover(box(u - x, v - y, width, height)))
    case = box(u, v, 0.6, 0.6, 0.03)
    image = shadow(image, cover(case), 0.04, 0.6)
    plastic = np.broadcast_to(np.array([0.13, 0.13, 0.145]), image.shape)
    image = paint(image, shade(plastic, 0.04 * smooth_step(-case / 0.06), 0.1), cover(case))
    image = paint(image, (0.55, 0.55, 0.55), cover(np.hypot(u + 0.2, v + 0.2) - 0.035))
    for row, width in ((-0.02, 0.36), (0.08, 0.26)):
        image = paint(image, (0.62, 0.62, 0.62), cover(box(u, v - row, width, 0.045)))
    return image


def capsule(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """A printed two-coloured capsule on a pale tray."""
    u, v = pose(rng, size, angle=0.08, shift=0.03, scale=0.015)
    side = np.array([flaw.uniform(-0.45, 0.45), flaw.uniform(-0.12, 0.12)])
    girth = np.where(u < 0.04, 0.305, 0.285)
    if defect == "dent":
        edge = flaw.choice([-1, 1])
        pinch = np.exp(-(((u - side[0]) / 0.18) ** 2))
        girth = girth - 0.18 * pinch * np.clip(0.5 + 4 * edge * v, 0, 1)
    away = np.hypot(u - np.clip(u, -0.42, 0.42), v)
    body = away - girth
    relief = np.sqrt(np.clip(girth**2 - away**2, 0, None))

    red = np.array([0.78, 0.17, 0.14]) * (1 + 0.05 * rng.uniform(-1, 1))
    cream = np.array([0.93, 0.88, 0.76]) * (1 + 0.03 * rng.uniform(-1, 1))
    albedo = paint(np.broadcast_to(cream, (*u.shape, 3)), red, cover(u - 0.04))
    seam = np.exp(-(((u - 0.05) / 0.022) ** 2))
    albedo = albedo * (1 - 0.35 * seam)[..., None]
    imprint = np.minimum(
        np.abs(np.hypot(u - 0.27, v) - 0.085) - 0.022,
        np.minimum(box(u - 0.43, v, 0.05, 0.2), box(u - 0.53, v, 0.05, 0.2)),
    )
    if defect == "faulty_imprint":
        imprint = spoilt_imprint(imprint, u, v, flaw)
    albedo = paint(albedo, (0.16, 0.20, 0.36), 0.85 * cover(imprint))
    stripe = box(u + 0.3, v, 0.3, 0.05, 0.02)
    albedo = paint(albedo, (0.95, 0.9, 0.85), 0.85 * cover(stripe))
    if defect == "contamination":
        for _ in range(flaw.integers(3, 6)):
            spot = side + flaw.uniform(-0.14, 0.14, 2)
            speck = blot(flaw, u, v, spot, flaw.uniform(0.05, 0.09), 0.5)
            albedo = paint(albedo, (0.14, 0.12, 0.08), 0.9 * cover(speck, 0.01))
    if defect == "crack":
        line = stroke(flaw, side, flaw.uniform(0.45, 0.6), 0.07, flaw.uniform(0.9, 2.2))
        gap = cover(curve(u, v, line) - 0.045, 0.01)
        albedo = paint(albedo, (0.10, 0.05, 0.05), 0.9 * gap)

    tray = np.array([0.70, 0.73, 0.76]) * (1 + 0.01 * noise(rng, size, 0.05))[..., None]
    pill = cover(body)
    return paint(shadow(tray, pill, 0.1, 0.5), shade(albedo, relief, 0.45, 40), pill)


def spoilt_imprint(imprint: Array, u: Array, v: Array, flaw: Rng) -> Array:
    """Leave out a part of the imprint, or print it a second time beside the first."""
    if flaw.random() < 0.5:
        wiped = blot(flaw, u, v, np.array([flaw.uniform(0.25, 0.5), 0.0]), 0.2, 0.2)
        return np.maximum(imprint, -wiped)
    jump = flaw.choice([-1, 1]) * flaw.uniform(0.1, 0.14)
    second = np.minimum(
        np.abs(np.hypot(u - 0.29, v - jump) - 0.085) - 0.022,
        np.minimum(box(u - 0.45, v - jump, 0.05, 0.2), box(u - 0.55, v - jump, 0.05, 0.2)),
    )
    return np.minimum(imprint, second)


THREADS = 20  # across the picture


def fabric(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """A blue twill, laid under the camera thread by thread, slightly stretched."""
    u, v = pose(rng, size, angle=0.015, shift=0.02, scale=0.01)
    u = u + 0.004 * noise(rng, size, 0.3)
    v = v + 0.004 * noise(rng, size, 0.3)
    x, y = grid(size)
    column, row = u * THREADS / 2, v * THREADS / 2
    warp, weft = np.floor(column), np.floor(row)
    shades = rng.uniform(0.95, 1.05, (2, 64))
    warp_lies_up = (warp + weft) % 4 < 2

    def thread(across: Array, along: Array, lies_up: Mask) -> Array:
        """Relief of one direction's threads: round across, diving at the crossings' ends."""
        crown = np.sqrt(np.clip(1 - (2 * (across % 1) - 1) ** 2, 0, 1))
        return crown * np.where(lies_up, 1.0, 0.55) * (0.94 + 0.06 * np.cos(2 * np.pi * along))

    warp_height = thread(column, row, warp_lies_up)
    weft_height = thread(row, column, ~warp_lies_up)
    torn = np.zeros_like(u)
    if defect == "broken_thread":
        gone = np.floor(flaw.uniform(-0.6, 0.6) * THREADS / 4)
        start, length = flaw.uniform(-0.8, 0.1), flaw.uniform(0.6, 1.0)
        rows, columns = (v, u) if flaw.random() < 0.5 else (u, v)
        lane = np.floor((rows - np.median(rows)) * THREADS / 4 - 0.5) == gone  # two threads
        reach = columns - np.median(columns)
        torn = (lane & (reach > start) & (reach < start + length)).astype(float)
        if rows is v:
            weft_height = weft_height * (1 - torn)
        else:
            warp_height = warp_height * (1 - torn)
        warp_lies_up = np.where(torn > 0, rows is v, warp_lies_up)
    blue = np.array([0.20, 0.33, 0.56]) * shades[0][warp.astype(int) % 64][..., None]
    pale = np.array([0.62, 0.70, 0.80]) * shades[1][weft.astype(int) % 64][..., None]
    albedo = np.where(warp_lies_up[..., None].astype(bool), blue, pale)
    height = np.where(warp_lies_up, warp_height, weft_height)
    albedo = albedo * (0.35 + 0.65 * height * (1 - 0.9 * torn))[..., None]
    fibres = (1 + 0.05 * noise(rng, size, 0.012))[..., None]
    image = shade(albedo * fibres, 0.03 * height, 0.03)

    centre = flaw.uniform(-0.6, 0.6, 2)
    if defect == "hole":
        tear = blot(flaw, x, y, centre, flaw.uniform(0.13, 0.19), 0.7)
        image = image * (1 - 0.35 * cover(tear - 0.05, 0.1))[..., None]
        image = paint(image, (0.05, 0.05, 0.06), cover(tear + 0.015 * noise(flaw, size, 0.03)))
    if defect == "stain":
        spill = blot(flaw, x, y, centre, flaw.uniform(0.2, 0.3), 0.5)
        wet = 0.55 * cover(spill, 0.06) + 0.2 * np.exp(-((spill / 0.03) ** 2))
        image = paint(image, image * np.array([0.50, 0.36, 0.18]), np.clip(1.6 * wet, 0, 1))
    if defect == "loose_thread":
        line = stroke(flaw, centre, flaw.uniform(0.7, 1.0), 0.12, flaw.uniform(0, np.pi))
        fibre = curve(x, y, line) - 0.045
        image = shadow(image, cover(fibre), 0.04, 0.6)
        red = shade(
            np.broadcast_to(np.array([0.78, 0.25, 0.18]), image.shape),
            0.04 * smooth_step(-fibre / 0.045),
            0.1,
        )
        image = paint(image, red, cover(fibre))
    return np.clip(image, 0, 1)


def wood(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """A laminate board: the same printed grain on each, cut with a little play."""
    u, v = pose(rng, size, angle=0.02, shift=0.03, scale=0.01)
    x, y = grid(size)
    print_ = np.random.default_rng(THREADS)
    bend = 0.09 * sample(noise(print_, size, 0.3, 2.0), u, v)
    rings = np.sin(
        2 * np.pi * (3.2 * (u + bend) + 0.35 * sample(noise(print_, size, 0.12, 6.0), u, v))
    )
    fibre = sample(noise(print_, size, 0.012, 25.0), u, v)
    pores = np.clip(sample(noise(print_, size, 0.014, 7.0), u, v) - 1.5, 0, 1)
    tone = 0.5 + 0.22 * rings * np.abs(rings) + 0.12 * fibre
    light, dark = np.array([0.80, 0.60, 0.38]), np.array([0.55, 0.35, 0.19])
    image = paint(np.broadcast_to(light, (*u.shape, 3)), dark, np.clip(tone, 0, 1))
    image = image * (1 + 0.05 * rng.uniform(-1, 1)) * (1 - 0.35 * pores)[..., None]

    centre = flaw.uniform(-0.6, 0.6, 2)
    if defect == "scratch":
        line = stroke(flaw, centre, flaw.uniform(0.6, 0.9), 0.015, flaw.uniform(-0.8, 0.8))
        cut = curve(x, y, line)
        image = paint(image, (0.93, 0.82, 0.64), 0.85 * cover(cut - 0.022, 0.01))
        image = paint(image, (0.35, 0.22, 0.12), 0.6 * cover(np.abs(cut - 0.034) - 0.008))
    if defect == "worm_hole":
        for _ in range(flaw.integers(2, 5)):
            spot = centre + flaw.uniform(-0.25, 0.25, 2)
            hole = blot(flaw, x, y, spot, flaw.uniform(0.05, 0.08), 0.2)
            image = paint(image, (0.88, 0.74, 0.52), 0.6 * cover(hole - 0.025))
            image = paint(image, (0.10, 0.06, 0.04), cover(hole))
    if defect == "stain":
        spill = blot(flaw, x, y, centre, flaw.uniform(0.18, 0.28), 0.4)
        wet = 0.75 * cover(spill, 0.03) + 0.25 * np.exp(-((spill / 0.025) ** 2))
        image = paint(image, image * np.array([0.40, 0.38, 0.52]), np.clip(wet, 0, 1))
    if defect == "crack":
        line = stroke(
            flaw, centre, flaw.uniform(0.7, 1.1), 0.05, np.pi / 2 + flaw.uniform(-0.5, 0.5)
        )
        image = paint(image, (0.12, 0.07, 0.04), 0.95 * cover(curve(x, y, line) - 0.022, 0.02))
    return np.clip(image, 0, 1)


PRODUCTS: dict[str, Product] = {
    "capsule": Product(capsule, ("contamination", "crack", "dent", "faulty_imprint")),
    "circuit": Product(
        circuit, ("cut_trace", "misplaced_component", "missing_component", "solder_bridge")
    ),
    "fabric": Product(fabric, ("broken_thread", "hole", "loose_thread", "stain")),
    "gear": Product(gear, ("blocked_hole", "missing_tooth", "rust", "scratch")),
    "wood": Product(wood, ("crack", "scratch", "stain", "worm_hole")),
}


# ---------------------------------------------------------------- the camera


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
