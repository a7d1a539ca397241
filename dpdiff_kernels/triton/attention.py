"""prototype_attention on GPUs: tile sizes, launches, and the operators with the native ones' schemas."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpdiff_kernels.reference import empty_like_query
from dpdiff_kernels.triton.attention_backward import add_parts_kernel, bank_gradient_kernel, query_gradient_kernel
from dpdiff_kernels.triton.attention_forward import forward_kernel
from dpdiff_kernels.triton.launch import (
    Variant,
    arch_of,
    ceil_div,
    launch,
    multiprocessors_of,
    on_device,
    power_of_2,
    registered,
)
from dpdiff_kernels.triton.routing import active_lists, active_mask

_LOG2_E = 1.4426950408889634
_LONG = 64  # tokens of an image, from which on no tile of `plain` ones spans more than two
_PARTS_BYTES = 32 << 20  # that partial sums of a shared bank's gradients may take
_ADDED = 1024  # elements of these that a program adds up


class Tile(NamedTuple):
    tokens: int
    prototypes: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    forward: Tile
    query_gradient: Tile
    bank_gradient: Tile


def pick_tiles(arch: str, itemsize: int, block_e: int, two_softmaxes: bool, plain: bool) -> Tiles:
    """The one table to tune: by architecture, bytes of an element, and channels up to the next power of two, of tiles
    that don't spill. On sm_90 those of 64 channels are the fastest of these on an H200. plain: all images see the same
    banks, and none has fewer than `_LONG` tokens."""
    if itemsize == 4:
        if block_e == 64 and arch == "sm_90":
            bank_gradient = Tile(32, 128, 8, 1) if plain else Tile(32, 32, 8, 1)
            return Tiles(Tile(64, 32, 4, 3), Tile(128, 32, 8, 3), bank_gradient)
        if block_e == 256:
            return Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
        if block_e == 128:
            bank_gradient = Tile(32, 16, 8, 1) if arch.startswith("gfx") else Tile(16, 32, 8, 1)
            return Tiles(Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), bank_gradient)
        forward = Tile(64, 32, 8, 2)
        if arch == "sm_80" and block_e != 32:
            forward = Tile(128, 32, 8, 2) if block_e == 16 else Tile(32, 32, 4, 2)
        if block_e == 32:  # larger ones spill, though not of 16 or 64 channels
            return Tiles(forward, Tile(16, 32, 4, 1 if arch.startswith("gfx") else 2), Tile(16, 32, 4, 1))
        bank_gradient = Tile(32, 32, 4 if arch.startswith("gfx") else 8, 1)
        return Tiles(forward, Tile(32, 32, 8 if block_e == 64 else 4, 1), bank_gradient)
    if arch == "sm_80" and block_e > 16:  # without Hopper's products of four warps, larger ones spill
        if block_e <= 64:
            forward = Tile(128, 32, 8, 3) if block_e == 64 else Tile(128 if two_softmaxes else 64, 32, 4, 2)
            return Tiles(forward, Tile(64, 32, block_e // 8, 2), Tile(32, 32, 4, 2))
        if block_e == 128:
            return Tiles(Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2))
        return Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 2))
    if arch.startswith("gfx"):  # larger ones spill
        bank_gradient = Tile(32, 16 if block_e in (16, 256) else 32, 4, 1)
        return Tiles(Tile(64, 16 if block_e == 16 else 32, 4, 1), Tile(32, 32, 4, 1), bank_gradient)
    if block_e <= 64:
        bank_gradient = Tile(64, 64, 4, 3) if plain else Tile(64 if block_e == 64 else 32, 32, 4, 2)
        return Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), bank_gradient)
    if block_e == 128:
        bank_gradient = Tile(32, 64, 8, 2) if plain else Tile(64, 32, 8, 2)
        return Tiles(Tile(128, 32 if two_softmaxes else 64, 8, 3), Tile(64, 64, 4, 2), bank_gradient)
    query_gradient = Tile(32, 32, 8 if two_softmaxes else 4, 2)
    return Tiles(Tile(32 if two_softmaxes else 64, 32, 8, 2), query_gradient, Tile(32, 32, 8, 2))


def pick_precision(arch: str) -> str:
    """Of float32 products. In bf16x6, each factor is three bfloat16s, which hold its 24 bits, and what is left out is
    below 2^-26 of the product: float32's own accuracy on tensor cores. AMD's multiply float32 as it is."""
    return "ieee" if arch.startswith("gfx") else "bf16x6"


def pick_chunk(arch: str, itemsize: int, block_e: int) -> int:
    """Channels at a time in products of tokens and prototypes: more of float32 spill, in wide heads."""
    if itemsize == 4 and block_e > 64:
        return 16 if arch == "sm_80" and block_e == 256 else 32
    return block_e


class Problem(NamedTuple):
    """What both directions derive from their inputs."""

    precision: str
    tiles: Tiles
    block_e: int
    chunk: int
    folded: bool
    sizes: tuple[int, ...]  # batch, heads, tokens, prototypes of the local and of the global bank

    @property
    def sequence(self) -> int:
        return self.sizes[2] * (self.sizes[0] if self.folded else 1)

    def programs(self, tile: Tile) -> int:
        return self.sizes[1] * (1 if self.folded else self.sizes[0]) * ceil_div(self.sequence, tile.tokens)


def _problem(query, local_key, global_key, gate, groups) -> Problem:
    batch, heads, n_tokens, channels = query.shape
    arch = arch_of(query.device)
    block_e = max(16, power_of_2(channels))
    folded = groups is None and local_key.dim() == 3 and (global_key is None or global_key.dim() == 3)
    return Problem(
        "ieee" if query.device.type == "cpu" else pick_precision(arch),  # the interpreter knows no other
        pick_tiles(arch, query.element_size(), block_e, gate is not None, folded and n_tokens >= _LONG),
        block_e,
        pick_chunk(arch, query.element_size(), block_e),
        folded,
        (batch, heads, n_tokens, local_key.shape[-2], 0 if global_key is None else global_key.shape[-2]),
    )


def _rows(tensor: Tensor | None) -> Tensor | None:
    """The kernels want neighbouring channels; whatever else the strides are is fine."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of image (0: shared), head and row."""
    if tensor is None:
        return 0, 0, 0
    return (0, *tensor.stride()[:2]) if tensor.dim() == 3 else tensor.stride()[:3]


def _constants(problem: Problem, channels: int, tile: Tile) -> dict:
    return {
        "CHANNELS": channels,
        "BLOCK_E": problem.block_e,
        "BLOCK_T": tile.tokens,
        "BLOCK_M": tile.prototypes,
        "CHUNK": problem.chunk,
        "PRECISION": problem.precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@registered(torch.library.triton_op)
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
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(query, local_key, global_key, gate, groups)
    out = empty_like_query(query)
    reference = total = difference = None
    if for_backward:
        reference = query.new_empty((1 if gate is None else 2, *query.shape[:3]), dtype=torch.float32)
        total = torch.empty_like(reference)
        difference = None if gate is None else empty_like_query(query)
    if out.numel():
        query, local_key, local_value = _rows(query), _rows(local_key), _rows(local_value)
        global_key, global_value = _rows(global_key), _rows(global_value)
        with on_device(query):
            lists = counts = None
            if groups is not None:
                lists, counts = active_lists(active_mask(groups, active_groups))
            tile = problem.tiles.forward
            launch(forward_kernel)[(problem.programs(tile),)](
                query, local_key, local_value, global_key, global_value, None if gate is None else gate.contiguous(),
                lists, counts, out, difference, reference, total,
                *(
                    stride
                    for tensor in (query, local_key, local_value, global_key, global_value, out)
                    for stride in _strides(tensor)
                ),
                *problem.sizes, scale * _LOG2_E,
                FOLDED=problem.folded, **_constants(problem, query.shape[-1], tile),
            )  # fmt: skip
    empty = query.new_empty(0, dtype=torch.float32)
    return (
        out,
        empty if reference is None else reference,
        torch.empty_like(empty) if total is None else total,
        query.new_empty(0) if difference is None else difference,
    )


@registered(torch.library.triton_op)
def prototype_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    local_key: Tensor,
    local_value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
    groups: Tensor | None,
    active_groups: Tensor | None,
    out: Tensor,
    reference: Tensor,
    total: Tensor,
    difference: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(query, local_key, global_key, gate, groups)
    grad_query = empty_like_query(query)
    empty = query.new_empty(0, dtype=torch.float32)
    grad_gate = empty if gate is None else gate.new_empty(gate.shape)
    banks = [_rows(bank) for bank in (local_key, local_value, global_key, global_value)]
    if query.numel() == 0:
        return grad_query, *(query.new_zeros(0 if bank is None else bank.shape) for bank in banks), grad_gate

    query, grad_out = _rows(query), _rows(grad_out)
    reference, total = reference.contiguous(), total.contiguous()
    sums = reference.new_empty(*reference.shape, 2)
    with on_device(query):
        mask = lists = counts = None
        if groups is not None:
            mask = active_mask(groups, active_groups)
            lists, counts = active_lists(mask)
        tile = problem.tiles.query_gradient
        launch(query_gradient_kernel)[(problem.programs(tile),)](
            grad_out, query, *banks, None if gate is None else gate.contiguous(), lists, counts,
            _laid_out(out, grad_query), None if gate is None else _laid_out(difference, grad_query), reference, total,
            grad_query, None if gate is None else grad_gate, sums,
            *(stride for t in (grad_out, query, *banks, grad_query) for stride in _strides(t)),
            *problem.sizes, scale, scale * _LOG2_E,
            FOLDED=problem.folded, **_constants(problem, query.shape[-1], tile),
        )  # fmt: skip
        tokens = (grad_out, query, scale)
        grad_local = _bank_gradients(problem, *tokens, *banks[:2], mask, lists, counts, sums[0])
        grad_global = query.new_empty(0), query.new_empty(0)
        if global_key is not None:
            grad_global = _bank_gradients(problem, *tokens, *banks[2:], None, None, None, sums[-1])
    return grad_query, *grad_local, *grad_global, grad_gate


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _bank_gradients(
    problem: Problem,
    grad_out: Tensor,
    query: Tensor,
    scale: float,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lists: Tensor | None,
    counts: Tensor | None,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """mask, lists, counts: the routes of the bank's images. sums (H, B, N, 2): of its softmax."""
    batch, heads, n_tokens = problem.sizes[:3]
    shared, count, channels = key.dim() == 3, *key.shape[-2:]
    tile = problem.tiles.bank_gradient
    programs = heads * (1 if shared else batch) * ceil_div(count, tile.prototypes)
    parts = 1
    if mask is not None and shared:  # prototypes that some image uses
        lists, counts = active_lists(mask.any(0, keepdim=True))
    elif mask is not None:
        mask = None
    elif shared:
        blocks = ceil_div(batch * n_tokens, tile.tokens)
        # ints: torch.compile's numbers are no keys of a cache
        parts = _parts(2 * multiprocessors_of(query.device), int(programs), int(blocks), int(key.numel()))
    size = key.shape if parts == 1 else (parts, *key.shape)
    dtype = key.dtype if parts == 1 else torch.float32
    new = query.new_empty if lists is None else query.new_zeros
    grads = new(size, dtype=dtype), new(size, dtype=dtype)
    launch(bank_gradient_kernel)[(programs * parts,)](
        grad_out, query, key, value, lists, counts, mask, sums, *grads,
        *(stride for t in (grad_out, query, key, value) for stride in _strides(t)),
        heads * count * channels, count * channels, channels, key.numel(),
        batch, heads, n_tokens, count, parts, scale, scale * _LOG2_E,
        SHARED=shared, NEAR=_near(tile.tokens, query, grad_out), **_constants(problem, channels, tile),
    )  # fmt: skip
    if parts > 1:
        of_parts, grads = grads, (query.new_empty(key.shape), query.new_empty(key.shape))
        launch(add_parts_kernel)[(ceil_div(key.numel(), _ADDED),)](*of_parts, *grads, key.numel(), parts, BLOCK=_ADDED)
    return grads


def _near(tokens: int, *tensors: Tensor) -> bool:
    """Whether as many tokens in a row are of two images at most, and offsets from the first fit 32 bits."""
    farthest = max(abs(t.stride(0)) + (t.shape[2] + tokens) * abs(t.stride(2)) for t in tensors)
    return tokens <= tensors[0].shape[2] and farthest < 2**31


@cache
def _parts(slots: int, programs: int, blocks: int, elements: int) -> int:
    """Into how many parts the `blocks` of tokens are split, in the least time: programs run in rounds, of as many as
    there are slots; each takes as long as its blocks and about three more, and adding up costs a block for every
    200,000 elements of a part."""
    most = max(1, min(blocks, slots, _PARTS_BYTES // (8 * elements)))
    rounds = lambda parts: ceil_div(programs * parts, slots)
    return min(range(1, most + 1), key=lambda n: rounds(n) * (ceil_div(blocks, n) + 3) + (n > 1) * n * elements / 2e5)


def variants(arch: str) -> Iterator[Variant]:
    """All that is launched, with channels that are a power of two."""
    for itemsize, dtype in ((2, "*bf16"), (2, "*fp16"), (4, "*fp32")):
        signature = dict.fromkeys(("of_parts_key", "of_parts_value"), "*fp32")
        signature |= {"grad_key": dtype, "grad_value": dtype, "size": "i32", "parts": "i32"}
        yield Variant(add_parts_kernel, signature, {"BLOCK": _ADDED}, divisible=("size",))
        for block_e in (16, 32, 64, 128, 256):
            for banks in ("one", "joint", "gated"):
                absent = {"one": {"global_key", "global_value"}, "joint": set(), "gated": set()}[banks]
                absent |= {"gate", "difference", "grad_gate"} if banks != "gated" else set()
                for tokens in ("folded", "image by image", "routed"):
                    tiles = pick_tiles(arch, itemsize, block_e, banks == "gated", plain=tokens == "folded")
                    unrouted = absent | (set() if tokens == "routed" else {"lists", "counts"})
                    folded = {"FOLDED": tokens == "folded"}
                    for unwanted in (set(), {"reference", "total", "difference"}):  # without a backward pass
                        yield _variant(forward_kernel, arch, dtype, block_e, tiles.forward, unrouted | unwanted, folded)
                    yield _variant(query_gradient_kernel, arch, dtype, block_e, tiles.query_gradient, unrouted, folded)
            for shared, absent, near in (
                (True, {"lists", "counts", "mask"}, True),
                (True, {"lists", "counts", "mask"}, False),
                (True, set(), True),
                (False, {"lists", "counts", "mask"}, True),
                (False, {"mask"}, True),
            ):
                plain = shared and bool(absent) and near
                tile = pick_tiles(arch, itemsize, block_e, False, plain).bank_gradient
                # Parts of a gradient, of which only shared banks without routes have several, are in float32.
                for parts in sorted({dtype, "*fp32"} if shared and absent else {dtype}):
                    kinds = dict.fromkeys(("grad_key", "grad_value"), parts)
                    flags = {"SHARED": shared, "NEAR": near}
                    yield _variant(bank_gradient_kernel, arch, dtype, block_e, tile, absent, flags, kinds)


def _variant(
    kernel: Any,
    arch: str,
    dtype: str,
    block_e: int,
    tile: Tile,
    absent: set[str],
    flags: dict[str, bool],
    kinds: dict[str, str] | None = None,
) -> Variant:
    """absent: arguments that are None. kinds: of tensors that aren't as usual."""
    kinds = {"lists": "*i32", "counts": "*i32", "mask": "*i1"} | (kinds or {})
    kinds |= dict.fromkeys(("reference", "total", "sums"), "*fp32")
    names = kernel.arg_names
    tensors = names[: names.index(next(name for name in names if name.endswith("_b")))]
    numbers = [n for n in names[len(tensors) :] if not n.isupper()]
    signature = {name: kinds.get(name, dtype) for name in tensors if name not in absent}
    signature |= {name: "fp32" if name.endswith("scale") else "i32" for name in numbers}
    constants = dict.fromkeys(sorted(absent.intersection(names)))
    constants |= {"CHANNELS": block_e, "BLOCK_E": block_e, "BLOCK_T": tile.tokens, "BLOCK_M": tile.prototypes}
    chunk = pick_chunk(arch, 4 if dtype == "*fp32" else 2, block_e)
    constants |= flags | {"CHUNK": chunk, "PRECISION": pick_precision(arch)}
    divisible = tuple(name for name in numbers if name[-2:] in ("_b", "_h", "_n", "_m"))
    return Variant(kernel, signature, constants, tile.num_warps, tile.num_stages, divisible)
