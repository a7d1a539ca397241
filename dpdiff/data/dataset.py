"""Samples as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from dpdiff.data.images import load_image, load_mask
from dpdiff.data.samples import Sample


class AnomalyDataset(Dataset):
    """Images of one size with their labels and masks, read when asked for.

    samples: what to read. image_size: the side S in pixels; the aspect ratio is not kept. categories: all names, whose
    order numbers them; those of the samples, in order of appearance, when None.

    Item i is a dict, which the default collation stacks:

    - ``image``: float32 (3, S, S) in [0, 1], resized antialiased bilinear
    - ``mask``: bool (S, S), true where the defect is, resized nearest; all false without one
    - ``has_mask``: bool, whether ``mask`` is the truth: of a defective image without a mask it is not
    - ``label``: int, 0 good, 1 defective
    - ``category``: int
    - ``path``: str

    An unreadable file raises ValueError with its path; :func:`dpdiff.data.check` tells beforehand.
    """

    def __init__(self, samples: Sequence[Sample], image_size: int, categories: Sequence[str] | None = None) -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: expected a positive number of pixels")
        self.samples = list(samples)
        self.image_size = image_size
        self.categories = list(dict.fromkeys(s.category for s in self.samples) if categories is None else categories)
        self._number = {category: i for i, category in enumerate(self.categories)}
        unknown = {s.category for s in self.samples} - self._number.keys()
        if unknown:
            raise ValueError(f"categories lacks {sorted(unknown)[0]!r}, which samples have")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        size = self.image_size
        return {
            "image": load_image(sample.image, size),
            "mask": load_mask(sample.mask, size) if sample.mask else torch.zeros(size, size, dtype=torch.bool),
            "has_mask": sample.mask is not None or sample.label == 0,
            "label": sample.label,
            "category": self._number[sample.category],
            "path": str(sample.image),
        }
