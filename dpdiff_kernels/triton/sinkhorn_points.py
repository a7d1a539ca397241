"""Sinkhorn between points: tiles of the cost from tensor cores, as attention makes its scores; O(N + M) memory.

With potentials less squared norms, scaled to powers of 2, an exponent is a product of points plus a bias for its row
and one for its column: exp((h_i + k_j - |x_i - y_j|^2) / eps) = 2^(factor x_i y_j + row_i + column_j). The half-step
is attention's online softmax without values, the plan's application attention without normalisation.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.triton.launch import Variant, arch_of, ceil_div, launch, multiprocessors_of, on_device, registered
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

_INF = tl.constexpr(float("inf"))
_LARGEST_SQUARE = 8e37  # beyond, a squared distance could overflow


def _tiles(arch: str, dim: int, applying: bool = False, many: bool = True) -> dict[str, int | str | bool]:
    """Output and reduced points of a tile, the part of their dimension that is held at a time, and how many warps hold
    it. Products are as exact as float32's: of three TF32 where there are any. many: whether there are points enough for
    large tiles on most multiprocessors."""
    whole = dim <= (32 if applying else 64)
    if arch == "sm_90" and not applying:
        wide = many and whole  # others would spill
        tiles = {"OUT": 128, "REDUCED": 256 if wide else 128, "num_warps": 8, "num_stages": 1 if wide else 2}
        if not many:
            tiles = {"OUT": 64, "REDUCED": 128, "num_warps": 4, "num_stages": 1}
        return tiles | {"CHUNK": 64 if whole and dim > 32 else 32, "WHOLE": whole, "PRECISION": "tf32x3"}
    return {
        "OUT": 64,
        "REDUCED": 32 if applying or (arch == "sm_80" and dim > 32) else 64,
        "CHUNK": 64 if whole and dim > 32 else 32,
        "WHOLE": whole,
        "PRECISION": "ieee" if arch == "gfx942" else "tf32x3",
        "num_warps": 8 if applying or dim > 32 else 4,
        "num_stages": 1 if arch == "gfx942" else 2,
    }


# ------------------------------------------------------------------------------------------- kernels


@triton.jit
def _points(x, rows, inside, start, dim, CHUNK: tl.constexpr):
    """Coordinates [start, start + CHUNK) of points, zero beyond the edges."""
    d = start + tl.arange(0, CHUNK)
    return tl.load(x + rows[:, None] * dim + d[None, :], mask=inside[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def _halves(x):
    """What TF32 holds of x, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_products(p, q, total, PRECISION: tl.constexpr):
    """total + p q^T, on tensor cores as three products of TF32, which Triton's own tf32x3 looks through for NaN, and
    adds up beside them: points are finite."""
    if PRECISION == "tf32x3":
        p_high, p_low = _halves(p)
        q_high, q_low = _halves(tl.trans(q))
        total = tl.dot(p_low, q_high, total, input_precision="tf32")
        total = tl.dot(p_high, q_low, total, input_precision="tf32")
        return tl.dot(p_high, q_high, total, input_precision="tf32")
    else:
        return tl.dot(p, tl.trans(q), total, input_precision=PRECISION)


@triton.jit
def _products(
    x, y, i, j, in_i, in_j, first, dim,
    OUT: tl.constexpr, REDUCED: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of points i of x, whose coordinates are in `first` where the chunk is all of them, with j of y."""
    total = tl.zeros((OUT, REDUCED), tl.float32)
    if WHOLE:
        return _add_products(first, _points(y, j, in_j, 0, dim, CHUNK), total, PRECISION)
    else:
        for start in range(0, dim, CHUNK):
            p, q = _points(x, i, in_i, start, dim, CHUNK), _points(y, j, in_j, start, dim, CHUNK)
            total = _add_products(p, q, total, PRECISION)
        return total


@triton.jit(do_not_specialize=["k"])
def _half_step(
    x, y, bias, own, weight, log_weight, before, out, out_bias, used, parts, stranded,
    k, n, m, dim, n_parts, stride,
    eps: tl.float64, scale: tl.float64, factor, damp: tl.float64, tau: tl.float64, tol: tl.float64,
    COLUMNS: tl.constexpr, TOL: tl.constexpr, OUT: tl.constexpr, REDUCED: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = -damp eps log sum_j exp((h_j - cost_ij) / eps) for points x (n, dim) and y (m, dim), the latter with
    biases; own (n,) is what of x's costs belongs to x alone."""
    tiles = tl.cdiv(n, OUT)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if used is not None:
        if stopped(used, parts, stranded, b, k, n_parts, tol, COLUMNS, TOL):
            return
    i = tile * OUT + tl.arange(0, OUT)
    keep = i < n
    x += b * n * dim
    y += b * m * dim
    i_wide = i.to(tl.int64)
    first = _points(x, i_wide, keep, 0, dim, CHUNK)
    most = tl.full((OUT,), -_INF, tl.float32)
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, m, REDUCED):
        j = start + tl.arange(0, REDUCED)
        inner = _products(x, y, i_wide, j.to(tl.int64), keep, j < m, first, dim, OUT, REDUCED, CHUNK, WHOLE, PRECISION)
        e = inner * factor + tl.load(bias + b * m + j, mask=j < m, other=-_INF)[None, :]
        greater = tl.maximum(most, tl.max(e, 1))
        base = tl.where(greater > -_INF, greater, 0.0)
        total = total * tl.exp2(most - base) + tl.sum(tl.exp2(e - base[:, None]), 1)
        most = greater
    square = tl.load(own + b * n + i, mask=keep, other=0.0)
    softmin = tl.where(total > 0, square - most.to(tl.float64) / scale - eps * tl.log(total.to(tl.float64)), _INF)
    if TOL:
        if COLUMNS:
            if tile == 0:
                tl.store(used + b, (k + 1).to(tl.int64))
        else:
            potential = tl.load(before + b * stride + i, mask=keep, other=_INF)
            off = violation(softmin, i, keep, b, n, potential, weight, eps, tau)
            tl.store(parts + b * n_parts + tile, off)
    value = softmin * damp
    tl.store(out + b * stride + i, value, mask=keep)
    h = carried(value, i, keep, b, n, log_weight)
    tl.store(out_bias + b * n + i, ((h - square) * scale).to(tl.float32), mask=keep)


@triton.jit
def _apply(
    x, y, row, column, u, t, w, v, sums, out, n, m, dim, dim_u, dim_v, factor,
    OUT: tl.constexpr, REDUCED: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, CHUNK_U: tl.constexpr,
    CHUNK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums_i = sum_j P_ij w_j and, where there is a v, out_i = sum_j P_ij v_j, for the plan P of biases row and column,
    each entry times u_i t_j where these are there. Program axis 1 is the part of v's dimension."""
    tiles = tl.cdiv(n, OUT)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * OUT + tl.arange(0, OUT)
    keep = i < n
    i_wide = i.to(tl.int64)
    x += b * n * dim
    y += b * m * dim
    first = _points(x, i_wide, keep, 0, dim, CHUNK)
    own = tl.load(row + b * n + i, mask=keep, other=-_INF)
    summed = tl.zeros((OUT,), tl.float32)
    moved = tl.zeros((OUT, CHUNK_V), tl.float32)
    for start in range(0, m, REDUCED):
        j = start + tl.arange(0, REDUCED)
        inside, j_wide = j < m, j.to(tl.int64)
        inner = _products(x, y, i_wide, j_wide, keep, inside, first, dim, OUT, REDUCED, CHUNK, WHOLE, PRECISION)
        e = inner * factor + tl.load(column + b * m + j, mask=inside, other=-_INF)[None, :] + own[:, None]
        p = tl.exp2(tl.minimum(e, 126.0))
        if u is not None:
            p *= _products(
                u + b * n * dim_u, t + b * m * dim_u, i_wide, j_wide, keep, inside, first, dim_u,
                OUT, REDUCED, CHUNK_U, False, PRECISION,
            )  # fmt: skip
        summed += tl.sum(p * tl.load(w + b * m + j, mask=inside, other=0.0)[None, :], 1)
        if v is not None:
            vectors = _points(v + b * m * dim_v, j_wide, inside, tl.program_id(1) * CHUNK_V, dim_v, CHUNK_V)
            moved = tl.dot(p, vectors, moved, input_precision=PRECISION)
    tl.store(sums + b * n + i, summed, mask=keep & (tl.program_id(1) == 0))
    if v is not None:
        d = tl.program_id(1) * CHUNK_V + tl.arange(0, CHUNK_V)
        to = out + b * n * dim_v + i_wide[:, None] * dim_v + d[None, :]
        tl.store(to, moved, mask=keep[:, None] & (d < dim_v)[None, :])


# ------------------------------------------------------------------------------------------- launches


class _Points:
    """Launches on one batch of points x (B, N, D) and y (B, M, D)."""

    def __init__(self, x: Tensor, y: Tensor, eps: float, metric: str):
        x, y = x.contiguous(), y.contiguous()
        self.eps, self.scale = eps, 1.4426950408889634 / eps
        self.batch, self.dim, self.l2 = x.shape[0], x.shape[2], metric == "l2"
        self.good = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        for p in (x, y):
            self.good &= (p.square().sum(-1) < _LARGEST_SQUARE).all(1)
        if self.l2 and y.shape[1]:  # distances stay, and products get smaller
            centre = y.mean(1, keepdim=True)
            x, y = x - centre, y - centre
        self.points = x, y
        self.own = tuple(  # what of the cost belongs to one point
            p.square().sum(-1, dtype=torch.float64)
            if self.l2
            else torch.full_like(p[..., :1], share).squeeze(-1).double()
            for p, share in ((x, 1.0), (y, 0.0))
        )
        self.arch = arch_of(x.device)
        self.factor = (2 if self.l2 else 1) * self.scale

    def poison(self) -> Tensor:
        return torch.where(self.good, 0.0, float("nan"))[:, None, None]

    def _bias(self, h: Tensor, side: int) -> Tensor:
        return ((h.contiguous() - self.own[side]) * self.scale).float()

    def iterate(self, a, b, n_iters, tol, tau_a, tau_b, keep_all=False):
        logs = self.eps * a.double().log(), self.eps * b.double().log()
        weights, taus = (a, b), (tau_a, tau_b)
        fewest = min(a.shape[1], b.shape[1])
        many = 2 * self.batch * ceil_div(fewest, 128) >= multiprocessors_of(a.device)
        tiles = _tiles(self.arch, self.dim, many=many)
        n_parts = ceil_div(a.shape[1], tiles["OUT"])
        biases = [torch.empty_like(a), self._bias(torch.where(b > 0, logs[1], -float("inf")), 1)]

        def half_step(columns, k, before, out, used, parts, stranded):
            side, other = (1, 0) if columns else (0, 1)
            n, m = weights[side].shape[1], weights[other].shape[1]
            if out.numel():
                launch(_half_step, traced=False)[(self.batch * ceil_div(n, tiles["OUT"]),)](
                    self.points[side], self.points[other], biases[other], self.own[side], weights[side], logs[side],
                    before, out, biases[side], used, parts, stranded, k, n, m, self.dim, n_parts, out.stride(0),
                    self.eps, self.scale, self.factor, damping(taus[side], self.eps), taus[side] or float("inf"),
                    tol or 0.0, COLUMNS=columns, TOL=tol is not None, **tiles,
                )  # fmt: skip

        return iterate(half_step, a, b, self.eps, n_iters, tol, tau_a, tau_b, n_parts, keep_all)

    def apply(
        self,
        columns: bool,
        h: Tensor,
        k: Tensor,
        w: Tensor | None = None,
        v: Tensor | None = None,
        pair: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """sum_j P_ij w_j (w of 1 where None) and sum_j P_ij v_j for the plan of h (B, N) and k (B, M); for columns over
        its rows. With pair = (u, t), vectors of the points on either side, each entry is times u_i t_j."""
        side, other = (1, 0) if columns else (0, 1)
        x, y = self.points[side], self.points[other]
        n, m = x.shape[1], y.shape[1]
        depth = 0 if v is None else v.shape[2]
        sums = x.new_zeros(self.batch, n)
        out = x.new_zeros(self.batch, n, depth) if depth else None
        if sums.numel():
            biases = self._bias(h, 0), self._bias(k, 1)
            u, t = (None, None) if pair is None else (pair[side].contiguous(), pair[other].contiguous())
            chunk_v = 16 if depth <= 16 else 64
            tiles = _tiles(self.arch, self.dim, applying=True)
            grid = self.batch * ceil_div(n, tiles["OUT"]), max(1, ceil_div(depth, chunk_v))
            launch(_apply, traced=False)[grid](
                x, y, biases[side], biases[other], u, t, x.new_ones(self.batch, m) if w is None else w,
                v.contiguous() if depth else None, sums, out,
                n, m, self.dim, 0 if u is None else u.shape[2], depth, self.factor,
                CHUNK_U=32, CHUNK_V=chunk_v, **tiles,
            )  # fmt: skip
        return sums, out if depth else sums.new_zeros(self.batch, n, 0)

    def pull(self, side: int, total: Tensor, moment: Tensor) -> Tensor:
        """The gradient of points p from sum_j G_ij and sum_j G_ij q_j, for gradients G of their costs with q_j."""
        return 2 * (total[..., None] * self.points[side] - moment) if self.l2 else -moment


@registered(torch.library.custom_op)
def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As dpdiff::sinkhorn_points."""
    a, b = a.contiguous(), b.contiguous()
    with on_device(x):
        points = _Points(x, y, eps, metric)
        f, g, used = points.iterate(a, b, n_iters, tol, tau_a, tau_b)
        h, k = reference.log_weighted(f, a, eps), reference.log_weighted(g, b, eps)
        (rows, _), (columns, _) = points.apply(False, h, k), points.apply(True, h, k)
    value, error = scalars(f, g, rows, columns, a, b, eps, tau_a, tau_b)
    poison = reference.poison_of(points.good, a, b).double()
    return f + poison[:, None], g + poison[:, None], (value + poison).float(), used, (error + poison).float()


@registered(torch.library.custom_op, replayed=False)  # a recording would hold each iteration's tensors
def sinkhorn_points_backward(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    used: Tensor,
    of_f: Tensor | None,
    of_g: Tensor | None,
    eps: float,
    n_iters: int,
    tau_a: float | None,
    tau_b: float | None,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As dpdiff::sinkhorn_points_backward."""
    a, b = a.contiguous(), b.contiguous()
    with on_device(x):
        points = _Points(x, y, eps, metric)
        f, g, _ = points.iterate(a, b, n_iters, None, tau_a, tau_b, keep_all=True)
        to_f = torch.zeros_like(a, dtype=torch.float64) if of_f is None else of_f.double()
        to_g = torch.zeros_like(b, dtype=torch.float64) if of_g is None else of_g.double()
        to_a, to_b = torch.zeros_like(to_f), torch.zeros_like(to_g)
        of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)

        def transport(columns: bool, h: Tensor, k: Tensor, w: Tensor) -> Tensor:
            return points.apply(columns, h, k, w)[0]

        p, q = points.points
        for _, of_q, of_r, rows, columns in adjoint(transport, f, g, used, a, b, to_f, to_g, eps, tau_a, tau_b):
            to_a, to_b = to_a - eps * rows, to_b - eps * columns
            for (h, k, factor), by_rows in ((of_q, False), (of_r, True)):
                weighted = factor[..., None] * (p if by_rows else q)
                for side in (0, 1):
                    if (side == 0) == by_rows:  # the factor is of the points themselves
                        total, moment = points.apply(side == 1, h, k, v=q if side == 0 else p)
                        total, moment = factor * total, factor[..., None] * moment
                    else:
                        total, moment = points.apply(side == 1, h, k, factor, weighted)
                    (of_x if side == 0 else of_y).add_(points.pull(side, total, moment))
    of_a, of_b = (torch.where(w > 0, z / w, 0).float() for z, w in ((to_a, a), (to_b, b)))
    poison = reference.poison_of(points.good, a, b)
    return of_x + poison[:, None, None], of_y + poison[:, None, None], of_a + poison[:, None], of_b + poison[:, None]


@registered(torch.library.custom_op)
def sinkhorn_apply(x: Tensor, y: Tensor, h_x: Tensor, h_y: Tensor, v: Tensor, eps: float, metric: str) -> Tensor:
    """As dpdiff::sinkhorn_apply."""
    with on_device(x):
        points = _Points(x, y, eps, metric)
        return points.apply(False, h_x, h_y, v=v)[1] + points.poison()


@registered(torch.library.custom_op, replayed=False)  # a recording would hold each iteration's tensors
def sinkhorn_apply_backward(
    grad: Tensor, x: Tensor, y: Tensor, h_x: Tensor, h_y: Tensor, v: Tensor, eps: float, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As dpdiff::sinkhorn_apply_backward."""
    with on_device(x):
        points = _Points(x, y, eps, metric)
        grads, potentials = [], []
        for side in (0, 1):
            of_h, moment = points.apply(side == 1, h_x, h_y, v=points.points[1 - side], pair=(grad, v))
            grads.append(points.pull(side, of_h, moment) / -eps + points.poison())
            potentials.append(of_h.double() / eps)
    return *grads, *potentials


def variants(arch: str) -> Iterator[Variant]:
    """Every configuration that is launched on `arch`."""
    everything = dict.fromkeys(("x", "y", "bias", "weight", "out_bias", "parts", "stranded"), "*fp32")
    everything |= dict.fromkeys(("own", "log_weight", "before", "out"), "*fp64") | {"used": "*i64", "factor": "fp32"}
    everything |= dict.fromkeys(("k", "n", "m", "dim", "n_parts", "stride"), "i32")
    everything |= dict.fromkeys(("eps", "scale", "damp", "tau", "tol"), "fp64")
    operands = dict.fromkeys(("x", "y", "row", "column", "u", "t", "w", "v", "sums", "out"), "*fp32")
    operands |= dict.fromkeys(("n", "m", "dim", "dim_u", "dim_v"), "i32") | {"factor": "fp32"}
    for dim in (32, 64, 65):
        sizes = (True, False) if arch == "sm_90" else (True,)
        for many, columns, absent in itertools.product(sizes, (False, True), ABSENT):
            tiles = _tiles(arch, dim, many=many)
            n_warps, n_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
            constants = tiles | {"COLUMNS": columns, "TOL": not absent}
            constants |= dict.fromkeys(absent) | ({"before": None} if columns else {})
            signature = {name: kind for name, kind in everything.items() if name not in constants}
            yield Variant(_half_step, signature, constants, n_warps, n_stages, divisible=("dim",))
        for missing, chunks_v in ((("u", "t", "v", "out"), (16,)), (("u", "t"), (16, 64)), ((), (16, 64))):
            tiles = _tiles(arch, dim, applying=True)
            n_warps, n_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
            for chunk_v in chunks_v:
                constants = tiles | {"CHUNK_U": 32, "CHUNK_V": chunk_v} | dict.fromkeys(missing)
                signature = {name: kind for name, kind in operands.items() if name not in constants}
                yield Variant(_apply, signature, constants, n_warps, n_stages, divisible=("dim",))
