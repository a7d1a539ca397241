"""Families of metal parts photographed on a table.

Each family draws the character of a category and returns its main material and paint(canvas), which paints one
specimen; what differs from specimen to specimen comes from canvas.draw.
"""

import numpy as np

from . import materials as m
from .canvas import PI, Canvas, Draw, clip, cos, hypot, sin, smooth
from .shapes import box, dome, lattice, polygon, sectors, star, stick


def washer(draw: Draw):
    outer = draw.uniform(0.5, 0.75)
    inner = outer * draw.uniform(0.35, 0.65)
    material, teeth = m.metal(draw), draw.choice((0, 0, 8, 12, 16))
    step = draw.uniform(0.3, 0.7) if draw.chance(0.4) else 0.0

    def paint(canvas: Canvas):
        r = canvas.radius()
        rim = r - outer
        if teeth:
            _, along, across = sectors(canvas.u, canvas.v, teeth)
            rim = np.minimum(rim, box(along - outer, across, 0.08, outer * 1.4 / teeth, 0.02))
        canvas.part(np.maximum(rim, inner - r), material, 0.05, 0.04)
        if step:
            middle = inner + (outer - inner) * step
            canvas.part(np.maximum(r - middle, inner - r), material, 0.03, 0.03, base=0.05)

    return material, paint


def nut(draw: Draw):
    inner, sides = draw.uniform(0.42, 0.62), draw.choice((6, 6, 6, 4, 8))
    hole, material, flange = inner * draw.uniform(0.45, 0.65), m.metal(draw), draw.chance(0.35)
    threads = draw.uniform(30, 60)

    def paint(canvas: Canvas):
        r = canvas.radius()
        if flange:
            canvas.part(np.maximum(r - inner * 1.32, hole - r), material, 0.06, 0.05)
        body = np.maximum(polygon(canvas.u, canvas.v, sides, inner), r - inner * 1.12)
        canvas.part(body, material, 0.12, 0.10, base=0.05)
        canvas.part(r - hole * 1.14, material, -0.08, 0.05, base=0.15)
        canvas.part(r - hole, m.DARK, 0.03 * sin(r * threads), 0.02, base=0.02)

    return material, paint


def screw_head(draw: Draw):
    radius, drive = draw.uniform(0.45, 0.68), draw.choice(("slot", "cross", "hex", "star", "square", "two"))
    depth, material, collar = draw.uniform(0.08, 0.14), m.metal(draw), draw.chance(0.4)
    size = radius * draw.uniform(0.45, 0.6)
    flat = draw.uniform(0.15, 0.6)

    def recess(canvas: Canvas, turned: float):
        c, s = cos(turned), sin(turned)
        u, v = canvas.u * c + canvas.v * s, canvas.v * c - canvas.u * s
        if drive == "slot":
            return box(u, v, radius * 1.1, size * 0.2)
        if drive == "cross":
            return np.minimum(box(u, v, size, size * 0.22, 0.02), box(u, v, size * 0.22, size, 0.02))
        if drive == "two":
            return hypot(abs(u) - size, v) - size * 0.28
        if drive == "star":
            return star(u, v, 6, size, size * 0.68)
        return polygon(u, v, 6 if drive == "hex" else 4, size * 0.8)

    def paint(canvas: Canvas):
        r = canvas.radius()
        turned = canvas.draw.uniform(0, 2 * PI)
        if collar:
            canvas.part(r - radius * 1.25, material, 0.04, 0.03)
        canvas.part(r - radius, material, 0.16, radius * flat, base=0.04)
        canvas.part(np.maximum(recess(canvas, turned), r - radius), material, -depth, 0.05, base=0.16)

    return material, paint


def bolt(draw: Draw):
    material, length, shank = m.metal(draw), draw.uniform(0.9, 1.3), draw.uniform(0.09, 0.17)
    head, depth = shank * draw.uniform(1.6, 2.2), draw.uniform(0.12, 0.22)
    pitch, pointed, plain_share = draw.uniform(0.055, 0.11), draw.chance(0.5), draw.uniform(0, 0.45)

    def paint(canvas: Canvas):
        u, v = canvas.u + length / 2, canvas.v
        taper = shank * (clip((length - u) * (1 / (2.5 * shank))) if pointed else 1.0)
        wave = (u + v * 0.25) * (1 / pitch)
        wave = 2 * abs(wave - np.floor(wave) - 0.5)
        threaded = smooth(u, depth + plain_share * length, depth + plain_share * length + 0.05)
        edge = abs(v) - taper * (1 - 0.22 * threaded * wave)
        canvas.part(np.maximum(edge, abs(u - length / 2) - length / 2), material, 0.14, shank)
        canvas.relief -= np.float32(0.035) * wave * threaded * clip(-edge * (4 / shank))
        canvas.part(box(u, v, depth, head, 0.03), material, 0.17, head * 0.7)

    return material, paint


def gear(draw: Draw):
    outer, teeth = draw.uniform(0.58, 0.74), draw.integer(10, 28)
    material = m.metal(draw) if draw.chance(0.7) else m.plastic(draw)
    tooth, bore = outer * draw.uniform(0.13, 0.2), outer * draw.uniform(0.14, 0.26)
    holes, hub, keyway = draw.choice((0, 3, 4, 5, 6)), draw.uniform(1.4, 1.9), draw.chance(0.5)

    def paint(canvas: Canvas):
        r = canvas.radius()
        number, along, across = sectors(canvas.u, canvas.v, teeth)
        width = (outer - along) * 0.35 + outer * 1.1 / teeth
        each = np.maximum(abs(across) - width, along - outer)
        body = r - (outer - tooth)
        bored = bore - r
        if keyway:
            bored = np.maximum(bored, -box(canvas.u - bore, canvas.v, bore * 0.35, bore * 0.28))
        canvas.part(np.maximum(each, outer * 0.6 - r), material, 0.10, 0.04, removable=True, groups=(number, teeth))
        body = np.maximum(body, bored)
        if holes:
            _, a, c = sectors(canvas.u, canvas.v, holes)
            middle = (outer - tooth + bore * hub) / 2
            size = (outer - tooth - bore * hub) * 0.34
            body = np.maximum(body, size - hypot(a - middle, c))
        canvas.part(body, material, 0.10, 0.04)
        canvas.part(np.maximum(r - bore * hub, bored), material, 0.06, 0.03, base=0.10)

    return material, paint


def bearing(draw: Draw):
    metal, balls_of, radius, balls = m.metal(draw), m.metal(draw), draw.uniform(0.62, 0.76), draw.integer(7, 14)
    inner, cage = draw.uniform(0.35, 0.48), m.plastic(draw) if draw.chance(0.5) else m.metal(draw)

    def paint(canvas: Canvas):
        r = canvas.radius()
        bore, race_in, race_out = radius * inner * 0.72, radius * inner * 1.15, radius * 0.8
        canvas.part(np.maximum(r - radius, bore - r), metal, 0.05, 0.03)
        canvas.part(np.maximum(r - race_out, race_in - r), m.DARK, 0.0, 0.03)
        middle, size = (race_in + race_out) / 2, (race_out - race_in) * 0.46
        canvas.part(abs(r - middle) - size * 0.35, cage, 0.04, 0.03, base=0.02)
        phase = canvas.draw.uniform(0, 2 * PI)
        number, along, across = sectors(canvas.u, canvas.v, balls, phase)
        ball = hypot(along - middle, across) - min(size, middle * 2.6 / balls)
        canvas.part(ball, balls_of, 0.12, size, base=0.03, removable=True, groups=(number, balls))
        for low, high in ((bore, race_in), (race_out, radius)):
            canvas.part(np.maximum(r - high, low - r), metal, 0.10, 0.03, base=0.03)

    return metal, paint


def impeller(draw: Draw):
    material, blades, radius = draw.choice((m.plastic, m.metal))(draw), draw.integer(3, 9), draw.uniform(0.62, 0.76)
    twist, hub, shroud = draw.uniform(0.5, 1.6) * draw.choice((-1, 1)), draw.uniform(0.16, 0.26), draw.chance(0.5)

    def paint(canvas: Canvas):
        r = canvas.radius()
        bend = r * twist
        c, s = cos(bend), sin(bend)
        number, along, across = sectors(canvas.u * c + canvas.v * s, canvas.v * c - canvas.u * s, blades)
        width = 0.9 / blades * (0.35 + along)
        blade = np.maximum(np.maximum(abs(across) - width, along - radius * 0.92), hub * 0.6 - r)
        canvas.part(blade, material, 0.08 + 0.25 * across, 0.05, base=0.03, removable=True, groups=(number, blades))
        if shroud:
            canvas.part(abs(r - radius) - 0.05, material, 0.12, 0.04)
        canvas.part(np.maximum(r - hub, hub * 0.3 - r), material, 0.18, 0.08)

    return material, paint


def key(draw: Draw):
    metal, bow, length = m.metal(draw), draw.uniform(0.2, 0.28), draw.uniform(0.75, 0.95)
    cuts = [draw.uniform(0.02, 0.1) for _ in range(6)]
    shape, grip = draw.choice((0, 3, 5, 6, 8)), m.plastic(draw) if draw.chance(0.4) else metal

    def paint(canvas: Canvas):
        u, v = canvas.u + length * 0.55, canvas.v
        blade = box(u - length / 2, v, length / 2 + 0.1, 0.1, 0.02)
        for k, cut in enumerate(cuts):
            centre = length * (0.38 + 0.11 * k)
            blade = np.maximum(blade, (0.1 - cut) - v - abs(u - centre) * 0.9 if cut > 0.03 else blade)
        canvas.part(blade, metal, 0.05, 0.03)
        canvas.part(box(u - length * 0.6, v + 0.03, length * 0.45, 0.018), metal, -0.02, 0.02, base=0.05)
        head = polygon(u, v, shape, bow) if shape else hypot(u, v) - bow
        ring = hypot(u + bow * 0.35, v) - bow * 0.3
        canvas.part(np.maximum(head, -ring), grip, 0.07, 0.04)

    return metal, paint


def spring(draw: Draw):
    metal, coils, radius = m.metal(draw), draw.integer(7, 14), draw.uniform(0.16, 0.3)
    length, wire, lean = draw.uniform(0.55, 0.75), draw.uniform(0.22, 0.3), draw.choice((-0.5, 0.5))

    def paint(canvas: Canvas):
        pitch = 2 * length * canvas.draw.uniform(0.95, 1.05) / coils
        swing = sin(clip(canvas.v * (1 / radius), -1.0, 1.0) * (PI / 2)) * (lean * pitch / 2)
        arch = dome(abs(canvas.v) - radius, radius)
        for side in (-1, 1):  # the back of the coils, then the front
            _, along, _ = lattice(canvas.u - side * swing, canvas.v, coils, 1, pitch, 9.0)
            rod = np.maximum(abs(along) - pitch * wire, abs(canvas.v) - radius)
            bend = (0.15 + 0.12 * side * arch) - 0.1
            canvas.part(rod, metal, 0.08, pitch * wire, base=bend, tone=0.25 * (side - 1))

    return metal, paint


def plate(draw: Draw):
    """A stamped bracket with holes and slots."""
    metal, width, height = m.metal(draw), draw.uniform(0.55, 0.78), draw.uniform(0.3, 0.55)
    corner, columns, rows = draw.uniform(0.03, 0.2), draw.integer(2, 4), draw.integer(1, 2)
    hole, slot, countersunk = draw.uniform(0.06, 0.1), draw.chance(0.5), draw.chance(0.5)
    rib = draw.chance(0.4)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        _, a, b = lattice(u, v, columns, rows, 1.5 * width / columns, 1.3 * height / rows)
        holes = box(a, b, hole * 1.9, hole, hole) if slot else hypot(a, b) - hole
        canvas.part(np.maximum(box(u, v, width, height, corner), -holes), metal, 0.06, 0.03)
        if countersunk:
            canvas.part(np.maximum(holes - 0.05, -holes), metal, -0.03, 0.05, base=0.06)
        if rib:
            canvas.part(box(u, v, width * 0.85, 0.03, 0.03), metal, 0.04, 0.03, base=0.06)

    return metal, paint


def can_lid(draw: Draw):
    metal, radius = m.metal(draw), draw.uniform(0.68, 0.8)
    tab, rings, slot = draw.uniform(0.16, 0.22), draw.integer(1, 3), draw.uniform(0.2, 0.3)
    coloured = m.plastic(draw) if draw.chance(0.4) else metal

    def paint(canvas: Canvas):
        u, v, r = canvas.u, canvas.v, canvas.radius()
        canvas.part(r - radius, metal, 0.12, 0.06)
        canvas.part(r - radius * 0.9, metal, -0.08, 0.05, base=0.12)
        for ring in range(rings):
            canvas.part(abs(r - radius * (0.82 - 0.08 * ring)) - 0.018, metal, 0.02, 0.018, base=0.04)
        mouth = hypot(u - radius * 0.4, v * 0.9) - slot
        canvas.part(abs(mouth) - 0.012, metal, -0.02, 0.012, base=0.04)
        handle = stick(u, v, (-tab * 1.5, 0.0), (tab * 0.6, 0.0), tab)
        opening = stick(u, v, (-tab * 1.5, 0.0), (-tab * 0.8, 0.0), tab * 0.5)
        canvas.part(np.maximum(handle, -opening), coloured, 0.05, 0.05, base=0.05, removable=True)
        canvas.part(r - 0.06, metal, 0.05, 0.05, base=0.10, removable=True)

    return metal, paint


def cap(draw: Draw):
    radius, crimps, material = draw.uniform(0.55, 0.72), draw.integer(18, 36), draw.choice((m.metal, m.plastic))(draw)
    print_ = m.plastic(draw)
    logo, points = draw.choice(("star", "ring", "bars", "disc", "none")), draw.integer(4, 8)
    size = radius * draw.uniform(0.35, 0.55)

    def paint(canvas: Canvas):
        r = canvas.radius()
        _, _, across = sectors(canvas.u, canvas.v, crimps)
        wave = abs(across) * (crimps / radius)
        canvas.part(r - radius * (1.03 - 0.012 * wave), material, 0.10, 0.12)
        canvas.part(r - radius * 0.84, material, 0.05, 0.06, base=0.10)
        canvas.part(r - radius * 0.76, material, -0.02, 0.03, base=0.15)
        if logo == "star":
            mark = star(canvas.u, canvas.v, points, size, size * 0.5)
        elif logo == "ring":
            mark = abs(r - size) - size * 0.18
        elif logo == "disc":
            mark = np.minimum(r - size * 0.6, abs(r - size) - 0.02)
        else:
            across_bars = abs(canvas.v * (5 / size) - np.rint(canvas.v * (5 / size))) * (size / 5) - size * 0.06
            mark = np.maximum(across_bars, box(canvas.u, canvas.v, size, size * 0.6))
        if logo != "none":
            canvas.part(mark, print_, 0.003, 0.02, base=0.13, removable=True)

    return material, paint


def coin(draw: Draw):
    material, radius, points = m.metal(draw), draw.uniform(0.6, 0.75), draw.integer(4, 9)
    motif, size = draw.choice(("star", "polygon", "rings", "leaf")), draw.uniform(0.3, 0.42)
    beads = draw.choice((0, 24, 36, 48))
    core = m.metal(draw) if draw.chance(0.3) else material

    def paint(canvas: Canvas):
        u, v, r = canvas.u, canvas.v, canvas.radius()
        canvas.part(r - radius, material, 0.09, 0.04)
        canvas.part(r - radius * 0.92, material, -0.03, 0.03, base=0.09)
        canvas.part(r - radius * 0.66, core, 0.0, 0.03, base=0.06)
        if beads:
            number, along, across = sectors(u, v, beads)
            dot = hypot(along - radius * 0.83, across) - radius * 1.8 / beads
            canvas.part(dot, material, 0.04, 0.03, base=0.06, removable=True, groups=(number, beads))
        if motif == "star":
            mark = star(u, v, points, radius * size * 1.3, radius * size * 0.6)
        elif motif == "polygon":
            mark = abs(polygon(u, v, points, radius * size)) - 0.03
        elif motif == "rings":
            mark = np.minimum(abs(r - radius * size) - 0.03, r - 0.1)
        else:
            _, along, across = sectors(u, v, points)
            mark = hypot((along - radius * size * 0.7) * 0.6, across) - 0.07
        canvas.part(mark, core, 0.05, 0.05, base=0.06)

    return material, paint
