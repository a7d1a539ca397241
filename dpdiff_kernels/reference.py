"""The executable definition of every operator, in plain PyTorch: any device, float64 included, differentiable.

Batch dimensions are flattened by the public functions before they get here, and inputs are valid.
"""

import torch
from torch import Tensor

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
