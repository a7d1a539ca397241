"""The backends of a processor, on which every operator is tested."""

import pytest

import dpdiff_kernels as dk

BACKENDS = [name for name in ("reference", "cpp") if dk.backends()[name]]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library is not there")
