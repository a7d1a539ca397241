"""Materials: a palette and a procedural texture each, drawn at random per category."""

import numpy as np

from .canvas import PI, Array, Canvas, Colour, Draw, Material, clip, sin, smooth

METALS = {
    "steel": ((0.46, 0.48, 0.51), (0.74, 0.76, 0.79)),
    "aluminium": ((0.62, 0.63, 0.64), (0.86, 0.87, 0.88)),
    "brass": ((0.55, 0.42, 0.18), (0.85, 0.72, 0.38)),
    "copper": ((0.52, 0.27, 0.17), (0.86, 0.54, 0.40)),
    "bronze": ((0.38, 0.27, 0.15), (0.66, 0.50, 0.31)),
    "gold": ((0.66, 0.49, 0.16), (0.95, 0.80, 0.40)),
    "gunmetal": ((0.20, 0.21, 0.23), (0.40, 0.42, 0.45)),
    "zinc": ((0.50, 0.53, 0.56), (0.70, 0.73, 0.75)),
}
COLOURS = {
    "red": (0.75, 0.13, 0.12), "orange": (0.90, 0.45, 0.10), "yellow": (0.92, 0.78, 0.16), "lime": (0.60, 0.76, 0.20),
    "green": (0.15, 0.50, 0.24), "teal": (0.10, 0.50, 0.50), "cyan": (0.30, 0.68, 0.82), "blue": (0.13, 0.30, 0.68),
    "navy": (0.10, 0.14, 0.34), "violet": (0.42, 0.24, 0.58), "pink": (0.88, 0.52, 0.62), "white": (0.90, 0.90, 0.89),
    "ivory": (0.88, 0.83, 0.70), "grey": (0.55, 0.56, 0.57), "black": (0.11, 0.11, 0.12), "brown": (0.40, 0.25, 0.15),
}  # fmt: skip
WOODS = {
    "oak": ((0.55, 0.38, 0.21), (0.76, 0.58, 0.36)), "walnut": ((0.26, 0.16, 0.10), (0.48, 0.32, 0.21)),
    "pine": ((0.72, 0.52, 0.28), (0.90, 0.74, 0.49)), "cherry": ((0.47, 0.23, 0.13), (0.70, 0.41, 0.26)),
    "ash": ((0.64, 0.54, 0.40), (0.83, 0.75, 0.61)), "teak": ((0.45, 0.29, 0.13), (0.66, 0.46, 0.25)),
}  # fmt: skip
STONES = {
    "granite": ((0.32, 0.31, 0.31), (0.76, 0.74, 0.72)), "marble": ((0.58, 0.57, 0.56), (0.94, 0.93, 0.91)),
    "slate": ((0.20, 0.23, 0.26), (0.40, 0.44, 0.47)), "terracotta": ((0.54, 0.27, 0.16), (0.77, 0.47, 0.32)),
    "concrete": ((0.48, 0.47, 0.45), (0.68, 0.67, 0.65)), "sandstone": ((0.62, 0.50, 0.34), (0.83, 0.73, 0.57)),
    "basalt": ((0.12, 0.12, 0.13), (0.35, 0.35, 0.36)), "jade": ((0.14, 0.34, 0.24), (0.48, 0.68, 0.54)),
}  # fmt: skip


def jitter(draw: Draw, colour: Colour, amount: float = 0.04) -> Colour:
    return tuple(float(min(1.0, max(0.0, value + draw.uniform(-amount, amount)))) for value in colour)


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(1.0, value * factor) for value in colour)


# Textures. Each draws its character once and returns texture(canvas, s, t) -> (tone, relief).


def plain(draw: Draw):
    grain, depth = draw.uniform(8, 30), draw.uniform(0.0, 0.002)

    def texture(canvas: Canvas, s: Array, t: Array):
        noise = canvas.noise(s * grain, t * grain)
        return 0.35 + 0.3 * noise, noise * depth

    return texture


def mottled(draw: Draw):
    scale, contrast = draw.uniform(3, 9), draw.uniform(0.6, 1.4)

    def texture(canvas: Canvas, s: Array, t: Array):
        noise = canvas.cloud(s * scale, t * scale, 3)
        return clip(0.5 + contrast * (noise - 0.5)), noise * (0.01 / scale)

    return texture


def brushed(draw: Draw):
    fine, coarse, contrast = draw.uniform(25, 60), draw.uniform(0.6, 2), draw.uniform(0.4, 1.0)

    def texture(canvas: Canvas, s: Array, t: Array):
        noise = canvas.noise(s * coarse, t * fine)
        return clip(0.5 + contrast * (noise - 0.5)), noise * (0.10 / fine)

    return texture


def hammered(draw: Draw):
    scale = draw.uniform(6, 12)

    def texture(canvas: Canvas, s: Array, t: Array):
        first, _, value = canvas.cells(s * scale, t * scale)
        dent = clip(first) * first
        return 0.4 + 0.3 * value, dent * (0.10 / scale)

    return texture


def cast(draw: Draw):
    scale, rough = draw.uniform(12, 28), draw.uniform(0.2, 0.5)

    def texture(canvas: Canvas, s: Array, t: Array):
        noise = canvas.cloud(s * scale, t * scale, 2)
        return 0.2 + 0.6 * noise, noise * (rough / scale)

    return texture


def grained(draw: Draw):
    """Wood: distorted growth rings with fine pores along them."""
    rings, sway, fibre = draw.uniform(5, 14), draw.uniform(0.3, 1.2), draw.uniform(20, 40)

    def texture(canvas: Canvas, s: Array, t: Array):
        bend = canvas.cloud(s * 0.7, t * 2.0, 2) * sway
        phase = (t + bend) * rings
        ring = phase - np.floor(phase)
        pores = canvas.noise(s * 3, t * fibre)
        return clip(0.15 + 0.55 * ring + 0.5 * (pores - 0.3)), ring * 0.004 + pores * 0.004

    return texture


def veined(draw: Draw):
    scale, width = draw.uniform(1.2, 2.5), draw.uniform(0.06, 0.16)

    def texture(canvas: Canvas, s: Array, t: Array):
        ridge = abs(canvas.cloud(s * scale, t * scale, 3) - 0.5)
        fine = canvas.noise(s * scale * 9, t * scale * 9)
        return clip(smooth(ridge, 0.0, width) * 0.8 + 0.25 * fine), fine * 0.001

    return texture


def speckled(draw: Draw):
    scale, spread = draw.uniform(9, 22), draw.uniform(0.5, 1.0)

    def texture(canvas: Canvas, s: Array, t: Array):
        first, second, value = canvas.cells(s * scale, t * scale)
        return clip(0.5 + spread * (value - 0.5)), clip(second - first) * (0.04 / scale)

    return texture


def terrazzo(draw: Draw):
    scale, chip = draw.uniform(4, 9), draw.uniform(0.28, 0.42)

    def texture(canvas: Canvas, s: Array, t: Array):
        first, _, value = canvas.cells(s * scale, t * scale)
        inside = 1 - smooth(first, chip - 0.04, chip + 0.04)
        return 0.5 + inside * (value - 0.5), 0.0 * first

    return texture


def pebbled(draw: Draw):
    """Leather and moulded plastic: cells with grooves between them."""
    scale, depth = draw.uniform(10, 24), draw.uniform(0.15, 0.45)

    def texture(canvas: Canvas, s: Array, t: Array):
        first, second, value = canvas.cells(s * scale, t * scale)
        bump = smooth(second - first, 0.0, 0.35)
        return 0.25 + 0.4 * bump + 0.2 * value, bump * (depth / scale)

    return texture


def woven(draw: Draw):
    """Plain weave or twill of two threads of slightly different colour."""
    threads, lean, depth = draw.uniform(14, 34), draw.choice((1, 1, 2, 3)), draw.uniform(0.2, 0.6)

    def texture(canvas: Canvas, s: Array, t: Array):
        waver = canvas.noise(s * 4, t * 4) * 0.5
        p, q = s * threads + waver, t * threads + waver
        i, j = np.floor(p), np.floor(q)
        over = (i + j * lean) * (1 / (lean + 1))
        over = (over - np.floor(over)) < 0.4  # warp thread on top
        across = np.where(over, p - i, q - j) - 0.5
        round_ = 1 - 4 * across * across
        fuzz = canvas.noise(s * threads * 2.3, t * threads * 2.3)
        return clip(np.where(over, np.float32(0.35), np.float32(0.6)) * (0.4 + 0.6 * round_) + 0.3 * fuzz), round_ * (
            depth / threads
        )

    return texture


def knitted(draw: Draw):
    columns, slant = draw.uniform(9, 18), draw.uniform(0.7, 1.1)

    def texture(canvas: Canvas, s: Array, t: Array):
        waver = canvas.noise(s * 3, t * 3) * 0.4
        p = s * columns + waver
        side = p - np.floor(p) - 0.5
        q = t * columns * 1.1 + slant * abs(side) * 2 + waver
        loop = q - np.floor(q) - 0.5
        bump = clip(1 - 4 * loop * loop) * clip(1 - 2.2 * abs(abs(side) - 0.25) * 2)
        fuzz = canvas.noise(p * 4, q * 4)
        return clip(0.15 + 0.6 * bump + 0.3 * fuzz), bump * (0.5 / columns)

    return texture


def ribbed(draw: Draw):
    ribs, depth = draw.uniform(8, 20), draw.uniform(0.1, 0.3)

    def texture(canvas: Canvas, s: Array, t: Array):
        wave = 0.5 + 0.5 * sin(s * (ribs * PI))
        fine = canvas.noise(s * 20, t * 20)
        return 0.2 + 0.5 * wave + 0.2 * fine, wave * (depth / ribs)

    return texture


def flecked(draw: Draw):
    """Paper, felt, composite: short fibres in all directions."""
    scale, contrast = draw.uniform(10, 22), draw.uniform(0.5, 1.0)

    def texture(canvas: Canvas, s: Array, t: Array):
        one = canvas.noise(s * scale, t * scale * 4)
        two = canvas.noise((s + t) * scale * 3 + 9, (s - t) * scale + 3)
        fibre = np.maximum(one, two)
        return clip(0.5 + contrast * (fibre - 0.65)), fibre * 0.004

    return texture


def metal(draw: Draw) -> Material:
    name = draw.choice(list(METALS))
    low, high = (jitter(draw, colour, 0.03) for colour in METALS[name])
    texture = draw.choice((brushed, brushed, mottled, cast, plain, hammered))(draw)
    return Material(name, low, high, draw.uniform(0.45, 0.9), texture)


def plastic(draw: Draw) -> Material:
    name = draw.choice(list(COLOURS))
    colour = jitter(draw, COLOURS[name])
    texture = draw.choice((plain, plain, mottled, pebbled, cast))(draw)
    return Material(name, shade(colour, draw.uniform(0.75, 0.92)), shade(colour, 1.08), draw.uniform(0.1, 0.5), texture)


def wood(draw: Draw) -> Material:
    name = draw.choice(list(WOODS))
    low, high = (jitter(draw, colour, 0.03) for colour in WOODS[name])
    return Material(name, low, high, draw.uniform(0.0, 0.15), grained(draw))


def stone(draw: Draw) -> Material:
    name = draw.choice(list(STONES))
    low, high = (jitter(draw, colour, 0.04) for colour in STONES[name])
    texture = draw.choice((veined, speckled, terrazzo, mottled, cast))(draw)
    return Material(name, low, high, draw.uniform(0.0, 0.35), texture)


def cloth(draw: Draw) -> Material:
    name = draw.choice(list(COLOURS))
    colour = jitter(draw, COLOURS[name])
    texture = draw.choice((woven, woven, knitted, flecked, ribbed))(draw)
    return Material(name, shade(colour, draw.uniform(0.4, 0.65)), shade(colour, 1.1), 0.0, texture)


def hide(draw: Draw) -> Material:
    name = draw.choice(list(COLOURS))
    colour = jitter(draw, COLOURS[name])
    return Material(
        name, shade(colour, draw.uniform(0.5, 0.75)), shade(colour, 1.1), draw.uniform(0.05, 0.3), pebbled(draw)
    )


def table(draw: Draw) -> Material:
    """What products lie on to be photographed: mostly plain."""
    if draw.chance(0.25):
        return draw.choice((wood, metal, stone, cloth))(draw)
    value = draw.choice((0.06, 0.10, 0.18, 0.35, 0.55, 0.72, 0.86, 0.92))
    colour = jitter(draw, (value, value, value), 0.05)
    texture = draw.choice((plain, plain, mottled, flecked, ribbed))(draw)
    return Material("plain", shade(colour, 0.88), shade(colour, 1.06), 0.0, texture)


DARK = Material("dark", (0.05, 0.05, 0.06), (0.12, 0.12, 0.13), 0.1, plain(Draw(0)))
