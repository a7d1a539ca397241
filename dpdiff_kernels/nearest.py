"""Nearest-prototype search, aggregation and statistics."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpdiff_kernels import reference
from dpdiff_kernels.backends import asked_for, backends, select
from dpdiff_kernels.checks import (
    check_bool,
    check_choice,
    check_floats,
    check_groups,
    check_int,
    check_positive,
    check_shape,
    widest_under_autocast,
)
from dpdiff_kernels.operators import register
from dpdiff_kernels.replay import replayed

METRICS = ("cosine", "dot", "l2")
BACKENDS = ("triton", "cpp", "reference")


class Nearest(NamedTuple):
    """What `nearest_prototype` returns."""

    scores: Tensor
    indices: Tensor


class Aggregated(NamedTuple):
    """What `aggregate_nearest` returns."""

    values: Tensor
    scores: Tensor
    indices: Tensor


class PrototypeStatistics(NamedTuple):
    """What `prototype_statistics` returns."""

    counts: Tensor
    sums: Tensor
    inertia: Tensor | None


@replayed(asked_for)
def nearest_prototype(
    tokens: Tensor,
    prototypes: Tensor,
    k: int = 1,
    metric: str = "cosine",
    groups: Tensor | None = None,
    active_groups: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Nearest:
    """Finds each token's k nearest prototypes, exactly.

    Args:
        tokens: (..., N, D), any float dtype.
        prototypes: (K, D), shared by all tokens, or (..., K, D), one set for each batch element; as tokens in dtype and
            device (under autocast the two are promoted to the wider dtype).
        k: how many, from 1 to K.
        metric: "cosine" (zero for a zero vector) or "dot", the largest first; "l2", the squared Euclidean distance, the
            smallest first.
        groups: (K,) int64, the group that each prototype belongs to. With `active_groups` only.
        active_groups: (..., G) int64, the only groups that each batch element searches. Negative entries are padding;
            an entry may repeat. The groups of an element must hold k prototypes or more between them.
        backend: overrides the choice of implementation, see `backends`.

    Returns:
        scores: (..., N, k) float32 (float64 for float64 inputs), within 6e-7 (|x|^2 + |p|^2) of the true value, or 6e-7
            for cosine. Differentiable in tokens and prototypes; the gradient of the cosine is zero at a zero vector.
        indices: (..., N, k) int64. No other prototype scores better by more than that rounding; exact ties go to the
            lowest index. A NaN score counts as the best there is, so that it shows.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a shape, device or option is wrong; k exceeds K; or (checked on CPU, outside torch.compile) some
            element's active groups hold fewer than k prototypes (on a GPU, places that nothing fills score NaN).

    Forward-mode derivatives are on the reference; elsewhere they are a NotImplementedError.

    O(N K D) time, in which K counts the active prototypes only; the N x K scores are never held.
    """
    tokens, prototypes = _check_search(tokens, prototypes, k, metric, groups, active_groups)
    operators = _OPERATORS[select(backend, BACKENDS, tokens, prototypes)]
    tokens_, prototypes_, active_groups = _flatten(tokens, prototypes, active_groups)
    result = operators.nearest_prototype(tokens_, prototypes_, k, metric, groups, active_groups)
    return Nearest(*(t.reshape(*tokens.shape[:-1], k) for t in result))


@replayed(asked_for)
def aggregate_nearest(
    tokens: Tensor,
    prototypes: Tensor,
    k: int = 1,
    metric: str = "cosine",
    temperature: float = 0.1,
    groups: Tensor | None = None,
    active_groups: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Aggregated:
    """Replaces each token by the mean of its k nearest prototypes, weighted by a softmax over their scores.

    `values = sum_j softmax_j(score_j / temperature) prototype_j`, where the score of "l2" counts negatively: the
    nearest prototype weighs most under every metric. With k=1 the value is the nearest prototype itself.

    Args:
        temperature: positive, in the unit of the scores.
        others: as for `nearest_prototype`.

    Returns:
        values: (..., N, D) in the tokens' dtype; NaN where a score is NaN.
        scores, indices: as for `nearest_prototype`.

    Gradients reach tokens and prototypes through values and scores; they are added up in a fixed order. Forward-mode
    derivatives are on the reference.

    Raises:
        TypeError, ValueError: as for `nearest_prototype`.

    Beside the search, O(N k D) time, and as much in the backward pass.
    """
    check_positive("temperature", temperature)
    tokens, prototypes = _check_search(tokens, prototypes, k, metric, groups, active_groups)
    operators = _OPERATORS[select(backend, BACKENDS, tokens, prototypes)]
    tokens_, prototypes_, active_groups = _flatten(tokens, prototypes, active_groups)
    found = operators.aggregate_nearest(tokens_, prototypes_, k, metric, temperature, groups, active_groups)
    values, *result = found[:3]
    return Aggregated(values.reshape(tokens.shape), *(t.reshape(*tokens.shape[:-1], k) for t in result))


@replayed(asked_for)
def prototype_statistics(
    tokens: Tensor,
    prototypes: Tensor,
    metric: str = "l2",
    weights: Tensor | None = None,
    *,
    with_inertia: bool = True,
    backend: str | None = None,
) -> PrototypeStatistics:
    """Assigns each token to its nearest prototype and adds up what each prototype was given.

    What k-means and moving-average updates need, in one pass: the new prototypes are `sums / counts[:, None]`.

    Args:
        tokens: (..., N, D), any float dtype; all tokens count alike, whatever their batch element.
        prototypes: (K, D), as tokens in dtype and device. K must be at least 1 unless there are no tokens.
        metric: "l2", "cosine" or "dot".
        weights: (..., N) float, each token's weight; 1 when None.
        with_inertia: False saves the time of the exact distances.
        backend: overrides the choice of implementation, see `backends`.

    Returns:
        counts: (K,) float32 (float64 for float64 inputs, as the others), the sum of the weights of each one's tokens.
        sums: (K, D) float32, the weighted sum of the tokens themselves (under every metric).
        inertia: () float32, the weighted sum of the tokens' distances to their prototypes: the squared distance
            for "l2", 1 - cosine for "cosine", minus the product for "dot". None without `with_inertia`.

    Not differentiable.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.

    O(N K D) time; beyond the results, a number or two for each token.
    """
    tokens, prototypes = _check_operands(tokens, prototypes)
    check_choice("metric", metric, METRICS)
    check_bool("with_inertia", with_inertia)
    _check_prototypes(prototypes, tokens.shape[-1])
    if weights is not None:
        check_floats(weights=weights)
        check_shape("weights", weights, tuple(tokens.shape[:-1]))
        if weights.device != tokens.device:
            raise ValueError(f"weights is on {weights.device}: expected {tokens.device}, where tokens is")
    if prototypes.shape[0] == 0 and math.prod(tokens.shape[:-1]) > 0:
        raise ValueError("prototypes is empty: expected at least 1 prototype for the tokens given")
    tokens, prototypes = tokens.detach(), prototypes.detach()
    operators = _OPERATORS[select(backend, BACKENDS, tokens, prototypes)]
    tokens = tokens.reshape(math.prod(tokens.shape[:-1]), tokens.shape[-1]).contiguous()
    if weights is not None:
        weights = weights.detach().to(reference.accumulation_dtype(tokens)).flatten().contiguous()
    counts, sums, inertia = operators.prototype_statistics(
        tokens, prototypes.contiguous(), metric, weights, with_inertia
    )
    return PrototypeStatistics(counts, sums, inertia if with_inertia else None)


def _check_operands(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    tokens, prototypes = widest_under_autocast(tokens, prototypes)
    check_floats(tokens=tokens, prototypes=prototypes)
    if tokens.dim() < 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected (..., N, D)")
    return tokens, prototypes


def _check_search(
    tokens: Tensor, prototypes: Tensor, k: int, metric: str, groups: Tensor | None, active_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, prototypes = _check_operands(tokens, prototypes)
    batch, d = tuple(tokens.shape[:-2]), tokens.shape[-1]
    _check_prototypes(prototypes, d, batch)
    n_prototypes = prototypes.shape[-2]
    check_choice("metric", metric, METRICS)
    check_int("k", k, 1)
    if k > n_prototypes:
        raise ValueError(f"k is {k}: expected at most the number of prototypes, {n_prototypes}")
    check_groups(groups, active_groups, n_prototypes, batch, tokens.device)
    return tokens, prototypes


def _check_prototypes(prototypes: Tensor, d: int, batch: tuple[int, ...] = ()) -> None:
    """(K, D), or one such bank for each element of the batch."""
    own = prototypes.dim() == len(batch) + 2 and tuple(prototypes.shape[:-2]) == batch
    if prototypes.dim() < 2 or prototypes.shape[-1] != d or not (own or prototypes.dim() == 2):
        shapes = " or ".join(str(shape) for shape in dict.fromkeys([("K", d), (*batch, "K", d)]))
        raise ValueError(f"prototypes has shape {tuple(prototypes.shape)}: expected {shapes}")


def _flatten(tokens: Tensor, prototypes: Tensor, active_groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens (B, N, D), prototypes (K, D) or (B, K, D), active_groups (B, G), contiguous; B = 1 where all share all."""
    *batch, n, d = tokens.shape
    n_batch = math.prod(batch)
    tokens, prototypes = tokens.contiguous(), prototypes.contiguous()
    if prototypes.dim() == 2 and active_groups is None:
        return tokens.reshape(1, n_batch * n, d), prototypes, None
    if prototypes.dim() > 2:
        prototypes = prototypes.reshape(n_batch, *prototypes.shape[-2:])
    if active_groups is not None:
        active_groups = active_groups.reshape(n_batch, active_groups.shape[-1]).contiguous()
    return tokens.reshape(n_batch, n, d), prototypes, active_groups


def _fake_nearest(tokens, prototypes, k, *_):
    shape = (tokens.shape[0], tokens.shape[1], k)
    return tokens.new_empty(shape, dtype=torch.float32), tokens.new_empty(shape, dtype=torch.int64)


def _fake_aggregate(tokens, prototypes, k, *_):
    shape = (tokens.shape[0], tokens.shape[1], k)
    dtypes = torch.float32, torch.int64, torch.float32
    return tokens.new_empty(tokens.shape), *(tokens.new_empty(shape, dtype=dtype) for dtype in dtypes)


def _fake_backward(
    tokens, prototypes, indices, scores, weights, grad_values, grad_scores, metric, temperature, *wanted
):
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip((tokens, prototypes), wanted))


def _fake_statistics(tokens, prototypes, *_):
    k, d = prototypes.shape
    return tuple(tokens.new_empty(shape, dtype=torch.float32) for shape in ((k,), (k, d), ()))


def _register(namespace: str, *modules: Any) -> SimpleNamespace:
    """The operators of `namespace`, with their fake kernels and gradients; modules: as for `register`."""

    def operator(
        name: str, fake: Callable, backward: Callable | None = None, setup_context: Callable | None = None
    ) -> Callable:
        return register(f"{namespace}::{name}", fake, backward, setup_context, *modules)

    def save(ctx, inputs, indices, scores, weights, metric, temperature):
        ctx.save_for_backward(*inputs[:2], indices, scores, weights)
        ctx.mark_non_differentiable(indices, *([] if weights is None else [weights]))
        ctx.set_materialize_grads(False)
        ctx.metric, ctx.temperature = metric, temperature

    def second_backward(ctx, *_):
        raise RuntimeError("this nearest_prototype has no second derivative: pass backend='reference'")

    nearest_backward = operator("nearest_backward", _fake_backward, second_backward)

    def backward(ctx, grad_values, grad_scores):
        if grad_values is None and grad_scores is None:
            return None, None
        grad_values, grad_scores = (None if g is None else g.contiguous() for g in (grad_values, grad_scores))
        wanted = ctx.needs_input_grad[:2]
        grads = nearest_backward(*ctx.saved_tensors, grad_values, grad_scores, ctx.metric, ctx.temperature, *wanted)
        return tuple(grad if needed else None for grad, needed in zip(grads, wanted))

    return SimpleNamespace(
        nearest_prototype=operator(
            "nearest_prototype",
            _fake_nearest,
            lambda ctx, grad_scores, _: (*backward(ctx, None, grad_scores), *[None] * 4),
            lambda ctx, inputs, output: save(ctx, inputs, output[1], output[0], None, inputs[3], 1.0),
        ),
        aggregate_nearest=operator(
            "aggregate_nearest",
            _fake_aggregate,
            lambda ctx, grad_values, grad_scores, *_: (*backward(ctx, grad_values, grad_scores), *[None] * 5),
            lambda ctx, inputs, output: save(ctx, inputs, *output[2:0:-1], output[3], *inputs[3:5]),
        ),
        prototype_statistics=operator("prototype_statistics", _fake_statistics),
    )


# All have the functions `nearest_prototype`, `aggregate_nearest` and `prototype_statistics` of `reference`.
_OPERATORS: dict[str, Any] = {"reference": reference}
if backends()["cpp"]:
    _OPERATORS["cpp"] = _register("dpdiff")
if backends()["triton"]:
    import dpdiff_kernels.triton.nearest

    _OPERATORS["triton"] = _register("dpdiff_triton", dpdiff_kernels.triton.nearest)
