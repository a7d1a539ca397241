"""Images of a product that a small detector can learn, and defects on them."""

import numpy as np
import torch

SIZE = 64


def striped(seed: int, size: int = SIZE) -> np.ndarray:
    """A good product: stripes of one width and direction, whose place, colour and contrast vary. uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (6 * row + 2 * column + rng.uniform()))
    image = (
        0.5 + rng.uniform(0.2, 0.3) * wave[..., None] * rng.uniform(0.8, 1, 3) + rng.normal(0, 0.01, (size, size, 3))
    )
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def with_defect(image: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The image with a patch of noise painted on it, and the mask of the patch."""
    rng = np.random.default_rng(seed)
    image, mask = image.copy(), np.zeros(image.shape[:2], bool)
    top, left = rng.integers(8, len(image) - 24, 2)
    mask[top : top + 16, left : left + 16] = True
    image[mask] = rng.integers(0, 256, (mask.sum(), 3))
    return image, mask


def as_batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
