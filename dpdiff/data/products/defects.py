"""Seven kinds of defect, from barely visible to obvious.

A kind looks at a painted specimen and returns what to change: the geometry, before it is painted again, or its surface,
afterwards; and where it may show, which is cut to where it does show in the end (see category.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .canvas import PI, Array, Canvas, Damage, Draw, Material, blur, clip, cos, hypot, sin, smooth
from .shapes import blob, box, path, polygon

_STAINS = (
    (0.30, 0.18, 0.08), (0.08, 0.07, 0.06), (0.45, 0.22, 0.08),
    (0.75, 0.73, 0.66), (0.16, 0.18, 0.30), (0.35, 0.36, 0.20),
)  # fmt: skip
Neighbour = Callable[[Draw], Material]  # draws the material of another category


@dataclass(frozen=True)
class Defect:
    support: Callable[[Canvas], Array]  # (size, size) bool, called after marking
    damage: Damage | None = None
    mark: Callable[[Canvas], None] | None = None


def scratch(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    points = _walk(draw, _spot(draw, canvas), 6, _between(0.15, 0.9, severity) / 6, 0.25)
    radius, strength = _between(0.004, 0.009, severity), _between(0.4, 0.9, severity)
    colour = draw.choice(((0.92, 0.92, 0.93), (0.75, 0.75, 0.74), (0.12, 0.11, 0.10)))
    return _line(points, radius, colour, strength, _between(0.004, 0.02, severity))


def crack(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    spot = _spot(draw, canvas)
    points = _walk(draw, spot, draw.integer(5, 9), _between(0.04, 0.13, severity), 0.9)
    branch = _walk(draw, points[draw.integer(1, 3)], 3, _between(0.03, 0.1, severity), 0.8)
    radius, strength = _between(0.002, 0.008, severity), _between(0.5, 0.95, severity)
    return _line(points, radius, (0.04, 0.04, 0.04), strength, 0.03, branch)


def stain(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    u, v = _spot(draw, canvas)
    radius, strength = _between(0.08, 0.24, severity), _between(0.3, 0.8, severity)
    rough, lobes, seed = draw.uniform(0.3, 0.7), draw.uniform(0.8, 1.6), draw.uniform(0, 40)
    edge, colour, gloss = draw.uniform(0.02, 0.1), draw.choice(_STAINS), draw.choice((None, 0.0, 0.6))

    def cover(canvas: Canvas) -> Array:
        distance = blob(canvas, u, v, radius, rough, lobes, seed)
        return (1 - smooth(distance, -edge, 0.0)) * canvas.cover * strength

    return Defect(lambda c: cover(c) > 0.3 * strength, mark=lambda c: c.tint(cover(c), colour, gloss=gloss))


def missing_part(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    """A piece that should be there isn't; or, of a product in one piece, a bit has broken off or a hole gapes."""
    least = canvas.size * canvas.size / 2000
    pieces = [k for k in range(canvas.n_pieces) if np.count_nonzero(canvas.piece(k) > 0.5) >= least]
    if pieces and draw.chance(0.75):
        chosen = draw.choice(pieces)
        return Defect(lambda c: canvas.piece(chosen) > 0.5, Damage(missing=chosen))
    u, v, _ = _edge(draw, canvas)
    radius, rough, seed = _between(0.07, 0.24, severity), draw.uniform(0.2, 0.6), draw.uniform(0, 40)

    def bite(c: Canvas) -> Array:
        return blob(c, u, v, radius, rough, 1.2, seed)

    return Defect(lambda c: (bite(c) < 0) & (canvas.cover > 0.5), Damage(bite=bite))


def deformation(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    """Something is bent; where nothing would show it, dented."""
    u, v, structure = _edge(draw, canvas)
    mode, angle = draw.choice(("push", "twist", "bulge", "dent")), draw.uniform(0, 2 * PI)
    if structure < 0.045 or mode == "dent":
        return _dent(u, v, _between(0.08, 0.3, severity), _between(0.02, 0.12, severity) * draw.choice((-1, 1)))
    radius, amount = _between(0.2, 0.5, severity), _between(0.03, 0.13, severity) * draw.choice((-1, 1))

    def shift(x: Array, y: Array) -> tuple[Array, Array]:
        du, dv = x - u, y - v
        fade = _fade(du, dv, radius) * amount
        if mode == "push":
            return fade * cos(angle), fade * sin(angle)
        scale = 2.5 / radius
        return (-fade * dv * scale, fade * du * scale) if mode == "twist" else (fade * du * scale, fade * dv * scale)

    def warp(x: Array, y: Array) -> tuple[Array, Array]:
        du, dv = shift(x, y)
        return x + du, y + dv

    def support(c: Canvas) -> Array:
        return hypot(*shift(canvas.u, canvas.v)) > canvas.pixel

    return Defect(support, Damage(warp=warp))


def _dent(u: float, v: float, radius: float, depth: float) -> Defect:
    def press(c: Canvas) -> Array:
        return _fade(c.u - u, c.v - v, radius) * c.cover

    def mark(c: Canvas) -> None:
        c.relief -= press(c) * depth

    return Defect(lambda c: press(c) > 0, mark=mark)


def _fade(du: Array, dv: Array, radius: float) -> Array:
    """From 1 at the centre smoothly to 0 at the radius."""
    share = clip(1 - (du * du + dv * dv) * (1 / (radius * radius)))
    return share * share


def wrong_texture(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    u, v = _spot(draw, canvas)
    material, strength = neighbour(draw), _between(0.35, 1.0, severity)
    radius, rough, seed = _between(0.1, 0.28, severity), draw.uniform(0.0, 0.4), draw.uniform(0, 40)
    straight, angle = draw.chance(0.4), draw.uniform(0, 2 * PI)

    def cover(c: Canvas) -> Array:
        if straight:
            du, dv = c.u - u, c.v - v
            p, q = du * cos(angle) + dv * sin(angle), dv * cos(angle) - du * sin(angle)
            distance = box(p, q, radius, radius * 0.7, 0.02)
        else:
            distance = blob(c, u, v, radius, rough, 1.0, seed)
        return clip(0.5 - distance * (1 / c.pixel)) * c.cover * strength

    return Defect(lambda c: cover(c) > 0.5 * strength, mark=lambda c: c.patch(cover(c), material))


def foreign_object(draw: Draw, canvas: Canvas, severity: float, neighbour: Neighbour) -> Defect:
    u, v = _spot(draw, canvas)
    size, material = _between(0.05, 0.15, severity), neighbour(draw)
    shape = draw.choice(("fibre", "grain", "shard", "ring", "rod"))
    angle, sides = draw.uniform(0, 2 * PI), draw.integer(3, 5)
    points, seed = _walk(draw, (u, v), 7, size * 0.7, 0.7), draw.uniform(0, 40)

    def outline(c: Canvas) -> Array:
        du, dv = c.u - u, c.v - v
        p, q = du * cos(angle) + dv * sin(angle), dv * cos(angle) - du * sin(angle)
        if shape == "fibre":
            return path(c.u, c.v, points, 0.25 * size * 0.3)
        if shape == "grain":
            return blob(c, u, v, size * 0.8, 0.4, 1.2, seed)
        if shape == "shard":
            return polygon(p, q * 1.6, sides, size * 0.6)
        if shape == "ring":
            return abs(hypot(p, q) - size * 0.8) - size * 0.2
        return box(p, q, size * 1.6, size * 0.22, size * 0.2)

    def mark(c: Canvas) -> None:
        c.part(outline(c), material, min(0.08, size * 0.8), size * 0.4, base=c.relief)

    return Defect(lambda c: outline(c) < 0.5 * c.pixel, mark=mark)


KINDS = {f.__name__: f for f in (scratch, crack, stain, missing_part, deformation, wrong_texture, foreign_object)}


def _between(subtle: float, obvious: float, severity: float) -> float:
    return subtle + (obvious - subtle) * severity


def _spot(draw: Draw, canvas: Canvas) -> tuple[float, float]:
    """A random point of the product, in its coordinates."""
    inside = np.flatnonzero(canvas.cover > 0.9)
    chosen = inside[draw.integer(0, len(inside) - 1)]
    return float(canvas.u.flat[chosen]), float(canvas.v.flat[chosen])


def _edge(draw: Draw, canvas: Canvas) -> tuple[float, float, float]:
    """The point of the product where its shape or colour changes most, of a dozen random ones, and that change."""
    inside = np.flatnonzero(canvas.cover > 0.9)
    chosen = inside[[draw.integer(0, len(inside) - 1) for _ in range(12)]]
    level = blur(canvas.relief + 0.3 * canvas.cover + 0.2 * canvas.colour[1], 2)  # edges, not the grain of materials
    change = abs(np.roll(level, 3, 0) - level) + abs(np.roll(level, 3, 1) - level)
    best = chosen[np.argmax(change.flat[chosen])]
    return float(canvas.u.flat[best]), float(canvas.v.flat[best]), float(change.flat[best])


def _walk(draw: Draw, start: tuple[float, float], steps: int, step: float, bend: float) -> list[tuple[float, float]]:
    angle, points = draw.uniform(0, 2 * PI), [start]
    for _ in range(steps):
        u, v = points[-1]
        length = step * draw.uniform(0.7, 1.3)
        points.append((u + length * cos(angle), v + length * sin(angle)))
        angle += draw.uniform(-bend, bend)
    return points


def _line(points, radius: float, colour, strength: float, depth: float, branch=None) -> Defect:
    """A groove along points (and branch) on the product's surface."""

    def cover(c: Canvas) -> Array:
        distance = path(c.u, c.v, points, radius)
        if branch:
            distance = np.minimum(distance, path(c.u, c.v, branch, radius * 0.8))
        return clip(0.5 - distance * (1 / c.pixel)) * c.cover * strength

    return Defect(lambda c: cover(c) > 0.15 * strength, mark=lambda c: c.tint(cover(c), colour, depth))
