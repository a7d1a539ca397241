"""Families of consumer goods photographed on a table. See hardware.py."""

import numpy as np

from . import materials as m
from .canvas import PI, Canvas, Draw, clip, cos, hypot, sin, smooth
from .shapes import box, dome, lattice, polygon, sectors, stick


def capsule(draw: Draw):
    one, two = m.plastic(draw), m.plastic(draw)
    length, radius = draw.uniform(0.32, 0.5), draw.uniform(0.16, 0.26)
    seam, band = draw.uniform(-0.15, 0.15), draw.chance(0.4)

    def paint(canvas: Canvas):
        outline = stick(canvas.u, canvas.v, (-length, 0), (length, 0), radius)
        canvas.part(outline, one, 0.22, radius)
        half = np.maximum(outline - 0.008, seam - canvas.u)
        canvas.part(half, two, 0.0, 0.02, base=0.22 * dome(outline, radius))
        if band:
            ink = np.maximum(abs(canvas.u + length * 0.55) - 0.025, outline)
            canvas.part(ink, m.DARK, 0.0, 0.02, base=0.22 * dome(outline, radius), removable=True)

    return two, paint


def tablet(draw: Draw):
    material, sides = m.plastic(draw), draw.choice((0, 0, 0, 3, 5, 6))
    radius, squash = draw.uniform(0.42, 0.6), draw.uniform(0.65, 1.0)
    score, letters, speck = draw.choice(("one", "cross", "none")), draw.integer(0, 3), draw.chance(0.35)

    def paint(canvas: Canvas):
        v = canvas.v * (1 / squash)
        if sides:
            outline = np.maximum(polygon(canvas.u, v, sides, radius * 0.85), canvas.radius() - radius)
        else:
            outline = (hypot(canvas.u, v) - radius) * squash
        canvas.part(outline, material, 0.16, radius * 0.6)
        curve = 0.16 * dome(outline, radius * 0.6)
        if score != "none":
            groove = abs(canvas.u) - 0.03
            if score == "cross":
                groove = np.minimum(groove, abs(canvas.v) - 0.03)
            canvas.part(np.maximum(groove, outline + 0.02), material, -0.035, 0.03, base=curve)
        for letter in range(letters):
            u = canvas.u - (letter - (letters - 1) / 2) * 0.14 - (0.16 if score == "one" else 0.0)
            mark = abs(box(u, canvas.v, 0.035, 0.07, 0.03)) - 0.01
            canvas.part(np.maximum(mark, outline), material, -0.02, 0.015, base=curve, removable=True)
        if speck:
            dots = canvas.noise(canvas.u * 40, canvas.v * 40)
            canvas.tint(smooth(dots, 0.8, 0.95) * clip(-outline * 50) * 0.6, m.shade(material.low, 0.6))

    return material, paint


def cable(draw: Draw):
    sheath, copper, count = m.plastic(draw), m.metal(draw), draw.choice((1, 2, 3, 3, 4, 5, 7))
    colours = [m.plastic(draw) for _ in range(min(count, 4))]
    radius = draw.uniform(0.62, 0.74)
    filler, strands = m.plastic(draw), draw.uniform(9, 16)

    def paint(canvas: Canvas):
        r = canvas.radius()
        canvas.part(r - radius, sheath, 0.08, 0.06)
        canvas.part(r - radius * 0.84, filler, -0.05, 0.05, base=0.08)
        ring = count - 1 if count >= 5 else count
        size = {1: 0.62, 2: 0.4, 3: 0.37, 4: 0.33}.get(count, 0.27) * radius
        offset = 0.0 if count == 1 else radius * 0.8 - size
        spots = [(offset * cos(2 * PI * k / ring), offset * sin(2 * PI * k / ring)) for k in range(ring)]
        if count >= 5:
            spots.append((0.0, 0.0))
        for k, (u, v) in enumerate(spots):
            u, v = u + canvas.draw.uniform(-0.015, 0.015), v + canvas.draw.uniform(-0.015, 0.015)
            d = canvas.radius(u, v)
            canvas.part(d - size, colours[k % len(colours)], 0.05, 0.05, base=0.05, removable=True)
            first, _, _ = canvas.cells(canvas.u * strands + 7.0 * k, canvas.v * strands)
            if canvas.n_pieces - 1 != canvas.damage.missing:
                canvas.part(d - size * 0.66, copper, 0.06 * (1 - clip(first)), 0.01, base=0.08)

    return sheath, paint


def button(draw: Draw):
    material = draw.choice((m.plastic, m.plastic, m.wood, m.metal))(draw)
    radius, holes = draw.uniform(0.5, 0.7), draw.choice((2, 4))
    rim, spread, size = draw.uniform(0.12, 0.25), draw.uniform(0.2, 0.3), draw.uniform(0.06, 0.1)
    thread = m.cloth(draw) if draw.chance(0.4) else None

    def paint(canvas: Canvas):
        r = canvas.radius()
        _, along, across = sectors(canvas.u, canvas.v, holes)
        hole = hypot(along - spread, across) - size
        canvas.part(np.maximum(r - radius, -hole), material, 0.10, radius * rim)
        canvas.part(np.maximum(r - radius * (1 - rim), -hole), material, -0.05, 0.06, base=0.10)
        if thread:
            for k in range(holes // 2):
                angle = 2 * PI * k / holes
                end = (spread * cos(angle), spread * sin(angle))
                stitch = stick(canvas.u, canvas.v, (-end[0], -end[1]), end, size * 0.7)
                canvas.part(stitch, thread, 0.05, 0.05, base=0.06, removable=True)

    return material, paint


def battery(draw: Draw):
    one, two, end = m.plastic(draw), m.plastic(draw), m.metal(draw)
    length, radius, split = draw.uniform(0.55, 0.72), draw.uniform(0.17, 0.27), draw.uniform(-0.4, 0.4)
    stripes = draw.integer(0, 3)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        tube = 0.25 * dome(abs(v) - radius, radius)
        canvas.part(box(u - length, v, 0.07, radius * 0.4, 0.02), end, 0.1, radius * 0.4, removable=True)
        canvas.part(box(u, v, length, radius, 0.03), end, 0.0, 0.02, base=tube)
        canvas.part(box(u, v, length - 0.05, radius * 1.01), one, 0.0, 0.02, base=tube)
        canvas.part(np.maximum(box(u, v, length - 0.05, radius * 1.01), u - split), two, 0.0, 0.02, base=tube)
        for k in range(stripes):
            mark = box(u + 0.25 - 0.2 * k, v, 0.04, radius * 0.6, 0.02)
            canvas.part(mark, end, 0.0, 0.02, base=tube, removable=True)

    return one, paint


def resistor(draw: Draw):
    body, lead, bands = m.plastic(draw), m.metal(draw), [m.plastic(draw) for _ in range(draw.integer(3, 5))]
    length, radius, bulge = draw.uniform(0.34, 0.46), draw.uniform(0.14, 0.2), draw.chance(0.6)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        sag = canvas.draw.uniform(-0.08, 0.08)
        for side in (-1, 1):
            wire = stick(u, v, (side * length, 0.0), (side * 0.95, sag * side), 0.025)
            canvas.part(wire, lead, 0.05, 0.025, base=0.03)
        outline = box(u, v, length, radius, radius * 0.8)
        if bulge:
            outline = np.minimum(outline, box(abs(u) - length * 0.75, v, length * 0.25, radius * 1.2, radius * 0.5))
        canvas.part(outline, body, 0.22, radius)
        curve = 0.22 * dome(outline, radius)
        for k, band in enumerate(bands):
            stripe = abs(u - length * (1.3 * k / (len(bands) - 1) - 0.65)) - 0.03
            canvas.part(np.maximum(stripe, outline - 0.004), band, 0.0, 0.02, base=curve, removable=True)

    return body, paint


def biscuit(draw: Draw):
    tone = draw.choice(((0.52, 0.33, 0.16), (0.74, 0.54, 0.30), (0.30, 0.18, 0.11), (0.82, 0.68, 0.44)))
    dough = m.Material("baked", m.shade(tone, 0.75), m.shade(tone, 1.12), 0.03, m.cast(draw))
    bit = m.plastic(draw)
    radius, chips, square = draw.uniform(0.55, 0.7), draw.integer(5, 14), draw.chance(0.35)
    docked, scallops = draw.chance(0.4), draw.choice((0, 0, 16, 24))

    def paint(canvas: Canvas):
        u, v, r = canvas.u, canvas.v, canvas.radius()
        edge = 0.06 * (canvas.cloud(u * 3, v * 3, 2) - 0.5)
        outline = box(u, v, radius * 0.85, radius * 0.85, 0.08) if square else r - radius
        if scallops:
            _, _, across = sectors(u, v, scallops)
            outline = outline + abs(across) * 0.5
        canvas.part(outline + edge, dough, 0.14, 0.18)
        canvas.tint(smooth(outline + edge, -0.14, 0.0) * (outline < 0) * 0.35, m.shade(tone, 0.55))
        if docked:
            _, a, b = lattice(u, v, 4, 4, radius * 0.36, radius * 0.36)
            canvas.part(hypot(a, b) - 0.035, dough, -0.08, 0.03, base=0.12)
        else:
            for _ in range(chips):
                angle, far = canvas.draw.uniform(0, 2 * PI), radius * 0.72 * canvas.draw.uniform(0.15, 1.0)
                size = canvas.draw.uniform(0.05, 0.1)
                canvas.part(canvas.radius(far * cos(angle), far * sin(angle)) - size + edge, bit, 0.06, size, base=0.12)

    return dough, paint


def hazelnut(draw: Draw):
    tone = draw.choice(
        ((0.55, 0.32, 0.15), (0.42, 0.24, 0.12), (0.66, 0.46, 0.26), (0.45, 0.40, 0.20), (0.60, 0.20, 0.12))
    )
    shell = m.Material("shell", m.shade(tone, 0.7), m.shade(tone, 1.2), draw.uniform(0.1, 0.4), m.grained(draw))
    crown = m.Material("shell", m.shade(tone, 1.1), m.shade(tone, 1.5), 0.0, m.cast(draw))
    radius, long, tip = draw.uniform(0.42, 0.55), draw.uniform(1.0, 1.45), draw.uniform(0.0, 0.25)

    def paint(canvas: Canvas):
        stretch = long * canvas.draw.uniform(0.95, 1.05)
        u, v = canvas.u * (1 / stretch), canvas.v
        wobble = 0.08 * (canvas.noise(u * 1.5 + 9, v * 1.5) - 0.5)
        outline = hypot(u, v) * (1 - tip * clip(u)) - radius + wobble
        canvas.part(outline, shell, 0.35, radius * 0.9)
        curve = 0.35 * dome(outline, radius * 0.9)
        top = canvas.radius(-radius * stretch * 0.85) - radius * 0.55 + wobble
        canvas.part(np.maximum(top, outline), crown, 0.01, 0.03, base=curve)

    return shell, paint


def die(draw: Draw):
    body, dots, pips = draw.choice((m.plastic, m.plastic, m.wood, m.stone))(draw), m.plastic(draw), draw.integer(2, 7)
    size, corner, radius = draw.uniform(0.48, 0.6), draw.uniform(0.06, 0.18), draw.uniform(0.06, 0.085)
    chosen = ((0, 8), (0, 4, 8), (0, 2, 6, 8), (0, 2, 4, 6, 8), (0, 2, 3, 5, 6, 8), (0, 2, 3, 4, 5, 6, 8))[pips - 2]

    def paint(canvas: Canvas):
        canvas.part(box(canvas.u, canvas.v, size, size, corner), body, 0.15, 0.08)
        number, a, b = lattice(canvas.u, canvas.v, 3, 3, size * 0.58, size * 0.58)
        pip = hypot(a, b) - radius
        for spot in chosen:
            canvas.part(pip + 9.0 * (number != spot).astype(np.float32), dots, -0.05, 0.05, base=0.15, removable=True)

    return body, paint
