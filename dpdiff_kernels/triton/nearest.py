"""The nearest-prototype operators in Triton: how their kernels are launched, and with which tiles.

Every operator takes and returns what the native one of the same name does (csrc/ops.cpp).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.triton.launch import Variant, arch_of, ceil_div, launch, on_device, power_of_2, registered
from dpdiff_kernels.triton.nearest_search import (
    exhaust_kernel,
    norms_kernel,
    pack_kernel,
    screen_kernel,
    settle_kernel,
)
from dpdiff_kernels.triton.nearest_sums import member_sums_kernel, token_gradients_kernel, values_kernel

METRICS = ("cosine", "dot", "l2")


class Tile(NamedTuple):
    """tokens x prototypes of a product's tile, the channels that it takes at a time, and how it is compiled."""

    tokens: int
    prototypes: int
    channels: int
    num_warps: int
    num_stages: int


def screen_tile(arch: str, n_prototypes: int, slots: int) -> Tile:
    """Of the screening, for so many prototypes (few where they are routed) and slots: the knob that speed hangs on."""
    tokens = 128 if slots <= 16 else 64
    prototypes = 128 if n_prototypes > 64 and slots <= 16 else 64
    if arch == "sm_90":
        return Tile(tokens, prototypes, 64, 8 if tokens == 128 else 4, 3)
    if arch == "sm_80":
        if tokens > prototypes:
            return Tile(tokens, prototypes, 64, 8, 3)  # with 32 channels it spills
        return Tile(tokens, prototypes, 32, 8 if tokens == 128 else 4, 4)
    return Tile(tokens, prototypes, 32, 8 if tokens == 128 else 4, 2)


def slots_of(k: int) -> int:
    """How many keys screening keeps of each token: enough for the k best and, nearly always, all that may tie."""
    return max(8, power_of_2(k + 3))


# The other kernels wait for memory: rows x channels.
ROW_TILE = dict(R=8, BD=256)
SETTLE_TILE = dict(BN=8, BD=128)
EXHAUST_TILE = dict(BN=4, BK=32, BD=32)
VALUES_TILE = dict(BN=8, BD=256)
SUMS_TILE = dict(R=32, BD=64)


def settle_warps(arch: str) -> int:
    """Where neither spills."""
    return 8 if arch == "sm_90" else 4


def _gradients_tile(slots: int) -> dict[str, int]:
    return dict(BN=8 if slots <= 16 else 4, BD=128 if slots <= 2 else 64)  # larger ones spill


# -------------------------------------------------------------------------------------------------------------- search


def _search(
    tokens: Tensor,
    prototypes: Tensor,
    k: int,
    metric: str,
    groups: Tensor | None,
    active_groups: Tensor | None,
    with_goodness: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (B, N, k) float32, indices (B, N, k), goodness (B, N, k) float64 (empty where not wanted)."""
    tokens, prototypes = tokens.contiguous(), prototypes.contiguous()
    n_batch, n, d = tokens.shape
    n_prototypes = prototypes.shape[-2]
    shared, routed = prototypes.dim() == 2, groups is not None
    packed = tokens.dtype == torch.float32 or d % 16 != 0
    scores = tokens.new_empty(n_batch, n, k, dtype=torch.float32)
    indices = tokens.new_empty(n_batch, n, k, dtype=torch.int64)
    goodness = tokens.new_empty((n_batch, n, k) if with_goodness else 0, dtype=torch.float64)
    if n_batch == 0 or n == 0:
        return scores, indices, goodness

    rows = counts = tokens.new_empty(0, dtype=torch.int32)
    if routed:
        active = reference.active_prototypes(groups, active_groups)
        every = torch.arange(n_prototypes, dtype=torch.int32, device=tokens.device)
        rows = torch.where(active, every, n_prototypes).sort(-1).values  # the active ones first, ascending
        counts = active.sum(-1, dtype=torch.int32)

    norms = _norms(prototypes)
    largest = norms.amax(-1)
    x, p = tokens, prototypes
    scales = remainders = bank_remainder = norms
    kind = torch.float16 if packed else tokens.dtype
    if packed or metric == "cosine":
        p, _, lost = _pack(prototypes, norms, largest, kind, own=metric == "cosine")
        bank_remainder = lost.amax(-1)
    if packed:
        x, scales, remainders = _pack(tokens, None, largest, kind, own=True)

    slots = slots_of(k)
    arch = arch_of(tokens.device)
    tile = screen_tile(arch, 0 if routed else n_prototypes, slots)
    keys = tokens.new_empty(n_batch, n, slots, dtype=torch.float32)
    positions = tokens.new_empty(n_batch, n, slots, dtype=torch.int32)
    unsettled = tokens.new_empty(n_batch, n, dtype=torch.int64)
    n_unsettled = torch.zeros(n_batch, dtype=torch.int32, device=tokens.device)
    options = dict(METRIC=metric, SHARED=shared, ROUTED=routed)
    with on_device(tokens):
        launch(screen_kernel)[(n_batch * ceil_div(n, tile.tokens),)](
            x, p, scales, norms, largest, rows, counts, keys, positions, n, n_prototypes, x.shape[-1],
            **options, PACKED=packed, WHOLE=x.shape[-1] % tile.channels == 0, SLOTS=slots,
            BN=tile.tokens, BK=tile.prototypes, BD=tile.channels,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        launch(settle_kernel)[(n_batch * ceil_div(n, SETTLE_TILE["BN"]),)](
            tokens, prototypes, scales, remainders, norms, largest, bank_remainder, rows, counts, keys, positions,
            scores, indices, goodness, unsettled, n_unsettled, n, n_prototypes, d, k,
            **options, PACKED=packed, WITH_GOODNESS=with_goodness, SLOTS=slots,
            KEY_BITS=tile.prototypes.bit_length() - 1, **SETTLE_TILE, num_warps=settle_warps(arch),
        )  # fmt: skip
        launch(exhaust_kernel)[(n_batch * ceil_div(n, EXHAUST_TILE["BN"]),)](
            tokens, prototypes, norms, rows, counts, scores, indices, goodness, unsettled, n_unsettled,
            n, n_prototypes, d, k,
            **options, WITH_GOODNESS=with_goodness, SLOTS=power_of_2(k), **EXHAUST_TILE,
        )  # fmt: skip
    return scores, indices, goodness


def _norms(rows: Tensor) -> Tensor:
    """The norms (...) float64 of rows (..., D)."""
    norms = rows.new_empty(rows.shape[:-1], dtype=torch.float64)
    n = norms.numel()
    with on_device(rows):
        launch(norms_kernel)[(ceil_div(n, ROW_TILE["R"]),)](rows, norms, n, rows.shape[-1], **ROW_TILE)
    return norms


def _pack(
    rows: Tensor, norms: Tensor | None, largest: Tensor, dtype: torch.dtype, own: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """rows (..., D) in 16 bits, up to a multiple of 64 channels; their scales (...), and what rounding lost (...).

    own: each row has its own scale.
    """
    n_of_bank, d = rows.shape[-2:]
    depth = d if d % 16 == 0 and dtype == rows.dtype else ceil_div(d, 64) * 64  # as the other operand has it
    packed = rows.new_empty(*rows.shape[:-1], depth, dtype=dtype)
    scales, remainders = (rows.new_empty(rows.shape[:-1], dtype=torch.float32) for _ in range(2))
    n = scales.numel()
    with on_device(rows):
        launch(pack_kernel)[(ceil_div(n, ROW_TILE["R"]),)](
            rows, norms, largest, packed, scales, remainders, n, n_of_bank, d, depth, OWN=own, **ROW_TILE
        )
    return packed, scales, remainders


@registered(torch.library.triton_op)
def nearest_prototype(
    tokens: Tensor, prototypes: Tensor, k: int, metric: str, groups: Tensor | None, active_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _search(tokens, prototypes, k, metric, groups, active_groups, with_goodness=False)[:2]


@registered(torch.library.triton_op)
def aggregate_nearest(
    tokens: Tensor,
    prototypes: Tensor,
    k: int,
    metric: str,
    temperature: float,
    groups: Tensor | None,
    active_groups: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, prototypes = tokens.contiguous(), prototypes.contiguous()
    scores, indices, goodness = _search(tokens, prototypes, k, metric, groups, active_groups, with_goodness=True)
    values, weights = torch.empty_like(tokens), torch.empty_like(scores)
    n_batch, n, d = tokens.shape
    if tokens.numel() > 0:
        with on_device(tokens):
            launch(values_kernel)[(ceil_div(n_batch * n, VALUES_TILE["BN"]),)](
                prototypes, indices, goodness, weights, values, n_batch * n, n, prototypes.shape[-2], d, k, temperature,
                SHARED=prototypes.dim() == 2, **VALUES_TILE,
            )  # fmt: skip
    return values, scores, indices, weights


# ---------------------------------------------------------------------------------------------- gradients, statistics


def _sort(rows: Tensor, n_prototypes: int) -> tuple[Tensor, Tensor]:
    """The entries in the order of their rows (E,), and where each prototype's begin (n_prototypes + 1,)."""
    ascending, order = rows.sort(stable=True)
    every = torch.arange(n_prototypes + 1, dtype=rows.dtype, device=rows.device)
    return order, torch.searchsorted(ascending, every)


@registered(torch.library.triton_op)
def nearest_backward(
    tokens: Tensor,
    prototypes: Tensor,
    indices: Tensor,
    scores: Tensor,
    weights: Tensor | None,
    grad_values: Tensor | None,
    grad_scores: Tensor | None,
    metric: str,
    temperature: float,
    of_tokens: bool,
    of_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    tokens, prototypes, indices, scores = (t.contiguous() for t in (tokens, prototypes, indices, scores))
    weights, grad_values, grad_scores = (
        None if t is None else t.contiguous() for t in (weights, grad_values, grad_scores)
    )
    n_batch, n, k = indices.shape
    d, n_prototypes = tokens.shape[2], prototypes.shape[-2]
    n_rows = n_batch * n
    grad_tokens = torch.empty_like(tokens) if of_tokens else tokens.new_empty(0)
    grad_prototypes = torch.zeros_like(prototypes) if of_prototypes else prototypes.new_empty(0)
    if n_rows == 0 or d == 0:
        return grad_tokens, grad_prototypes
    scales, factors, owns = (tokens.new_empty(size, dtype=torch.float32) for size in (n_rows, n_rows * k, n_rows * k))
    rows = tokens.new_empty(n_rows * k, dtype=torch.int32)
    norms = _norms(prototypes) if metric == "cosine" else scales
    slots = power_of_2(k)
    weights_, grad_scores_ = (scores if t is None else t for t in (weights, grad_scores))
    grad_values_ = tokens if grad_values is None else grad_values
    with_values = grad_values is not None
    with on_device(tokens):
        tile = _gradients_tile(slots)
        launch(token_gradients_kernel)[(ceil_div(n_rows, tile["BN"]),)](
            tokens, prototypes, norms, indices, scores, weights_, grad_values_, grad_scores_,
            grad_tokens, scales, rows, factors, owns, n_rows, n, n_prototypes, d, k, temperature,
            METRIC=metric, SHARED=prototypes.dim() == 2, WITH_VALUES=with_values,
            WITH_SCORES=grad_scores is not None, OF_TOKENS=of_tokens, SLOTS=slots, **tile,
        )  # fmt: skip
        if of_prototypes:
            order, starts = _sort(rows, prototypes.numel() // d)
            launch(member_sums_kernel)[((starts.numel() - 1) * ceil_div(d, SUMS_TILE["BD"]),)](
                order, starts, tokens, scales, factors, grad_values_, weights_, owns, prototypes, norms,
                grad_prototypes, norms, d, k,
                GRADIENT=True, METRIC=metric, WEIGHTED=True, WITH_VALUES=with_values, **SUMS_TILE,
            )  # fmt: skip
    return grad_tokens, grad_prototypes


@registered(torch.library.triton_op)
def prototype_statistics(
    tokens: Tensor, prototypes: Tensor, metric: str, weights: Tensor | None, with_inertia: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, prototypes = tokens.contiguous(), prototypes.contiguous()
    weights = None if weights is None else weights.contiguous()
    scores, indices, _ = _search(tokens.unsqueeze(0), prototypes, 1, metric, None, None, with_goodness=False)
    n_prototypes, d = prototypes.shape
    sums = torch.zeros_like(prototypes, dtype=torch.float32)
    counts = torch.zeros(n_prototypes, dtype=torch.float64, device=tokens.device)
    if tokens.shape[0] > 0:
        order, starts = _sort(indices.flatten(), n_prototypes)
        unused, weights_ = scores, scores if weights is None else weights
        with on_device(tokens):
            launch(member_sums_kernel)[(n_prototypes * max(1, ceil_div(d, SUMS_TILE["BD"])),)](
                order, starts, tokens, unused, weights_, tokens, unused, unused, prototypes, counts, sums, counts, d, 1,
                GRADIENT=False, METRIC=metric, WEIGHTED=weights is not None, WITH_VALUES=False, **SUMS_TILE,
            )  # fmt: skip
    if not with_inertia:
        return counts.float(), sums, sums.new_zeros(())
    distances = scores.flatten().double()
    if metric != "l2":
        distances = (1 if metric == "cosine" else 0) - distances
    inertia = distances.sum() if weights is None else (distances * weights).sum()
    return counts.float(), sums, inertia.float()


# ------------------------------------------------------------------------------------------- what there is to compile


def variants(arch: str) -> Iterator[Variant]:
    """Every tile, dtype and metric that can be launched on `arch`; of the flags, those that make the larger kernel."""
    sizes = dict.fromkeys(("n", "n_rows", "n_of_bank", "n_prototypes", "d", "depth", "k"), "i32")
    common = sizes | dict.fromkeys(("norms", "largest", "goodness", "totals"), "*fp64")
    common |= dict.fromkeys(("scales", "remainders", "bank_remainder", "keys", "scores", "weights"), "*fp32")
    common |= dict.fromkeys(("grad_scores", "factors", "owns"), "*fp32") | {"temperature": "fp32"}
    common |= dict.fromkeys(("rows", "counts", "positions", "n_unsettled"), "*i32")
    common |= dict.fromkeys(("indices", "unsettled", "order", "starts"), "*i64")

    def variant(kernel, operand: str, constants: dict, divisible=("d", "depth"), **options) -> Variant:
        operands = ("tokens", "prototypes", "values", "grad_values", "grad_tokens", "sums")
        types = common | dict.fromkeys(operands, f"*{operand}") | {"packed": "*bf16" if operand == "bf16" else "*fp16"}
        if kernel in (norms_kernel, pack_kernel):
            types["rows"] = f"*{operand}"
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        return Variant(kernel, signature, constants, divisible=tuple(set(divisible) & set(signature)), **options)

    for operand in ("fp32", "fp16", "bf16"):
        yield variant(norms_kernel, operand, ROW_TILE)
        yield variant(values_kernel, operand, dict(SHARED=False) | VALUES_TILE)
    for own in (True, False):
        yield variant(pack_kernel, "fp32", dict(OWN=own) | ROW_TILE)
    yield variant(pack_kernel, "bf16", dict(OWN=True) | ROW_TILE)
    yield variant(pack_kernel, "fp32", dict(OWN=True, norms=None) | ROW_TILE)
    for metric in METRICS:
        for slots in sorted({slots_of(k) for k in range(1, 33)}):
            for n_prototypes, routed in ((64, True), (128, False)):
                tile = screen_tile(arch, n_prototypes, slots)
                blocks = dict(SLOTS=slots, BN=tile.tokens, BK=tile.prototypes, BD=tile.channels)
                compiled = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
                for operand, packed, whole in (("fp16", True, True), ("bf16", False, True), ("bf16", False, False)):
                    flags = dict(METRIC=metric, PACKED=packed, SHARED=True, ROUTED=routed, WHOLE=whole)
                    yield variant(screen_kernel, operand, flags | blocks, **compiled)
            for operand in ("fp32", "bf16"):
                flags = dict(METRIC=metric, PACKED=operand == "fp32", SHARED=True, ROUTED=True, WITH_GOODNESS=True)
                flags |= dict(SLOTS=slots, KEY_BITS=7)
                yield variant(settle_kernel, operand, flags | SETTLE_TILE, num_warps=settle_warps(arch))
        for operand in ("fp32", "bf16"):
            for slots in (1, 4, 32):
                flags = dict(METRIC=metric, SHARED=True, ROUTED=True, WITH_GOODNESS=True, SLOTS=slots)
                yield variant(exhaust_kernel, operand, flags | EXHAUST_TILE)
                flags = dict(METRIC=metric, SHARED=False, WITH_VALUES=True, WITH_SCORES=True, OF_TOKENS=True)
                yield variant(token_gradients_kernel, operand, flags | dict(SLOTS=slots) | _gradients_tile(slots))
            flags = dict(GRADIENT=True, METRIC=metric, WEIGHTED=True, WITH_VALUES=True)
            yield variant(member_sums_kernel, operand, flags | SUMS_TILE)
