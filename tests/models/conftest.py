"""A detector small enough to train in seconds, and files of a product that it can learn."""

import pytest
import torch
from PIL import Image
from stripes import SIZE, striped

import dpdiff
from dpdiff.data import Sample


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
