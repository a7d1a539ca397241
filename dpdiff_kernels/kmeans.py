"""k-means over `prototype_statistics`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.backends import select
from dpdiff_kernels.checks import check_choice, check_floats, check_int, check_shape, under_autocast
from dpdiff_kernels.nearest import BACKENDS, nearest_prototype, prototype_statistics

# Elements of a chunk (64 MB in float32): the iterations convert one at a time.
_CHUNK = 1 << 24
# k-means++ looks at this many tokens for each prototype, drawn at random where there are more.
_SEEDING_TOKENS = 32


@torch.no_grad()
def kmeans(
    tokens: Tensor,
    n_prototypes: int,
    metric: str = "l2",
    n_iters: int = 25,
    generator: torch.Generator | None = None,
    init: str | Tensor = "k-means++",
    *,
    backend: str | None = None,
) -> Tensor:
    """Clusters tokens by Lloyd's algorithm and returns the cluster centres.

    Args:
        tokens: (..., N, D), any float dtype, finite; all leading dimensions are flattened into N.
        n_prototypes: how many centres, K; at most N.
        metric: "l2" (k-means), or "cosine" (spherical k-means: only directions count, centres are unit vectors; zero
            vectors count only where there are fewer others than centres).
        n_iters: the most Lloyd iterations; stops before at a fixed point. 0 returns the initial centres.
        generator: of the tokens' device; torch's default one when None. The same state gives the same centres.
        init: "k-means++" (Arthur and Vassilvitskii 2007, greedy; on a random subset of more than 32 K tokens),
            "random" (K different tokens), or the centres themselves (K, D), as tokens in dtype and device.
        backend: overrides the choice of implementation, see `backends`.

    Returns:
        (K, D) centres in the tokens' dtype, computed in float32 (float64 for float64 tokens). A centre that loses
        all its tokens moves to the token farthest from its own centre. Not differentiable.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong, NaN or Inf in tokens or init
            included.

    O(N K D) for an iteration. Memory beyond the input: a few chunks of 2^24 elements (64 MB in float32) and a few
    numbers for each token; for k-means++ also the tokens that it looks at, 32 K at most, in float32 (float64 for
    float64), and O(log K) numbers for each of them.
    """
    check_floats(tokens=tokens)
    if under_autocast(tokens):  # which would seed from distances in its own dtype
        with torch.autocast(tokens.device.type, enabled=False):
            return kmeans(tokens, n_prototypes, metric, n_iters, generator, init, backend=backend)
    if tokens.dim() < 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected (..., N, D)")
    tokens = tokens.detach().reshape(math.prod(tokens.shape[:-1]), tokens.shape[-1])
    check_int("n_prototypes", n_prototypes, 1)
    check_int("n_iters", n_iters, 0)
    check_choice("metric", metric, ("l2", "cosine"))
    select(backend, BACKENDS, tokens)  # before any work, and where no iteration would ask
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}: expected a torch.Generator")
    if n_prototypes > len(tokens):
        raise ValueError(f"n_prototypes is {n_prototypes}: expected at most the number of tokens, {len(tokens)}")
    if not all(_is_finite(chunk) for chunk in tokens.split(_chunk_length(tokens))):
        raise ValueError("tokens holds NaN or Inf: expected finite values")

    weights = None
    if metric == "cosine":
        weights = torch.cat([_inverse_norm(chunk) for chunk in _chunks(tokens)])
        directed = weights > 0  # a zero vector has no direction, and makes no centre where there are others enough
        if n_prototypes <= directed.sum() < len(tokens):
            tokens, weights = tokens[directed], weights[directed]

    if isinstance(init, Tensor):
        check_floats(tokens=tokens, init=init)
        check_shape("init", init, (n_prototypes, tokens.shape[1]))
        if not _is_finite(init):
            raise ValueError("init holds NaN or Inf: expected finite values")
        prototypes = _prepare(init.detach(), metric).clone()  # not the caller's own
    elif not isinstance(init, str):
        raise TypeError(f"init is a {type(init).__name__}: expected a torch.Tensor, 'k-means++' or 'random'")
    elif init == "random":
        prototypes = _prepare(tokens[_draw(tokens, n_prototypes, generator)], metric)
    else:
        check_choice("init", init, ("k-means++", "random"))
        prototypes = _plus_plus(tokens, n_prototypes, metric, generator)

    for _ in range(n_iters):
        updated = _lloyd(tokens, weights, prototypes, metric, backend)
        if torch.equal(updated, prototypes):
            break
        prototypes = updated
    return prototypes.to(tokens.dtype)


def _is_finite(x: Tensor) -> bool:
    # A sum shows NaN and Inf several times as fast as a look at each; one that overflows is looked into.
    return bool(x.sum(dtype=reference.accumulation_dtype(x)).isfinite()) or bool(x.isfinite().all())


def _chunk_length(tokens: Tensor) -> int:
    return max(1, _CHUNK // max(1, tokens.shape[1]))


def _chunks(tokens: Tensor) -> Iterator[Tensor]:
    """The tokens in float32 or float64."""
    for chunk in tokens.split(_chunk_length(tokens)):
        yield chunk.to(reference.accumulation_dtype(tokens))


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| (N,), and zero where that isn't finite; no square over- or underflows."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    largest = x.abs().amax(-1).clamp(min=torch.finfo(x.dtype).tiny)
    inverse = 1 / (largest * torch.linalg.vector_norm(x / largest.unsqueeze(-1), dim=-1))
    return torch.where(inverse.isfinite(), inverse, 0)


def _prepare(tokens: Tensor, metric: str) -> Tensor:
    """Tokens as they are clustered: float32 or float64, of unit length for cosine."""
    tokens = tokens.to(reference.accumulation_dtype(tokens))
    return tokens if metric == "l2" else tokens * _inverse_norm(tokens).unsqueeze(-1)


def _draw(tokens: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """n different tokens' indices."""
    return torch.randperm(len(tokens), generator=generator, device=tokens.device)[:n]


def _plus_plus(tokens: Tensor, n_prototypes: int, metric: str, generator: torch.Generator | None) -> Tensor:
    """Draws tokens one by one, with a probability proportional to the squared distance from those drawn before: each
    time the best of a few trials, as scikit-learn does."""
    if len(tokens) > _SEEDING_TOKENS * n_prototypes:
        tokens = tokens[_draw(tokens, _SEEDING_TOKENS * n_prototypes, generator)]
    tokens = _prepare(tokens, metric)
    squares = tokens.square().sum(-1)
    n_trials = 2 + int(math.log(n_prototypes))
    drawn = _draw(tokens, 1, generator).expand(n_prototypes).clone()
    distances = _squared_distances(tokens, squares, drawn[:1])[0]
    for i in range(1, n_prototypes):
        cumulative = distances.cumsum(0, dtype=torch.float64)
        if cumulative[-1] == 0:  # fewer different tokens than prototypes
            cumulative = torch.ones_like(cumulative).cumsum(0)
        thresholds = cumulative[-1] * torch.rand(
            n_trials, dtype=torch.float64, device=tokens.device, generator=generator
        )
        trials = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=len(tokens) - 1)
        candidates = torch.minimum(distances, _squared_distances(tokens, squares, trials))
        best = candidates.sum(-1).argmin()
        drawn[i], distances = trials[best], candidates[best]
    return tokens[drawn]


def _squared_distances(tokens: Tensor, squares: Tensor, indices: Tensor) -> Tensor:
    """Of the tokens at indices (L,) to all tokens: (L, N)."""
    distances = torch.addmm(squares, tokens[indices], tokens.mT, alpha=-2) + squares[indices, None]
    return distances.clamp(min=0).scatter(1, indices[:, None], 0)


def _lloyd(tokens: Tensor, weights: Tensor | None, prototypes: Tensor, metric: str, backend: str | None) -> Tensor:
    """One iteration's new centres. The weights make unit vectors of tokens where only directions count."""
    length = _chunk_length(tokens)
    sums = torch.zeros_like(prototypes, dtype=torch.float64)
    counts = sums.new_zeros(len(prototypes))
    for i, chunk in enumerate(_chunks(tokens)):
        chunk_weights = None if weights is None else weights[i * length : (i + 1) * length]
        statistics = prototype_statistics(
            chunk, prototypes, metric=metric, weights=chunk_weights, with_inertia=False, backend=backend
        )
        counts += statistics.counts
        sums += statistics.sums
    empty = counts == 0
    updated = (sums / torch.where(empty, 1, counts).unsqueeze(-1)).to(prototypes.dtype)
    if empty.any():
        updated[empty] = _prepare(tokens[_farthest(tokens, prototypes, metric, int(empty.sum()), backend)], "l2")
    return _prepare(updated, metric)


def _farthest(tokens: Tensor, prototypes: Tensor, metric: str, n: int, backend: str | None) -> Tensor:
    """The indices of the n tokens farthest from their prototypes."""
    found = [nearest_prototype(chunk, prototypes, metric=metric, backend=backend) for chunk in _chunks(tokens)]
    scores = torch.cat([nearest.scores for nearest in found]).flatten()
    return scores.sort(descending=metric == "l2", stable=True).indices[:n]
