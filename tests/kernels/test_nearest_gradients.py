"""Gradients of nearest_prototype and aggregate_nearest against float64 and finite differences."""

import pytest
import torch
from cpu_backends import each_backend, needs_cpp
from nearest_problems import metrics, random

import dpdiff_kernels as dk


@each_backend
@metrics
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_agree_with_float64(backend, metric, shared, k, dtype):
    inputs = random(2, 40, 35, dtype=dtype), random(*([] if shared else [2]), 20, 35, seed=1, dtype=dtype)
    grad_values, grad_scores = random(2, 40, 35, seed=2, dtype=dtype), random(2, 40, k, seed=3)
    found = []
    for cast, name in ((torch.Tensor.double, "reference"), (torch.clone, backend)):
        tokens, prototypes = (cast(t).requires_grad_() for t in inputs)
        result = dk.aggregate_nearest(tokens, prototypes, k=k, metric=metric, temperature=0.5, backend=name)
        nearest = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=name)
        loss = (result.values * grad_values).sum() + (result.scores * grad_scores).sum() + nearest.scores.sum()
        found.append(torch.autograd.grad(loss, (tokens, prototypes)))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for expected, grad in zip(*found):
        assert grad.dtype == dtype
        torch.testing.assert_close(
            grad.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


@each_backend
def test_gradients_of_one_input_or_output(backend):
    tokens, prototypes = random(30, 8), random(10, 8, seed=1)
    both = [t.clone().requires_grad_() for t in (tokens, prototypes)]
    dk.aggregate_nearest(*both, k=2, backend=backend).values.sum().backward()
    for i in range(2):
        inputs = [tokens.clone(), prototypes.clone()]
        inputs[i].requires_grad_()
        dk.aggregate_nearest(*inputs, k=2, backend=backend).values.sum().backward()
        assert torch.equal(inputs[i].grad, both[i].grad) and inputs[1 - i].grad is None
    inputs = [t.clone().requires_grad_() for t in (tokens, prototypes)]
    result = dk.aggregate_nearest(*inputs, k=2, backend=backend)
    assert not result.indices.requires_grad
    statistics = dk.prototype_statistics(*inputs, backend=backend)
    assert not any(t.requires_grad for t in statistics)
    with torch.no_grad():
        assert not dk.nearest_prototype(*inputs, backend=backend).scores.requires_grad


@metrics
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(metric, shared, k):
    tokens = random(2, 2, 3, dtype=torch.float64).requires_grad_()
    prototypes = random(*([] if shared else [2]), 4, 3, seed=1, dtype=torch.float64).requires_grad_()

    def function(tokens, prototypes):
        values, scores, _ = dk.aggregate_nearest(tokens, prototypes, k=k, metric=metric, temperature=0.7)
        return values, scores, dk.nearest_prototype(tokens, prototypes, k=k, metric=metric).scores

    assert torch.autograd.gradcheck(function, (tokens, prototypes))
    assert torch.autograd.gradgradcheck(function, (tokens, prototypes))


@needs_cpp
def test_no_second_derivative_is_an_error_rather_than_zero():
    tokens = random(5, 4).requires_grad_()
    scores = dk.nearest_prototype(tokens, random(3, 4, seed=1), backend="cpp").scores
    (grad,) = torch.autograd.grad(scores.sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: pass backend='reference'"):
        grad.sum().backward()
