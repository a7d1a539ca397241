"""Entropic optimal transport by Sinkhorn's iterations, batched: from a cost matrix, or from points without one."""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.backends import asked_for, backends, capability, refuse_tangents, select
from dpdiff_kernels.checks import (
    check_bool,
    check_choice,
    check_floats,
    check_int,
    check_positive,
    check_shape,
    present,
    widest_under_autocast,
)
from dpdiff_kernels.operators import observed, register
from dpdiff_kernels.replay import replayed

_HELD = 400_000  # costs, about what the shared memory of eight blocks, the largest cluster, holds


class Transport(NamedTuple):
    """What `sinkhorn` returns."""

    plan: Tensor | None
    f: Tensor
    g: Tensor
    cost: Tensor
    value: Tensor
    n_iters: Tensor
    error: Tensor


class PointTransport(NamedTuple):
    """What `sinkhorn_points` returns: the results, then what `apply` needs of the problem."""

    value: Tensor
    f: Tensor
    g: Tensor
    n_iters: Tensor
    error: Tensor
    problem: tuple  # x, y, log-weighted potentials (batch dimensions flattened), eps, metric, backend

    def apply(self, v: Tensor) -> Tensor:
        """Returns plan @ v, (..., N, C), for v (..., M, C) of any floating-point dtype, in one pass over the pairs that
        holds a block of the plan. In float64 for points in float64, in float32 otherwise.

        Differentiable in v and, through the plan, in all that `sinkhorn_points` was given; the backward pass computes
        the pairs again.

        Raises:
            TypeError: v isn't a floating-point tensor.
            ValueError: v's shape or device doesn't fit.
        """
        x, y, h_x, h_y, eps, metric, backend = self.problem
        check_floats(v=v)
        if v.device != x.device:
            raise ValueError(f"v is on {v.device}: expected {x.device}, where the points are")
        batch, n, m = self.f.shape[:-1], x.shape[1], y.shape[1]
        if v.dim() != len(batch) + 2 or v.shape[:-1] != (*batch, m):
            raise ValueError(f"v has shape {tuple(v.shape)}: expected {(*batch, m, 'C')}")
        refuse_tangents(backend, x, y, h_x, h_y, v)
        flat = v.reshape(x.shape[0], m, v.shape[-1]).to(x.dtype)
        return _OPERATORS[backend].sinkhorn_apply(x, y, h_x, h_y, flat, eps, metric).view(*batch, n, v.shape[-1])


@replayed(asked_for)
def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 50,
    tol: float | None = None,
    tau_a: float | None = None,
    tau_b: float | None = None,
    return_plan: bool = True,
    *,
    backend: str | None = None,
) -> Transport:
    r"""Entropy-regularised optimal transport between weighted points, for a batch of cost matrices.

    Looks for the plan P >= 0 that minimises

        <P, cost> + eps KL(P | a b^T) + tau_a KL(P 1 | a) + tau_b KL(P^T 1 | b),    KL(x | y) = sum x log(x / y) - x + y

    where tau = None (balanced) asks for P 1 = a, or P^T 1 = b, exactly. The plan is P_ij = a_i b_j exp((f_i + g_j -
    cost_ij) / eps). An iteration, from g = 0, sets f and then g:

        f_i = -damp_a eps log sum_j b_j exp((g_j - cost_ij) / eps)        damp = 1, or tau / (tau + eps) where relaxed
        g_j = -damp_b eps log sum_i a_i exp((f_i - cost_ij) / eps)

    so that P^T 1 = b holds to rounding from the first iteration on, and P 1 approaches a.

    Args:
        cost: (..., N, M), float32, float16, bfloat16 or float64, of any sign and scale. +inf forbids the pair: its plan
            is 0. The half precisions are computed in float32; float64 runs on the reference backend.
        a: (..., N) or (N,), weights of the rows, 0 allowed. None: 1 / N each.
        b: (..., M) or (M,), weights of the columns, 0 allowed. None: 1 / M each. Weights need not sum to 1; balanced,
            the sums of a and b must agree to 1e-5 relative (float16: 4e-3, bfloat16: 3e-2).
        eps: the regularisation, in units of cost (not relative to its largest entry). Results are stable from 10 to
            1e-4 times the largest cost; the iterations that convergence takes grow as 1 / eps.
        n_iters: the number of iterations, at least 1; with tol the largest number. Without tol, all backends but
            the reference spare a problem the last ones as soon as these can't change an entry of its plan by more than
            8e-6 of itself; results, `n_iters` and gradients are those of all.
        tol: stops each problem of the batch by itself once its `error` is below; the check costs nothing. The error of
            float32 doesn't fall much below 1e-6 of the mass.
        tau_a: relaxes the row marginal, in units of cost. None: balanced.
        tau_b: relaxes the column marginal.
        return_plan: False leaves `plan` None (and its memory unused, unless a gradient needs it).
        backend: see `dpdiff_kernels.use_backend`. "cuda" takes up to 4,096 columns; its backward pass is Triton's.

    Returns:
        plan: (..., N, M).
        f: (..., N), g: (..., M), the dual potentials, in units of cost. For a zero weight the formulas above
            still define them, and its plan is 0. +inf for a point that no finite cost connects to a weight.
        cost: (...), <plan, cost>.
        value: (...), the objective above, computed as that of the dual problem at f and g:
            <a, f> + <b, g> - eps (sum P - sum a sum b), with -tau (exp(-f / tau) - 1) in place of f where relaxed.
            The two are equal at convergence; before that, this one is a lower bound. +inf where no plan is feasible.
        n_iters: (...) int64, the iterations used.
        error: (...) float32, |P 1 - a|_1 + |P^T 1 - b|_1 of the returned plan: the truth about convergence, whatever
            stopped the iterations. Where relaxed, the marginal that optimality asks for, a exp(-f / tau_a), is
            in place of a. An infeasible problem (a weight that only +inf costs connect) keeps the mass that can't be
            carried as error.
        All but n_iters and error are in float64 for a float64 cost, in float32 otherwise.

    Inputs without a meaning (a NaN or -inf cost, a NaN or infinite weight) make every result of their problem NaN but
    n_iters, and none of another problem. N or M of 0: an empty plan; the other side's weights count as not connected.

    Gradients reach cost, a and b. Through `value` by the envelope theorem, at the price of one pass: the plan for cost,
    f + eps (sum b - 1) for a, g + eps (sum a - 1) for b (the potentials, for weights that sum to 1; zero where they
    are infinite); exact at convergence. Through plan, cost, f and g as exact derivatives of the iterations that ran,
    converged or not: the backward pass runs them again and holds a few times n_iters (N + M) numbers (cpp: of one
    problem per thread at a time), never n_iters N M. There, zero weights and infinite costs get a zero gradient. Second
    derivatives: on the reference all, elsewhere those of value only. No backend has forward-mode ones: an error.

    Work: O(N M) per iteration. Iterations are spared by a bound: each moves g, in the spread of its changes (where
    relaxed, in the largest), no farther than the one before.

    Raises:
        TypeError: a dtype or the type of an option is wrong (mixed dtypes are promoted under autocast only).
        ValueError: a shape, device or option doesn't fit; in eager mode on CPU also where a weight is negative or,
            balanced, the sums of a and b differ. Elsewhere (GPU, compiled code) that check would stall the device: a
            negative weight gives NaN, and a difference in mass stays visible in `error`.

    References:
        Cuturi, Sinkhorn distances, 2013. Franklin and Lorenz, On the scaling of multidimensional matrices, 1989 (that
        bound, in Hilbert's metric). Chizat et al., Scaling algorithms for unbalanced optimal transport problems,
        2018 (relaxed marginals). Schmitzer, Stabilized sparse scaling algorithms for entropy regularized transport
        problems, 2019 (absorption).
    """
    cost, a, b = widest_under_autocast(cost, a, b)
    check_floats(cost=cost, **present(a=a, b=b))
    if cost.dim() < 2:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: expected (..., N, M)")
    _check_options(eps, n_iters, tol, tau_a, tau_b)
    check_bool("return_plan", return_plan)
    *batch, n, m = cost.shape
    name = select(backend, _implemented(cost), cost, a, b)
    size = math.prod(batch)
    dtype = reference.accumulation_dtype(cost)
    flat = len(batch) == 1  # then no views, which take as long as a small problem
    flat_cost = (cost if flat else cost.reshape(size, n, m)).to(dtype)
    flat_a = _weights("a", a, batch, n, flat_cost)
    flat_b = _weights("b", b, batch, m, flat_cost)
    if a is not None or b is not None:
        _check_masses(flat_a, flat_b, cost.dtype, balanced=tau_a is None and tau_b is None)
    problem = flat_cost, flat_a, flat_b, eps, n_iters, tol, tau_a, tau_b
    # the plan is also the gradient of value with respect to cost
    keep_plan = return_plan or (torch.is_grad_enabled() and any(t.requires_grad for t in problem[:3]))
    plan, *others = _OPERATORS[name].sinkhorn(*problem, keep_plan)
    results = plan if return_plan else None, *others
    if not flat:
        results = (None if x is None else x.view((*batch, *x.shape[1:])) for x in results)
    return Transport(*results)


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 50,
    tol: float | None = None,
    metric: str = "l2",
    *,
    tau_a: float | None = None,
    tau_b: float | None = None,
    backend: str | None = None,
) -> PointTransport:
    """`sinkhorn` between points, without their (N, M) cost: it is computed, block by block, as often as needed.

    Args:
        x: (..., N, D) and
        y: (..., M, D), the points, of one floating-point dtype.
        metric: the cost. "l2": the squared Euclidean distance |x - y|^2. "cosine": 1 - cosine similarity, from 0
            to 2, where a zero vector has similarity 0 to all.
        a, b, eps, n_iters, tol, tau_a, tau_b, backend: as for `sinkhorn`.

    Returns:
        value, f, g, n_iters, error: as for `sinkhorn`, and `apply(v)`, which is plan @ v.

    A NaN or infinite coordinate makes every result of its problem NaN but n_iters.

    Gradients reach x, y, a and b through value (by the envelope theorem, two passes over the pairs), through f and g
    (exact derivatives of the iterations that ran, which the backward pass runs again: O(n_iters (N + M)) memory) and
    through apply. Second derivatives: on the reference all, elsewhere those of value only. Forward-mode ones: none.

    Work: O(N M D) per iteration. Memory beyond the inputs: O(N + M) and a block of the cost.

    Raises:
        TypeError, ValueError: as for `sinkhorn`.
    """
    x, y, a, b = widest_under_autocast(x, y, a, b)
    check_floats(x=x, y=y, **present(a=a, b=b))
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., N, D)")
    if y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(f"y has shape {tuple(y.shape)}: expected {(*x.shape[:-2], 'M', x.shape[-1])}, to go with x")
    check_choice("metric", metric, ("l2", "cosine"))
    _check_options(eps, n_iters, tol, tau_a, tau_b)
    name = select(backend, ("triton", "cpp", "reference"), x, y, a, b)

    *batch, n, d = x.shape
    m, size = y.shape[-2], math.prod(batch)
    dtype = reference.accumulation_dtype(x)
    flat_x, flat_y = x.reshape(size, n, d).to(dtype), y.reshape(size, m, d).to(dtype)
    flat_a = _weights("a", a, batch, n, flat_x)
    flat_b = _weights("b", b, batch, m, flat_x)
    if a is not None or b is not None:
        _check_masses(flat_a, flat_b, x.dtype, balanced=tau_a is None and tau_b is None)
    if metric == "cosine":
        flat_x, flat_y = (reference.unit(p.double()).to(dtype) for p in (flat_x, flat_y))
    points = flat_x, flat_y, flat_a, flat_b
    f, g, value, used, error = _OPERATORS[name].sinkhorn_points(*points, eps, n_iters, tol, tau_a, tau_b, metric)
    h_x, h_y = reference.log_weighted(f, flat_a, eps), reference.log_weighted(g, flat_b, eps)
    return PointTransport(
        value.view(batch),
        f.to(dtype).view(*batch, n),
        g.to(dtype).view(*batch, m),
        used.view(batch),
        error.view(batch),
        (flat_x, flat_y, h_x, h_y, eps, metric, name),
    )


def _implemented(cost: Tensor) -> tuple[str, ...]:
    """The backends of `sinkhorn`, the fastest first: CUDA C++ where blocks form clusters whose shared memory holds the
    costs."""
    if not cost.is_cuda:  # a program for any N and M mustn't learn their limits on GPUs
        return "triton", "cpp", "reference"
    n, m = cost.shape[-2:]
    if m > 4096:  # which CUDA C++ doesn't take
        return "triton", "cpp", "reference"
    held = m <= 512 and n * m <= _HELD and backends()["cuda"] and capability(cost.device) >= (9, 0)
    return *(("cuda", "triton") if held else ("triton", "cuda")), "cpp", "reference"


def _check_options(eps: float, n_iters: int, tol: float | None, tau_a: float | None, tau_b: float | None) -> None:
    check_positive("eps", eps)
    check_int("n_iters", n_iters, 1)
    for name, value in (("tol", tol), ("tau_a", tau_a), ("tau_b", tau_b)):
        if value is not None:
            check_positive(name, value)


def _weights(name: str, weights: Tensor | None, batch: list[int], size: int, like: Tensor) -> Tensor:
    """The weights as (B, size), in like's dtype."""
    if weights is None:
        return like.new_full((like.shape[0], size), 1 / size if size else 0.0)
    check_shape(name, weights, (*batch, size), (size,))
    return weights.to(like.dtype).expand(*batch, size).reshape(like.shape[0], size)


def _check_masses(a: Tensor, b: Tensor, dtype: torch.dtype, balanced: bool) -> None:
    """Raises where a weight is negative or balanced masses differ; looks at the data, so in eager mode on CPU only."""
    if observed((a, b)) or a.device.type != "cpu":
        return
    for name, weights in (("a", a), ("b", b)):
        if (weights < 0).any():
            raise ValueError(f"{name} has a weight of {weights.min().item():g}: expected none below 0")
    if not balanced or not a.shape[-1] or not b.shape[-1]:
        return
    mass_a, mass_b = a.sum(-1, dtype=torch.float64), b.sum(-1, dtype=torch.float64)
    tolerance = max(1e-5, 4 * torch.finfo(dtype).eps)
    apart = (mass_a - mass_b).abs() > tolerance * torch.maximum(mass_a, mass_b)
    if apart.any():
        i = int(apart.nonzero()[0])
        raise ValueError(
            f"a sums to {mass_a[i].item():.7g} and b to {mass_b[i].item():.7g} (problem {i} of {len(a)}): "
            "expected equal masses, or a marginal relaxed by tau_a or tau_b"
        )


def _fake(cost, a, b, eps, n_iters, tol, tau_a, tau_b, return_plan):
    batch, n, m = cost.shape
    plan = cost.new_empty(batch if return_plan else 0, n, m)
    total, value, error = (cost.new_empty(batch) for _ in range(3))
    return plan, *_contiguous(a, b), total, value, cost.new_empty(batch, dtype=torch.int64), error


def _fake_points(x, y, a, b, eps, n_iters, tol, tau_a, tau_b, metric):
    f, g = (weights.new_empty(weights.shape, dtype=torch.float64) for weights in (a, b))
    batch = x.shape[0]
    return f, g, x.new_empty(batch), x.new_empty(batch, dtype=torch.int64), x.new_empty(batch)


def _fake_apply(x, y, h_x, h_y, v, eps, metric):
    return x.new_empty(x.shape[0], x.shape[1], v.shape[2])


def _fake_value(of_value, plan, *problem):
    return plan.new_empty(plan.shape)


def _contiguous(*tensors):
    """Of the same shapes: whatever the strides are, results are contiguous."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _sums(grads, others):
    """Of pairs, either of which may be None."""
    return [b if a is None else a if b is None else a + b for a, b in zip(grads, others)]


def _not_twice(ctx, *grads):
    raise NotImplementedError(
        "second derivatives, but for those of value, are on the reference: use backend='reference'"
    )


def _save_value(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _value_twice(ctx, grad):
    of_value, plan = ctx.saved_tensors
    return (grad * plan).sum((-2, -1)), reference.sinkhorn_value_backward(of_value, grad), *[None] * 6


def _register(namespace: str, *modules: Any) -> SimpleNamespace:
    """The operators of `namespace`, with their fake kernels and gradients; modules: as for `register`."""
    ops = SimpleNamespace()

    def save(ctx, inputs, output):
        cost, a, b, *ctx.options = inputs
        plan, f, g, _, _, used, error = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(used, error)
        ctx.save_for_backward(cost, a, b, plan, f, g, used)

    def backward(ctx, of_plan, of_f, of_g, of_total, of_value, *_):
        cost, a, b, plan, f, g, used = ctx.saved_tensors
        eps, n_iters, _, tau_a, tau_b, has_plan = ctx.options
        grads, given = [None] * 3, (of_plan, of_f, of_g, of_total)
        if any(grad is not None for grad in given):
            grads = ops.sinkhorn_backward(cost, a, b, used, *given, eps, n_iters, tau_a, tau_b)
        if of_value is not None:
            if not has_plan:
                plan = ops.sinkhorn(cost, a, b, *ctx.options[:-1], True)[0]

            def of_cost(of_value, plan):
                if plan.device.type == "cpu" and backends()["cpp"]:  # which writes into huge pages, past the caches
                    return _value_backward(of_value, plan, cost, a, b, f, g, eps)
                return reference.sinkhorn_value_backward(of_value, plan)

            needed = ctx.needs_input_grad[:3]
            problem = a, b, f, g, plan, eps, tau_a, tau_b
            direct = reference.envelope_gradients(of_value, *problem, needed, of_cost)
            grads = _sums(grads, direct)
        return *grads, *[None] * 6

    def save_points(ctx, inputs, output):
        x, y, a, b, *ctx.options = inputs
        f, g, _, used, error = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(used, error)
        ctx.save_for_backward(x, y, a, b, f, g, used)

    def backward_points(ctx, of_f, of_g, of_value, *_):
        x, y, a, b, f, g, used = ctx.saved_tensors
        eps, n_iters, _, tau_a, tau_b, metric = ctx.options
        grads = [None] * 4
        if of_f is not None or of_g is not None:
            given = (None if grad is None else grad.float() for grad in (of_f, of_g))
            grads = ops.sinkhorn_points_backward(x, y, a, b, used, *given, eps, n_iters, tau_a, tau_b, metric)
        if of_value is not None:
            problem = x, y, a, b, f, g, eps, tau_a, tau_b, metric
            needed = ctx.needs_input_grad[:4]
            direct = reference.points_envelope_gradients(ops.sinkhorn_apply, of_value, *problem, needed)
            grads = _sums(grads, (None if grad is None else grad.to(x.dtype) for grad in direct))
        return *grads, *[None] * 6

    def save_apply(ctx, inputs, output):
        *tensors, ctx.eps, ctx.metric = inputs
        ctx.save_for_backward(*tensors)

    def backward_apply(ctx, grad):
        x, y, h_x, h_y, v = ctx.saved_tensors
        grads, of_v = [None] * 4, None
        if any(ctx.needs_input_grad[:4]):
            grads = ops.sinkhorn_apply_backward(grad, x, y, h_x, h_y, v, ctx.eps, ctx.metric)
        if ctx.needs_input_grad[4]:
            of_v = ops.sinkhorn_apply(y, x, h_y, h_x, grad, ctx.eps, ctx.metric)
        return *grads, of_v, None, None

    for name, fake, formula, setup in (
        ("sinkhorn", _fake, backward, save),
        ("sinkhorn_points", _fake_points, backward_points, save_points),
        ("sinkhorn_apply", _fake_apply, backward_apply, save_apply),
        ("sinkhorn_backward", lambda cost, a, b, *_: _contiguous(cost, a, b), _not_twice, None),
        ("sinkhorn_points_backward", lambda x, y, a, b, *_: _contiguous(x, y, a, b), _not_twice, None),
        ("sinkhorn_apply_backward", lambda _, x, y, h_x, h_y, *__: _contiguous(x, y, h_x, h_y), _not_twice, None),
    ):
        setattr(ops, name, register(f"{namespace}::{name}", fake, formula, setup, *modules))
    return ops


# All have the functions `sinkhorn`, `sinkhorn_points` and `sinkhorn_apply` of `reference`.
_OPERATORS: dict[str, Any] = {"reference": reference}
if backends()["cpp"]:
    _value_backward = register("dpdiff::sinkhorn_value_backward", _fake_value, _value_twice, _save_value)
    _OPERATORS["cpp"] = _OPERATORS["cuda"] = _register("dpdiff")
if backends()["triton"]:
    import dpdiff_kernels.triton.sinkhorn
    import dpdiff_kernels.triton.sinkhorn_points

    modules = dpdiff_kernels.triton.sinkhorn, dpdiff_kernels.triton.sinkhorn_points
    _OPERATORS["triton"] = _register("dpdiff_triton", *modules)
    if backends()["cuda"]:  # whose forward pass alone is CUDA C++
        torch.library.register_kernel("dpdiff::sinkhorn_backward", "cuda", torch.ops.dpdiff_triton.sinkhorn_backward)
