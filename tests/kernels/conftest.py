"""What tests of kernels ask pytest for by name."""

import pytest
from cpu_backends import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param
