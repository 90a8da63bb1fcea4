"""The demo's objects: a gear, a circuit board and a capsule."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from anomaly_lit.data.demo.parts import (
    Array,
    Rng,
    blot,
    box,
    cover,
    curve,
    grid,
    noise,
    paint,
    pose,
    shade,
    shadow,
    smooth_step,
    stroke,
)

TEETH = 14
BOLTS = 6


def gear(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """Draw a rotated steel gear on a dark mat."""
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
    """Draw a printed circuit with its parts, placed with a little play."""
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
    """Draw a printed two-coloured capsule on a pale tray."""
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
