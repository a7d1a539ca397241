"""Families with many equal or similar pieces: boards, packages, trays. See hardware.py."""

import numpy as np

from . import materials as m
from .canvas import PI, Canvas, Draw, cos, hypot, sin
from .shapes import box, lattice, path, stick


def board(draw: Draw):
    """A printed circuit board: traces, pads, and components at fixed places."""
    base = draw.choice(("green", "green", "blue", "red", "black", "white"))
    mask = m.Material(base, m.shade(m.COLOURS[base], 0.75), m.COLOURS[base], 0.2, m.plain(draw))
    trace = m.Material("trace", m.shade(m.COLOURS[base], 1.1), m.shade(m.COLOURS[base], 1.5), 0.3, m.plain(draw))
    solder, body = m.metal(draw), m.Material("resin", (0.09, 0.09, 0.10), (0.17, 0.17, 0.18), 0.2, m.plain(draw))
    width, height = draw.uniform(0.68, 0.85), draw.uniform(0.5, 0.8)
    routes = []
    for _ in range(draw.integer(8, 16)):
        u, v = draw.uniform(-width, width) * 0.9, draw.uniform(-height, height) * 0.9
        points = [(u, v)]
        for _ in range(draw.integer(2, 3)):
            step, way = draw.uniform(0.15, 0.6), draw.integer(0, 7)
            u = min(max(u + step * cos(way * PI / 4), -width * 0.92), width * 0.92)
            v = min(max(v + step * sin(way * PI / 4), -height * 0.92), height * 0.92)
            points.append((u, v))
        routes.append(points)
    chips = [
        (*_place(draw, width, height), draw.uniform(0.1, 0.22), draw.uniform(0.08, 0.2))
        for _ in range(draw.integer(1, 3))
    ]
    small = [(*_place(draw, width, height), draw.integer(0, 1), m.plastic(draw)) for _ in range(draw.integer(4, 9))]
    cans = [(*_place(draw, width, height), draw.uniform(0.07, 0.12)) for _ in range(draw.integer(0, 2))]

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        outline = box(u, v, width, height, 0.03)
        corner = hypot(abs(u) - width + 0.09, abs(v) - height + 0.09)
        canvas.part(np.maximum(outline, 0.045 - corner), mask, 0.05, 0.02)
        canvas.part(np.maximum(corner - 0.075, 0.045 - corner), solder, 0.005, 0.01, base=0.05)
        lines = vias = None
        for points in routes:
            line = path(u, v, points, 0.013)
            end = np.minimum(canvas.radius(*points[0]), canvas.radius(*points[-1])) - 0.032
            lines = line if lines is None else np.minimum(lines, line)
            vias = end if vias is None else np.minimum(vias, end)
        canvas.part(np.maximum(lines, outline), trace, 0.006, 0.01, base=0.05)
        canvas.part(np.maximum(vias, outline), solder, 0.02, 0.03, base=0.05)
        for cu, cv, w, h in chips:
            pins = np.maximum(box(u - cu, v - cv, w, h + 0.05), _comb(u - cu, 0.05, 0.3))
            canvas.part(pins, solder, 0.03, 0.02, base=0.05)
            canvas.part(box(u - cu, v - cv, w, h, 0.01), body, 0.08, 0.02, base=0.05, removable=True)
        for cu, cv, upright, colour in small:
            a, b = (v - cv, u - cu) if upright else (u - cu, v - cv)
            canvas.part(box(a, b, 0.085, 0.038), solder, 0.03, 0.02, base=0.05)
            canvas.part(box(a, b, 0.05, 0.038), colour, 0.04, 0.01, base=0.05, removable=True)
        for cu, cv, r in cans:
            canvas.part(canvas.radius(cu, cv) - r, solder, 0.16, 0.04, base=0.05, removable=True)

    return mask, paint


def _place(draw: Draw, width: float, height: float) -> tuple[float, float]:
    return draw.uniform(-0.75, 0.75) * width, draw.uniform(-0.75, 0.75) * height


def _comb(x, pitch: float, duty: float):
    """Stripes across x: distance to the nearest tooth."""
    phase = x * (1 / pitch)
    return (abs(phase - np.rint(phase)) - duty) * pitch


def chip(draw: Draw):
    """An integrated circuit with legs on two or four sides."""
    tone = draw.choice(((0.13, 0.13, 0.14), (0.20, 0.20, 0.22), (0.45, 0.43, 0.40), (0.22, 0.14, 0.10)))
    body, legs = m.Material("resin", m.shade(tone, 0.8), m.shade(tone, 1.2), 0.15, m.cast(draw)), m.metal(draw)
    ink = m.Material("ink", (0.65, 0.65, 0.63), (0.80, 0.80, 0.78), 0.0, m.plain(draw))
    width, height, count = draw.uniform(0.38, 0.62), draw.uniform(0.26, 0.5), draw.integer(4, 12)
    four, lines, reach = draw.chance(0.35), draw.integer(1, 3), draw.uniform(0.1, 0.2)
    if four:
        height = width
    text = [[draw.chance(0.7) for _ in range(8)] for _ in range(lines)]

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        for a, b, side, other in ((u, v, width, height), (v, u, height, width)):
            pitch = 1.8 * side / count
            number, x, _ = lattice(a, b, count, 1, pitch, 9.0)
            number = number + count * (b > 0)
            leg = np.maximum(abs(x) - pitch * 0.28, abs(b) - other - reach)
            canvas.part(leg, legs, 0.05, 0.03, removable=True, groups=(number.astype(np.int32), 2 * count))
            if not four:
                break
        canvas.part(box(u, v, width, height, 0.02), body, 0.12, 0.06, base=0.03)
        canvas.part(canvas.radius(-width * 0.78, height * 0.7) - 0.035, body, -0.03, 0.03, base=0.15)
        for row, letters in enumerate(text):
            for k, there in enumerate(letters):
                if there:
                    cu, cv = (k - 3.5) * width * 0.18, (row - (len(text) - 1) / 2) * 0.16
                    glyph = abs(box(u - cu, v - cv, width * 0.055, 0.045, 0.02)) - 0.008
                    half = np.maximum(glyph, (u - cu) * (1.0 if (k * 7 + row * 3) % 3 else -1.0) - 0.02)
                    canvas.part(half, ink, 0.0, 0.02, base=0.15)

    return body, paint


def connector(draw: Draw):
    housing, pins = m.plastic(draw), m.metal(draw)
    columns, rows, round_ = draw.integer(3, 9), draw.integer(1, 4), draw.chance(0.5)
    pitch = min(1.4 / columns, 1.2 / rows)
    key, size = draw.chance(0.6), draw.uniform(0.2, 0.3)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        width, height = columns * pitch / 2 + 0.12, rows * pitch / 2 + 0.12
        outline = box(u, v, width, height, 0.06)
        if key:
            outline = np.minimum(outline, box(u, v - height, width * 0.3, 0.08, 0.02))
        canvas.part(outline, housing, 0.16, 0.04)
        canvas.part(box(u, v, width - 0.07, height - 0.07, 0.03), housing, -0.08, 0.03, base=0.16)
        number, a, b = lattice(u, v, columns, rows, pitch, pitch)
        a, b = a + canvas.draw.uniform(-0.006, 0.006), b + canvas.draw.uniform(-0.006, 0.006)
        pin = hypot(a, b) - size * pitch if round_ else box(a, b, size * pitch, size * pitch, 0.01)
        canvas.part(pin, pins, 0.10, 0.05, base=0.08, removable=True, groups=(number, columns * rows))

    return housing, paint


def zipper(draw: Draw):
    tape, metal = m.cloth(draw), m.metal(draw) if draw.chance(0.6) else m.plastic(draw)
    pitch, reach, slider = draw.uniform(0.1, 0.18), draw.uniform(0.12, 0.2), draw.chance(0.6)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        shift = canvas.draw.uniform(0, pitch)
        canvas.part(abs(v) - 0.62, tape, 0.02, 0.02)
        for side in (-1, 1):
            canvas.part(abs(v - side * 0.57) - 0.02, tape, 0.015, 0.02, base=0.02)
            phase = (u + shift) * (1 / pitch) + side * 0.25
            number = (np.floor(phase + 0.5) + 24).astype(np.int32) % 24
            along = (phase - np.rint(phase)) * pitch
            tooth = box(along, v - side * reach * 0.45, pitch * 0.24, reach, 0.03)
            canvas.part(tooth, metal, 0.08, 0.04, base=0.03, removable=True, groups=(number, 24))
        if slider:
            at = canvas.draw.uniform(-0.5, 0.5)
            canvas.part(box(u - at, v, 0.16, 0.2, 0.08), metal, 0.12, 0.05, base=0.06, removable=True)
            pull = stick(u - at, v, (0.05, 0.02), (0.42, canvas.draw.uniform(-0.1, 0.2)), 0.06)
            canvas.part(pull, metal, 0.06, 0.05, base=0.16)

    return tape, paint


def blister(draw: Draw):
    foil, pill = m.metal(draw), m.plastic(draw)
    columns, rows, long = draw.integer(2, 5), draw.integer(2, 4), draw.choice((0.0, 0.0, 0.3, 0.5))
    pitch = min(1.5 / (columns * (1 + long)), 1.3 / rows)
    size = draw.uniform(0.28, 0.36) * pitch

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        wide = pitch * (1 + long)
        canvas.part(box(u, v, columns * wide / 2 + 0.06, rows * pitch / 2 + 0.06, 0.08), foil, 0.04, 0.02)
        number, a, b = lattice(u, v, columns, rows, wide, pitch)
        half = long * pitch * 0.6
        pocket = stick(a, b, (-half, 0.0), (half, 0.0), size * 1.25)
        canvas.part(pocket, foil, 0.05, 0.05, base=0.04)
        a, b = a + canvas.draw.uniform(-0.01, 0.01), b + canvas.draw.uniform(-0.01, 0.01)
        tablet = stick(a, b, (-half, 0.0), (half, 0.0), size)
        canvas.part(tablet, pill, 0.08, size, base=0.07, removable=True, groups=(number, columns * rows))

    return pill, paint


def brush(draw: Draw):
    handle, bristle = draw.choice((m.plastic, m.wood))(draw), [m.plastic(draw) for _ in range(2)]
    columns, rows = draw.integer(5, 10), draw.integer(3, 6)
    pitch = min(1.3 / columns, 0.9 / rows)
    hairs = draw.uniform(30, 50)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        width, height = columns * pitch / 2 + 0.1, rows * pitch / 2 + 0.08
        canvas.part(np.minimum(box(u, v, width, height, 0.2), box(u - width, v, 0.9, 0.13, 0.05)), handle, 0.1, 0.08)
        number, a, b = lattice(u, v, columns, rows, pitch, pitch)
        lean = 0.02 * (canvas.noise(u * 4, v * 4) - 0.5)
        tuft = hypot(a + lean, b - lean) - pitch * 0.4
        hair = canvas.noise(u * hairs, v * hairs) * 0.06
        for parity, material in enumerate(bristle):
            chosen = tuft + 9.0 * ((number // 2 + number // columns) % 2 != parity).astype(np.float32)
            canvas.part(chosen, material, 0.1 + hair, 0.06, base=0.08, removable=True, groups=(number, columns * rows))

    return handle, paint


def keypad(draw: Draw):
    case, keys, mark = m.plastic(draw), m.plastic(draw), m.plastic(draw)
    columns, rows = draw.integer(3, 5), draw.integer(3, 5)
    pitch = 1.3 / max(columns, rows)
    corner = draw.uniform(0.1, 0.45) * pitch
    symbols = [draw.integer(0, 3) for _ in range(columns * rows)]

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        canvas.part(box(u, v, columns * pitch / 2 + 0.1, rows * pitch / 2 + 0.1, 0.08), case, 0.06, 0.05)
        number, a, b = lattice(u, v, columns, rows, pitch, pitch)
        key = box(a, b, pitch * 0.38, pitch * 0.38, min(corner, pitch * 0.38))
        canvas.part(key, keys, 0.08, 0.04, base=0.06, removable=True, groups=(number, columns * rows))
        r = hypot(a, b)
        glyphs = (
            abs(r - pitch * 0.14) - 0.012,
            box(a, b, pitch * 0.03, pitch * 0.17),
            np.minimum(box(a, b, pitch * 0.15, pitch * 0.03), box(a, b, pitch * 0.03, pitch * 0.15)),
            r - pitch * 0.08,
        )
        which = np.array(symbols, np.int32)[number]
        glyph = glyphs[3]
        for k in range(3):
            glyph = np.where(which == k, glyphs[k], glyph)
        canvas.part(np.maximum(glyph, key), mark, 0.0, 0.01, base=0.14)

    return case, paint


def tray(draw: Draw):
    """Loose beads or grains in a shallow dish; every specimen lies differently."""
    dish, grain = draw.choice((m.plastic, m.wood, m.metal))(draw), draw.choice((m.plastic, m.stone, m.metal))(draw)
    scale, round_, size = draw.uniform(4.5, 8), draw.chance(0.6), draw.uniform(0.34, 0.44)

    def paint(canvas: Canvas):
        u, v, r = canvas.u, canvas.v, canvas.radius()
        outline = r - 0.8 if round_ else box(u, v, 0.78, 0.7, 0.15)
        canvas.part(outline, dish, 0.12, 0.05)
        canvas.part(outline + 0.08, dish, -0.08, 0.06, base=0.12)
        first, _, value = canvas.cells(u * scale, v * scale)
        bead = (first - size) * (1 / scale)
        canvas.part(np.maximum(bead, outline + 0.14), grain, 0.06 + 0.03 * value, size / scale, base=0.04)

    return grain, paint


def rope(draw: Draw):
    """A twisted or braided cord across the image."""
    fibre, accent = m.cloth(draw), m.cloth(draw)
    radius, pitch = draw.uniform(0.16, 0.34), draw.uniform(0.16, 0.34)
    lean, every = draw.uniform(0.6, 1.2) * draw.choice((-1, 1)), draw.integer(2, 5)

    def paint(canvas: Canvas):
        u = canvas.u
        v = canvas.v - 0.06 * (canvas.noise(u * 1.2, 0 * u) - 0.5)
        phase = (u + lean * v) * (1 / pitch) + canvas.draw.uniform(0, 1)
        strand = phase - np.floor(phase) - 0.5
        rod = abs(v) - radius * (1 + 0.06 * (1 - 4 * strand * strand))
        bulge = 0.12 + 0.10 * (1 - 4 * strand * strand)
        second = (np.floor(phase).astype(np.int32) % every) == 0
        canvas.part(rod, fibre, bulge, radius, along=(u + lean * v, v - lean * u))
        canvas.part(np.where(second, rod, np.float32(9.0)), accent, bulge, radius, along=(u + lean * v, v - lean * u))

    return fibre, paint


def crate(draw: Draw):
    """Bottles or jars in a grid seen from above."""
    glass, lid, wall = m.plastic(draw), m.metal(draw), m.plastic(draw)
    columns, rows = draw.integer(2, 4), draw.integer(2, 4)
    pitch = 1.5 / max(columns, rows)
    ring, size = draw.uniform(0.5, 0.75), draw.uniform(0.4, 0.46)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        width, height = columns * pitch / 2, rows * pitch / 2
        canvas.part(box(u, v, width + 0.05, height + 0.05, 0.03), wall, 0.08, 0.03)
        canvas.part(box(u, v, width, height), m.DARK, 0.0, 0.02, base=0.0)
        number, a, b = lattice(u, v, columns, rows, pitch, pitch)
        a, b = a + canvas.draw.uniform(-0.012, 0.012), b + canvas.draw.uniform(-0.012, 0.012)
        r = hypot(a, b)
        canvas.part(r - size * pitch, glass, 0.10, 0.08)
        canvas.part(
            r - size * pitch * ring, lid, 0.08, 0.03, base=0.10, removable=True, groups=(number, columns * rows)
        )

    return glass, paint
