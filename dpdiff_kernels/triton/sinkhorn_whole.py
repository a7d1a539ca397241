"""Sinkhorn of problems that are small enough for one program each: it runs all iterations, or goes back through them,
in one launch. What its threads tell each other goes through global memory and barriers, the costs come from the L2
cache. Results are those of `sinkhorn`'s half-steps, which spread each problem over the GPU and take two launches an
iteration."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.triton.launch import Variant, arch_of, ceil_div, launch, power_of_2
from dpdiff_kernels.triton.sinkhorn_iterations import at_rest, carried, damping, last_of, violation
from dpdiff_kernels.triton.sinkhorn_tiles import exponentials, pair_of, plan_sums, softmin_of, store_pair

_INF = tl.constexpr(float("inf"))
# Costs of a problem up to which one multiprocessor takes less time than launches, forward, and back; and for which few
# warps do.
_MOST, _MOST_BACK, _FEW = 1 << 18, 1 << 20, 1 << 12


def fits(cost: Tensor, back: bool) -> bool:
    """On AMD's, scalar registers would spill."""
    most = _MOST_BACK if back else _MOST
    return cost.shape[1] * cost.shape[2] <= most and arch_of(cost.device) != "gfx942"


def _tile(n: int, m: int) -> dict[str, int]:
    """Rows and columns of a tile, points at a time of what is done for each, and warps. Other tiles spill."""
    size, num_warps, least = (1024, 4, 16) if n * m <= _FEW else (8192, 16, 32)
    width = min(max(power_of_2(m), least), 8 * num_warps)
    return {"HEIGHT": size // width, "WIDTH": width, "POINTS": 32 * num_warps, "num_warps": num_warps, "num_stages": 1}


# ------------------------------------------------------------------------------------------- kernels


@triton.jit
def _half_step(
    cost, other_high, other_low, weight, log_weight, before, out, high, low, p, n, m, eps, scale, damp, tau,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """out_i = -damp eps log sum_j exp((h_j - cost_ij) / eps), and h_i as a pair, of n points; the violation of the
    potential before, where there is one. Of problem p, but for weights and costs."""
    for start in range(0, n, OUT):
        i = start + tl.arange(0, OUT)
        most, total = exponentials(cost, other_high, other_low, p, i, n, m, scale, COLUMNS, OUT, REDUCED)
        tl.store(high + i, most, mask=i < n)
        tl.store(low + i, total, mask=i < n)
    tl.debug_barrier()
    off = 0.0
    for start in range(0, n, POINTS):  # logarithms in float64, each by one thread
        i = start + tl.arange(0, POINTS)
        keep = i < n
        most = tl.load(high + i, mask=keep, other=-_INF)
        softmin = softmin_of(most, tl.load(low + i, mask=keep, other=0.0), eps)
        if before is not None:
            potential = tl.load(before + i, mask=keep, other=_INF)
            off += violation(softmin, i, keep, p, n, potential, weight, eps, tau)
        tl.store(out + i, softmin * damp, mask=keep)
        store_pair(high + i, low + i, carried(softmin * damp, i, keep, p, n, log_weight), keep)
    tl.debug_barrier()
    return off


@triton.jit(do_not_specialize=["n_iters", "slots", "every"])
def _iterations(
    cost, a, b, log_a, log_b, f, g, f_high, f_low, g_high, g_low, seen, used,
    n, m, n_iters, slots, every, eps: tl.float64, scale, damp_a: tl.float64, damp_b: tl.float64,
    tau_a: tl.float64, tau_b: tl.float64, tol: tl.float64, KEEP: tl.constexpr, TOL: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """All iterations of a problem. f (B, slots, N): two slots where TOL, n_iters where KEEP, else one. g (B, slots, M)
    where KEEP, else (B, M). g_high, g_low: of g = 0."""
    p = tl.program_id(0).to(tl.int64)
    f_high, f_low, g_high, g_low = f_high + p * n, f_low + p * n, g_high + p * m, g_low + p * m
    stranded = 0.0
    k = 0
    last = n_iters
    while k < last:
        to_f, to_g = f + (p * slots + k % slots) * n, g + (p * slots + k if KEEP else p) * m
        before = f + (p * slots + (k + 1) % slots) * n if TOL else None
        off = _half_step(
            cost, g_high, g_low, a, log_a, before, to_f, f_high, f_low, p, n, m, eps, scale, damp_a, tau_a,
            False, HEIGHT, WIDTH, POINTS,
        )  # fmt: skip
        if TOL and k > 0 and stranded + off < tol:
            last = k
        else:
            _half_step(
                cost, f_high, f_low, b, log_b, None, to_g, g_high, g_low, p, m, n, eps, scale, damp_b, tau_b,
                True, WIDTH, HEIGHT, POINTS,
            )  # fmt: skip
            k += 1
            if TOL:
                if tau_b == _INF and k == 1:
                    for start in range(0, m, POINTS):
                        j = start + tl.arange(0, POINTS)
                        w = tl.load(b + p * m + j, mask=j < m, other=0.0)
                        stranded += tl.sum(tl.where(tl.load(to_g + j, mask=j < m, other=0.0) == _INF, w, 0.0))
            elif not KEEP and k % every == 0 and k < n_iters:
                relaxed = (tau_a < _INF) | (tau_b < _INF)
                if at_rest(to_g, seen + p * m, b + p * m, m, eps, k, every, n_iters, relaxed, POINTS):
                    last = k
    if TOL:
        tl.store(used + p, k.to(tl.int64))


@triton.jit
def _pass_on(
    cost, h_high, h_low, k_high, k_low, factor, sums, p, n, m, scale,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """sums_i = sum_j exp((h_i + k_j - cost_ij) / eps) factor_j of n points, of what all threads have written."""
    tl.debug_barrier()
    for start in range(0, n, OUT):
        i = start + tl.arange(0, OUT)
        keep = i < n
        h, h_rest = tl.load(h_high + i, mask=keep, other=-_INF), tl.load(h_low + i, mask=keep, other=0.0)
        summed, _ = plan_sums(
            cost, h, h_rest, k_high, k_low, factor, None, None, p, i, n, m, scale, COLUMNS, OUT, REDUCED
        )  # fmt: skip
        tl.store(sums + i, summed, mask=keep)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_iters"])
def _adjoint(
    cost, used, q_h_high, q_h_low, q_k_high, q_k_low, q_factor, r_h_high, r_h_low, r_k_high, r_k_low, r_factor,
    of_f, of_g, to_a, to_b, sums, n, m, n_iters, eps: tl.float64, scale, damp_a: tl.float64, damp_b: tl.float64,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Back through the iterations of a problem, as `sinkhorn_iterations.adjoint`: finds the factors of Q and R, takes
    from to_a and to_b what reaches the weights, and uses up of_f and of_g."""
    p = tl.program_id(0).to(tl.int64)
    count = tl.load(used + p).to(tl.int32)
    of_f, to_a, of_g, to_b, sums = of_f + p * n, to_a + p * n, of_g + p * m, to_b + p * m, sums + p * m
    for step in range(0, count):
        k = p * n_iters + (count - 1 - step)
        row, column = k * n, k * m
        for start in range(0, m, POINTS):
            j = start + tl.arange(0, POINTS)
            reached = tl.load(q_k_high + column + j, mask=j < m, other=-_INF) > -_INF
            passed = damp_b * tl.load(of_g + j, mask=j < m, other=0.0)
            tl.store(q_factor + column + j, tl.where(reached, passed, 0.0).to(tl.float32), mask=j < m)
        _pass_on(
            cost, q_h_high + row, q_h_low + row, q_k_high + column, q_k_low + column, q_factor + column,
            r_factor + row, p, n, m, scale, False, HEIGHT, WIDTH,
        )  # fmt: skip
        for start in range(0, n, POINTS):
            i = start + tl.arange(0, POINTS)
            rows = tl.load(r_factor + row + i, mask=i < n, other=0.0).to(tl.float64)
            tl.store(to_a + i, tl.load(to_a + i, mask=i < n, other=0.0) - eps * rows, mask=i < n)
            reached = tl.load(r_h_high + row + i, mask=i < n, other=-_INF) > -_INF
            passed = damp_a * (tl.load(of_f + i, mask=i < n, other=0.0) - rows)
            tl.store(r_factor + row + i, tl.where(reached, passed, 0.0).to(tl.float32), mask=i < n)
            tl.store(of_f + i, tl.zeros((POINTS,), tl.float64), mask=i < n)
        _pass_on(
            cost, r_k_high + column, r_k_low + column, r_h_high + row, r_h_low + row, r_factor + row,
            sums, p, m, n, scale, True, WIDTH, HEIGHT,
        )  # fmt: skip
        for start in range(0, m, POINTS):
            j = start + tl.arange(0, POINTS)
            columns = tl.load(sums + j, mask=j < m, other=0.0).to(tl.float64)
            tl.store(to_b + j, tl.load(to_b + j, mask=j < m, other=0.0) - eps * columns, mask=j < m)
            tl.store(of_g + j, -columns, mask=j < m)
        tl.debug_barrier()


# ------------------------------------------------------------------------------------------- launches


def iterate(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
    keep_all: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sinkhorn_iterations.iterate`."""
    batch, n, m = cost.shape
    log_a, log_b = eps * a.double().log(), eps * b.double().log()
    slots = n_iters if keep_all else 1 if tol is None else 2
    f = a.new_zeros(batch, slots, n, dtype=torch.float64)
    g = b.new_zeros(batch, slots if keep_all else 1, m, dtype=torch.float64)
    seen = torch.zeros_like(b, dtype=torch.float64)
    used = torch.full((batch,), n_iters, dtype=torch.int64, device=a.device)
    pairs = torch.empty_like(a), torch.empty_like(a), *pair_of(torch.where(b > 0, log_b, -float("inf")))
    if batch:
        launch(_iterations, traced=False)[(batch,)](
            cost, a, b, log_a, log_b, f, g, *pairs, seen, used, n, m, n_iters, slots, ceil_div(n_iters, 8),
            eps, 1.4426950408889634 / eps, damping(tau_a, eps), damping(tau_b, eps),
            tau_a or float("inf"), tau_b or float("inf"), tol or 0.0, KEEP=keep_all, TOL=tol is not None, **_tile(n, m),
        )  # fmt: skip
    return (f, g, used) if keep_all else (last_of(f, used), g.squeeze(1), used)


def adjoint(
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    used: Tensor,
    a: Tensor,
    b: Tensor,
    of_f: Tensor,
    of_g: Tensor,
    to_a: Tensor,
    to_b: Tensor,
    eps: float,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of all iterations, (h, k) as pairs and the factor of Q, and of R (see `sinkhorn_iterations.adjoint`). Takes from
    to_a and to_b, gradients of the log-weights times eps, what goes through the iterations; of_f and of_g are lost."""
    batch, n, m = cost.shape
    damp_a, damp_b = damping(tau_a, eps), damping(tau_b, eps)
    free = lambda x, damp: torch.where(x < float("inf"), x / damp, -float("inf"))
    weighted = lambda x, weight: reference.log_weighted(x, weight[:, None], eps)
    before = torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], 1)
    q = *pair_of(weighted(f, a)), *pair_of(free(g, damp_b)), torch.empty_like(g, dtype=torch.float32)
    r = *pair_of(free(f, damp_a)), *pair_of(weighted(before, b)), torch.empty_like(f, dtype=torch.float32)
    if batch:
        launch(_adjoint, traced=False)[(batch,)](
            cost, used, *q, *r, of_f, of_g, to_a, to_b, torch.empty_like(b), n, m, f.shape[1],
            eps, 1.4426950408889634 / eps, damp_a, damp_b, **_tile(n, m),
        )  # fmt: skip
    return q, r


def variants(arch: str) -> Iterator[Variant]:
    """Every configuration that is launched on `arch`."""
    if arch == "gfx942":
        return
    pairs = [f"{name}_{part}" for name in ("f", "g", "q_h", "q_k", "r_h", "r_k") for part in ("high", "low")]
    kinds = dict.fromkeys(("cost", "a", "b", *pairs, "q_factor", "r_factor", "sums"), "*fp32")
    kinds |= dict.fromkeys(("log_a", "log_b", "f", "g", "seen", "of_f", "of_g", "to_a", "to_b"), "*fp64")
    kinds |= dict.fromkeys(("n", "m", "n_iters", "slots", "every"), "i32") | {"used": "*i64", "scale": "fp32"}
    kinds |= dict.fromkeys(("eps", "damp_a", "damp_b", "tau_a", "tau_b", "tol"), "fp64")
    signature = lambda kernel: {name: kinds[name] for name in kernel.arg_names if name in kinds}
    for n, m in (16, 16), (32, 32), (1024, 32), (1024, 64), (1024, 128):
        tile = _tile(n, m)
        how = tile.pop("num_warps"), tile.pop("num_stages")
        yield Variant(_adjoint, signature(_adjoint), tile, *how, divisible=("n", "m"))
        for kept, with_tol in ((False, False), (False, True), (True, False)):
            constants = tile | {"KEEP": kept, "TOL": with_tol}
            yield Variant(_iterations, signature(_iterations), constants, *how, divisible=("n", "m"))
