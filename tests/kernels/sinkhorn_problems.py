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


def clouds_apart(n, m, eps):
    """Clouds far from each other, and weights that leave out two points of each: those in the midst of the other, which
    are nearer than all others by more than 100 eps."""
    x, y = points(n, m, 2, dtype=torch.float32)
    x, y = 0.1 * x, 0.1 * y + torch.tensor([1.0, 0.0])
    x[1], x[n - 2], y[0], y[m - 2] = y[2], y[3], x[2], x[3]
    _, a, b = random_problem(n, m, dtype=torch.float32)
    a[[1, n - 2]] = b[[0, m - 2]] = 0
    cost = torch.cdist(x.double(), y.double()).square()
    weighted = cost[a > 0][:, b > 0]
    assert weighted.min() > 100 * eps + max(cost[a > 0][:, b == 0].amin(0).max(), cost[a == 0][:, b > 0].amin(1).max())
    return x, y, normalised(a), normalised(b)
