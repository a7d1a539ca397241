"""Prototype-conditioned attention: tokens attend to a local and a global prototype bank that the whole batch shares."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpdiff_kernels import reference
from dpdiff_kernels.backends import asked_for, backends, select
from dpdiff_kernels.checks import check_floats, check_groups, check_int, check_shape, present, under_autocast
from dpdiff_kernels.operators import observed, register
from dpdiff_kernels.replay import replayed


@replayed(asked_for)
def prototype_attention(
    query: Tensor,
    local_key: Tensor,
    local_value: Tensor,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    groups: Tensor | None = None,
    active_groups: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attends from tokens to one or two banks of prototypes.

    Without a gate, one softmax runs over both banks together (over the local one where there is no global bank)::

        softmax(scale * query @ [local_key, global_key]^T) @ [local_value, global_value]

    With a gate, each bank has its own softmax, and the gate blends what they answer::

        (1 - gate) * softmax(scale * query @ local_key^T) @ local_value
            + gate * softmax(scale * query @ global_key^T) @ global_value

    One fused pass either way: O(B H N M E) time for M prototypes in all, no (N, M) matrix in memory, and banks that the
    batch shares are never expanded. Softmax as in Milakov and Gimelshein, "Online normalizer calculation for softmax"
    (2018); recomputation in the backward pass as in Dao et al., "FlashAttention" (2022).

    Args:
        query: (..., H, N, E) float32, bfloat16, float16 or float64: any leading batch dimensions, H heads of E
            channels. Under autocast, this and the other floating-point inputs are cast to autocast's dtype first.
        local_key, local_value: (H, M, E), shared by the batch, or (..., H, M, E); dtype of `query`.
        global_key, global_value: as the local bank's, with a number of prototypes of their own; or both None.
        gate: (..., H, N) or broadcastable to it, in [0, 1] (not checked); dtype of `query`. Needs a global bank.
        scale: of the scores; 1 / sqrt(E) when None.
        groups: (M,) int64, the group that each local prototype belongs to. Routes the local bank, with
        active_groups: (..., G) int64, the only groups that each batch element attends to. Negative entries are
            padding, duplicates are harmless. The work grows with the active prototypes, not with M.
        backend: see `dpdiff_kernels.backends`.

    Returns:
        (..., H, N, E) in the dtype of `query`; sums run in float32 (float64 for float64).

    A local bank without prototypes, or without active ones, leaves the answer to the global bank (as gate = 1 does; the
    gate then has no gradient), and an empty global bank leaves it to the local one. A NaN in a query stays in its row;
    one in a key or value reaches every token that attends to that prototype.

    Gradients reach query, banks and gate; those of a shared bank are summed over the batch, in an order that does not
    depend on the number of threads. `cpp` and `triton` recompute scores from two floats saved for each token, head and
    softmax (with a gate, the difference of the two answers is saved too), and can't be differentiated twice. Those of
    forward mode are on the reference; elsewhere they are a NotImplementedError.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes or devices; ValueError where a batch element has no prototype
            to attend to. (The reference finds that last one in eager mode on CPU; elsewhere it answers NaN.)
    """
    tensors = (query, local_key, local_value, global_key, global_value, gate)
    if isinstance(query, Tensor) and under_autocast(query):
        tensors = [_autocast(tensor) for tensor in tensors]
        with torch.autocast(query.device.type, enabled=False):
            return prototype_attention(*tensors, scale, groups, active_groups, backend=backend)
    _check(*tensors, scale)
    batch_shape = query.shape[:-3]
    heads, n_tokens, channels = query.shape[-3:]
    check_groups(groups, active_groups, local_key.shape[-2], batch_shape, query.device)
    if scale is None:
        scale = channels**-0.5 if channels else 1.0
    if global_key is not None and global_key.shape[-2] == 0:
        global_key = global_value = gate = None
    if local_key.shape[-2] == 0:
        if global_key is None:
            raise ValueError("local_key has no prototypes, and there is no global bank: expected at least one")
        local_key, local_value, global_key, global_value = global_key, global_value, None, None
        gate = groups = active_groups = None
    banks = local_key, local_value, global_key, global_value
    backend = select(backend, ("triton", "cpp", "reference"), query, *banks, gate)

    batch = math.prod(batch_shape)
    flat = query if query.dim() == 4 else query.reshape(batch, heads, n_tokens, channels)
    banks = [_flatten_bank(bank, batch) for bank in banks]
    if gate is not None and gate.shape != flat.shape[:-1]:
        gate = gate.expand(*batch_shape, heads, n_tokens).reshape(batch, heads, n_tokens)
    if active_groups is not None:
        active_groups = active_groups.reshape(batch, active_groups.shape[-1])
    if backend != "cpp" and active_groups is not None and global_key is None:
        _check_routes(groups, active_groups)
    if backend == "reference":
        out = reference.prototype_attention(flat, *banks, gate, scale, groups, active_groups)
    else:
        if gate is not None and backend == "cpp":
            gate = gate.float()
        if scale < 0:
            flat, scale = -flat, -scale
        for_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (flat, *banks, gate))
        out = _OPERATORS[backend](flat, *banks, gate, scale, groups, active_groups, for_backward)[0]
    return out if query.dim() == 4 else out.reshape(query.shape)


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """As autocast does for scaled_dot_product_attention: float64 stays."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check(
    query: Tensor,
    local_key: Tensor,
    local_value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
) -> None:
    check_floats(
        query=query,
        local_key=local_key,
        local_value=local_value,
        **present(global_key=global_key, global_value=global_value, gate=gate),
    )
    if query.dim() < 3:
        raise ValueError(f"query has shape {tuple(query.shape)}: expected (..., H, N, E)")
    _check_bank("local", local_key, local_value, query)
    if (global_key is None) != (global_value is None):
        given, missing = ("global_key", "global_value") if global_value is None else ("global_value", "global_key")
        raise ValueError(f"{given} is given without {missing}: expected both or neither")
    if global_key is not None:
        _check_bank("global", global_key, global_value, query)
    if gate is not None:
        if global_key is None:
            raise ValueError("gate is given without a global bank: expected global_key and global_value too")
        expected = query.shape[:-1]
        sizes = list(zip(reversed(gate.shape), reversed(expected)))
        if gate.dim() > len(expected) or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(f"gate has shape {tuple(gate.shape)}: expected one that broadcasts to {tuple(expected)}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale is {scale!r}: expected a number")
    if scale is not None and not abs(scale) < math.inf:
        raise ValueError(f"scale is {scale}: expected a finite number")


def _check_bank(name: str, key: Tensor, value: Tensor, query: Tensor) -> None:
    batch_shape, (heads, _, channels) = query.shape[:-3], query.shape[-3:]
    shared = (heads, key.shape[-2] if key.dim() > 1 else 0, channels)
    check_shape(f"{name}_key", key, shared, (*batch_shape, *shared))
    check_shape(f"{name}_value", value, tuple(key.shape))


def _flatten_bank(bank: Tensor | None, batch: int) -> Tensor | None:
    return bank if bank is None or bank.dim() == 3 else bank.reshape(batch, *bank.shape[-3:])


def _check_routes(groups: Tensor, active_groups: Tensor) -> None:
    if observed((groups, active_groups)) or groups.device.type != "cpu":
        return
    if not reference.active_prototypes(groups, active_groups).any(-1).all():
        raise ValueError(
            "active_groups leaves a batch element without local prototypes, and there is no global bank: "
            "expected at least one active prototype each"
        )


def _fake(query, local_key, local_value, global_key, global_value, gate, scale, groups, active_groups, for_backward):
    batch, heads, n_tokens, _ = query.shape
    softmaxes = 1 if gate is None else 2
    sums = (softmaxes, batch, heads, n_tokens) if for_backward else (0,)
    return (
        reference.empty_like_query(query),
        query.new_empty(sums, dtype=torch.float32),
        query.new_empty(sums, dtype=torch.float32),
        reference.empty_like_query(query) if for_backward and gate is not None else query.new_empty(0),
    )


def _fake_backward(grad_out, query, local_key, local_value, global_key, global_value, gate, *_):
    grads = [
        query.new_empty(0 if bank is None else bank.shape)
        for bank in (local_key, local_value, global_key, global_value)
    ]
    return (
        reference.empty_like_query(query),
        *grads,
        query.new_empty(0, dtype=torch.float32) if gate is None else gate.new_empty(gate.shape),
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, groups, active_groups, _ = inputs
    ctx.save_for_backward(*tensors, groups, active_groups, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _no_second_backward(ctx, *grads):
    raise RuntimeError("prototype_attention has no second derivative: pass backend='reference'")


def _register(namespace: str, *modules: Any) -> Callable:
    """The operator, with its fake kernel and gradient; modules: as for `register`."""
    name = f"{namespace}::prototype_attention"
    run_backward = register(f"{name}_backward", _fake_backward, _no_second_backward, None, *modules)

    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 10
        *tensors, groups, active_groups, out, reference, total, difference = ctx.saved_tensors
        grads = run_backward(grad_out, *tensors, ctx.scale, groups, active_groups, out, reference, total, difference)
        return *(None if t is None else grad for t, grad in zip(tensors, grads)), None, None, None, None

    return register(name, _fake, backward, _save, *modules)


_OPERATORS: dict[str, Callable] = {}
if backends()["cpp"]:
    _OPERATORS["cpp"] = _register("dpdiff")
if backends()["triton"]:
    import dpdiff_kernels.triton.attention

    _OPERATORS["triton"] = _register("dpdiff_triton", dpdiff_kernels.triton.attention)


class ProjectedBanks(NamedTuple):
    """Keys and values (H, M, E) or (B, H, M, E) of the two banks: what `PrototypeAttention` can reuse."""

    local_key: Tensor
    local_value: Tensor
    global_key: Tensor | None
    global_value: Tensor | None


class PrototypeAttention(nn.Module):
    """Multi-head attention from tokens to prototypes: projections, heads and a learnt gate around the operator.

    While the banks stay the same, as they do over the denoising steps of inference, project them once::

        cache = attention.project_banks(local_prototypes, global_prototypes)
        for t in steps:
            x = attention(x, cache=cache)

    Args:
        dim: channels D of tokens and output.
        num_heads: H; divides `dim`.
        gated: blends the two banks by a gate learnt per token and head, which starts at one half; otherwise one softmax
            runs over both banks together.
        bank_dim: channels of the prototypes; `dim` when None.
    """

    def __init__(self, dim: int, num_heads: int, gated: bool = True, bank_dim: int | None = None) -> None:
        super().__init__()
        check_int("dim", dim, 1)
        check_int("num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"dim is {dim}: expected a multiple of num_heads ({num_heads})")
        bank_dim = dim if bank_dim is None else bank_dim
        check_int("bank_dim", bank_dim, 1)
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.local_bank = nn.Linear(bank_dim, 2 * dim)
        self.global_bank = nn.Linear(bank_dim, 2 * dim)
        self.gate = nn.Linear(dim, num_heads) if gated else None
        if gated:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.out = nn.Linear(dim, dim)

    def project_banks(self, local_prototypes: Tensor, global_prototypes: Tensor | None = None) -> ProjectedBanks:
        """Returns the keys and values of banks (M, D) or (B, M, D), for `forward(..., cache=...)`."""
        local_key, local_value = self._split(self.local_bank(local_prototypes))
        if global_prototypes is None:
            return ProjectedBanks(local_key, local_value, None, None)
        return ProjectedBanks(local_key, local_value, *self._split(self.global_bank(global_prototypes)))

    def forward(
        self,
        tokens: Tensor,
        local_prototypes: Tensor | None = None,
        global_prototypes: Tensor | None = None,
        groups: Tensor | None = None,
        active_groups: Tensor | None = None,
        cache: ProjectedBanks | None = None,
    ) -> Tensor:
        """tokens (B, N, D) -> (B, N, D).

        The banks are given either as prototypes, (M, D) shared or (B, M, D), or as the cache of `project_banks`.
        groups (M,) and active_groups (B, G) route the local bank. Without a global bank the gate has no part.
        """
        if (local_prototypes is None) == (cache is None) or (cache is not None and global_prototypes is not None):
            raise ValueError("expected either local_prototypes (and global_prototypes) or cache, not both")
        banks = self.project_banks(local_prototypes, global_prototypes) if cache is None else cache
        query = self.query(tokens).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
        gate = None
        if self.gate is not None and banks.global_key is not None:
            gate = self.gate(tokens).sigmoid().mT
        attended = prototype_attention(query, *banks, gate=gate, groups=groups, active_groups=active_groups)
        return self.out(attended.transpose(-3, -2).flatten(-2))

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        heads = projected.unflatten(-1, (2 * self.num_heads, -1)).transpose(-3, -2)  # (..., 2 H, M, E)
        return heads.chunk(2, -3)
