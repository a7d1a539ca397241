"""The kernels of the nearest-prototype search: pack, screen, settle, exhaust.

Screening computes a key for every pair on tensor cores, in 16 bits, and keeps each token's best few. A key's error is
bounded (`settle_kernel`): of those few, all that may be among the k best are scored in float64. Where a key that was
not kept could still be among them (near ties, overflow, NaN), the token goes on a list, and `exhaust_kernel` scores all
its prototypes in float64. So the answer is exact, whatever the screening's precision.

bfloat16 and float16 operands are screened as they are, but for prototypes under cosine, which are packed: scaled to
`LENGTH`. Float32 operands, and rows that don't begin at 32 bytes, are packed as float16, which rounds eight times less
than bfloat16 would.
"""

import triton
import triton.language as tl

LENGTH = tl.constexpr(1024.0)  # of packed rows: no element overflows float16, and few are subnormal
_LARGEST_SCALE = tl.constexpr(1e36)
_NO_KEY = tl.constexpr(-2139095041)  # `_ordered32` of minus infinity
_NO_RANK = tl.constexpr(-(2**63))
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ------------------------------------------------------------------------------- integers that sort as their floats do


@triton.jit
def _ordered32(bits):
    """An involution of float32's bits; for finite values and infinities."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _rank(goodness):
    """Of float64: NaN ranks above everything, and -0.0 as 0.0."""
    bits = tl.where(goodness == 0, 0.0, goodness).to(tl.int64, bitcast=True)
    return tl.where(goodness == goodness, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF), 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _goodness(rank):
    """The float64 of a rank; NaN for `_NO_RANK` too."""
    return (rank ^ ((rank >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


# ----------------------------------------------------------------------------------------------- norms and packed rows


@triton.jit
def _square_norms(rows, mask, d, BD: tl.constexpr):
    """sum(row^2) (R,) in float64 of the rows at the pointers (R, 1)."""
    total = tl.zeros((rows.shape[0], BD), tl.float64)
    for first in range(0, d, BD):
        channel = first + tl.arange(0, BD)[None, :]
        value = tl.load(rows + channel, mask=mask[:, None] & (channel < d), other=0.0).to(tl.float64)
        total += value * value
    return tl.sum(total, 1)


@triton.jit
def norms_kernel(rows, norms, n, d, R: tl.constexpr, BD: tl.constexpr):
    """norms (n,) float64 of rows (n, d)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    square = _square_norms(rows + row[:, None] * d, row < n, d, BD)
    tl.store(norms + row, tl.sqrt(square), mask=row < n)


@triton.jit
def _packing_scale(norm):
    """What scales a vector of this norm, float64, to `LENGTH`; 1 for a zero vector, 0 for what isn't finite."""
    usable = (norm > 0) & (norm < float("inf"))
    scale = tl.minimum(1.0 / (tl.where(usable, norm, 1.0) / LENGTH), _LARGEST_SCALE)
    return tl.where(usable, scale, tl.where(norm == 0, 1.0, 0.0)).to(tl.float32)


@triton.jit
def pack_kernel(
    rows, norms, largest, packed, scales, remainders, n, n_of_bank, d, depth,
    OWN: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """packed (n, depth) = scale * rows and zeros, in 16 bits, and remainders (n,), bounds of what rounding lost.

    OWN: each row is scaled to `LENGTH`, by its norm, found here if norms is None. Else each bank of n_of_bank rows has
    one scale, that of its `largest` norm.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < n
    if OWN and norms is None:
        norm = tl.sqrt(_square_norms(rows + row[:, None] * d, inside, d, BD))
    elif OWN:
        norm = tl.load(norms + row, mask=inside, other=0.0)
    else:
        norm = tl.load(largest + row // n_of_bank, mask=inside, other=0.0)
    scale = _packing_scale(norm)
    lost = tl.zeros((R, BD), tl.float32)
    for first in range(0, depth, BD):
        channel = first + tl.arange(0, BD)[None, :]
        mask = inside[:, None] & (channel < d)
        value = tl.load(rows + row[:, None] * d + channel, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        rounded = value.to(packed.dtype.element_ty)
        tl.store(packed + row[:, None] * depth + channel, rounded, mask=inside[:, None] & (channel < depth))
        left = value - rounded.to(tl.float32)
        lost += left * left
    # What the scaling's own roundings and tensor cores that flush subnormal operands may lose comes on top.
    remainder = 1.001 * tl.sqrt(tl.sum(lost, 1)) + 2.0**-23 * LENGTH + 2.0**-14 * tl.sqrt(d * 1.0)
    tl.store(scales + row, scale, mask=inside)
    tl.store(remainders + row, remainder, mask=inside)


# ------------------------------------------------------------------------------------------------------------ screening


@triton.jit
def _bank_of(image, n_prototypes, counts, SHARED: tl.constexpr, ROUTED: tl.constexpr):
    """Where the image's prototypes begin, and how many it searches."""
    begin = 0 if SHARED else image.to(tl.int64) * n_prototypes
    count = tl.load(counts + image) if ROUTED else n_prototypes
    return begin, count


@triton.jit
def _row_at(position, image, rows, n_prototypes, ROUTED: tl.constexpr):
    """The prototypes at these positions among those that the image searches; in range whatever the position."""
    position = tl.minimum(tl.maximum(position, 0), n_prototypes - 1)
    if ROUTED:
        position = tl.minimum(tl.load(rows + image.to(tl.int64) * n_prototypes + position), n_prototypes - 1)
    return position


@triton.jit
def screen_kernel(
    tokens, prototypes, scales, norms, largest, rows, counts, keys, positions, n, n_prototypes, d,
    METRIC: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, ROUTED: tl.constexpr, WHOLE: tl.constexpr,
    SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The SLOTS largest keys of each token, in no order: keys (B, n, SLOTS), and the positions of their prototypes.

    A key is x.p, or x.p - |p|^2 / 2 for l2, times the scales of tokens and prototypes: it orders the prototypes of one
    token as the scores do. PACKED: the tokens are scaled. WHOLE: BD divides d.
    """
    n_blocks = tl.cdiv(n, BN)
    image, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    begin, count = _bank_of(image, n_prototypes, counts, SHARED, ROUTED)
    token = image.to(tl.int64) * n + tl.minimum(block * BN + tl.arange(0, BN), n - 1)
    x = tokens + token[:, None] * d
    bank_scale = _packing_scale(tl.load(largest + (0 if SHARED else image))) if PACKED else 1.0

    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full((BN, SLOTS), _NO_KEY, tl.int32)
    place = tl.zeros((BN, SLOTS), tl.int32) - 1 - slot
    for first in range(0, count, BK):
        column = tl.arange(0, BK)
        row = begin + _row_at(first + column, image, rows, n_prototypes, ROUTED)
        p = prototypes + row.to(tl.int64)[:, None] * d
        key = tl.zeros((BN, BK), tl.float32)
        for c in range(0, d, BD):
            channel = c + tl.arange(0, BD)[None, :]
            if WHOLE:
                a, b = tl.load(x + channel), tl.load(p + channel)
            else:
                a, b = tl.load(x + channel, channel < d, 0.0), tl.load(p + channel, channel < d, 0.0)
            if _INTERPRETED:  # where a bfloat16's bits would be multiplied
                a, b = a.to(tl.float32), b.to(tl.float32)
            key = tl.dot(a, b.T, key)
        if METRIC == "l2":
            norm = tl.load(norms + row).to(tl.float32)
            bias = -0.5 * norm * (norm * bank_scale)
            key += bias[None, :] * tl.load(scales + token)[:, None] if PACKED else bias[None, :]

        # The key's last bits give way to its column, so that a maximum tells both.
        code = (_ordered32(key.to(tl.int32, bitcast=True)) & -BK) | (BK - 1 - column)[None, :]
        code = tl.where((first + column < count)[None, :], code, _NO_KEY)
        top, worst = tl.max(code, 1), tl.min(best, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            of_worst = best == worst[:, None]
            victim = tl.min(tl.where(of_worst, slot, SLOTS), 1)
            replaced = (slot == victim[:, None]) & (top > worst)[:, None]
            best = tl.where(replaced, top[:, None], best)
            place = tl.where(replaced, (first + BK - 1 - (top & (BK - 1)))[:, None], place)
            code = tl.where(code == top[:, None], _NO_KEY, code)
            top, worst = tl.max(code, 1), tl.min(best, 1)

    out = token[:, None] * SLOTS + slot
    tl.store(keys + out, _ordered32(best).to(tl.float32, bitcast=True))
    tl.store(positions + out, place)


# ------------------------------------------------------------------------------------------------------ exact decisions


@triton.jit
def _store_best(
    rank, row, token, inside, scores, indices, goodness, k, METRIC: tl.constexpr, WITH_GOODNESS: tl.constexpr
):
    """Stores the k best of (R, SLOTS) in order; a place that nothing fills gets NaN and index 0."""
    for j in range(k):
        top = tl.max(rank, 1)
        best = tl.min(tl.where(rank == top[:, None], row, 0x7FFFFFFF), 1)
        value = _goodness(top)
        out = token * k + j
        tl.store(scores + out, ((0.0 - value) if METRIC == "l2" else value).to(tl.float32), mask=inside)
        tl.store(indices + out, tl.maximum(best, 0).to(tl.int64), mask=inside)
        if WITH_GOODNESS:
            tl.store(goodness + out, value, mask=inside)
        rank = tl.where(row == best[:, None], _NO_RANK, rank)


@triton.jit
def settle_kernel(
    tokens, prototypes, scales, remainders, norms, largest, bank_remainder, rows, counts, keys, positions,
    scores, indices, goodness, unsettled, n_unsettled, n, n_prototypes, d, k,
    METRIC: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, ROUTED: tl.constexpr,
    WITH_GOODNESS: tl.constexpr, SLOTS: tl.constexpr, KEY_BITS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Scores in float64 what may be among the k best; lists in unsettled (B, n) the tokens for which more may be.

    KEY_BITS: how many of a key's low bits screening gave away. goodness (B, n, k) float64: the scores, with l2 negated.
    """
    n_blocks = tl.cdiv(n, BN)
    image, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    begin, count = _bank_of(image, n_prototypes, counts, SHARED, ROUTED)
    inside = block * BN + tl.arange(0, BN) < n
    token = image.to(tl.int64) * n + tl.minimum(block * BN + tl.arange(0, BN), n - 1)
    x = tokens + token[:, None] * d
    square = _square_norms(x, inside, d, BD)

    # The largest error of a key: what packing lost, by Cauchy and Schwarz; d + 8 additions, each of which may truncate
    # to 23 bits after alignment (tensor cores don't round to nearest), twice over; the bits given away; underflow.
    norm = tl.load(largest + (0 if SHARED else image)).to(tl.float32)
    endless = tl.where(norm < float("inf"), 0.0, float("inf"))
    bias, scale = 0.0, 1.0
    length, remainder = 1.001 * tl.sqrt(square).to(tl.float32), tl.zeros((BN,), tl.float32)
    bank_length, lost = norm, 0.0
    if PACKED:
        scale, remainder = tl.load(scales + token), tl.load(remainders + token)
        length = remainder + 1.001 * LENGTH
    if PACKED or METRIC == "cosine":
        lost = tl.load(bank_remainder + (0 if SHARED else image))
        bank_length = lost + 1.001 * LENGTH
    if METRIC == "l2":
        bias = 0.5 * norm * scale * (LENGTH if PACKED else norm)
    error = length * lost + remainder * bank_length
    extent = length * bank_length + bias + endless
    error += ((d + 8) * 2.0**-22 + 2.0 ** (KEY_BITS - 23) + 2.0**-20) * extent
    error += (d + 2) * 2.0**-125 * (1 + length + bank_length)
    error = tl.where(extent < 1e38, 1.001 * error, float("inf"))

    # Tokens whose scores are all the same: NaN, or zero.
    all_nan = square != square
    alike = all_nan if METRIC == "l2" else all_nan | (square + endless == 0)

    slot = tl.arange(0, SLOTS)[None, :]
    key = tl.load(keys + token[:, None] * SLOTS + slot)
    position = tl.load(positions + token[:, None] * SLOTS + slot)
    code = (_ordered32(key.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | position.to(tl.int64) & 0xFFFFFFFF
    rank = tl.full((BN, SLOTS), _NO_RANK, tl.int64)
    row = tl.zeros((BN, SLOTS), tl.int32) - 1
    low = tl.full((BN,), float("inf"), tl.float32)  # the k-th largest key
    last = low
    for s in range(SLOTS):
        top = tl.max(code, 1)
        code = tl.where(code == top[:, None], _NO_RANK, code)
        last = _ordered32((top >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        low = tl.where(s < k, last, low)
        at = tl.where(alike, s, top.to(tl.int32))
        wanted = (at >= 0) & (at < count) & ((s < k) | ((last >= low - 2 * error) & ~alike))
        scored = wanted & inside & ~alike & (error < float("inf"))
        here = _row_at(at, image, rows, n_prototypes, ROUTED)
        value = tl.where(all_nan, float("nan"), 0.0).to(tl.float64)
        if tl.max(scored.to(tl.int32), 0) > 0:
            p = prototypes + (begin + here).to(tl.int64)[:, None] * d
            total = tl.zeros((BN, BD), tl.float64)
            for first in range(0, d, BD):
                channel = first + tl.arange(0, BD)[None, :]
                mask = scored[:, None] & (channel < d)
                a = tl.load(x + channel, mask=mask, other=0.0).to(tl.float64)
                b = tl.load(p + channel, mask=mask, other=0.0).to(tl.float64)
                total += (a - b) * (a - b) if METRIC == "l2" else a * b
            value += tl.sum(total, 1)
            if METRIC == "cosine":
                both = tl.sqrt(square) * tl.load(norms + begin + here)
                value = tl.where(both == 0, 0.0, value / tl.where(both == 0, 1.0, both))
            if METRIC == "l2":
                value = 0.0 - value
        filled = (slot == s) & wanted[:, None]
        rank = tl.where(filled, _rank(value)[:, None], rank)
        row = tl.where(filled, here[:, None].to(tl.int32), row)

    settled = alike | (last < low - 2 * error) | ((count <= SLOTS) & (error < float("inf")))
    _store_best(rank, row, token, inside & settled, scores, indices, goodness, k, METRIC, WITH_GOODNESS)
    left = (inside & ~settled).to(tl.int32)
    base = tl.atomic_add(n_unsettled + image, tl.sum(left, 0))  # the order on the list changes no result
    tl.store(unsettled + image.to(tl.int64) * n + base + tl.cumsum(left, 0) - 1, token, mask=left != 0)


@triton.jit
def exhaust_kernel(
    tokens, prototypes, norms, rows, counts, scores, indices, goodness, unsettled, n_unsettled, n, n_prototypes, d, k,
    METRIC: tl.constexpr, SHARED: tl.constexpr, ROUTED: tl.constexpr, WITH_GOODNESS: tl.constexpr,
    SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The k best prototypes of the unsettled tokens, all scored in float64. SLOTS >= k."""
    n_blocks = tl.cdiv(n, BN)
    image, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    n_listed = tl.load(n_unsettled + image)
    if block * BN < n_listed:
        begin, count = _bank_of(image, n_prototypes, counts, SHARED, ROUTED)
        listed = block * BN + tl.arange(0, BN)
        inside = listed < n_listed
        token = tl.load(unsettled + image.to(tl.int64) * n + listed, mask=inside, other=0)
        x = tokens + token[:, None] * d
        square = _square_norms(x, inside, d, BD)

        slot = tl.arange(0, SLOTS)[None, :]
        best = tl.full((BN, SLOTS), _NO_RANK, tl.int64)
        chosen = tl.zeros((BN, SLOTS), tl.int32) - 1 - slot
        for first in range(0, count, BK):
            position = first + tl.arange(0, BK)
            row = _row_at(position, image, rows, n_prototypes, ROUTED)
            p = prototypes + (begin + row).to(tl.int64)[:, None] * d
            total = tl.zeros((BN, BK, BD), tl.float64)
            for c in range(0, d, BD):
                channel = c + tl.arange(0, BD)[None, :]
                a = tl.load(x + channel, inside[:, None] & (channel < d), 0.0).to(tl.float64)[:, None, :]
                b = tl.load(p + channel, channel < d, 0.0).to(tl.float64)[None, :, :]
                total += (a - b) * (a - b) if METRIC == "l2" else a * b
            value = tl.sum(total, 2)
            if METRIC == "l2":
                value = 0.0 - value
            if METRIC == "cosine":
                both = tl.sqrt(square)[:, None] * tl.load(norms + begin + row)[None, :]
                value = tl.where(both == 0, 0.0, value / tl.where(both == 0, 1.0, both))
            rank = tl.where((position < count)[None, :], _rank(value), _NO_RANK)

            # Positions ascend: of equal ranks those already chosen stay, and the last of them is the first to go.
            top, worst = tl.max(rank, 1), tl.min(best, 1)
            while tl.max((top > worst).to(tl.int32), 0) > 0:
                where = tl.min(tl.where(rank == top[:, None], position[None, :], 0x7FFFFFFF), 1)
                here = _row_at(where, image, rows, n_prototypes, ROUTED)
                victim = tl.max(tl.where(best == worst[:, None], chosen, -0x7FFFFFFF), 1)
                replaced = (chosen == victim[:, None]) & (best == worst[:, None]) & (top > worst)[:, None]
                best = tl.where(replaced, top[:, None], best)
                chosen = tl.where(replaced, here[:, None].to(tl.int32), chosen)
                rank = tl.where(position[None, :] == where[:, None], _NO_RANK, rank)
                top, worst = tl.max(rank, 1), tl.min(best, 1)
        _store_best(best, chosen, token, inside, scores, indices, goodness, k, METRIC, WITH_GOODNESS)
