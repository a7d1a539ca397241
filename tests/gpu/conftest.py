"""The GPU kernels' tests: on a CUDA device where there is one, else on small CPU tensors in Triton's interpreter."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda_only" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton")
    return torch.device("cpu")
