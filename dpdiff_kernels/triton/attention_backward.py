"""Attention, backward: scores are recomputed tile by tile (Dao et al., "FlashAttention", 2022), in two passes without
atomics. In one, a program owns a tile of tokens and streams the banks; in the other, it owns a tile of prototypes and
streams the tokens of all images that use them, so that a shared bank's gradient is summed in registers.

With p = w softmax(scale q k^T), w the gate's weight of the bank, and delta = (gradient of the answer) . answer:
  dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q.
"""

import triton
import triton.language as tl

from dpdiff_kernels.triton.attention_forward import dot_rows, load_rows, locate, prototype_rows, store_rows


@triton.jit
def query_tile(
    q, query, offsets, do, grad_out, grad_offsets, inside, dq, start, weight, delta,
    key, value, k_m, v_m, listed, m, present, exponent_scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = prototype_rows(m, listed, present)
    k = load_rows(key, rows * k_m, present, CHANNELS, BLOCK_E)
    v = load_rows(value, rows * v_m, present, CHANNELS, BLOCK_E)
    scores = dot_rows(q, query, offsets, inside, k, key, rows * k_m, present, CHANNELS, BLOCK_E, CHUNK, PRECISION)
    p = tl.exp2(scores * exponent_scale - start[:, None])
    if weight is not None:
        p *= weight[:, None]
    slopes = dot_rows(
        do, grad_out, grad_offsets, inside, v, value, rows * v_m, present, CHANNELS, BLOCK_E, CHUNK, PRECISION
    )
    ds = p * (slopes - delta[:, None])
    if present is not None:
        ds = tl.where(present[None, :], ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def query_gradient_of(
    q, query, offsets, do, grad_out, grad_offsets, inside, dq, start, weight, delta,
    key, value, k_m, v_m, listed, count, exponent_scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what a bank of `count` prototypes gives to the gradient of the queries, but for the scale and, where it is
    None, the weight."""
    full = count // BLOCK_M * BLOCK_M
    for first in tl.range(0, full, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        dq = query_tile(
            q, query, offsets, do, grad_out, grad_offsets, inside, dq, start, weight, delta,
            key, value, k_m, v_m, listed, m, None, exponent_scale, CHANNELS, BLOCK_E, CHUNK, PRECISION,
        )  # fmt: skip
    for first in tl.range(full, count, BLOCK_M, num_stages=1):  # what is left over
        m = first + tl.arange(0, BLOCK_M)
        dq = query_tile(
            q, query, offsets, do, grad_out, grad_offsets, inside, dq, start, weight, delta,
            key, value, k_m, v_m, listed, m, m < count, exponent_scale, CHANNELS, BLOCK_E, CHUNK, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def read_sums(reference, total, at, inside):
    """What exponents are relative to, and one over their sum, for tokens that are inside; zeros for others."""
    start = tl.load(reference + at, mask=inside, other=0.0)
    inverse = tl.where(inside, 1.0 / tl.load(total + at, mask=inside, other=1.0), 0.0)
    return tl.where(start == float("-inf"), 0.0, start), inverse


@triton.jit
def store_sums(sums, place, start, weight, delta, inside):
    """Of tokens: what their exponents start from, where they give weights of all (the gate's, over the sum of
    exponentials), and delta, in one place. Two arrays would take the pass over prototypes more instructions: each
    thread reads what belongs to its elements of a tile, one by one."""
    tl.store(sums + 2 * place, start - tl.log2(weight), mask=inside)
    tl.store(sums + 2 * place + 1, delta, mask=inside)


@triton.jit
def load_sums(sums, place, inside):
    """Tokens that are not inside weigh nothing."""
    both = tl.arange(0, 2)[None, :]
    at = (sums + both) + 2 * place[:, None]
    if inside is None:
        return tl.split(tl.load(at))
    else:
        start, delta = tl.split(tl.load(at, mask=inside[:, None], other=0.0))
        return tl.where(inside, start, float("inf")), delta


@triton.jit
def query_gradient_kernel(
    grad_out, query, local_key, local_value, global_key, global_value, gate, lists, counts,
    out, difference, reference, total, grad_query, grad_gate, sums,
    d_b, d_h, d_n, q_b, q_h, q_n, lk_b, lk_h, lk_m, lv_b, lv_h, lv_m, gk_b, gk_h, gk_m, gv_b, gv_h, gv_m, o_b, o_h, o_n,
    batch, heads, tokens, local_count, global_count, scale, exponent_scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    FOLDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Also writes, for the pass over prototypes, each softmax's `sums` (S, H, B, N, 2) float32. out, difference and
    grad_query have the same strides."""
    # torch.compile passes them in float64
    scale, exponent_scale = tl.cast(scale, tl.float32), tl.cast(exponent_scale, tl.float32)
    sequence = tokens * batch if FOLDED else tokens
    tiles = tl.cdiv(sequence, BLOCK_T)
    instance = tl.program_id(0) // tiles
    first_image = 0 if FOLDED else instance // heads
    head = (instance if FOLDED else instance % heads).to(tl.int64)
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < sequence
    image, n = locate(t, tokens, first_image, FOLDED)
    out_rows = image * o_b + head * o_h + n * o_n
    offsets = image * q_b + head * q_h + n * q_n
    grad_offsets = image * d_b + head * d_h + n * d_n
    q = load_rows(query, offsets, inside, CHANNELS, BLOCK_E)
    do = load_rows(grad_out, grad_offsets, inside, CHANNELS, BLOCK_E)

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

    answer = load_rows(out, out_rows, inside, CHANNELS, BLOCK_E)
    delta = tl.sum(do.to(tl.float32) * answer.to(tl.float32), 1)
    flat = (image * heads + head) * tokens + n
    start, weight = read_sums(reference, total, flat, inside)
    if gate is not None:
        apart = load_rows(difference, out_rows, inside, CHANNELS, BLOCK_E)
        slope = tl.sum(do.to(tl.float32) * apart.to(tl.float32), 1)
        tl.store(grad_gate + flat, slope, mask=inside)
        g = tl.load(gate + flat, mask=inside, other=0.0).to(tl.float32)
        if lists is not None:
            g = tl.where(local_count == 0, 1.0, g)
        global_delta = delta + (1.0 - g) * slope
        delta -= g * slope
        weight *= 1.0 - g
    place = (head * batch + image) * tokens + n
    store_sums(sums, place, start, weight, delta, inside)

    of_bank = None if gate is None else weight  # one softmax has one weight, for the sum
    dq = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    dq = query_gradient_of(
        q, query, offsets, do, grad_out, grad_offsets, inside, dq, start, of_bank, delta,
        local_key, local_value, lk_m, lv_m, listed, local_count, exponent_scale,
        CHANNELS, BLOCK_E, BLOCK_M, CHUNK, PRECISION,
    )  # fmt: skip
    if gate is not None:
        second = (tl.zeros([], tl.int64) + batch) * heads * tokens  # to the second softmax
        start, weight = read_sums(reference, total, flat + second, inside)
        weight *= g
        of_bank = weight
        delta = global_delta
        store_sums(sums, place + second, start, weight, delta, inside)
    if global_key is not None:
        dq = query_gradient_of(
            q, query, offsets, do, grad_out, grad_offsets, inside, dq, start, of_bank, delta,
            global_key, global_value, gk_m, gv_m, None, global_count, exponent_scale,
            CHANNELS, BLOCK_E, BLOCK_M, CHUNK, PRECISION,
        )  # fmt: skip
    if gate is None:
        dq *= weight[:, None]
    store_rows(grad_query, out_rows, dq * scale, inside, CHANNELS, BLOCK_E)


@triton.jit
def token_rows(rows, image, n, steps, ahead, tokens, per_image, per_token, NEAR: tl.constexpr):
    """Where the tokens are that follow the image's n-th by `steps`, and which are in images `ahead` of it (None: in
    itself): the first, and their offsets from it. NEAR: these fit 32 bits, and ahead is 0 or 1."""
    first = rows + tl.cast(image, tl.int64) * per_image + tl.cast(n, tl.int64) * per_token
    if ahead is None:
        return first, steps.to(tl.int64) * per_token
    elif NEAR:
        return first, steps * tl.cast(per_token, tl.int32) + tl.where(
            ahead != 0, tl.cast(per_image - tl.cast(tokens, tl.int64) * per_token, tl.int32), 0
        )
    else:
        return first, steps.to(tl.int64) * per_token + ahead * (per_image - tl.cast(tokens, tl.int64) * per_token)


@triton.jit
def bank_tile(
    k, key, key_offsets, v, value, value_offsets, present, used, dk, dv,
    query, grad_out, sums, image, t0, steps, inside, place, exponent_scale,
    tokens, q_b, q_n, d_b, d_n,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    FOLDED: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Adds what the tokens of a sequence from t0 on give to the gradients of keys, but for the scale, and of values.
    inside: which of the tokens are there; None: all."""
    n, ahead = t0, None
    if FOLDED:  # vectors of quotients take longer than the products
        image = t0 // tokens
        n = t0 - image * tokens
        ahead = tl.where(n + steps >= tokens, 1, 0) if NEAR else (n + steps) // tokens
    query, offsets = token_rows(query, image, n, steps, ahead, tokens, q_b, q_n, NEAR)
    grad_out, grad_offsets = token_rows(grad_out, image, n, steps, ahead, tokens, d_b, d_n, NEAR)
    q = load_rows(query, offsets, inside, CHANNELS, BLOCK_E)
    do = load_rows(grad_out, grad_offsets, inside, CHANNELS, BLOCK_E)
    start, delta = load_sums(sums + 2 * (place + t0), steps, inside)
    scores = dot_rows(k, key, key_offsets, present, q, query, offsets, inside, CHANNELS, BLOCK_E, CHUNK, PRECISION)
    p = tl.exp2(scores * exponent_scale - start[None, :])
    if used is not None:
        p = tl.where(used[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    slopes = dot_rows(
        v, value, value_offsets, present, do, grad_out, grad_offsets, inside, CHANNELS, BLOCK_E, CHUNK, PRECISION
    )
    ds = p * (slopes - delta[None, :])
    if used is not None:
        ds = tl.where(used[:, None], ds, 0.0)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def bank_gradient_kernel(
    grad_out, query, key, value, lists, counts, mask, sums, grad_key, grad_value,
    d_b, d_h, d_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, g_b, g_h, g_m, g_part,
    batch, heads, tokens, count, parts, scale, exponent_scale,
    CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    SHARED: tl.constexpr, NEAR: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one bank. A program owns a tile of prototypes, those of one head (of one image where the bank isn't
    shared), and takes a part of the tokens.

    lists, counts: which prototypes have gradients: for each image, or, SHARED, for all of them together; then
    mask (B, M) says which of these an image uses. None: all. grad_key and grad_value have the same strides; with
    several parts, these are to be added up. NEAR: a tile's tokens are of two images at most, whose distance fits 32
    bits.
    """
    scale, exponent_scale = tl.cast(scale, tl.float32), tl.cast(exponent_scale, tl.float32)
    tiles = tl.cdiv(count, BLOCK_M)
    rest = tl.program_id(0) // tiles
    part = rest % parts
    instance = rest // parts
    head = (instance if SHARED else instance % heads).to(tl.int64)
    first_image = 0 if SHARED else (instance // heads).to(tl.int64)
    width = count
    listed = None
    if lists is not None:
        listed = lists + first_image * count
        count = tl.load(counts + first_image)
    first = tl.program_id(0) % tiles * BLOCK_M
    if first >= count:
        return
    m = first + tl.arange(0, BLOCK_M)
    present = m < count
    rows = prototype_rows(m, listed, present)
    key += first_image * k_b + head * k_h
    value += first_image * v_b + head * v_h
    k = load_rows(key, rows * k_m, present, CHANNELS, BLOCK_E)
    v = load_rows(value, rows * v_m, present, CHANNELS, BLOCK_E)
    query += head * q_h
    grad_out += head * d_h

    # One sequence: all images' tokens, one image's, or, where images use different prototypes, one for each image.
    FOLDED: tl.constexpr = SHARED and mask is None
    sequence = tokens * batch if FOLDED else tokens
    blocks = tl.cdiv(sequence, BLOCK_T)
    begin = blocks * part // parts * BLOCK_T
    end = tl.minimum(blocks * (part + 1) // parts * BLOCK_T, sequence)
    steps = tl.arange(0, BLOCK_T)
    dk = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for i in range(batch if mask is not None else 1):
        image = first_image + i
        place = (head * batch + image) * tokens
        last, used = end, None
        if mask is not None:
            used = tl.load(mask + image * width + rows, mask=present, other=0) != 0
            last = tl.where(tl.max(used.to(tl.int32)) != 0, end, begin)  # nothing to do where none of them is used
        full = begin
        if FOLDED:  # else the two loops spill
            full += (last - begin) // BLOCK_T * BLOCK_T
            for t0 in tl.range(begin, full, BLOCK_T):
                dk, dv = bank_tile(
                    k, key, rows * k_m, v, value, rows * v_m, present, used, dk, dv,
                    query, grad_out, sums, image, t0, steps, None, place, exponent_scale,
                    tokens, q_b, q_n, d_b, d_n, CHANNELS, BLOCK_E, BLOCK_T, CHUNK, PRECISION, FOLDED, NEAR,
                )  # fmt: skip
        for t0 in tl.range(full, last, BLOCK_T, num_stages=1 if FOLDED else None):  # what is left over
            dk, dv = bank_tile(
                k, key, rows * k_m, v, value, rows * v_m, present, used, dk, dv,
                query, grad_out, sums, image, t0, steps, t0 + steps < last, place, exponent_scale,
                tokens, q_b, q_n, d_b, d_n, CHANNELS, BLOCK_E, BLOCK_T, CHUNK, PRECISION, FOLDED, NEAR,
            )  # fmt: skip
    at = first_image * g_b + head * g_h + rows * g_m + part.to(tl.int64) * g_part
    store_rows(grad_key, at, dk * scale, present, CHANNELS, BLOCK_E)
    store_rows(grad_value, at, dv, present, CHANNELS, BLOCK_E)


@triton.jit
def add_parts_kernel(of_parts_key, of_parts_value, grad_key, grad_value, size, parts, BLOCK: tl.constexpr):
    """Adds up the parts (parts, size) of both gradients, in float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    of_key = tl.zeros([BLOCK], tl.float32)
    of_value = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        first = tl.cast(part, tl.int64) * size
        of_key += tl.load(of_parts_key + first + at, mask=inside)
        of_value += tl.load(of_parts_value + first + at, mask=inside)
    tl.store(grad_key + at, of_key.to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + at, of_value.to(grad_value.dtype.element_ty), mask=inside)
