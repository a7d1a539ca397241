"""The backends of a processor, on which every operator is tested."""

import pytest
import torch

import dpdiff_kernels as dk

BACKENDS = [name for name in ("reference", "cpp") if dk.backends()[name]]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library is not there")
CAPABILITIES = ("portable", "avx2", "avx512", "amx")  # of instructions, each with those before it


def skip_unless_lesser(capability: str) -> None:
    """Skips what processes with fewer instructions are for: this one has no more, or these themselves."""
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(torch.ops.dpdiff.cpu_capability()):
        pytest.skip("not on this processor, or what all other tests here run on")
