"""Problems for the tests of sinkhorn and sinkhorn_points, and what their solutions minimise."""

import torch


def random_problem(*shape, seed=0, dtype=torch.float64):
    """A cost in [0, 1] and weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(shape, generator=generator, dtype=dtype)
    a = torch.rand(shape[:-1], generator=generator, dtype=dtype) + 0.1
    b = torch.rand((*shape[:-2], shape[-1]), generator=generator, dtype=dtype) + 0.1
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def kl(x, y):
    """Generalised Kullback-Leibler divergence."""
    return torch.where(x > 0, x * (x / y).log(), 0).sum() - x.sum() + y.sum()


def objective(plan, cost, a, b, eps, tau_a=None, tau_b=None):
    value = (plan * cost).sum() + eps * kl(plan, a[:, None] * b)
    if tau_a is not None:
        value += tau_a * kl(plan.sum(1), a)
    if tau_b is not None:
        value += tau_b * kl(plan.sum(0), b)
    return value


def normalised(w):
    return w / w.sum(-1, keepdim=True)


def points(n, m, d, *batch, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=generator, dtype=dtype)
    return x, torch.randn(*batch, m, d, generator=generator, dtype=dtype) + 0.5
