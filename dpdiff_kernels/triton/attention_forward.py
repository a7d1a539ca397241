"""Attention, forward, with online softmax (Milakov and Gimelshein, 2018): a program owns a tile of tokens.

An instance is one head of one image, or, where all images see the same banks, one head of all of them: their tokens
then are one sequence ("folded"), and a tile may span two images. Exponents are base 2: `scale` includes log2(e).
"""

import triton
import triton.language as tl


@triton.jit
def locate(t, tokens, image, FOLDED: tl.constexpr):
    """Which image the tokens t of a sequence are from, and their places there."""
    if FOLDED:
        return (t // tokens).to(tl.int64), (t % tokens).to(tl.int64)
    else:
        return image.to(tl.int64), t.to(tl.int64)


@triton.jit
def load_rows(
    rows, offsets, present, CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, first=0, WIDTH: tl.constexpr = None
):
    """Rows of CHANNELS at the given offsets, zeros after them and in rows that are not present (None: all are); from
    the channel `first` on WIDTH of BLOCK_E channels, or all."""
    e = first + tl.arange(0, BLOCK_E if WIDTH is None else WIDTH)
    if offsets.dtype == tl.int32:  # added last, they take the fewest instructions
        at = (rows + e[None, :]) + offsets[:, None]
    else:
        at = rows + offsets[:, None] + e[None, :]
    if present is None and CHANNELS == BLOCK_E:
        return tl.load(at)
    elif present is None:
        return tl.load(at, mask=(e < CHANNELS)[None, :], other=0.0)
    elif CHANNELS == BLOCK_E:
        return tl.load(at, mask=present[:, None], other=0.0)
    else:
        return tl.load(at, mask=present[:, None] & (e < CHANNELS)[None, :], other=0.0)


@triton.jit
def store_rows(rows, offsets, values, present, CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.arange(0, BLOCK_E)
    mask = present[:, None] & (e < CHANNELS)[None, :]
    tl.store(rows + offsets[:, None] + e[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def dot_rows(
    x, x_rows, x_offsets, x_present, y, y_rows, y_offsets, y_present,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T, of rows that were loaded from there. Where many channels of float32, three bfloat16s each, would fill the
    registers, they are read again, a CHUNK of channels at a time."""
    if CHUNK == BLOCK_E:
        return tl.dot(x, y.T, input_precision=PRECISION)
    else:
        products = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        for first in tl.range(0, BLOCK_E, CHUNK, num_stages=1):
            x_chunk = load_rows(x_rows, x_offsets, x_present, CHANNELS, BLOCK_E, first, CHUNK)
            y_chunk = load_rows(y_rows, y_offsets, y_present, CHANNELS, BLOCK_E, first, CHUNK)
            products = tl.dot(x_chunk, y_chunk.T, products, input_precision=PRECISION)
        return products


@triton.jit
def prototype_rows(m, listed, present):
    """Where the prototypes at places m of a list are in their bank; without a list, they are there already."""
    if listed is None:
        return m.to(tl.int64)
    elif present is None:
        return tl.load(listed + m).to(tl.int64)
    else:
        return tl.load(listed + m, mask=present, other=0).to(tl.int64)


@triton.jit
def attend_tile(
    q, query, offsets, inside, rising, best, total, answer, key, value, k_m, v_m, listed, m, present, scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = prototype_rows(m, listed, present)
    k = load_rows(key, rows * k_m, present, CHANNELS, BLOCK_E)
    v = load_rows(value, rows * v_m, present, CHANNELS, BLOCK_E)
    scores = dot_rows(q, query, offsets, inside, k, key, rows * k_m, present, CHANNELS, BLOCK_E, CHUNK, PRECISION)
    if rising is None:
        weights = tl.exp2(scores * scale)
    else:
        if present is not None:
            scores = tl.where(present[None, :], scores, float("-inf"))
        raised = tl.where(rising, tl.maximum(best, tl.max(scores, 1) * scale), best)
        start = tl.where(raised == float("-inf"), 0.0, raised)  # scores of -inf weigh nothing, rather than NaN
        weights = tl.exp2(scores * scale - start[:, None])
        factor = tl.exp2(best - start)
        best = raised
        total *= factor
        answer *= factor[:, None]
    if present is not None:  # for a scale of zero too, times which -inf is NaN
        weights = tl.where(present[None, :], weights, 0.0)
    answer = tl.dot(weights.to(v.dtype), v, answer, input_precision=PRECISION)
    return best, total + tl.sum(weights, 1), answer


@triton.jit
def attend(
    q, query, offsets, inside, rising, best, total, answer, key, value, k_m, v_m, listed, count, scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a bank of `count` prototypes to the sum of weights and the weighted sum of values. Weights are relative to
    `best`, which is the running maximum in rows that are `rising`; None: in none, and `best` is 0."""
    full = count // BLOCK_M * BLOCK_M
    for first in tl.range(0, full, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        best, total, answer = attend_tile(
            q, query, offsets, inside, rising, best, total, answer, key, value, k_m, v_m, listed, m, None, scale,
            CHANNELS, BLOCK_E, CHUNK, PRECISION,
        )  # fmt: skip
    for first in tl.range(full, count, BLOCK_M, num_stages=1):  # what is left over
        m = first + tl.arange(0, BLOCK_M)
        best, total, answer = attend_tile(
            q, query, offsets, inside, rising, best, total, answer, key, value, k_m, v_m, listed, m, m < count, scale,
            CHANNELS, BLOCK_E, CHUNK, PRECISION,
        )  # fmt: skip
    return best, total, answer


@triton.jit
def attend_banks(
    q, query, offsets, inside, rising, key, value, k_m, v_m, listed, count, second_key, second_value, second_k_m,
    second_v_m, second_count, scale, CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What weights are relative to, their sum, and the weighted sum of values, over one bank or two."""
    best = tl.zeros([BLOCK_T], tl.float32)
    if rising is not None:
        best = tl.where(rising, float("-inf"), best)
    total = tl.zeros([BLOCK_T], tl.float32)
    answer = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    best, total, answer = attend(
        q, query, offsets, inside, rising, best, total, answer, key, value, k_m, v_m, listed, count, scale,
        CHANNELS, BLOCK_E, BLOCK_M, CHUNK, PRECISION,
    )  # fmt: skip
    if second_key is not None:
        best, total, answer = attend(
            q, query, offsets, inside, rising, best, total, answer, second_key, second_value, second_k_m, second_v_m,
            None, second_count, scale, CHANNELS, BLOCK_E, BLOCK_M, CHUNK, PRECISION,
        )  # fmt: skip
    return best, total, answer


@triton.jit
def softmax_banks(
    q, query, offsets, inside, key, value, k_m, v_m, listed, count, second_key, second_value, second_k_m, second_v_m,
    second_count, scale, CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same in the fewest instructions. bfloat16 has float32's exponents: weights relative to 0 are as exact as
    those relative to their maximum, and take a third fewer instructions, unless all are tiny or some huge. A tile with
    such rows is done again, in which only these rise: the others stay as they were, to the bit."""
    rising = None if q.dtype == tl.bfloat16 else tl.full([BLOCK_T], True, tl.int1)
    best, total, answer = attend_banks(
        q, query, offsets, inside, rising, key, value, k_m, v_m, listed, count,
        second_key, second_value, second_k_m, second_v_m, second_count, scale,
        CHANNELS, BLOCK_E, BLOCK_T, BLOCK_M, CHUNK, PRECISION,
    )  # fmt: skip
    if rising is None:
        extreme = ~((total > 2.0**-60) & (total < 2.0**60))  # NaN too
        if tl.max((extreme & inside).to(tl.int32)) != 0:
            best, total, answer = attend_banks(
                q, query, offsets, inside, extreme, key, value, k_m, v_m, listed, count,
                second_key, second_value, second_k_m, second_v_m, second_count, scale,
                CHANNELS, BLOCK_E, BLOCK_T, BLOCK_M, CHUNK, PRECISION,
            )  # fmt: skip
    return best, total, answer


@triton.jit
def forward_kernel(
    query, local_key, local_value, global_key, global_value, gate, lists, counts, out, difference, reference, total,
    q_b, q_h, q_n, lk_b, lk_h, lk_m, lv_b, lv_h, lv_m, gk_b, gk_h, gk_m, gv_b, gv_h, gv_m, o_b, o_h, o_n,
    batch, heads, tokens, local_count, global_count, scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    FOLDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lists, counts: with routes, each image's local prototypes. reference: of each softmax, scaled; where it is None,
    nothing is saved for a backward pass. difference has the strides of `out`; None without a gate."""
    scale = tl.cast(scale, tl.float32)  # torch.compile passes it in float64
    sequence = tokens * batch if FOLDED else tokens
    tiles = tl.cdiv(sequence, BLOCK_T)
    instance = tl.program_id(0) // tiles
    first_image = 0 if FOLDED else instance // heads
    head = (instance if FOLDED else instance % heads).to(tl.int64)
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < sequence
    image, n = locate(t, tokens, first_image, FOLDED)
    offsets = image * q_b + head * q_h + n * q_n
    q = load_rows(query, offsets, inside, CHANNELS, BLOCK_E)

    bank_image = 0 if FOLDED else (instance // heads).to(tl.int64)
    local_key += bank_image * lk_b + head * lk_h
    local_value += bank_image * lv_b + head * lv_h
    listed = None
    if lists is not None:
        listed = lists + bank_image * local_count
        local_count = tl.load(counts + bank_image)
    if global_key is not None:
        global_key += bank_image * gk_b + head * gk_h
        global_value += bank_image * gv_b + head * gv_h

    second = None if gate is not None else global_key
    best, sums, answer = softmax_banks(
        q, query, offsets, inside, local_key, local_value, lk_m, lv_m, listed, local_count,
        second, global_value, gk_m, gv_m, global_count, scale, CHANNELS, BLOCK_E, BLOCK_T, BLOCK_M, CHUNK, PRECISION,
    )  # fmt: skip
    flat = (image * heads + head) * tokens + n
    out_rows = image * o_b + head * o_h + n * o_n
    if gate is not None:
        if reference is not None:
            tl.store(reference + flat, best, mask=inside)
            tl.store(total + flat, sums, mask=inside)
        g = tl.load(gate + flat, mask=inside, other=0.0).to(tl.float32)
        local_answer = answer * (1.0 / sums)[:, None]
        if lists is not None:  # where all are routed away, the global bank answers alone
            g = tl.where(local_count == 0, 1.0, g)
            local_answer = tl.where(local_count == 0, 0.0, local_answer)
        best, sums, answer = softmax_banks(
            q, query, offsets, inside, global_key, global_value, gk_m, gv_m, None, global_count,
            None, None, 0, 0, 0, scale, CHANNELS, BLOCK_E, BLOCK_T, BLOCK_M, CHUNK, PRECISION,
        )  # fmt: skip
    answer = answer * (1.0 / sums)[:, None]
    if gate is not None:
        if reference is not None:
            apart = answer - local_answer
            if lists is not None:
                apart = tl.where(local_count == 0, 0.0, apart)
            store_rows(difference, out_rows, apart, inside, CHANNELS, BLOCK_E)
            flat += (tl.zeros([], tl.int64) + batch) * heads * tokens  # of the second softmax
        answer = (1.0 - g)[:, None] * local_answer + g[:, None] * answer
    if reference is not None:
        tl.store(reference + flat, best, mask=inside)
        tl.store(total + flat, sums, mask=inside)
    store_rows(out, out_rows, answer, inside, CHANNELS, BLOCK_E)
