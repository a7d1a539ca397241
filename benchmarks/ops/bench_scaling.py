"""How the operators' time goes with tokens, with prototypes and with threads, beside PyTorch's best (no compiler):

    pytest benchmarks/ops/bench_scaling.py [--device cuda]

Everything is float32. One size grows, and the others stay at 4,096 tokens, 512 prototypes and all threads.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dpdiff_kernels as dk
from benchmarks.contenders import contenders, on

TOKENS, PROTOTYPES = 4096, 512
THREADS = [2**i for i in range((torch.get_num_threads()).bit_length())]
GROWING = [("tokens", n) for n in (1024, 4096, 16_384)]
GROWING += [("prototypes", m) for m in (64, 256, 1024, 4096)]
GROWING += [on("cpu", ("threads", n)) for n in THREADS]


class Problem(NamedTuple):
    """An operator's call and PyTorch's, of one size, and what neither can do without."""

    dpdiff: Callable[[], Tensor]
    torch: Callable[[], Tensor]
    flops: float
    bytes: float
    rate: str = "float32"  # of the limits, for the operations


def draw(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def nearest(device: str, n: int, m: int) -> Problem:
    """768 channels, which may be screened in bfloat16."""
    x, p = draw(device, n, 768), draw(device, m, 768, seed=1)
    by_mm = lambda: torch.addmm(p.square().sum(-1), x, p.T, alpha=-2).argmin(1)
    ours = lambda: dk.nearest_prototype(x, p, metric="l2").indices.view(-1)
    return Problem(ours, by_mm, 2 * 768 * n * m, 4 * 768 * (n + m) + 12 * n, "bfloat16")


def attention(device: str, n: int, m: int) -> Problem:
    """12 heads of 64 channels, one image."""
    query, (key, value) = draw(device, 1, 12, n, 64), draw(device, 2, 12, m, 64, seed=1)
    by_sdpa = lambda: F.scaled_dot_product_attention(query, key[None], value[None])
    ours = lambda: dk.prototype_attention(query, key, value)
    return Problem(ours, by_sdpa, 4 * 12 * 64 * n * m, 4 * 12 * 64 * 2 * (n + m))


def sinkhorn(device: str, n: int, m: int) -> Problem:
    """Four problems, each with a quarter of the tokens; 50 iterations at eps = 0.05."""
    cost, n_iters, eps = draw(device, 4, n // 4, m), 50, 0.05

    def by_products() -> Tensor:
        kernel = (cost / -eps).exp()
        v = torch.ones(4, m, 1, device=device)
        for _ in range(n_iters):
            u = 4 / n / (kernel @ v)
            v = 1 / m / (kernel.mT @ u)
        return u * kernel * v.mT

    ours = lambda: dk.sinkhorn(cost, eps=eps, n_iters=n_iters).plan
    return Problem(ours, by_products, 4 * n_iters * n * m, 8 * n * m)


@pytest.fixture
def threads(growing) -> Generator[None]:
    """As many as the case says, if it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(growing[1] if growing[0] == "threads" else before)
    yield
    torch.set_num_threads(before)


@contenders("PyTorch", backends=())
@pytest.mark.parametrize("growing", GROWING, ids=lambda growing: f"{growing[1]} {growing[0]}")
@pytest.mark.parametrize("operator", [nearest, attention, sinkhorn], ids=lambda operator: operator.__name__)
def test_growing(measure, device, operator, growing, threads, contender):
    axis, size = growing
    n, m = size if axis == "tokens" else TOKENS, size if axis == "prototypes" else PROTOTYPES
    problem = operator(device, n, m)
    ours, theirs = problem.dpdiff(), problem.torch()
    if ours.dtype == torch.int64:  # rounding decides between near ties
        assert (ours == theirs).double().mean() > 0.999
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    run = problem.dpdiff if contender == "dpdiff" else problem.torch
    sweep = (operator.__name__, axis, size)
    work = {"flops": problem.flops, "bytes": problem.bytes, "dtype": problem.rate}
    measure(f"{operator.__name__}, {size:,} {axis}", run, **work, sweep=sweep)
