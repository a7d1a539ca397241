"""Tiles of a cost matrix and the sums over them that Sinkhorn's half-steps and plans are made of, in the log domain.

Exponents h_i + k_j - cost_ij are small where they matter and their parts are not, so that potentials are kept in
float64 and handed on as pairs of float32 (what float32 holds, and the rest), and differences keep what rounding loses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_INF = tl.constexpr(float("inf"))


@triton.jit
def sum_of(a, b):
    """a + b, and what rounding lost of it (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def tile_of(cost, b, i, j, n, m, COLUMNS: tl.constexpr):
    """Costs of output points i (rows of the tile) and reduced points j, inf beyond the edges; n of the outputs. The
    matrix is contiguous in the reduced points for rows, in the output points for columns."""
    if COLUMNS:
        at = j[None, :].to(tl.int64) * n + i[:, None]
    else:
        at = i[:, None].to(tl.int64) * m + j[None, :]
    inside = (i < n)[:, None] & (j < m)[None, :]
    return tl.load(cost + b * n * m + at, mask=inside, other=_INF)


@triton.jit
def exponentials(
    cost, high, low, b, i, n, m, scale, COLUMNS: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr
):  # fmt: skip
    """For output points i: the greatest x_ij = h_j - cost_ij, and the sum of exp((x_ij - it) / eps), h = high + low."""
    # Each place of the tile by itself, all together in the end: warps that share an output would wait for each other.
    most = tl.full((OUT, REDUCED), -_INF, tl.float32)
    total = tl.zeros((OUT, REDUCED), tl.float32)
    for start in range(0, m, REDUCED):
        j = start + tl.arange(0, REDUCED)
        h = tl.load(high + j, mask=j < m, other=-_INF)
        h_rest = tl.load(low + j, mask=j < m, other=0.0)
        c = tile_of(cost, b, i, j, n, m, COLUMNS)
        x, rest = sum_of(h[None, :], -c)
        rest = tl.where(x > -_INF, rest + h_rest[None, :], 0.0)  # else infinite minus infinite
        greater = tl.maximum(most, x)
        base = tl.where(greater > -_INF, greater, 0.0)
        total = total * tl.exp2((most - base) * scale) + tl.exp2(((x - base) + rest) * scale)
        most = greater
    greatest = tl.max(most, 1)
    base = tl.where(greatest > -_INF, greatest, 0.0)
    return greatest, tl.sum(total * tl.exp2((most - base[:, None]) * scale), 1)


@triton.jit
def softmin_of(most, total, eps):
    """-eps log sum_j exp(x_ij / eps) in float64, of what `exponentials` finds; inf where nothing is reached."""
    return tl.where(total > 0, -(most.to(tl.float64) + eps * tl.log(total.to(tl.float64))), _INF)


@triton.jit
def plan_of(h, h_rest, k, k_rest, c, scale):
    """exp((h + k - c) / eps), at most 2^126"""
    s, lost = sum_of(h, k)
    x, lost_again = sum_of(s, -c)
    rest = tl.where(x > -_INF, (lost + lost_again) + (h_rest + k_rest), 0.0)
    return tl.exp2(tl.minimum((x + rest) * scale, 126.0))


@triton.jit
def plan_sums(
    cost, h, h_rest, k_high, k_low, factor, plan, totals, b, i, n, m, scale,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """For output points i: sum_j P_ij factor_j (1 where there is none), P_ij = exp((h_i + k_j - cost_ij) / eps), and
    sum_j P_ij cost_ij where there are totals. Writes P where there is a plan."""
    summed = tl.zeros((OUT, REDUCED), tl.float32)
    total = tl.zeros((OUT, REDUCED), tl.float32)
    for start in range(0, m, REDUCED):
        j = start + tl.arange(0, REDUCED)
        k = tl.load(k_high + j, mask=j < m, other=-_INF)
        k_rest = tl.load(k_low + j, mask=j < m, other=0.0)
        c = tile_of(cost, b, i, j, n, m, COLUMNS)
        p = plan_of(h[:, None], h_rest[:, None], k[None, :], k_rest[None, :], c, scale)
        if plan is not None:
            inside = (i < n)[:, None] & (j < m)[None, :]
            tl.store(plan + b * n * m + i[:, None].to(tl.int64) * m + j[None, :], p, mask=inside)
        if totals is not None:
            total += p * tl.where(c < _INF, c, 0.0)
        if factor is not None:
            p *= tl.load(factor + j, mask=j < m, other=0.0)[None, :]
        summed += p
    return tl.sum(summed, 1), tl.sum(total, 1)


@triton.jit
def store_pair(high, low, x, keep):
    """A float64 as what float32 holds of it, and the rest; an infinity as itself and 0."""
    held = x.to(tl.float32)
    tl.store(high, held, mask=keep)
    tl.store(low, tl.where(x > -_INF, x - held.to(tl.float64), 0.0).to(tl.float32), mask=keep)


def pair_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 as the sum of two float32, and an infinity as itself and 0; contiguous."""
    x = x.contiguous()
    high = x.float()
    return high, torch.where(high.isfinite(), x - high.double(), 0).float()
