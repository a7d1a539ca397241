"""Families that fill the image: textiles, panels, tiles, sheets. See hardware.py."""

from collections.abc import Callable

import numpy as np

from . import materials as m
from .canvas import PI, Canvas, Draw, Material, hypot, sin
from .shapes import box, lattice, polygon


def _whole(canvas: Canvas):
    return np.full_like(canvas.u, -9.0)


def _repeat(x, pitch: float):
    """Number of the period and position in it, from -pitch / 2 to pitch / 2."""
    number = np.floor(x * (1 / pitch) + 0.5)
    return number, x - number * pitch


def _odd(number):
    """1 for odd numbers, 0 for even ones."""
    return number - 2 * np.floor(number * 0.5)


def _uneven(number, strength: float):
    """A slightly different tone for each numbered piece: multiples of the golden ratio, modulo 1."""
    share = number * 0.618034
    return strength * (share - np.floor(share) - 0.5)


def _bare(draw: Draw, make: Callable[[Draw], Material]):
    """One material and nothing else."""
    material, scale = make(draw), draw.uniform(0.8, 1.5)

    def paint(canvas: Canvas):
        canvas.part(_whole(canvas), material, 0.0, 0.05, along=(canvas.u * scale, canvas.v * scale))

    return material, paint


def fabric(draw: Draw):
    return _bare(draw, m.cloth)


def leather(draw: Draw):
    return _bare(draw, m.hide)


def slab(draw: Draw):
    return _bare(draw, m.stone)


def veneer(draw: Draw):
    return _bare(draw, m.wood)


def foil(draw: Draw):
    return _bare(draw, m.metal)


def striped(draw: Draw):
    """A textile with stripes or checks."""
    ground, stripe, second = m.cloth(draw), m.cloth(draw), m.cloth(draw)
    stripe = Material(stripe.name, stripe.low, stripe.high, 0.0, ground.texture)
    second = Material(second.name, second.low, second.high, 0.0, ground.texture)
    pitch, share, check = draw.uniform(0.25, 0.7), draw.uniform(0.15, 0.4), draw.chance(0.5)

    def paint(canvas: Canvas):
        canvas.part(_whole(canvas), ground, 0.0, 0.05)
        sway = 0.02 * (canvas.noise(canvas.u * 2, canvas.v * 2) - 0.5)
        _, across = _repeat(canvas.u + sway, pitch)
        canvas.part(abs(across) - pitch * share * 0.5, stripe, 0.0, 0.05)
        if check:
            _, down = _repeat(canvas.v + sway, pitch)
            canvas.part(abs(down) - pitch * share * 0.35, second, 0.0, 0.05)

    return ground, paint


def printed(draw: Draw):
    """A textile or paper printed with a repeating motif."""
    ground, ink = draw.choice((m.cloth, m.hide, m.plastic))(draw), m.plastic(draw)
    ink = Material(ink.name, ink.low, ink.high, ground.gloss, ground.texture)
    motif = draw.choice(("dots", "rings", "squares", "crosses", "hexagons"))
    pitch, size = draw.uniform(0.3, 0.55), draw.uniform(0.2, 0.32)

    def paint(canvas: Canvas):
        row, b = _repeat(canvas.v, pitch)
        shift = _odd(row) * (pitch / 2)
        _, a = _repeat(canvas.u + shift, pitch)
        r = hypot(a, b)
        mark = {
            "dots": lambda: r - pitch * size,
            "rings": lambda: abs(r - pitch * size) - pitch * 0.06,
            "squares": lambda: box(a, b, pitch * size, pitch * size),
            "crosses": lambda: np.minimum(box(a, b, pitch * size, pitch * 0.07), box(a, b, pitch * 0.07, pitch * size)),
            "hexagons": lambda: abs(polygon(a, b, 6, pitch * size)) - pitch * 0.05,
        }[motif]()
        canvas.part(_whole(canvas), ground, 0.0, 0.05)
        canvas.part(mark, ink, 0.0, 0.05)

    return ground, paint


def planks(draw: Draw):
    wood, pitch, tone = m.wood(draw), draw.uniform(0.28, 0.6), draw.uniform(0.1, 0.4)
    groove = draw.uniform(0.008, 0.018)

    def paint(canvas: Canvas):
        number, across = _repeat(canvas.v, pitch)
        canvas.backdrop(m.DARK)
        along = canvas.u + number * 3.7, canvas.v + number * 1.3
        canvas.part(abs(across) - pitch / 2 + groove, wood, 0.03, 0.02, along=along, tone=_uneven(number, tone))

    return wood, paint


def tiles(draw: Draw):
    ceramic = draw.choice((m.stone, m.stone, m.plastic))(draw)
    grout = Material("grout", (0.42, 0.41, 0.39), (0.62, 0.61, 0.58), 0.0, m.cast(draw))
    pitch, ratio, brick = draw.uniform(0.35, 0.75), draw.choice((1.0, 1.0, 2.0)), draw.chance(0.4)
    gap, tone = draw.uniform(0.012, 0.03), draw.uniform(0.05, 0.3)

    def paint(canvas: Canvas):
        row, b = _repeat(canvas.v, pitch / ratio)
        shift = _odd(row) * (pitch / 2) if brick or ratio > 1 else 0.0
        column, a = _repeat(canvas.u + shift, pitch)
        number = column + 7 * row
        canvas.backdrop(grout)
        tile = box(a, b, pitch / 2 - gap, pitch / ratio / 2 - gap, 0.02)
        along = canvas.u + number * 1.7, canvas.v + number * 2.3
        canvas.part(tile, ceramic, 0.04, 0.02, along=along, tone=_uneven(number, tone))

    return ceramic, paint


def mosaic(draw: Draw):
    """Hexagonal tiles in two colours."""
    one, two = (draw.choice((m.stone, m.plastic))(draw) for _ in range(2))
    grout = Material("grout", (0.30, 0.29, 0.28), (0.50, 0.49, 0.47), 0.0, m.cast(draw))
    pitch, every = draw.uniform(0.2, 0.34), draw.integer(2, 5)

    def paint(canvas: Canvas):
        canvas.backdrop(grout)
        down = pitch * 1.7320508
        row_a, b_a = _repeat(canvas.v, down)
        col_a, a_a = _repeat(canvas.u, pitch)
        row_b, b_b = _repeat(canvas.v - down / 2, down)
        col_b, a_b = _repeat(canvas.u - pitch / 2, pitch)
        first = a_a * a_a + b_a * b_a < a_b * a_b + b_b * b_b
        a, b = np.where(first, a_a, a_b), np.where(first, b_a, b_b)
        number = np.where(first, col_a + 3 * row_a, col_b + 3 * row_b + 1)
        tile = polygon(a, b, 6, pitch * 0.46)
        second = (number.astype(np.int32) % every) == 0
        canvas.part(tile, one, 0.03, 0.02, tone=_uneven(number, 0.2))
        canvas.part(np.where(second, tile, np.float32(9.0)), two, 0.03, 0.02, tone=_uneven(number, 0.2))

    return one, paint


def perforated(draw: Draw):
    """A sheet with holes, or with slots."""
    metal = draw.choice((m.metal, m.metal, m.plastic))(draw)
    pitch, size = draw.uniform(0.16, 0.34), draw.uniform(0.22, 0.34)
    staggered, long = draw.chance(0.5), draw.choice((1.0, 1.0, 2.2))

    def paint(canvas: Canvas):
        row, b = _repeat(canvas.v, pitch)
        shift = _odd(row) * (pitch * long / 2) if staggered else 0.0
        _, a = _repeat(canvas.u + shift, pitch * long)
        hole = box(a, b, size * pitch * long, size * pitch, size * pitch)
        canvas.backdrop(m.DARK)
        canvas.part(-hole, metal, 0.06, 0.03)

    return metal, paint


def mesh(draw: Draw):
    """A woven wire grid."""
    wire, back = draw.choice((m.metal, m.metal, m.plastic))(draw), m.table(draw)
    pitch, width = draw.uniform(0.16, 0.3), draw.uniform(0.12, 0.22)

    def paint(canvas: Canvas):
        canvas.backdrop(back)
        i, a = _repeat(canvas.u, pitch)
        j, b = _repeat(canvas.v, pitch)
        wave = 0.04 * sin((canvas.v * (1 / pitch) + i) * PI)
        canvas.part(abs(a) - width * pitch, wire, 0.08, width * pitch, base=0.06 + wave, along=(canvas.v, canvas.u))
        over = 0.04 * sin((canvas.u * (1 / pitch) + j + 1) * PI)
        rod = abs(b) - width * pitch  # shown where it passes over, or beside, the others
        rod = np.where(over > wave, rod, np.maximum(rod, width * pitch - abs(a)))
        canvas.part(rod, wire, 0.08, width * pitch, base=0.06 + over)

    return wire, paint


def tread(draw: Draw):
    """Sheet metal with raised lozenges or ribs in alternating directions."""
    metal, pitch, size = draw.choice((m.metal, m.metal, m.hide))(draw), draw.uniform(0.24, 0.4), draw.uniform(0.3, 0.42)
    thin = draw.uniform(0.08, 0.14)

    def paint(canvas: Canvas):
        canvas.part(_whole(canvas), metal, 0.0, 0.05)
        i, a = _repeat(canvas.u, pitch)
        j, b = _repeat(canvas.v, pitch)
        odd = _odd(i + j) > 0.5
        p, q = np.where(odd, a + b, a - b) * 0.7071068, np.where(odd, a - b, a + b) * 0.7071068
        lozenge = (hypot(p * (1 / size), q * (1 / thin)) - pitch) * thin
        canvas.part(lozenge, metal, 0.07, 0.03, tone=0.3)

    return metal, paint


def panel(draw: Draw):
    """A solar cell: dark wafer, thin fingers, wide busbars."""
    tone = draw.choice(((0.09, 0.12, 0.30), (0.05, 0.06, 0.12), (0.14, 0.16, 0.22), (0.20, 0.10, 0.16)))
    texture, line = draw.choice((m.speckled, m.mottled, m.plain))(draw), m.metal(draw)
    wafer = Material("silicon", m.shade(tone, 0.7), m.shade(tone, 1.5), 0.3, texture)
    fingers, busbars, corner = draw.uniform(0.05, 0.09), draw.integer(2, 5), draw.uniform(0.02, 0.3)

    def paint(canvas: Canvas):
        u, v = canvas.u, canvas.v
        outline = np.maximum(box(u, v, 0.9, 0.9), (abs(u) + abs(v)) * 0.7071068 - 1.27 + corner)
        canvas.part(outline, wafer, 0.02, 0.02)
        inside = outline + 0.04
        _, across = _repeat(v, fingers)
        canvas.part(np.maximum(abs(across) - 0.006, inside), line, 0.004, 0.01, base=0.02)
        number, a, _ = lattice(u, v, busbars, 1, 1.8 / busbars, 9.0)
        bar = np.maximum(abs(a) - 0.022, inside)
        canvas.part(bar, line, 0.01, 0.02, base=0.02, removable=True, groups=(number, busbars))

    return wafer, paint


def corrugated(draw: Draw):
    """Cardboard, roofing or hose: parallel waves."""
    material = draw.choice((m.plastic, m.metal, m.cloth))(draw)
    pitch, depth, sharp = draw.uniform(0.1, 0.28), draw.uniform(0.2, 0.45), draw.chance(0.3)

    def paint(canvas: Canvas):
        sway = 0.03 * (canvas.noise(canvas.u * 1.3, canvas.v * 1.3) - 0.5)
        _, x = _repeat(canvas.v + sway, pitch)
        share = abs(x) * (2 / pitch)
        wave = 1 - share if sharp else 1 - share * share
        canvas.part(_whole(canvas), material, depth * pitch * wave, 0.05)

    return material, paint


def wicker(draw: Draw):
    """Basket weave of flat strips."""
    one, two = (draw.choice((m.wood, m.hide, m.plastic))(draw) for _ in range(2))
    pitch, width = draw.uniform(0.18, 0.34), draw.uniform(0.38, 0.46)

    def paint(canvas: Canvas):
        canvas.backdrop(m.DARK)
        i, a = _repeat(canvas.u, pitch)
        j, b = _repeat(canvas.v, pitch)
        odd = _odd(i + j) > 0.5
        for material, across, lengthwise, number, top in ((one, b, a, j, ~odd), (two, a, b, i, odd)):
            strip = abs(across) - width * pitch
            strip = np.where(top, strip, np.maximum(strip, width * pitch - abs(lengthwise)))
            share = lengthwise * (2 / pitch)
            arch = 0.05 * (1 - share * share) * top
            along = (canvas.u, canvas.v) if across is b else (canvas.v, canvas.u)
            canvas.part(strip, material, 0.03, 0.05, base=arch, along=along, tone=_uneven(number, 0.2))

    return one, paint


def bricks(draw: Draw):
    tone = draw.choice(((0.60, 0.30, 0.22), (0.66, 0.54, 0.40), (0.42, 0.40, 0.39)))
    clay = Material("clay", m.shade(tone, 0.72), m.shade(tone, 1.18), 0.0, m.cast(draw))
    mortar = Material("mortar", (0.50, 0.48, 0.45), (0.72, 0.70, 0.66), 0.0, m.cast(draw))
    pitch, ratio, gap = draw.uniform(0.5, 0.9), draw.uniform(2.0, 3.2), draw.uniform(0.02, 0.04)

    def paint(canvas: Canvas):
        canvas.backdrop(mortar)
        row, b = _repeat(canvas.v, pitch / ratio)
        column, a = _repeat(canvas.u + _odd(row) * (pitch / 2), pitch)
        number = column * 3 + 7 * row
        edge = 0.03 * (canvas.cloud(canvas.u * 8, canvas.v * 8, 2) - 0.5)
        brick = box(a, b, pitch / 2 - gap, pitch / ratio / 2 - gap, 0.02) + edge
        canvas.part(brick, clay, 0.05, 0.03, tone=_uneven(number, 0.5))

    return clay, paint
