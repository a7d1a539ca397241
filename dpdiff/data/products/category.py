"""One category of products: how all its specimens look, how they vary, and its images, each on its own."""

import numpy as np

from . import assemblies, goods, hardware, materials, surfaces
from .canvas import PI, Array, Canvas, Damage, Draw, Light, Material, Pose, blur, cos, develop, sin
from .defects import KINDS

OBJECTS = (
    hardware.washer, hardware.nut, hardware.screw_head, hardware.bolt, hardware.gear, hardware.bearing,
    hardware.impeller, hardware.key, hardware.spring, hardware.plate, hardware.can_lid, hardware.cap, hardware.coin,
    goods.capsule, goods.tablet, goods.cable, goods.button, goods.battery, goods.resistor, goods.biscuit,
    goods.hazelnut, goods.die, assemblies.board, assemblies.chip, assemblies.connector, assemblies.zipper,
    assemblies.blister, assemblies.brush, assemblies.keypad, assemblies.tray, assemblies.rope, assemblies.crate,
)  # fmt: skip
SURFACES = (
    surfaces.fabric, surfaces.leather, surfaces.slab, surfaces.veneer, surfaces.foil, surfaces.striped,
    surfaces.printed, surfaces.planks, surfaces.tiles, surfaces.mosaic, surfaces.perforated, surfaces.mesh,
    surfaces.tread, surfaces.panel, surfaces.corrugated, surfaces.wicker, surfaces.bricks,
)  # fmt: skip
KINDS_PER_CATEGORY = 4
_NEIGHBOURS = 160  # a category borrows materials of the first so many of its seed, whether they are rendered or not
_VISIBLE = 6.0  # levels of 255 that a pixel must change by to count as defective
_CHARACTER, _TRAIN, _TEST, _DEFECTIVE, _DEFECT, _FAMILIES = range(6)  # streams of random numbers


class Category:
    """Category number ``index`` of a seed; the same whatever other categories there are.

    Attributes: ``name``; ``kinds``, the defects its test images show in turn; ``material``, its main one.
    """

    def __init__(self, seed: int, index: int):
        self._key = (seed, index)
        draw = Draw(*self._key, _CHARACTER)
        families = OBJECTS + SURFACES
        block, place = divmod(index, len(families))  # each block of categories has every family once
        family = Draw(seed, block, _FAMILIES).sample(families, place + 1)[-1]
        self.material, self._paint = family(draw)
        self.name = f"{self.material.name}_{family.__name__}_{index:04d}"
        self.kinds = draw.sample(list(KINDS), KINDS_PER_CATEGORY)
        self._table = materials.table(draw)
        # how far specimens differ in place, angle (from fixtures to heaps), size, light and exposure
        self._turn = draw.choice((0.02, 0.05) if family in SURFACES else (0.03, 0.1, 0.3, PI))
        self._shift = draw.uniform(0.02, 0.1)
        self._scale, self._growth = draw.uniform(1.0, 1.2), draw.uniform(0.01, 0.05)
        self._lamp, self._lamp_swing = draw.uniform(0, 2 * PI), draw.uniform(0.1, 0.6)
        self._elevation, self._exposure = draw.uniform(0.6, 1.2), draw.uniform(0.03, 0.12)
        self._ambient, self._shadow = draw.uniform(0.25, 0.5), draw.uniform(0.3, 0.75)
        self._sharpness, self._softness = draw.integer(3, 5), draw.uniform(0.0, 0.6)
        self._noise = draw.uniform(0.4, 1.4)

    def good(self, split: str, number: int, size: int) -> Array:
        """Image ``number`` of the split, "train" or "test": (size, size, 3) uint8."""
        stream = {"train": _TRAIN, "test": _TEST}[split]
        canvas, light = self._specimen(Draw(*self._key, stream, number), size, Damage())
        return develop(canvas.photograph(light), self._noise, canvas.draw)

    def defective(self, number: int, size: int) -> tuple[str, Array, Array]:
        """Defective test image ``number``: its kind, the image (size, size, 3) uint8, the mask (size, size) bool.

        The mask holds the pixels of the defect's outline or displacement near which (2 pixels) the image, before its
        noise, differs visibly from that of the same specimen without the defect.
        """
        kind = self.kinds[number % len(self.kinds)]
        specimen = (*self._key, _DEFECTIVE, number)
        sound, light = self._specimen(Draw(*specimen), size, Damage())
        before = sound.photograph(light)
        draw = Draw(*self._key, _DEFECT, number)
        severity = draw.uniform()
        for attempt in range(100):  # until it shows; a dark stain on a dark part, say, doesn't
            if attempt == 60:  # and nothing bends black cloth so that one could see it
                kind = "wrong_texture"
            defect = KINDS[kind](draw, sound, min(1.0, severity + 0.04 * attempt), self._neighbour)
            if defect.damage is None:
                canvas = sound.copy()
            else:
                canvas, _ = self._specimen(Draw(*specimen), size, defect.damage)
            if defect.mark is not None:
                defect.mark(canvas)
            after = canvas.photograph(light)
            change = abs(after - before)
            visible = np.maximum(np.maximum(change[0], change[1]), change[2]) > _VISIBLE
            mask = defect.support(canvas) & (blur(visible.astype(np.float32), 2) > 0.15)
            if np.count_nonzero(mask & visible) * 2000 >= size * size:
                return kind, develop(after, self._noise, canvas.draw), mask
        raise RuntimeError(f"no visible {kind} found for image {number} of {self.name}")

    def _specimen(self, draw: Draw, size: int, damage: Damage) -> tuple[Canvas, Light]:
        def around(middle: float, spread: float) -> float:
            return draw.uniform(middle - spread, middle + spread)

        shift = around(0, self._shift), around(0, self._shift)
        pose = Pose(*shift, angle=around(0, self._turn), scale=self._scale * around(1, self._growth))
        lamp, elevation = around(self._lamp, self._lamp_swing), around(self._elevation, 0.1)
        exposure = around(1, self._exposure)
        light = Light(
            direction=(cos(lamp) * cos(elevation), sin(lamp) * cos(elevation), sin(elevation)),
            ambient=self._ambient,
            shadow=self._shadow,
            falloff=draw.uniform(0.02, 0.2),
            gains=tuple(exposure * around(1, 0.02) for _ in range(3)),
            sharpness=self._sharpness,
            softness=self._softness,
        )
        canvas = Canvas(size, draw, pose, damage)
        canvas.backdrop(self._table)
        self._paint(canvas)
        return canvas, light

    def _neighbour(self, draw: Draw) -> Material:
        """The material of another category."""
        return Category(self._key[0], draw.integer(0, _NEIGHBOURS - 1)).material
