"""Tokens and prototypes for the tests of the nearest prototypes, and the scores of all pairs."""

import numpy as np
import pytest
import torch

METRICS = ("cosine", "dot", "l2")
TOLERANCE = 6e-7  # of |x|^2 + |p|^2, or of 1 for cosine
metrics = pytest.mark.parametrize("metric", METRICS)


def random(*shape, seed=0, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def brute_force(tokens, prototypes, metric):
    """Scores (N, K) in float64, each pair on its own, and what float32 rounding means for each."""
    x, p = tokens.double().numpy()[:, None, :], prototypes.double().numpy()[None, :, :]
    square_x, square_p = (x * x).sum(-1), (p * p).sum(-1)
    if metric == "l2":
        return ((x - p) ** 2).sum(-1), TOLERANCE * (square_x + square_p)
    dot = (x * p).sum(-1)
    if metric == "dot":
        return dot, TOLERANCE * (square_x + square_p)
    norms = np.sqrt(square_x * square_p)
    cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)
    return cosine, np.full_like(dot, TOLERANCE)
