"""Peak memory of a call: of any library, in the middle of the call, and not hidden by what was freed before."""

import sys

import numpy as np
import pytest
import torch

import dpdiff_kernels as dk
from benchmarks.memory import peak_memory

SIZE = 96 << 20  # bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux' /proc")


def temporary() -> torch.Tensor:
    return torch.ones(SIZE // 4).sum()


@pytest.mark.parametrize("run", [temporary, lambda: np.ones(SIZE // 8).sum(), lambda: bytearray(SIZE)])
def test_what_is_held_for_a_moment_counts(run):
    for _ in range(2):
        assert peak_memory(run, "cpu") == pytest.approx(SIZE, rel=0.1)


def test_what_is_held_before_does_not_count():
    held = torch.ones(SIZE // 4)
    assert peak_memory(lambda: held.add_(1), "cpu") < SIZE / 10


def test_many_small_blocks_freed_before_do_not_hide_a_peak():
    blocks = [torch.ones(1024) for _ in range(SIZE // 4096)]
    del blocks
    assert peak_memory(temporary, "cpu") == pytest.approx(SIZE, rel=0.1)


@pytest.mark.skipif(not dk.backends()["cpp"], reason="only the native library keeps memory of freed results")
def test_memory_that_dpdiff_kept_is_counted_again():
    cost = torch.rand(8, 512, 512)  # 8 MB, as its plan
    run = lambda: dk.sinkhorn(cost, n_iters=1, backend="cpp").plan
    run()
    assert all(peak_memory(run, "cpu") >= 0.95 * cost.numel() * 4 for _ in range(2))
