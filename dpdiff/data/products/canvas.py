"""The canvas that products are painted on: colour, relief and gloss of every pixel, lit and photographed at the end.

Only operations that IEEE 754 defines to the last bit are used (+ - * / sqrt, comparisons, rounding, integers): no float
reductions, no library transcendentals, no derived distributions. So a seed gives the same pixels on any machine.
Lengths are in units of half the image; arrays are float32; colours are sRGB-like in [0, 1], squared for blending.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Colour = tuple[float, float, float]
PI = 3.141592653589793
_EVERYWHERE = (slice(None), slice(None))
_LATTICE = 64  # random values per side of the noise lattice, which repeats beyond


class Draw:
    """Random numbers from the raw output of PCG64, whose stream NumPy guarantees (its distributions may change)."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choice(self, options: Sequence):
        return options[self.integer(0, len(options) - 1)]

    def sample(self, options: Sequence, count: int) -> list:
        """Without replacement, in random order."""
        left = list(options)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(count)]

    def bytes(self, count: int) -> Array:
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def cos(angle):
    """Cosine to 4e-6, of a float or an array."""
    turns = angle * (0.5 / PI)
    floor = math.floor if isinstance(angle, float) else np.floor
    turns = abs(turns - floor(turns + 0.5))  # cosine is even and periodic: [0, 1/2]
    x = (0.25 - turns) * (2 * PI)  # and the sine of the complement: [-pi/2, pi/2], where Taylor's polynomial will do
    x2 = x * x
    return x * (1 + x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880)))))


def sin(angle):
    return cos(angle - PI / 2)


def turn(x: Array, y: Array) -> Array:
    """The angle of (x, y) in turns, from -1/2 to 1/2, to 1e-5."""
    across, along = abs(x), abs(y)
    ratio = np.minimum(across, along) / (np.maximum(across, along) + 1e-12)
    r2 = ratio * ratio
    odd = -0.33262347 + r2 * (0.19354346 + r2 * (-0.11643287 + r2 * (0.05265332 - r2 * 0.01172120)))
    angle = ratio * (0.99997726 + r2 * odd)
    angle = np.where(along > across, PI / 2 - angle, angle)
    angle = np.where(x < 0, PI - angle, angle)
    return np.where(y < 0, -angle, angle) * (0.5 / PI)


def hypot(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def clip(x: Array, low: float = 0.0, high: float = 1.0) -> Array:
    return np.minimum(np.maximum(x, low), high)


def smooth(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, with no kink between."""
    t = clip((x - low) * (1 / (high - low)))
    return t * t * (3 - 2 * t)


def blur(image: Array, radius: int) -> Array:
    """Mean over a square of 2 radius + 1 pixels, edges repeated, summed in integers."""
    width = 2 * radius + 1
    total = np.rint(image * 65536.0).astype(np.int64)
    for axis in (-2, -1):
        pad = [(0, 0)] * total.ndim
        pad[axis] = (radius + 1, radius)
        sums = np.cumsum(np.pad(total, pad, mode="edge"), axis=axis)
        total = sums[..., width:] - sums[..., :-width] if axis == -1 else sums[..., width:, :] - sums[..., :-width, :]
    return (total * (1 / (65536.0 * width * width))).astype(np.float32)


@dataclass(frozen=True)
class Material:
    """A surface: texture(canvas, s, t) gives tone in [0, 1], from low to high colour, and relief (array or number)."""

    name: str
    low: Colour
    high: Colour
    gloss: float
    texture: Callable[["Canvas", Array, Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Pose:
    x: float
    y: float
    angle: float
    scale: float


@dataclass(frozen=True)
class Damage:
    """Changes to the geometry of a product, made while it is painted."""

    missing: int = -1  # number of the removable piece to leave out
    bite: Callable[["Canvas"], Array] | None = None  # signed distance to what has broken off
    warp: Callable[[Array, Array], tuple[Array, Array]] | None = None  # coordinates (u, v) to their displaced ones


@dataclass(frozen=True)
class Light:
    direction: tuple[float, float, float]  # unit vector towards the lamp
    ambient: float
    shadow: float
    falloff: float  # how much brighter the lamp's side of the image is
    gains: Colour  # exposure and white balance
    sharpness: int  # the highlight's exponent is 2 to this power
    softness: float  # defocus: share of a 3 x 3 mean


class Canvas:
    """One image being painted.

    Attributes:
        draw: random numbers for what varies from image to image.
        x, y: coordinates of the image, from -1 to 1; u, v: those of the product, posed and perhaps warped.
        cover: how much of each pixel the product covers.
        colour, relief, gloss: of each pixel.
    """

    def __init__(self, size: int, draw: Draw, pose: Pose, damage: Damage):
        self.size, self.draw, self.damage = size, draw, damage
        centres = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
        self.x, self.y = np.broadcast_to(centres, (size, size)), np.broadcast_to(centres[:, None], (size, size))
        c, s = cos(pose.angle) / pose.scale, sin(pose.angle) / pose.scale
        x, y = self.x - pose.x, self.y - pose.y
        self.u, self.v = c * x + s * y, c * y - s * x
        if damage.warp is not None:
            self.u, self.v = damage.warp(self.u, self.v)
        self.pixel = 2 / (size * pose.scale)
        self.colour = np.zeros((3, size, size), np.float32)
        self.relief = np.zeros((size, size), np.float32)
        self.gloss = np.zeros((size, size), np.float32)
        self.cover = np.zeros((size, size), np.float32)
        self._pieces: list[tuple[Array, Array, int]] = []  # coverage of a group, number of each pixel's piece, number
        self._lattice = draw.bytes(_LATTICE * _LATTICE).astype(np.float32) * (1 / 255)

    def copy(self) -> "Canvas":
        """The same painting, to be marked on its own."""
        twin = copy.copy(self)
        for plane in ("colour", "relief", "gloss", "cover"):
            setattr(twin, plane, getattr(self, plane).copy())
        return twin

    @property
    def n_pieces(self) -> int:
        """How many removable pieces the product has so far."""
        return len(self._pieces)

    def piece(self, index: int) -> Array:
        """How much of each pixel a removable piece covers."""
        cover, numbers, number = self._pieces[index]
        return cover * (numbers == number)

    def radius(self, u: float = 0.0, v: float = 0.0) -> Array:
        """Distance from the point (u, v) of the product."""
        return hypot(self.u - u, self.v - v)

    def noise(self, s: Array, t: Array) -> Array:
        """Smooth value noise in [0, 1] with one random value per unit square."""
        i, j = np.floor(s), np.floor(t)
        f, g = s - i, t - j
        f, g = f * f * (3 - 2 * f), g * g * (3 - 2 * g)
        column, row = i.astype(np.int32) % _LATTICE, j.astype(np.int32) % _LATTICE * _LATTICE
        right, below = (column + 1) % _LATTICE, (row + _LATTICE) % (_LATTICE * _LATTICE)
        values = self._lattice
        top = values[row + column]
        top += f * (values[row + right] - top)
        bottom = values[below + column]
        bottom += f * (values[below + right] - bottom)
        return top + g * (bottom - top)

    def cloud(self, s: Array, t: Array, octaves: int = 3) -> Array:
        """Fractal noise in [0, 1]: each octave half as large and half as strong."""
        total = self.noise(s, t)
        for octave in range(1, octaves):
            total = total + self.noise(s * 2**octave + 17.0 * octave, t * 2**octave + 5.0 * octave) * 0.5**octave
        return total * (1 / (2 - 0.5 ** (octaves - 1)))

    def cells(self, s: Array, t: Array) -> tuple[Array, Array, Array]:
        """Distances to the two nearest of one random point per unit square, and a random value of the nearest."""
        i, j = np.floor(s), np.floor(t)
        column, row = i.astype(np.int32), j.astype(np.int32)
        f, g = s - i, t - j
        first = np.full(s.shape, 9.0, np.float32)
        second, value = first, first
        for dj in (-1, 0, 1):
            for di in (-1, 0, 1):
                index = (row + dj) % _LATTICE * _LATTICE + (column + di) % _LATTICE
                x = self._lattice[index] * 0.9 + (di - f)
                y = self._lattice[index - 29] * 0.9 + (dj - g)
                distance = x * x + y * y
                closer = distance < first
                second = np.where(closer, first, np.minimum(second, distance))
                value = np.where(closer, self._lattice[index - 7], value)
                first = np.where(closer, distance, first)
        return np.sqrt(first), np.sqrt(second), value

    def backdrop(self, material: Material) -> None:
        """Fill the image with what the product lies on."""
        self._paint(np.ones_like(self.cover), 0.0, material, _EVERYWHERE, self.x, self.y)

    def part(
        self,
        distance: Array,
        material: Material,
        height: float | Array = 0.05,
        bevel: float = 0.04,
        base: float | Array = 0.0,
        along: tuple[Array, Array] | None = None,
        removable: bool = False,
        groups: tuple[Array, int] | None = None,
        tone: float | Array = 0.0,
    ) -> None:
        """Lay a part of the product on the canvas.

        Args:
            distance: signed distance to its outline in product coordinates, negative inside.
            height: rise from its edge at base level over the bevel's width, rounded; negative for a recess.
            along: coordinates of its texture; the product's own by default.
            removable: it may be missing; groups: (number of each pixel's group, count) when it is several such pieces.
            tone: added to the tone of the material's texture.
        """
        if self.damage.bite is not None:
            distance = np.maximum(distance, -self.damage.bite(self))
        cover = clip(0.5 - distance * (1 / self.pixel))
        if removable:
            numbers, count = groups or (np.zeros(1, np.int32), 1)
            missing = self.damage.missing - len(self._pieces)
            self._pieces += [(cover, numbers, number) for number in range(count)]
            if 0 <= missing < count:
                cover = cover * (numbers != missing)
        rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
        if not len(rows):
            return
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        height, base, tone = (x[window] if isinstance(x, np.ndarray) else x for x in (height, base, tone))
        t = clip(distance[window] * (-1 / bevel))
        s, r = along or (self.u, self.v)
        level = base + height * np.sqrt(t * (2 - t))
        self._paint(cover[window], level, material, window, s[window], r[window], tone)
        self.cover[window] = np.maximum(self.cover[window], cover[window])

    def _paint(self, cover, level, material: Material, window: tuple, s: Array, t: Array, shift=0.0) -> None:
        tone, relief = material.texture(self, s, t)
        tone = clip(tone + shift)
        if {np.float32} != {x.dtype.type for x in (cover, tone, level + relief)}:
            raise TypeError(f"{material.name}: float32 only, or results would depend on NumPy's promotion")
        for plane, low, high in zip(self.colour, material.low, material.high):
            low, high = low * low, high * high
            plane[window] += cover * (low + (high - low) * tone - plane[window])
        self.relief[window] += cover * (level + relief - self.relief[window])
        self.gloss[window] += cover * (material.gloss - self.gloss[window])

    def patch(self, cover: Array, material: Material) -> None:
        """Replace the surface but not the shape where cover says."""
        self._paint(cover, self.relief, material, _EVERYWHERE, self.u, self.v)

    def tint(self, cover: Array, colour: Colour, depth: float | Array = 0.0, gloss: float | None = None) -> None:
        """Blend a plain colour over everything, lower the relief by depth, and set the gloss, where cover says."""
        for plane, value in zip(self.colour, colour):
            plane += cover * (value * value - plane)
        self.relief -= cover * depth
        if gloss is not None:
            self.gloss += cover * (gloss - self.gloss)

    def photograph(self, light: Light) -> Array:
        """The lit image without noise: (3, size, size) in [0, 255]."""
        slope = self.size / 4
        padded = np.pad(self.relief, 1, mode="edge")
        gx = (padded[1:-1, 2:] - padded[1:-1, :-2]) * slope
        gy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) * slope
        inverse = 1 / np.sqrt(gx * gx + gy * gy + 1)
        lx, ly, lz = light.direction
        diffuse = np.maximum(lz - lx * gx - ly * gy, 0) * inverse
        hx, hy, hz = lx, ly, lz + 1  # half way to the viewer, who looks straight down
        shine = np.maximum(hz - hx * gx - hy * gy, 0) * inverse * (1 / math.sqrt(hx * hx + hy * hy + hz * hz))
        for _ in range(light.sharpness):
            shine = shine * shine
        reach = max(1, self.size // 40)
        shift = [round(-c * reach * 1.2) for c in (ly, lx)]
        shadow = np.roll(self.cover, shift, (0, 1))
        shadow = blur(blur(shadow, reach), reach) * (1 - self.cover)
        field = 1 + light.falloff * (lx * self.x + ly * self.y)
        lit = (light.ambient + (1 - light.ambient) * (1 / lz) * diffuse) * (1 - light.shadow * shadow) * field
        # bright and dark bands on slopes, like the room mirrored in polished edges
        lit *= 1 - self.gloss * (0.3 + 0.3 * (1 - cos((lx * gx + ly * gy) * inverse * 9.0)))
        gleam = self.gloss * shine * field
        image = np.stack(
            [(lit * gain + 0.85 * gleam) * plane + 0.15 * gleam for plane, gain in zip(self.colour, light.gains)]
        )
        image = np.sqrt(clip(image)) * 255
        return image + light.softness * (blur(image, 1) - image)


def develop(image: Array, noise: float, draw: Draw) -> Array:
    """Sensor noise (triangular, of the given deviation in levels) and 8 bits: (size, size, 3) uint8."""
    grain = draw.bytes(2 * image.size).astype(np.float32)
    grain = (grain[::2] + grain[1::2] - 255) * (noise / 104.5)
    return clip(np.rint(image + grain.reshape(image.shape)), 0, 255).astype(np.uint8).transpose(1, 2, 0)
