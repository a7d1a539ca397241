"""The kernels beside the nearest-prototype search: values, their gradients, and sums over each prototype's tokens.

Nothing is added atomically: entries (token, nearest prototype) are sorted by prototype, and each prototype's sum runs
over its entries in their order.
"""

import triton
import triton.language as tl


@triton.jit
def _inverse(norm):
    """1 / norm, and 0 for a zero vector, whose cosine is constant."""
    return tl.where(norm == 0, 0.0, 1 / tl.where(norm == 0, 1.0, norm)).to(tl.float32)


@triton.jit
def values_kernel(
    prototypes, indices, goodness, weights, values, n_rows, n, n_prototypes, d, k, temperature,
    SHARED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """weights (n_rows, k) = softmax(goodness / temperature), values (n_rows, d): the mean of the prototypes."""
    token = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = token < n_rows
    bank = tl.zeros_like(token) if SHARED else token // n * n_prototypes
    best = tl.load(goodness + token * k, mask=inside, other=0.0)
    total = tl.zeros((BN,), tl.float32)
    for j in range(k):
        other = tl.load(goodness + token * k + j, mask=inside, other=0.0)
        total += tl.exp(((other - best) / temperature).to(tl.float32))
    for j in range(k):
        other = tl.load(goodness + token * k + j, mask=inside, other=0.0)
        tl.store(weights + token * k + j, tl.exp(((other - best) / temperature).to(tl.float32)) / total, mask=inside)
    for first in range(0, d, BD):
        channel = first + tl.arange(0, BD)[None, :]
        mask = inside[:, None] & (channel < d)
        mean = tl.zeros((BN, BD), tl.float32)
        for j in range(k):
            other = tl.load(goodness + token * k + j, mask=inside, other=0.0)
            weight = tl.exp(((other - best) / temperature).to(tl.float32)) / total
            row = bank + tl.load(indices + token * k + j, mask=inside, other=0)
            p = tl.load(prototypes + row[:, None] * d + channel, mask=mask, other=0.0).to(tl.float32)
            mean += weight[:, None] * p
        tl.store(values + token[:, None] * d + channel, mean.to(values.dtype.element_ty), mask=mask)


@triton.jit
def token_gradients_kernel(
    tokens, prototypes, norms, indices, scores, weights, grad_values, grad_scores,
    grad_tokens, scales, rows, factors, owns, n_rows, n, n_prototypes, d, k, temperature,
    METRIC: tl.constexpr, SHARED: tl.constexpr, WITH_VALUES: tl.constexpr, WITH_SCORES: tl.constexpr,
    OF_TOKENS: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What each token x and one of its prototypes p add to the gradients, and the tokens' gradients.

    With x' = s_x x and p' = s_p p, where s are the inverse norms for cosine and 1 otherwise:
        of x:  s_x (factor p' + own x')
        of p:  s_p (factor x' + own p') + weight grad_values
    Written: scales (n_rows,) = s_x, rows (n_rows, k) of all banks together, factors (n_rows, k) = s_p factor, owns.
    """
    token = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = token < n_rows
    x, slot = tokens + token[:, None] * d, tl.arange(0, SLOTS)[None, :]
    entry = token[:, None] * k + slot
    here = inside[:, None] & (slot < k)
    row = tl.load(indices + entry, mask=here, other=0)
    if not SHARED:
        row += tl.where(inside, token // n * n_prototypes, 0)[:, None]

    square = tl.zeros((BN, BD), tl.float64)
    product = tl.zeros((BN, SLOTS), tl.float32)  # grad_values . p; for k = 1 it changes nothing
    for first in range(0, d, BD):
        channel = first + tl.arange(0, BD)[None, :]
        mask = inside[:, None] & (channel < d)
        if METRIC == "cosine":
            value = tl.load(x + channel, mask=mask, other=0.0).to(tl.float64)
            square += value * value
        if WITH_VALUES and SLOTS > 1:
            grad = tl.load(grad_values + token[:, None] * d + channel, mask=mask, other=0.0).to(tl.float32)
            for j in range(k):
                at = tl.sum(tl.where(slot == j, row, 0), 1)
                p = tl.load(prototypes + at[:, None] * d + channel, mask=mask, other=0.0).to(tl.float32)
                product += tl.where(slot == j, tl.sum(grad * p, 1)[:, None], 0.0)
    scale = tl.full((BN,), 1.0, tl.float32)
    bank_scale = tl.full((BN, SLOTS), 1.0, tl.float32)
    if METRIC == "cosine":
        scale = _inverse(tl.sqrt(tl.sum(square, 1)))
        bank_scale = _inverse(tl.load(norms + row, mask=here, other=0.0))

    gradient = tl.zeros((BN, SLOTS), tl.float32)
    if WITH_SCORES:
        gradient += tl.load(grad_scores + entry, mask=here, other=0.0)
    if WITH_VALUES:
        weight = tl.load(weights + entry, mask=here, other=0.0)
        mean = tl.sum(weight * product, 1)
        through = weight * (product - mean[:, None]) / temperature
        gradient += (0.0 - through) if METRIC == "l2" else through
    if METRIC == "l2":
        factor, own = -2.0 * gradient, 2.0 * gradient
    elif METRIC == "cosine":
        factor, own = gradient, 0.0 - gradient * tl.load(scores + entry, mask=here, other=0.0)
    else:
        factor, own = gradient, tl.zeros_like(gradient)
    tl.store(scales + token, scale, mask=inside)
    tl.store(rows + entry, row.to(tl.int32), mask=here)
    tl.store(factors + entry, factor * bank_scale, mask=here)
    tl.store(owns + entry, own, mask=here)

    if OF_TOKENS:
        own_of_all = tl.sum(own, 1)
        for first in range(0, d, BD):
            channel = first + tl.arange(0, BD)[None, :]
            mask = inside[:, None] & (channel < d)
            value = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
            total = tl.zeros((BN, BD), tl.float32)
            if METRIC == "cosine":
                total += own_of_all[:, None] * scale[:, None] * (scale[:, None] * value)
            for j in range(k):
                at = tl.sum(tl.where(slot == j, row, 0), 1)
                times = tl.sum(tl.where(slot == j, factor, 0.0), 1)
                p = tl.load(prototypes + at[:, None] * d + channel, mask=mask, other=0.0).to(tl.float32)
                if METRIC == "l2":  # the difference loses less than two sums do
                    total += times[:, None] * (p - value)
                else:
                    inverse = tl.sum(tl.where(slot == j, bank_scale, 0.0), 1)
                    total += (times * scale)[:, None] * (inverse[:, None] * p)
            tl.store(grad_tokens + token[:, None] * d + channel, total.to(grad_tokens.dtype.element_ty), mask=mask)


@triton.jit
def member_sums_kernel(
    order, starts, tokens, scales, factors, grad_values, weights, owns, prototypes, norms, sums, totals, d, k,
    GRADIENT: tl.constexpr, METRIC: tl.constexpr, WEIGHTED: tl.constexpr, WITH_VALUES: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Over the entries e = (token i, place) of prototype j, which are order[starts[j]] up to order[starts[j + 1]]:

    sums (K, d) = sum_e factor_e x_i, and totals (K,) float64 = sum_e factor_e, with factor 1 where not WEIGHTED; or,
    for a GRADIENT, what `token_gradients_kernel` says that the pairs add to it.
    """
    n_chunks = tl.maximum(tl.cdiv(d, BD), 1)  # without channels there still are totals
    j, chunk = (tl.program_id(0) // n_chunks).to(tl.int64), tl.program_id(0) % n_chunks
    channel = chunk * BD + tl.arange(0, BD)
    begin, end = tl.load(starts + j), tl.load(starts + j + 1)
    total = tl.zeros((BD,), tl.float64)
    own = tl.zeros((R,), tl.float64)
    for first in range(begin, end, R):
        place = first + tl.arange(0, R)
        inside = place < end
        entry = tl.load(order + place, mask=inside, other=0)
        token = entry // k
        mask = inside[:, None] & (channel < d)[None, :]
        term = tl.load(tokens + token[:, None] * d + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if GRADIENT and METRIC == "cosine":
            term *= tl.load(scales + token, mask=inside, other=0.0)[:, None]
        if WEIGHTED:
            factor = tl.load(factors + entry, mask=inside, other=0.0)
            term *= factor[:, None]
        else:
            factor = inside.to(tl.float32)
        if WITH_VALUES:
            grad = tl.load(grad_values + token[:, None] * d + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            term += tl.load(weights + entry, mask=inside, other=0.0)[:, None] * grad
        total += tl.sum(term, 0)  # in float32 over R rows, in float64 beyond
        own += tl.load(owns + entry, mask=inside, other=0.0) if GRADIENT else factor
    own_of_all = tl.sum(own, 0)
    if GRADIENT:
        if METRIC == "cosine":
            norm = tl.load(norms + j)
            own_of_all = tl.where(norm == 0, 0.0, own_of_all / tl.where(norm == 0, 1.0, norm * norm))
        total += own_of_all * tl.load(prototypes + j * d + channel, mask=channel < d, other=0.0).to(tl.float64)
    elif chunk == 0:
        tl.store(totals + j, own_of_all)
    tl.store(sums + j * d + channel, total.to(tl.float32).to(sums.dtype.element_ty), mask=channel < d)
