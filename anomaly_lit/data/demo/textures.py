"""The demo's textures: a woven fabric and a wooden board."""

from __future__ import annotations

import numpy as np

from anomaly_lit.data.demo.parts import (
    Array,
    Mask,
    Rng,
    blot,
    cover,
    curve,
    grid,
    noise,
    paint,
    pose,
    sample,
    shade,
    shadow,
    smooth_step,
    stroke,
)

THREADS = 20  # across the picture


def fabric(rng: Rng, defect: str, flaw: Rng, size: int) -> Array:
    """Draw a blue twill, thread by thread, slightly stretched."""
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
    """Draw a laminate board: the same printed grain on each, cut with a little play."""
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
