"""Files of which tests make data sets, and what was found in one."""

from pathlib import Path

import numpy as np
from PIL import Image

from dpdiff.data import Sample


def image(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, value, value)).save(path)
    return path


def mask(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((6, 8), np.uint8)
    pixels[1:3, 2:5] = 255
    Image.fromarray(pixels).save(path)
    return path


def described(samples: list[Sample], root: Path) -> list[tuple]:
    def inside(path):
        return path and path.relative_to(root).as_posix()

    return [(inside(s.image), s.category, s.kind, s.label, inside(s.mask)) for s in samples]
