"""prototype_statistics against float64 brute force."""

import numpy as np
import pytest
import torch
from cpu_backends import each_backend
from nearest_problems import brute_force, metrics, random

import dpdiff_kernels as dk


@each_backend
@metrics
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(backend, metric, weighted, dtype):
    tokens, prototypes = random(3, 50, 20, dtype=dtype), random(30, 20, seed=1, dtype=dtype)
    weights = random(3, 50, seed=2).abs() if weighted else None
    result = dk.prototype_statistics(tokens, prototypes, metric=metric, weights=weights, backend=backend)
    scores, _ = brute_force(tokens.flatten(0, 1), prototypes, metric)
    distances = {"l2": scores, "cosine": 1 - scores, "dot": -scores}[metric]
    nearest, w = distances.argmin(1), np.ones(150) if weights is None else weights.double().flatten().numpy()
    assigned = (nearest[:, None] == np.arange(30)) * w[:, None]
    assert all(t.dtype == torch.float32 for t in result)
    np.testing.assert_allclose(result.counts.numpy(), assigned.sum(0), rtol=1e-6)
    sums = assigned.T @ tokens.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(result.sums.numpy(), sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.inertia.item(), (distances.min(1) * w).sum(), rtol=1e-5)
    options = {"metric": metric, "weights": weights, "backend": backend}
    without = dk.prototype_statistics(tokens, prototypes, with_inertia=False, **options)
    assert torch.equal(without.counts, result.counts) and torch.equal(without.sums, result.sums)
    assert without.inertia is None


@each_backend
def test_statistics_of_many_tokens_keep_their_precision(backend):
    """Float32 running sums of 200,000 equal terms would be off in the fourth digit."""
    tokens = torch.full((200_000, 3), 0.1)
    result = dk.prototype_statistics(tokens, torch.zeros(1, 3), backend=backend)
    assert result.counts.item() == 200_000
    np.testing.assert_allclose(result.sums.numpy(), np.full((1, 3), 200_000 * np.float64(np.float32(0.1))), rtol=2e-7)
    np.testing.assert_allclose(result.inertia.item(), 200_000 * 3 * np.float64(np.float32(0.1)) ** 2, rtol=2e-7)


@each_backend
@metrics
def test_statistics_without_channels_or_tokens(backend, metric):
    result = dk.prototype_statistics(torch.zeros(5, 0), torch.zeros(3, 0), metric=metric, backend=backend)
    assert result.counts.tolist() == [5, 0, 0] and result.sums.shape == (3, 0)
    assert result.inertia == (5 if metric == "cosine" else 0)
    for d in (4, 0):
        none = dk.prototype_statistics(torch.zeros(0, d), torch.zeros(0, d), metric=metric, backend=backend)
        assert none.counts.shape == (0,) and none.sums.shape == (0, d) and none.inertia == 0
