"""The executable definition of every operator, in plain PyTorch: any device, float64 included, differentiable.

Batch dimensions are flattened by the public functions before they get here, and inputs are valid.
"""

import torch
from torch import Tensor

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
    return scores.to(_accumulation_dtype(tokens)), indices


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
    weights = torch.softmax((-scores if metric == "l2" else scores) / temperature, dim=-1)
    values = (weights.unsqueeze(-1) * rows).sum(-2)
    return values.to(tokens.dtype), scores.to(_accumulation_dtype(tokens)), indices


@torch.no_grad()
def prototype_statistics(
    tokens: Tensor, prototypes: Tensor, metric: str, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, D), prototypes (K, D), weights (N,) -> counts (K,), sums (K, D), inertia ()."""
    scores, indices = nearest_prototype(tokens.unsqueeze(0), prototypes, 1, metric, None, None)
    scores, indices = scores.flatten().double(), indices.flatten()
    weights = torch.ones_like(scores) if weights is None else weights.double()
    zeros = torch.zeros_like(prototypes, dtype=torch.float64)
    # index_put adds equal indices in their order, on CUDA too; index_add doesn't.
    counts = zeros.new_zeros(prototypes.shape[0]).index_put((indices,), weights, accumulate=True)
    sums = zeros.index_put((indices,), tokens.double() * weights.unsqueeze(-1), accumulate=True)
    distances = {"l2": scores, "dot": -scores, "cosine": 1 - scores}[metric]
    dtype = _accumulation_dtype(tokens)
    return counts.to(dtype), sums.to(dtype), (distances * weights).sum().to(dtype)


def _accumulation_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def _rows(prototypes: Tensor, indices: Tensor) -> Tensor:
    """The prototypes (B, N, k, D) at indices (B, N, k)."""
    if prototypes.dim() == 2:
        return prototypes[indices]
    batch = torch.arange(indices.shape[0], device=indices.device)
    return prototypes[batch[:, None, None], indices]


def _unit(x: Tensor) -> Tensor:
    """x / |x|, and zero (with a zero gradient) where x is zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm))


def _scores(x: Tensor, rows: Tensor, metric: str) -> Tensor:
    """x (B, N, D) against its own rows (B, N, k, D) -> (B, N, k)."""
    x = x.unsqueeze(-2)
    if metric == "l2":
        return (x - rows).square().sum(-1)
    if metric == "cosine":
        x, rows = _unit(x), _unit(rows)
    return (x * rows).sum(-1)


@torch.no_grad()
def _nearest_indices(
    tokens: Tensor, prototypes: Tensor, k: int, metric: str, groups: Tensor | None, active_groups: Tensor | None
) -> Tensor:
    available = None if groups is None else active_prototypes(groups, active_groups).unsqueeze(1)
    n_batch, n_tokens, n_prototypes = tokens.shape[0], tokens.shape[1], prototypes.shape[-2]
    if torch.compiler.is_compiling() or n_batch * n_tokens * n_prototypes <= _SCORES_PER_CHUNK:
        return _nearest_in_chunk(tokens, prototypes, k, metric, available)
    chunk = max(1, _SCORES_PER_CHUNK // (n_batch * n_prototypes))
    return torch.cat(
        [_nearest_in_chunk(x, prototypes, k, metric, available) for x in tokens.split(chunk, dim=1)], dim=1
    )


def _nearest_in_chunk(tokens: Tensor, prototypes: Tensor, k: int, metric: str, available: Tensor | None) -> Tensor:
    x, p = tokens.double(), prototypes.double()
    if metric == "cosine":
        x, p = _unit(x), _unit(p)
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
    compute = torch.promote_types(dtype, torch.float32)
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


# ---------------------------------------------------------------------------------------------------------------------
# routing, for every operator that takes it


def active_prototypes(groups: Tensor, active_groups: Tensor) -> Tensor:
    """Returns (B, M) bool: which of the prototypes, in groups (M,), each image's active_groups (B, G) name."""
    known = torch.nn.functional.pad(active_groups, (1, 0), value=-1).sort(-1).values
    place = torch.searchsorted(known, groups.expand(known.shape[0], -1).contiguous()).clamp(max=known.shape[1] - 1)
    return (known.gather(-1, place) == groups) & (groups >= 0)
