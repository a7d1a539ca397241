"""Sinkhorn from a cost matrix that stays in global memory, in the log domain. Half-steps stream it, spread over the
GPU; of small problems, one program each runs all iterations (sinkhorn_whole.py).

Each output point belongs to one program: no atomics, the same bits every time. A problem that is within tol is passed
over by the launches that follow, so that the host never waits for the device.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.replay import forgo
from dpdiff_kernels.triton import sinkhorn_whole
from dpdiff_kernels.triton.launch import Variant, ceil_div, launch, on_device, registered
from dpdiff_kernels.triton.sinkhorn_iterations import (
    ABSENT,
    adjoint,
    carried,
    damping,
    iterate,
    scalars,
    stopped,
    violation,
)
from dpdiff_kernels.triton.sinkhorn_tiles import (
    exponentials,
    pair_of,
    plan_of,
    plan_sums,
    softmin_of,
    store_pair,
    tile_of,
)

_INF = tl.constexpr(float("inf"))
_GRADIENT_TILE = {"ROWS": 32, "WIDTH": 64}


# Tiles of (output points, reduced points) and warps. The matrix is contiguous in the reduced points for rows, in the
# output points for columns.
def _tiles(columns: bool) -> dict[str, int]:
    return {"OUT": 64, "REDUCED": 64, "num_warps": 8} if columns else {"OUT": 16, "REDUCED": 256, "num_warps": 8}


# ------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["k"])
def _half_step(
    cost, high, low, weight, log_weight, before, out, out_high, out_low, used, parts, stranded,
    k, n, m, n_parts, stride, eps: tl.float64, scale, damp: tl.float64, tau: tl.float64, tol: tl.float64,
    COLUMNS: tl.constexpr, TOL: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """out_i = -damp eps log sum_j exp((h_j - cost_ij) / eps), h = high + low, for n output and m reduced points."""
    tiles = tl.cdiv(n, OUT)
    b = tl.program_id(0) // tiles  # made wide where it is multiplied: sm_90 would spill
    tile = tl.program_id(0) % tiles
    if used is not None:
        if stopped(used, parts, stranded, b, k, n_parts, tol, COLUMNS, TOL):
            return
    i = tile * OUT + tl.arange(0, OUT)
    most, total = exponentials(cost, high + b * m, low + b * m, b.to(tl.int64), i, n, m, scale, COLUMNS, OUT, REDUCED)
    keep = i < n
    softmin = softmin_of(most, total, eps)
    if TOL:
        if COLUMNS:
            if tile == 0:
                tl.store(used + b, (k + 1).to(tl.int64))
        else:
            potential = tl.load(before + b.to(tl.int64) * stride + i, mask=keep, other=_INF)
            off = violation(softmin, i, keep, b, n, potential, weight, eps, tau)
            tl.store(parts + b * n_parts + tile, off)
    value = softmin * damp
    tl.store(out + b.to(tl.int64) * stride + i, value, mask=keep)
    h = carried(value, i, keep, b, n, log_weight)
    store_pair(out_high + b * n + i, out_low + b * n + i, h, keep)


@triton.jit
def _transport(
    cost, h_high, h_low, k_high, k_low, factor, plan, sums, totals, n, m, scale,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """sums_i = sum_j P_ij factor_j (1 where there is none), for P_ij = exp((h_i + k_j - cost_ij) / eps); and, where
    asked for, P itself and totals_i = sum_j P_ij cost_ij."""
    tiles = tl.cdiv(n, OUT)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * OUT + tl.arange(0, OUT)
    keep = i < n
    h = tl.load(h_high + b * n + i, mask=keep, other=-_INF)
    h_rest = tl.load(h_low + b * n + i, mask=keep, other=0.0)
    if factor is not None:
        factor += b * m
    k_high, k_low = k_high + b * m, k_low + b * m
    summed, total = plan_sums(
        cost, h, h_rest, k_high, k_low, factor, plan, totals, b, i, n, m, scale, COLUMNS, OUT, REDUCED
    )  # fmt: skip
    tl.store(sums + b * n + i, summed, mask=keep)
    if totals is not None:
        tl.store(totals + b * n + i, total, mask=keep)


@triton.jit
def _cost_gradient(
    out, cost, used, q_h_high, q_h_low, q_k_high, q_k_low, q_factor, r_h_high, r_h_low, r_k_high, r_k_low, r_factor,
    n, m, n_iters, scale, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out_ij += the sum over iterations of Q_ij factor_j + R_ij factor_i, of potentials (B, n_iters, N or M)."""
    row_tiles, column_tiles = tl.cdiv(n, ROWS), tl.cdiv(m, WIDTH)
    b = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    i = tile // column_tiles * ROWS + tl.arange(0, ROWS)
    j = tile % column_tiles * WIDTH + tl.arange(0, WIDTH)
    in_rows, in_columns = i < n, j < m
    c = tile_of(cost, b, i, j, n, m, False)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(0, tl.load(used + b).to(tl.int32)):
        row = (b * n_iters + k) * n + i
        column = (b * n_iters + k) * m + j
        h = tl.load(q_h_high + row, mask=in_rows, other=-_INF)[:, None]
        h_rest = tl.load(q_h_low + row, mask=in_rows, other=0.0)[:, None]
        p_k = tl.load(q_k_high + column, mask=in_columns, other=-_INF)[None, :]
        p_rest = tl.load(q_k_low + column, mask=in_columns, other=0.0)[None, :]
        factor = tl.load(q_factor + column, mask=in_columns, other=0.0)[None, :]
        total += plan_of(h, h_rest, p_k, p_rest, c, scale) * factor
        h = tl.load(r_h_high + row, mask=in_rows, other=-_INF)[:, None]
        h_rest = tl.load(r_h_low + row, mask=in_rows, other=0.0)[:, None]
        p_k = tl.load(r_k_high + column, mask=in_columns, other=-_INF)[None, :]
        p_rest = tl.load(r_k_low + column, mask=in_columns, other=0.0)[None, :]
        factor = tl.load(r_factor + row, mask=in_rows, other=0.0)[:, None]
        total += plan_of(h, h_rest, p_k, p_rest, c, scale) * factor
    to = out + b * n * m + i[:, None].to(tl.int64) * m + j[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


# ------------------------------------------------------------------------------------------- launches


class _Costs:
    """Launches on one batch of costs (B, N, M)."""

    def __init__(self, cost: Tensor, eps: float):
        self.cost, self.eps, self.scale = cost, eps, 1.4426950408889634 / eps
        self.batch, self.n, self.m = cost.shape
        self.good = torch.ones(self.batch, dtype=torch.bool, device=cost.device)
        if self.n and self.m:
            self.good = cost.amin((1, 2)) > -float("inf")  # NaN isn't either

    def _grid(self, columns: bool) -> tuple[int]:
        return (self.batch * ceil_div(self.m if columns else self.n, _tiles(columns)["OUT"]),)

    def iterate(self, a, b, n_iters, tol, tau_a, tau_b, keep_all=False):
        if sinkhorn_whole.fits(self.cost, back=keep_all):
            return sinkhorn_whole.iterate(self.cost, a, b, self.eps, n_iters, tol, tau_a, tau_b, keep_all)
        logs = self.eps * a.double().log(), self.eps * b.double().log()
        weights, taus = (a, b), (tau_a, tau_b)
        n_parts = ceil_div(self.n, _tiles(False)["OUT"])
        pairs = [tuple(torch.empty_like(a) for _ in range(2)), pair_of(torch.where(b > 0, logs[1], -float("inf")))]

        def half_step(columns, k, before, out, used, parts, stranded):
            if not out.numel():
                return
            side, other = (1, 0) if columns else (0, 1)
            n, m = (self.m, self.n) if columns else (self.n, self.m)
            launch(_half_step, traced=False)[self._grid(columns)](
                self.cost, *pairs[other], weights[side], logs[side], before, out, *pairs[side],
                used, parts, stranded, k, n, m, n_parts, out.stride(0),
                self.eps, self.scale, damping(taus[side], self.eps), taus[side] or float("inf"), tol or 0.0,
                COLUMNS=columns, TOL=tol is not None, **_tiles(columns),
            )  # fmt: skip

        return iterate(half_step, a, b, self.eps, n_iters, tol, tau_a, tau_b, n_parts, keep_all)

    def transport(self, columns: bool, h: Tensor, k: Tensor, factor=None, plan=None, totals=None) -> Tensor:
        """Of h (B, N) and k (B, M) in float64: sums over the columns, or for columns over the rows."""
        out, reduced = (k, h) if columns else (h, k)
        sums = torch.empty_like(out, dtype=torch.float32)
        if out.numel():
            launch(_transport, traced=False)[self._grid(columns)](
                self.cost, *pair_of(out), *pair_of(reduced), factor, plan, sums, totals,
                out.shape[1], reduced.shape[1], self.scale, COLUMNS=columns, **_tiles(columns),
            )  # fmt: skip
        return sums

    def adjoint(self, f, g, used, a, b, of_f, of_g, to_a, to_b, tau_a, tau_b):
        """As `sinkhorn_whole.adjoint`."""
        if sinkhorn_whole.fits(self.cost, back=True):
            return sinkhorn_whole.adjoint(self.cost, f, g, used, a, b, of_f, of_g, to_a, to_b, self.eps, tau_a, tau_b)
        q, r = ([torch.empty_like(x) for x in (f, g)] for _ in range(2))
        q.append(torch.empty_like(g, dtype=torch.float32))
        r.append(torch.empty_like(f, dtype=torch.float32))
        for step in adjoint(self.transport, f, g, used, a, b, of_f, of_g, self.eps, tau_a, tau_b):
            i, of_q, of_r, rows, columns = step
            for histories, now in ((q, of_q), (r, of_r)):
                for history, x in zip(histories, now):
                    history[:, i] = x
            to_a -= self.eps * rows
            to_b -= self.eps * columns
        return tuple((*pair_of(h), *pair_of(k), factor) for h, k, factor in (q, r))

    def add_gradient(self, out: Tensor, used: Tensor, q: tuple[Tensor, ...], r: tuple[Tensor, ...]) -> None:
        """q, r: as `adjoint` gives them."""
        if out.numel():
            tile = _GRADIENT_TILE
            grid = self.batch * ceil_div(self.n, tile["ROWS"]) * ceil_div(self.m, tile["WIDTH"])
            launch(_cost_gradient, traced=False)[(grid,)](
                out, self.cost, used, *q, *r, self.n, self.m, q[0].shape[1], self.scale, **tile, num_warps=4,
            )  # fmt: skip


# Custom operators rather than triton_op: a loop over launches, which torch.compile had better not unroll.


@registered(torch.library.custom_op)
def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
    return_plan: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As dpdiff::sinkhorn."""
    cost, a, b = (x.contiguous() for x in (cost, a, b))
    batch, n, m = cost.shape
    with on_device(cost):
        costs = _Costs(cost, eps)
        f, g, used = costs.iterate(a, b, n_iters, tol, tau_a, tau_b)
        h, k = reference.log_weighted(f, a, eps), reference.log_weighted(g, b, eps)
        plan = cost.new_empty(batch if return_plan else 0, n, m)
        totals = torch.zeros_like(a)
        rows = costs.transport(False, h, k, plan=plan if return_plan else None, totals=totals)
        columns = costs.transport(True, h, k)
    value, error = scalars(f, g, rows, columns, a, b, eps, tau_a, tau_b)
    poison = reference.poison_of(costs.good, a, b).double()
    plan += poison.float()[: len(plan), None, None]
    f, g, total, value, error = (
        (x + poison.view(-1, *[1] * (x.dim() - 1))).float() for x in (f, g, totals.sum(-1), value, error)
    )
    return plan, f, g, total, value, used, error


@registered(torch.library.custom_op)
def sinkhorn_backward(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    used: Tensor,
    of_plan: Tensor | None,
    of_f: Tensor | None,
    of_g: Tensor | None,
    of_total: Tensor | None,
    eps: float,
    n_iters: int,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As dpdiff::sinkhorn_backward."""
    cost, a, b, used = (x.contiguous() for x in (cost, a, b, used))
    with on_device(cost):
        costs = _Costs(cost, eps)
        if not sinkhorn_whole.fits(cost, back=True):
            forgo()  # a recording would hold each iteration's tensors
        f, g, _ = costs.iterate(a, b, n_iters, None, tau_a, tau_b, keep_all=True)
        to_f = torch.zeros_like(a, dtype=torch.float64) if of_f is None else of_f.double()
        to_g = torch.zeros_like(b, dtype=torch.float64) if of_g is None else of_g.double()
        to_a, to_b = torch.zeros_like(to_f), torch.zeros_like(to_g)
        of_cost = torch.zeros_like(cost)
        if of_plan is not None or of_total is not None:
            h, k = (
                reference.log_weighted(x.take_along_dim((used - 1)[:, None, None], 1).squeeze(1), w, eps)
                for x, w in ((f, a), (g, b))
            )
            plan = torch.empty_like(cost)
            costs.transport(False, h, k, plan=plan)
            through = torch.zeros_like(cost) if of_plan is None else of_plan
            if of_total is not None:
                through = through + of_total[:, None, None] * torch.where(cost < float("inf"), cost, 0)
                of_cost += of_total[:, None, None] * plan
            through = through * plan / eps
            of_cost -= through
            rows, columns = through.sum(2, dtype=torch.float64), through.sum(1, dtype=torch.float64)
            to_f, to_g, to_a, to_b = to_f + rows, to_g + columns, eps * rows, eps * columns
        costs.add_gradient(of_cost, used, *costs.adjoint(f, g, used, a, b, to_f, to_g, to_a, to_b, tau_a, tau_b))
    of_a, of_b = (torch.where(w > 0, x / w, 0).float() for x, w in ((to_a, a), (to_b, b)))
    poison = reference.poison_of(costs.good, a, b)
    return of_cost + poison[:, None, None], of_a + poison[:, None], of_b + poison[:, None]


def variants(arch: str) -> Iterator[Variant]:
    """Every configuration that is launched on `arch`."""
    everything = dict.fromkeys(("cost", "high", "low", "weight", "out_high", "out_low", "parts", "stranded"), "*fp32")
    everything |= dict.fromkeys(("log_weight", "before", "out"), "*fp64") | {"used": "*i64", "scale": "fp32"}
    everything |= dict.fromkeys(("k", "n", "m", "n_parts", "stride"), "i32")
    everything |= dict.fromkeys(("eps", "damp", "tau", "tol"), "fp64")
    for columns in (False, True):
        tiles = _tiles(columns)
        n_warps = tiles.pop("num_warps")
        for absent in ABSENT:
            constants = {"COLUMNS": columns, "TOL": not absent, **tiles}
            constants |= dict.fromkeys(absent) | ({"before": None} if columns else {})
            signature = {name: kind for name, kind in everything.items() if name not in constants}
            yield Variant(_half_step, signature, constants, n_warps, divisible=("n", "m"))
        for optional in ((), ("factor",)) if columns else (("factor",), ("plan", "totals"), ("plan",), ("totals",)):
            names = "cost", "h_high", "h_low", "k_high", "k_low", "sums", *optional
            signature = dict.fromkeys(names, "*fp32") | {"n": "i32", "m": "i32", "scale": "fp32"}
            constants = {"COLUMNS": columns, **tiles}
            constants |= {name: None for name in ("factor", "plan", "totals") if name not in optional}
            yield Variant(_transport, signature, constants, n_warps, divisible=("n", "m"))
    sides = [f"{side}_{name}" for side in "qr" for name in ("h_high", "h_low", "k_high", "k_low", "factor")]
    signature = dict.fromkeys(("out", "cost", *sides), "*fp32") | {"used": "*i64"}
    signature |= {"n": "i32", "m": "i32", "n_iters": "i32", "scale": "fp32"}
    yield Variant(_cost_gradient, signature, _GRADIENT_TILE, 4, divisible=("n", "m"))
