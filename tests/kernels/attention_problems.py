"""Inputs for the tests of prototype attention, and what it should make of them."""

import torch
from torch import Tensor

import dpdiff_kernels as dk

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(
    batch=3, heads=2, n=17, channels=16, m=11, m_global=5, gate=True, batched=False, dtype=torch.float32, seed=0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lead = (batch,) if batched else ()
    tensors = {
        "query": normal(batch, heads, n, channels),
        "local_key": normal(*lead, heads, m, channels),
        "local_value": normal(*lead, heads, m, channels),
    }
    if m_global is not None:
        tensors["global_key"] = normal(heads, m_global, channels)
        tensors["global_value"] = normal(heads, m_global, channels)
        if gate:
            tensors["gate"] = normal(batch, heads, n).sigmoid()
    return tensors


def expected(
    query,
    local_key,
    local_value,
    global_key=None,
    global_value=None,
    gate=None,
    scale=None,
    groups=None,
    active_groups=None,
) -> Tensor:
    """Image by image, head by head, in float64, on the active prototypes alone."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for b in range(query.shape[0]):
        kept = slice(None)
        if groups is not None:
            kept = torch.tensor([g >= 0 and g in active_groups[b].tolist() for g in groups.tolist()], dtype=torch.bool)
        for h in range(query.shape[1]):
            at = (h,) if local_key.dim() == 3 else (b, h)
            q, k, v = query[b, h].double(), local_key[at].double()[kept], local_value[at].double()[kept]
            if global_key is None:
                rows.append((scale * q @ k.T).softmax(-1) @ v)
                continue
            at = (h,) if global_key.dim() == 3 else (b, h)
            gk, gv = global_key[at].double(), global_value[at].double()
            if gate is None:
                rows.append((scale * q @ torch.cat([k, gk]).T).softmax(-1) @ torch.cat([v, gv]))
                continue
            blend = gate.expand(query.shape[:-1])[b, h].double()[:, None] if len(k) else 1.0
            local_out = (scale * q @ k.T).softmax(-1) @ v
            rows.append((1 - blend) * local_out + blend * ((scale * q @ gk.T).softmax(-1) @ gv))
    return torch.stack(rows).reshape(query.shape) if rows else query.double()


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


BANKS = {"one": {"m_global": None}, "joint": {"gate": False}, "gated": {}}


def check_gradients(backend, tensors, **options):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    doubles = {name: t.double().requires_grad_() for name, t in tensors.items()}
    direction = torch.randn(tensors["query"].shape, generator=torch.Generator().manual_seed(9))
    out = dk.prototype_attention(**leaves, **options, backend=backend)
    gradients = torch.autograd.grad((out * direction).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((expected(**doubles, **options) * direction).sum(), list(doubles.values()))
    for name, gradient, want in zip(leaves, gradients, wanted):
        torch.testing.assert_close(
            gradient.double(), want, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
