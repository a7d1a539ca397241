"""Signed distances to outlines, negative inside, in product coordinates; exact or close enough near the outline."""

import math
from itertools import pairwise

import numpy as np

from .canvas import PI, Array, Canvas, clip, cos, hypot, sin, turn


def box(u: Array, v: Array, width: float, height: float, corner: float = 0.0) -> Array:
    """A rectangle of half sizes width and height with rounded corners."""
    du, dv = abs(u) - (width - corner), abs(v) - (height - corner)
    outside = hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - corner


def stick(u: Array, v: Array, start: tuple[float, float], end: tuple[float, float], radius: float) -> Array:
    """A line segment with round ends."""
    du, dv = end[0] - start[0], end[1] - start[1]
    pu, pv = u - start[0], v - start[1]
    share = np.minimum(np.maximum((pu * du + pv * dv) * (1 / (du * du + dv * dv + 1e-9)), 0), 1)
    pu, pv = pu - share * du, pv - share * dv
    return hypot(pu, pv) - radius


def path(u: Array, v: Array, points: list[tuple[float, float]], radius: float) -> Array:
    """A polyline of sticks."""
    distance = stick(u, v, points[0], points[1], radius)
    for start, end in pairwise(points[1:]):
        distance = np.minimum(distance, stick(u, v, start, end, radius))
    return distance


def polygon(u: Array, v: Array, sides: int, inner: float) -> Array:
    """A regular polygon with the given inner radius (up to its corners, where the outline is sharp)."""
    distance = None
    for side in range(sides):
        angle = 2 * PI * side / sides
        edge = u * cos(angle) + v * sin(angle) - inner
        distance = edge if distance is None else np.maximum(distance, edge)
    return distance


def star(u: Array, v: Array, points: int, outer: float, inner: float) -> Array:
    """A star with straight edges, its first point along u."""
    _, along, across = sectors(u, v, points)
    half = PI / points
    end_u, end_v = inner * cos(half), inner * sin(half)
    du, dv = end_u - outer, end_v
    return ((along - outer) * dv - abs(across) * du) * (1 / math.sqrt(du * du + dv * dv))


def sectors(u: Array, v: Array, count: int, phase: float = 0.0) -> tuple[Array, Array, Array]:
    """Fold the plane into equal sectors around the origin: number of each, coordinates along and across its axis."""
    radius = hypot(u, v)
    angle = turn(u, v) * count - phase * (count / (2 * PI))
    number = np.floor(angle + 0.5)
    local = (angle - number) * (2 * PI / count)
    return number.astype(np.int32) % count, radius * cos(local), radius * sin(local)


def lattice(u: Array, v: Array, columns: int, rows: int, pitch_u: float, pitch_v: float):
    """Fold the plane into a grid centred at the origin: number of the cell, coordinates from its centre."""
    i = np.minimum(np.maximum(np.floor(u * (1 / pitch_u) + columns / 2), 0), columns - 1)
    j = np.minimum(np.maximum(np.floor(v * (1 / pitch_v) + rows / 2), 0), rows - 1)
    number = (j * columns + i).astype(np.int32)
    return number, u - (i - (columns - 1) / 2) * pitch_u, v - (j - (rows - 1) / 2) * pitch_v


def blob(canvas: Canvas, u: float, v: float, radius: float, rough: float, lobes: float, seed: float) -> Array:
    """An irregular patch around (u, v): its radius varies by the share rough with about 2 lobes bulges."""
    du, dv = canvas.u - u, canvas.v - v
    scale = lobes / radius
    bulge = canvas.cloud(du * scale + seed, dv * scale - seed, 2) - 0.5
    return hypot(du, dv) - radius * (1 + 2 * rough * bulge)


def dome(distance: Array, bevel: float) -> Array:
    """From 0 at an outline to 1 inside, rounded over the bevel's width: the profile that Canvas.part gives a part."""
    t = clip(distance * (-1 / bevel))
    return np.sqrt(t * (2 - t))
