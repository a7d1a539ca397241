"""The executable definition of every operator, in plain PyTorch: any device, float64 included, differentiable.

Batch dimensions are flattened by the public functions before they get here, and inputs are valid.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpdiff_kernels.operators import observed


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """In which every operator adds up: float64 for float64, float32 for all others."""
    return torch.promote_types(tensor.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# nearest prototype: everything is computed in float64, so that the choice and the scores are exact to float32 rounding.

# Float64 scores held at a time (8 MB): tokens are taken in chunks so that the N x K scores never are.
_SCORES_PER_CHUNK = 1 << 20


def nearest_prototype(
    tokens: Tensor, prototypes: Tensor, k: int, metric: str, groups: Tensor | None, active_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """tokens (B, N, D), prototypes (K, D) or (B, K, D) -> scores (B, N, k), indices (B, N, k)."""
    indices = _nearest_indices(tokens, prototypes, k, metric, groups, active_groups)
    scores = _scores(tokens.double(), _rows(prototypes.double(), indices), metric)
    return scores.to(accumulation_dtype(tokens)), indices


def aggregate_nearest(
    tokens: Tensor,
    prototypes: Tensor,
    k: int,
    metric: str,
    temperature: float,
    groups: Tensor | None,
    active_groups: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As nearest_prototype -> values (B, N, D), scores (B, N, k), indices (B, N, k)."""
    indices = _nearest_indices(tokens, prototypes, k, metric, groups, active_groups)
    rows = _rows(prototypes.double(), indices)
    scores = _scores(tokens.double(), rows, metric)
    goodness = -scores if metric == "l2" else scores
    # Relative to the best, whatever the temperature: a quotient of theirs may overflow.
    weights = torch.softmax((goodness - goodness.detach().amax(-1, keepdim=True)) / temperature, dim=-1)
    values = (weights.unsqueeze(-1) * rows).sum(-2)
    return values.to(tokens.dtype), scores.to(accumulation_dtype(tokens)), indices


@torch.no_grad()
def prototype_statistics(
    tokens: Tensor, prototypes: Tensor, metric: str, weights: Tensor | None, with_inertia: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, D), prototypes (K, D), weights (N,) -> counts (K,), sums (K, D), inertia () (or zero)."""
    scores, indices = nearest_prototype(tokens.unsqueeze(0), prototypes, 1, metric, None, None)
    scores, indices = scores.flatten().double(), indices.flatten()
    weights = torch.ones_like(scores) if weights is None else weights.double()
    zeros = torch.zeros_like(prototypes, dtype=torch.float64)
    # index_put adds equal indices in their order, on CUDA too; index_add doesn't.
    counts = zeros.new_zeros(prototypes.shape[0]).index_put((indices,), weights, accumulate=True)
    sums = zeros.index_put((indices,), tokens.double() * weights.unsqueeze(-1), accumulate=True)
    distances = {"l2": scores, "dot": -scores, "cosine": 1 - scores}[metric]
    inertia = (distances * weights).sum() if with_inertia else counts.new_zeros(())
    dtype = accumulation_dtype(tokens)
    return counts.to(dtype), sums.to(dtype), inertia.to(dtype)


def _rows(prototypes: Tensor, indices: Tensor) -> Tensor:
    """The prototypes (B, N, k, D) at indices (B, N, k)."""
    if prototypes.dim() == 2:
        return prototypes[indices]
    batch = torch.arange(indices.shape[0], device=indices.device)
    return prototypes[batch[:, None, None], indices]


def unit(x: Tensor) -> Tensor:
    """x / |x|, and zero (with a zero gradient) where x is zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm))


def _scores(x: Tensor, rows: Tensor, metric: str) -> Tensor:
    """x (B, N, D) against its own rows (B, N, k, D) -> (B, N, k)."""
    x = x.unsqueeze(-2)
    if metric == "l2":
        return (x - rows).square().sum(-1)
    if metric == "cosine":
        x, rows = unit(x), unit(rows)
    return (x * rows).sum(-1)


@torch.no_grad()
def _nearest_indices(
    tokens: Tensor, prototypes: Tensor, k: int, metric: str, groups: Tensor | None, active_groups: Tensor | None
) -> Tensor:
    available = None
    if groups is not None:
        available = active_prototypes(groups, active_groups)
        if available.device.type == "cpu" and not observed((groups, active_groups)):
            for i, n in enumerate(available.sum(-1).tolist()):
                if n < k:
                    few = f"active_groups leaves batch element {i} with {n} prototypes"
                    raise ValueError(f"{few}: expected at least k={k}")
        available = available.unsqueeze(1)
    n_batch, n_tokens, n_prototypes = tokens.shape[0], tokens.shape[1], prototypes.shape[-2]
    if n_prototypes == 0:  # of no token
        return torch.zeros(n_batch, n_tokens, k, dtype=torch.int64, device=tokens.device)
    if torch.compiler.is_compiling() or n_batch * n_tokens * n_prototypes <= _SCORES_PER_CHUNK:
        return _nearest_in_chunk(tokens, prototypes, k, metric, available)
    chunk = max(1, _SCORES_PER_CHUNK // (n_batch * n_prototypes))
    return torch.cat(
        [_nearest_in_chunk(x, prototypes, k, metric, available) for x in tokens.split(chunk, dim=1)], dim=1
    )


def _nearest_in_chunk(tokens: Tensor, prototypes: Tensor, k: int, metric: str, available: Tensor | None) -> Tensor:
    x, p = tokens.double(), prototypes.double()
    if metric == "cosine":
        x, p = unit(x), unit(p)
    distance = -(x @ p.mT)
    xx = x.square().sum(-1, keepdim=True)
    pp = p.square().sum(-1).unsqueeze(-2)
    if metric == "l2":
        distance = xx + pp + 2 * distance
        # Infinity minus infinity: the distance from an infinite vector is infinite.
        has_nan = x.isnan().any(-1, keepdim=True) | p.isnan().any(-1).unsqueeze(-2)
        distance = torch.where(distance.isnan() & ~has_nan, torch.inf, distance)

    # A matrix product may round equal columns differently: scores closer than its error are ties, for the lowest index.
    error = (x.shape[-1] + 4) * torch.finfo(torch.float64).eps * (xx + pp if metric == "l2" else (xx * pp).sqrt())
    error = torch.where(error.isfinite(), error, 0.0)
    if available is None:
        available = torch.ones((), dtype=torch.bool, device=x.device)
    available = available.expand_as(distance)
    chosen = []
    for _ in range(k):
        best = torch.where(available, distance + error, torch.inf).amin(-1, keepdim=True)  # NaN if there is one
        tied = ((distance - error <= best) | distance.isnan()) & available
        chosen.append(tied.to(torch.int8).argmax(-1, keepdim=True))
        available = available.scatter(-1, chosen[-1], False)
    return torch.cat(chosen, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# prototype-conditioned attention


def prototype_attention(
    query: Tensor,
    local_key: Tensor,
    local_value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
    groups: Tensor | None,
    active_groups: Tensor | None,
) -> Tensor:
    """query (B, H, N, E); banks (H, M, E) or (B, H, M, E); gate (B, H, N); groups (M,); active_groups (B, G)."""
    dtype = query.dtype
    compute = accumulation_dtype(query)
    query = query.to(compute) * scale
    local_key, local_value = local_key.to(compute), local_value.to(compute)
    hidden = None
    if groups is not None:
        active = active_prototypes(groups, active_groups)
        # Zeros in place of what an image does not attend to: a NaN there must not reach it, forward or backward.
        kept = active[:, None, :, None]
        local_key, local_value = torch.where(kept, local_key, 0.0), torch.where(kept, local_value, 0.0)
        hidden = ~active[:, None, None]
        if gate is not None:  # where nothing is active, the global bank answers alone: all weights zero times zero
            routed_away = hidden.all(-1)
            gate = torch.where(routed_away, 1.0, gate)
            hidden = hidden & ~routed_away[..., None]
    local_scores = query @ local_key.mT
    if hidden is not None:
        local_scores = local_scores.masked_fill(hidden, -torch.inf)
    if global_key is None:
        return (local_scores.softmax(-1) @ local_value).to(dtype)

    global_value = global_value.to(compute)
    global_scores = query @ global_key.to(compute).mT
    if gate is not None:
        gate = gate.to(compute)[..., None]
        local_out = local_scores.softmax(-1) @ local_value
        global_out = global_scores.softmax(-1) @ global_value
        return ((1 - gate) * local_out + gate * global_out).to(dtype)
    weights = torch.cat([local_scores, global_scores], -1).softmax(-1)
    local_weights, global_weights = weights.split([local_scores.shape[-1], global_scores.shape[-1]], -1)
    return (local_weights @ local_value + global_weights @ global_value).to(dtype)


def empty_like_query(query: Tensor) -> Tensor:
    """What other backends answer in: tokens outside and heads inside in memory, as for heads that are joined again."""
    _, heads, n_tokens, channels = query.shape
    row = heads * channels
    return query.new_empty_strided(query.shape, (n_tokens * row, channels, row, 1))


# ---------------------------------------------------------------------------------------------------------------------
# routing, for every operator that takes it


def active_prototypes(groups: Tensor, active_groups: Tensor) -> Tensor:
    """Returns (B, M) bool: which of the prototypes, in groups (M,), each image's active_groups (B, G) name."""
    known = torch.nn.functional.pad(active_groups, (1, 0), value=-1).sort(-1).values
    place = torch.searchsorted(known, groups.expand(known.shape[0], -1).contiguous()).clamp(max=known.shape[1] - 1)
    return (known.gather(-1, place) == groups) & (groups >= 0)


# ---------------------------------------------------------------------------------------------------------------------
# sinkhorn: everything in the log domain and, whatever the input, in float64: at eps = 1e-4 of the largest cost a
# float32 potential is only good to 6e-4 eps, and the plan with it.

Softmin = Callable[[Tensor], Tensor]
_BLOCK = 1 << 20  # elements of the cost that sinkhorn_points holds at once


def sinkhorn(
    cost: Tensor,  # (B, N, M)
    a: Tensor,  # (B, N)
    b: Tensor,  # (B, M)
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
    return_plan: bool,
) -> tuple[Tensor, ...]:
    """Returns plan (B, N, M), f (B, N), g (B, M), cost (B,), value (B,), n_iters (B,) and error (B,). Without
    return_plan, plan is (0, N, M)."""
    dtype = cost.dtype
    cost, a, b = _wide(cost), _wide(a), _wide(b)
    f, g, used = _iterate(
        lambda h: _replayed(_softmin, cost, h, eps),
        lambda h: _replayed(_softmin, cost.mT, h, eps),
        a, b, eps, n_iters, tol, tau_a, tau_b,
    )  # fmt: skip
    log_plan = (log_weighted(f, a, eps).unsqueeze(-1) + log_weighted(g, b, eps).unsqueeze(-2) - cost) / eps
    poison = poison_of((cost > -math.inf).flatten(1).all(1), a, b)
    plan = log_plan.exp() + poison[:, None, None]
    total = (plan * torch.where(cost < math.inf, cost, 0)).sum((-2, -1))
    value = _Envelope.apply(cost, a, b, f, g, plan, eps, tau_a, tau_b)
    error = violation(plan.sum(-1), f, a, tau_a) + violation(plan.sum(-2), g, b, tau_b)
    plan = plan if return_plan else plan[:0]
    outputs = (plan, f + poison[:, None], g + poison[:, None], total + poison, value + poison)
    return *(x.to(dtype) for x in outputs), used, (error + poison).detach().float()


def sinkhorn_points(
    x: Tensor,  # (B, N, D)
    y: Tensor,  # (B, M, D)
    a: Tensor,  # (B, N)
    b: Tensor,  # (B, M)
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
    metric: str,
) -> tuple[Tensor, ...]:
    """Returns f (B, N), g (B, M), value (B,), n_iters (B,) and error (B,); the potentials in float64.
    For the cosine, the points are of unit length."""
    dtype = x.dtype
    x, y, a, b = _wide(x), _wide(y), _wide(a), _wide(b)
    f, g, used = _iterate(
        lambda h: _softmin_points(x, y, h, eps, metric),
        lambda h: _softmin_points(y, x, h, eps, metric),
        a, b, eps, n_iters, tol, tau_a, tau_b,
    )  # fmt: skip
    poison = poison_of(x.isfinite().flatten(1).all(1) & y.isfinite().flatten(1).all(1), a, b)
    rows, columns = (
        _apply_points(
            p, q, log_weighted(u, m, eps), log_weighted(v, w, eps), torch.ones_like(w).unsqueeze(-1), eps, metric
        )
        for p, q, u, v, m, w in ((x, y, f, g, a, b), (y, x, g, f, b, a))
    )
    rows, columns = rows.squeeze(-1).detach(), columns.squeeze(-1).detach()
    value = _PointsEnvelope.apply(x, y, a, b, f, g, rows.sum(-1), eps, tau_a, tau_b, metric)
    error = violation(rows, f, a, tau_a) + violation(columns, g, b, tau_b)
    return f + poison[:, None], g + poison[:, None], (value + poison).to(dtype), used, (error + poison).detach().float()


def sinkhorn_apply(x: Tensor, y: Tensor, h_x: Tensor, h_y: Tensor, v: Tensor, eps: float, metric: str) -> Tensor:
    """Returns plan @ v (B, N, C) for v (B, M, C) and the plan of log-weighted potentials h_x (B, N) and h_y (B, M)."""
    return _apply_points(_wide(x), _wide(y), h_x, h_y, _wide(v), eps, metric).to(v.dtype)


def _iterate(
    rows: Softmin,
    columns: Softmin,
    a: Tensor,
    b: Tensor,
    eps: float,
    n_iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """n_iters times f from g, then g from f. A problem stops where its rows are within tol: that is known when the
    next f is (the columns are exact after g, but for those that nothing reaches)."""
    damp_a = 1.0 if tau_a is None else tau_a / (tau_a + eps)
    damp_b = 1.0 if tau_b is None else tau_b / (tau_b + eps)
    f = damp_a * rows(log_weighted(torch.zeros_like(b), b, eps))
    g = damp_b * columns(log_weighted(f, a, eps))
    used = torch.ones(a.shape[0], dtype=torch.int64, device=a.device)
    active = torch.ones_like(used, dtype=torch.bool)
    for _ in range(n_iters - 1):
        softmin = rows(log_weighted(g, b, eps))
        if tol is None:
            f = damp_a * softmin
            g = damp_b * columns(log_weighted(f, a, eps))
            used = used + 1
            continue
        row_sums = torch.where((a > 0) & (f < math.inf), a * ((f - softmin) / eps).exp(), 0)
        error = violation(row_sums, f, a, tau_a) + violation(torch.zeros_like(b), g, b * (g == math.inf), tau_b)
        active = active & ~(error < tol)
        if not observed((active,)) and not active.any():
            break
        f = torch.where(active[:, None], damp_a * softmin, f)
        g = torch.where(active[:, None], damp_b * columns(log_weighted(f, a, eps)), g)
        used = used + active
    return f, g, used


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # MPS has no float64


def log_weighted(potential: Tensor, weight: Tensor, eps: float) -> Tensor:
    """potential + eps log(weight); -inf for what carries nothing: a zero weight, or a potential that is infinite since
    nothing reaches that point."""
    weight = weight.to(potential.dtype)
    present = (weight > 0) & (potential < math.inf)
    return torch.where(present, potential + eps * torch.where(weight > 0, weight, 1).log(), -math.inf)


def _softmin(cost: Tensor, h: Tensor, eps: float) -> Tensor:
    """-eps log sum_j exp((h_j - cost_ij) / eps), +inf for a row that nothing reaches."""
    logits = (h.unsqueeze(-2) - cost) / eps
    reached = (logits > -math.inf).any(-1)
    logits = torch.where(reached.unsqueeze(-1), logits, 0)  # else logsumexp's gradient is NaN
    return torch.where(reached, -eps * logits.logsumexp(-1), math.inf)


def _replayed(function: Callable[..., Tensor], *args) -> Tensor:
    """The function, whose intermediate results the backward pass computes again rather than store."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _cost_block(x: Tensor, y: Tensor, metric: str) -> Tensor:
    inner = x @ y.mT
    if metric == "cosine":
        return 1 - inner
    return x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * inner


def _softmin_block(x: Tensor, y: Tensor, h: Tensor, eps: float, metric: str) -> Tensor:
    return _softmin(_cost_block(x, y, metric), h, eps)


def _blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    if torch.compiler.is_exporting():  # a program for any shape can't have a number of blocks
        return (x,)
    return x.split(max(1, _BLOCK // max(1, x.shape[0] * columns)), dim=1)


def _softmin_points(x: Tensor, y: Tensor, h: Tensor, eps: float, metric: str) -> Tensor:
    parts = [_replayed(_softmin_block, block, y, h, eps, metric) for block in _blocks(x, y.shape[1])]
    return torch.cat(parts, 1)


def _apply_block(x: Tensor, y: Tensor, h_x: Tensor, h_y: Tensor, v: Tensor, eps: float, metric: str) -> Tensor:
    return ((h_x.unsqueeze(-1) + h_y.unsqueeze(-2) - _cost_block(x, y, metric)) / eps).exp() @ v


def _apply_points(x: Tensor, y: Tensor, h_x: Tensor, h_y: Tensor, v: Tensor, eps: float, metric: str) -> Tensor:
    parts = [
        _replayed(_apply_block, block, y, h, h_y, v, eps, metric)
        for block, h in zip(_blocks(x, y.shape[1]), _blocks(h_x, y.shape[1]))
    ]
    return torch.cat(parts, 1)


def poison_of(good: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """NaN for each problem with an input that has no meaning, 0 for the others."""
    for weight in (a, b):
        good = good & ((weight >= 0) & (weight < math.inf)).all(-1)
    return torch.where(good, 0.0, math.nan).to(a.dtype)


def violation(sums: Tensor, potential: Tensor, weight: Tensor, tau: float | None) -> Tensor:
    """L1 distance of a marginal from what optimality asks: weight, or weight exp(-potential / tau) where relaxed."""
    target = weight if tau is None else torch.where(weight > 0, weight * (-potential / tau).exp(), 0)
    return (sums - target).abs().sum(-1)


def _conjugate(potential: Tensor, tau: float | None) -> Tensor:
    """What a unit of mass contributes to the dual objective: the potential, or -tau (exp(-potential / tau) - 1)."""
    return potential if tau is None else -tau * torch.expm1(-potential / tau)


def dual_value(
    a: Tensor, b: Tensor, f: Tensor, g: Tensor, mass: Tensor, eps: float, tau_a: float | None, tau_b: float | None
) -> Tensor:
    value = -eps * (mass - a.sum(-1) * b.sum(-1))
    for weight, potential, tau in ((a, f, tau_a), (b, g, tau_b)):
        value = value + torch.where(weight > 0, weight * _conjugate(potential, tau), 0).sum(-1)
    return value


def _marginal_gradient(potential: Tensor, other_mass: Tensor, eps: float, tau: float | None) -> Tensor:
    """d value / d weight at the optimum; zero where nothing reaches, for infinity would spoil all that is upstream."""
    relative = 1.0 if tau is None else (-potential / tau).exp()
    gradient = _conjugate(potential, tau) + eps * (other_mass.unsqueeze(-1) - relative)
    return torch.where(potential == torch.inf, 0.0, gradient)


def sinkhorn_value_backward(grad: Tensor, plan: Tensor) -> Tensor:
    """Value's gradient with respect to the cost."""
    return grad[:, None, None] * plan


def envelope_gradients(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    plan: Tensor,
    eps: float,
    tau_a: float | None,
    tau_b: float | None,
    needed: Sequence[bool],
    value_backward: Callable[[Tensor, Tensor], Tensor] = sinkhorn_value_backward,
) -> list[Tensor | None]:
    """The gradients of cost, a and b from that of value, where the potentials are optimal; None where not needed."""
    gradients = (
        lambda: value_backward(grad, plan),
        lambda: grad[:, None] * _marginal_gradient(f, b.sum(-1), eps, tau_a),
        lambda: grad[:, None] * _marginal_gradient(g, a.sum(-1), eps, tau_b),
    )
    return [gradient() if need else None for gradient, need in zip(gradients, needed)]


class _Envelope(torch.autograd.Function):
    """The dual objective, whose gradient takes the potentials as optimal. Differentiable twice: the gradients are made
    of plan, f and g, and these depend on the inputs through the iterations."""

    @staticmethod
    def forward(ctx, cost, a, b, f, g, plan, eps, tau_a, tau_b):
        ctx.save_for_backward(a, b, f, g, plan)
        ctx.options = eps, tau_a, tau_b
        return dual_value(a, b, f, g, plan.sum((-2, -1)), eps, tau_a, tau_b)

    @staticmethod
    def backward(ctx, grad):
        direct = envelope_gradients(grad, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:3])
        return *direct, *[None] * 6


def points_envelope_gradients(
    apply: Callable[..., Tensor],
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    eps: float,
    tau_a: float | None,
    tau_b: float | None,
    metric: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, y, a and b, where apply is that of the plan; None where not needed."""
    h_x, h_y = log_weighted(f, a, eps), log_weighted(g, b, eps)

    def of_points(p: Tensor, q: Tensor, h_p: Tensor, h_q: Tensor) -> Tensor:
        # sum_j plan_ij and sum_j plan_ij q_j in one pass
        moments = apply(p, q, h_p, h_q, torch.cat([torch.ones_like(q[..., :1]), q], -1), eps, metric)
        pulled = -moments[..., 1:] if metric == "cosine" else 2 * (moments[..., :1] * p - moments[..., 1:])
        return grad[:, None, None] * pulled

    gradients = (
        lambda: of_points(x, y, h_x, h_y),
        lambda: of_points(y, x, h_y, h_x),
        lambda: grad[:, None] * _marginal_gradient(f, b.sum(-1), eps, tau_a),
        lambda: grad[:, None] * _marginal_gradient(g, a.sum(-1), eps, tau_b),
    )
    return [gradient() if need else None for gradient, need in zip(gradients, needed)]


class _PointsEnvelope(torch.autograd.Function):
    """_Envelope, where the cost is that of points and the plan is applied rather than held."""

    @staticmethod
    def forward(ctx, x, y, a, b, f, g, mass, eps, tau_a, tau_b, metric):
        ctx.save_for_backward(x, y, a, b, f, g)
        ctx.options = eps, tau_a, tau_b, metric
        return dual_value(a, b, f, g, mass, eps, tau_a, tau_b)

    @staticmethod
    def backward(ctx, grad):
        grads = points_envelope_gradients(
            _apply_points, grad, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:4]
        )
        return *grads, None, None, None, None, None, None, None
