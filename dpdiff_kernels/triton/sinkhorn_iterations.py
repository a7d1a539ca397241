"""What Sinkhorn from a cost matrix and Sinkhorn between points share: when a problem stops, the iterations, and back
through them. Potentials are kept in float64."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.triton.launch import Variant, ceil_div, launch

_LOOK = 1024  # columns at a time
# What a half-step isn't given: with a tolerance, without one, and where no problem stops.
ABSENT = ((), ("parts", "stranded"), ("parts", "stranded", "used"))
_INF = tl.constexpr(float("inf"))


@triton.jit
def stopped(used, parts, stranded, b, k, n_parts, tol, COLUMNS: tl.constexpr, TOL: tl.constexpr):
    """Whether problem b is done before iteration k. used is at least k as long as it isn't. Without a tolerance a look
    has decided it; with one, the columns' half-step does, from the error of the rows that the rows' has just found."""
    done = tl.load(used + b) < k
    if TOL and COLUMNS:
        if k > 0:
            error = tl.load(stranded + b)
            for start in range(0, n_parts, 1024):
                i = start + tl.arange(0, 1024)
                error += tl.sum(tl.load(parts + b * n_parts + i, mask=i < n_parts, other=0.0))
            done = done | (error < tol)
    return done


@triton.jit
def violation(softmin, i, keep, b, n, potential, weight, eps, tau):
    """L1 distance between the marginal of the potential before and its target, from the next softmin. tau is inf where
    the marginal is balanced."""
    w = tl.load(weight + b * n + i, mask=keep, other=0.0).to(tl.float64)
    sums = tl.where((w > 0) & (potential < _INF), w * tl.exp((potential - softmin) / eps), 0.0)
    unreached = tl.where(tau < _INF, 0.0, w)
    target = tl.where((w > 0) & (potential < _INF), w * tl.exp(-potential / tau), unreached)
    return tl.sum(tl.where(keep, tl.abs(sums - target), 0.0)).to(tl.float32)


@triton.jit
def carried(value, i, keep, b, n, log_weight):
    """potential + eps log(weight), -inf where nothing is carried."""
    log_w = tl.load(log_weight + b * n + i, mask=keep, other=-_INF)
    return tl.where((log_w > -_INF) & (value < _INF), value + log_w, -_INF)


@triton.jit
def at_rest(g, seen, weight, m, eps, k, every, n_iters, relaxed, WIDTH: tl.constexpr):
    """Whether g has moved too little in the last `every` of k iterations for more to come of those left
    (csrc/sinkhorn_looks.h). Of one problem; seen: g at the last look."""
    least = tl.full((WIDTH,), _INF, tl.float64)
    greatest = tl.full((WIDTH,), -_INF, tl.float64)
    for start in range(0, m, WIDTH):
        j = start + tl.arange(0, WIDTH)
        keep = j < m
        now = tl.load(g + j, mask=keep, other=_INF)
        before = tl.load(seen + j, mask=keep, other=0.0)
        tl.store(seen + j, now, mask=keep)
        counts = (tl.load(weight + j, mask=keep, other=0.0) > 0) & (now < _INF)
        least = tl.minimum(least, tl.where(counts, now - before, _INF))
        greatest = tl.maximum(greatest, tl.where(counts, now - before, -_INF))
    low, high = tl.min(least, 0) / eps, tl.max(greatest, 0) / eps
    change = 0.00000762939453125 * every / (n_iters - k)  # 2^-17
    size = tl.maximum(-low, high)
    balanced = (high - low <= change) & (size <= 0.00000095367431640625 * every)  # 2^-20
    return (relaxed & (2 * size <= change)) | (balanced & (relaxed == 0))


@triton.jit(do_not_specialize=["k"])
def _look(g, seen, weight, used, k, m, every, n_iters, eps: tl.float64, RELAXED: tl.constexpr, WIDTH: tl.constexpr):
    """Ends problem b after k iterations where it is at rest."""
    b = tl.program_id(0).to(tl.int64)
    rests = at_rest(g + b * m, seen + b * m, weight + b * m, m, eps, k, every, n_iters, RELAXED, WIDTH)
    if rests & (tl.load(used + b) >= k):
        tl.store(used + b, (k - 1).to(tl.int64))


def iterate(
    half_step: Callable[..., None],
    a: Tensor,
    b: Tensor,
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
    n_parts: int,
    keep_all: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs half_step(columns, k, f_before, out, used, parts, stranded). Returns f (B, N), g (B, M) in float64 and the
    iterations used; with keep_all, f (B, n_iters, N) and g (B, n_iters, M) after each iteration, 0 after the last.
    Otherwise, without tol, problems are spared iterations that can't change their plan, which count as used."""
    batch, spares = a.shape[0], tol is None and not keep_all
    slots = n_iters if keep_all else 1 if spares else 2  # f before, in case that was within tol
    every = ceil_div(n_iters, 8)
    seen = torch.zeros_like(b, dtype=torch.float64)
    f = a.new_zeros(batch, slots, a.shape[1], dtype=torch.float64)
    g = b.new_zeros(batch, slots if keep_all else 1, b.shape[1], dtype=torch.float64)
    used = torch.full((batch,), n_iters if tol is None else 0, dtype=torch.int64, device=a.device)
    stops = None if keep_all else used  # what the kernels look at
    parts, stranded = (None, None) if tol is None else (a.new_zeros(batch, n_parts), a.new_zeros(batch))
    for k in range(n_iters):
        to_f, to_g = f[:, k % slots], g[:, k % g.shape[1]]
        half_step(False, k, f[:, (k - 1) % slots], to_f, stops, parts, stranded)
        half_step(True, k, None, to_g, stops, parts, stranded)
        if k == 0 and tol is not None and tau_b is None:
            stranded = torch.where(to_g == float("inf"), b, 0).sum(-1)
        if spares and (k + 1) % every == 0 and k + 1 < n_iters and b.numel():
            launch(_look, traced=False)[(batch,)](
                g, seen, b, used, k + 1, b.shape[1], every, n_iters, eps,
                RELAXED=(tau_a, tau_b) != (None, None), WIDTH=_LOOK, num_warps=4,
            )  # fmt: skip
    if keep_all:
        return f, g, used
    if spares:
        return f.squeeze(1), g.squeeze(1), torch.full_like(used, n_iters)
    return last_of(f, used), g.squeeze(1), used


def last_of(f: Tensor, used: Tensor) -> Tensor:
    """f (B, N) after `used` iterations, of slots (B, S, N) that they take in turn."""
    last = ((used - 1) % f.shape[1])[:, None, None].expand(-1, 1, f.shape[2])
    return f.gather(1, last).squeeze(1)


def scalars(
    f: Tensor,
    g: Tensor,
    rows: Tensor,
    columns: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[Tensor, Tensor]:
    """value and error, in float64, from the potentials and the marginals of their plan."""
    rows, columns, a, b = rows.double(), columns.double(), a.double(), b.double()
    value = reference.dual_value(a, b, f, g, rows.sum(-1), eps, tau_a, tau_b)
    return value, reference.violation(rows, f, a, tau_a) + reference.violation(columns, g, b, tau_b)


def damping(tau: float | None, eps: float) -> float:
    return 1.0 if tau is None else tau / (tau + eps)


def adjoint(
    transport: Callable[..., Tensor],
    f: Tensor,
    g: Tensor,
    used: Tensor,
    a: Tensor,
    b: Tensor,
    of_f: Tensor,
    of_g: Tensor,
    eps: float,
    tau_a: float | None,
    tau_b: float | None,
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], Tensor, Tensor]]:
    """Passes the gradients of f and g back through the iterations, from the last to the first.

    g_j = -damp eps log sum_i a_i exp((f_i - cost_ij) / eps) passes its gradient on through the softmax Q_ij = d g_j /
    d cost_ij, and f likewise through R_ij = d f_i / d cost_ij; both are plans of shifted potentials.
    `transport(columns, h, k, w)` is sum_j exp((h_i + k_j - cost_ij) / eps) w_j, or the sum over i with w_i for columns.

    Yields, for each iteration, k; (h, k, factor) of Q, which is exp((h_i + k_j - cost_ij) / eps) factor_j; (h, k,
    factor) of R, with factor_i; and what is to be added to the gradients of a's and b's log-weights times eps."""
    damp_a, damp_b = damping(tau_a, eps), damping(tau_b, eps)
    for k in range(f.shape[1] - 1, -1, -1):
        active = (used > k)[:, None]
        reached_f, reached_g = f[:, k] < float("inf"), g[:, k] < float("inf")
        h_f, k_g = reference.log_weighted(f[:, k], a, eps), torch.where(reached_g, g[:, k] / damp_b, 0)
        factor_g = torch.where(active & reached_g, damp_b * of_g, 0).float()
        rows = transport(False, h_f, k_g, factor_g).double()

        h_g = reference.log_weighted(g[:, k - 1] if k else torch.zeros_like(g[:, 0]), b, eps)
        k_f = torch.where(reached_f, f[:, k] / damp_a, 0)
        factor_f = torch.where(active & reached_f, damp_a * (of_f - rows), 0).float()
        columns = transport(True, k_f, h_g, factor_f).double()
        of_f, of_g = torch.where(active, 0, of_f), torch.where(active, -columns, of_g)
        yield k, (h_f, k_g, factor_g), (k_f, h_g, factor_f), rows, columns


def variants(arch: str) -> Iterator[Variant]:
    """Every configuration that is launched on `arch`."""
    signature = {"g": "*fp64", "seen": "*fp64", "weight": "*fp32", "used": "*i64", "eps": "fp64"}
    signature |= dict.fromkeys(("k", "m", "every", "n_iters"), "i32")
    for relaxed in (False, True):
        yield Variant(_look, signature, {"RELAXED": relaxed, "WIDTH": _LOOK}, 4)
