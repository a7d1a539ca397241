"""A detector small enough to train in seconds, and the images of a product that it can learn."""

import numpy as np
import pytest
import torch
from PIL import Image

import dpdiff
from dpdiff.data import Sample

SIZE = 64


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tests' tensors are too small for more, and bits don't depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """Makes small DPDiffAD models on a random backbone; the same weights for the same options."""

    def make(**options) -> dpdiff.DPDiffAD:
        small = dict(
            backbone="test_resnet",
            pretrained=False,
            image_size=SIZE,
            n_local=16,
            n_global=8,
            dim=24,
            depth=1,
            num_heads=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return dpdiff.DPDiffAD(**small | options).eval()

    return make


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


@pytest.fixture
def products(tmp_path):
    """Writes n good products to files; their samples."""

    def write(n: int = 24) -> list[Sample]:
        folder = tmp_path / "products"
        folder.mkdir(exist_ok=True)
        for i in range(n):
            Image.fromarray(striped(i)).save(folder / f"{i}.png")
        return [Sample(folder / f"{i}.png", "stripes") for i in range(n)]

    return write
