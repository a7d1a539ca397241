"""sinkhorn against POT, against formulas written out, and against its own definition."""

import math

import numpy as np
import ot
import pytest
import torch
from cpu_backends import each_backend
from sinkhorn_problems import objective, random_problem

import dpdiff_kernels as dk

# ------------------------------------------------------------------------------------------- the answer


@each_backend
@pytest.mark.parametrize("eps", [1.0, 0.05, 0.01])
def test_agrees_with_pot(backend, eps):
    dtype = torch.float64 if backend == "reference" else torch.float32
    cost, a, b = random_problem(3, 23, 17)
    cost = (cost - 0.3).to(dtype)
    tol = 1e-12 if dtype == torch.float64 else 2e-7
    t = dk.sinkhorn(cost, a.to(dtype), b.to(dtype), eps=eps, n_iters=50_000, tol=tol, backend=backend)
    assert (t.error < 1e-6).all()
    for i in range(3):
        mass = a[i].to(dtype).double().sum() / b[i].to(dtype).double().sum()
        weights = a[i].to(dtype).double().numpy(), (b[i].to(dtype).double() * mass).numpy()
        m = cost[i].double().numpy()
        expected = ot.sinkhorn(*weights, m, eps, method="sinkhorn_log", numItermax=200_000, stopThr=1e-12)
        result = ot.solve(m, *weights, reg=eps, reg_type="KL", max_iter=200_000, tol=1e-12)
        scale = 1e-9 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(t.plan[i].numpy(), expected, rtol=0, atol=scale * expected.max())
        assert t.value[i].item() == pytest.approx(result.value, rel=scale, abs=scale)
        assert t.cost[i].item() == pytest.approx(result.value_linear, rel=scale, abs=scale)


def test_agrees_with_pot_batch():
    cost, _, _ = random_problem(4, 12, 9)
    t = dk.sinkhorn(cost, n_iters=2000, tol=1e-12)
    expected = ot.batch.solve_batch(cost, reg=0.05, max_iter=2000, tol=1e-13, reg_type="kl", grad="detach")
    torch.testing.assert_close(t.plan, expected.plan, rtol=0, atol=1e-10)
    torch.testing.assert_close(t.value, expected.value, rtol=1e-9, atol=0)


@each_backend
@pytest.mark.parametrize("tau", [(0.4, 0.4), (0.4, 3.0), (0.7, None), (None, 0.7)])
def test_relaxed_marginals_agree_with_pot(backend, tau):
    dtype = torch.float64 if backend == "reference" else torch.float32
    cost, a, b = random_problem(11, 8)
    if None not in tau:
        a = 2.5 * a
    t = dk.sinkhorn(cost.to(dtype), a.to(dtype), b.to(dtype), 0.1, 3000, None, *tau, backend=backend)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), 0.1, tuple(math.inf if x is None else x for x in tau),
        reg_type="kl", numItermax=100_000, stopThr=1e-15,
    )  # fmt: skip
    atol = 1e-9 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(t.plan.numpy(), expected, rtol=0, atol=atol)
    assert t.error < (1e-9 if dtype == torch.float64 else 1e-5)
    expected_value = objective(torch.from_numpy(expected), cost, a, b, 0.1, *tau)
    assert t.value.item() == pytest.approx(expected_value.item(), abs=10 * atol)


@each_backend
@pytest.mark.parametrize("tau", [(None, None), (0.8, None), (None, 1.5), (0.8, 1.5)])
@pytest.mark.parametrize("n_iters", [1, 3])
def test_iterations_are_the_documented_ones(backend, tau, n_iters):
    cost, a, b = random_problem(6, 5)
    eps = 0.2
    damp = [1.0 if t is None else t / (t + eps) for t in tau]
    g = torch.zeros(5, dtype=torch.float64)
    for _ in range(n_iters):
        f = -damp[0] * eps * (b * ((g - cost) / eps).exp()).sum(1).log()
        g = -damp[1] * eps * (a[:, None] * ((f[:, None] - cost) / eps).exp()).sum(0).log()
    plan = a[:, None] * b * ((f[:, None] + g - cost) / eps).exp()
    targets = [w if t is None else w * (-p / t).exp() for w, p, t in ((a, f, tau[0]), (b, g, tau[1]))]
    error = (plan.sum(1) - targets[0]).abs().sum() + (plan.sum(0) - targets[1]).abs().sum()

    dtype = torch.float64 if backend == "reference" else torch.float32
    t = dk.sinkhorn(cost.to(dtype), a.to(dtype), b.to(dtype), eps, n_iters, None, *tau, backend=backend)
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for result, expected in ((t.plan, plan), (t.f, f), (t.g, g), (t.cost, (plan * cost).sum())):
        torch.testing.assert_close(result, expected.to(dtype), **close)
    torch.testing.assert_close(t.error.double(), error, rtol=1e-5, atol=1e-6)
    assert t.n_iters == n_iters


@each_backend
def test_value_is_the_objective_at_convergence_and_a_lower_bound_before(backend):
    cost, a, b = random_problem(30, 20, dtype=torch.float32)
    for tau in ((None, None), (0.5, 0.9)):
        first, fifth, t = (dk.sinkhorn(cost, a, b, 0.05, n, None, *tau, backend=backend) for n in (1, 5, 800))
        expected = objective(t.plan.double(), cost.double(), a.double(), b.double(), 0.05, *tau)
        assert t.value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert first.value < fifth.value < t.value + 1e-6


@each_backend
def test_return_plan_false_changes_nothing_else(backend):
    cost, a, b = random_problem(2, 9, 7, dtype=torch.float32)
    t = dk.sinkhorn(cost, a, b, backend=backend)
    bare = dk.sinkhorn(cost, a, b, return_plan=False, backend=backend)
    assert bare.plan is None
    for x, y in zip(t[1:], bare[1:]):
        torch.testing.assert_close(x, y)


# ------------------------------------------------------------------------------------------- stability


@each_backend
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("relative", [10, 1, 0.05, 1e-2, 1e-3, 1e-4])
def test_stable_at_any_eps_in_float32(backend, scale, relative):
    cost, a, b = random_problem(60, 40)
    cost = (scale * (cost - 0.5)).float()
    eps = relative * cost.abs().max().item()
    args = {"eps": eps, "n_iters": 30}
    t = dk.sinkhorn(cost, a.float(), b.float(), **args, backend=backend)
    exact = dk.sinkhorn(cost.double(), a.float().double(), b.float().double(), **args, backend="reference")
    torch.testing.assert_close(t.plan, exact.plan.float(), rtol=0, atol=2e-5 * exact.plan.max().item())
    for result, expected in ((t.f, exact.f), (t.g, exact.g), (t.value, exact.value), (t.cost, exact.cost)):
        torch.testing.assert_close(result, expected.float(), rtol=0, atol=2e-6 * max(scale, eps))
    torch.testing.assert_close(t.plan.sum(0), b.float(), rtol=1e-5, atol=0)
    assert t.error.item() == pytest.approx(exact.error.item(), rel=1e-3, abs=3e-6)


@each_backend
def test_structured_costs_at_small_eps(backend):
    """Distances on a line, where the potentials travel far: every iteration moves them by many eps."""
    n = 70
    x = torch.linspace(0, 1, n)
    a = torch.linspace(0.01, 1, n) ** 4
    cost = (x[:, None] - x[None]).square()
    inputs = cost, a / a.sum(), a.flip(0) / a.sum()
    t = dk.sinkhorn(*inputs, eps=1e-4, n_iters=200, backend=backend)
    exact = dk.sinkhorn(*(x.double() for x in inputs), eps=1e-4, n_iters=200, backend="reference")
    torch.testing.assert_close(t.plan, exact.plan.float(), rtol=0, atol=1e-5 * exact.plan.max().item())
    torch.testing.assert_close(t.f, exact.f.float(), rtol=0, atol=1e-6)


@each_backend
def test_tiny_and_unequal_weights(backend):
    cost, _, _ = random_problem(25, 30, dtype=torch.float32)
    a = torch.logspace(-25, 0, 25)
    b = torch.logspace(0, -28, 30)
    a, b = a / a.sum(), b / b.sum()
    for eps in (0.5, 0.01, 1e-3):
        t = dk.sinkhorn(cost, a, b, eps=eps, n_iters=20, backend=backend)
        exact = dk.sinkhorn(cost.double(), a.double(), b.double(), eps=eps, n_iters=20, backend="reference")
        torch.testing.assert_close(t.f, exact.f.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t.g, exact.g.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t.plan, exact.plan.float(), rtol=1e-4, atol=1e-9)


@each_backend
def test_strong_costs_with_weak_marginals(backend):
    """Mass that is cheaper to destroy than to carry: the plan's entries fall below what float32 holds."""
    cost = 20 * random_problem(20, 15)[0].float() + 5
    for tau in ((0.05, 0.05), (0.05, None), (None, 0.1)):
        args = {"eps": 0.01, "n_iters": 30, "tau_a": tau[0], "tau_b": tau[1]}
        t = dk.sinkhorn(cost, **args, backend=backend)
        exact = dk.sinkhorn(cost.double(), **args, backend="reference")
        for result, expected in ((t.f, exact.f), (t.g, exact.g), (t.value, exact.value)):
            torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t.plan, exact.plan.float(), rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------- early stopping


@each_backend
@pytest.mark.parametrize("tau_a", [None, 0.5])
def test_each_problem_stops_at_its_own_first_iteration_below_tol(backend, tau_a):
    cost, _, _ = random_problem(4, 12, 10, dtype=torch.float32)
    cost = cost * torch.tensor([0.05, 0.5, 1.0, 20.0])[:, None, None]
    t = dk.sinkhorn(cost, eps=0.1, n_iters=50, tol=1e-4, tau_a=tau_a, backend=backend)
    assert t.n_iters.dtype == torch.int64 and t.error.dtype == torch.float32
    assert len(t.n_iters.unique()) >= 3 and t.n_iters[3] == 50
    for i, used in enumerate(t.n_iters.tolist()):
        at = dk.sinkhorn(cost[i], eps=0.1, n_iters=used, tau_a=tau_a, backend=backend)
        torch.testing.assert_close(t.plan[i], at.plan)
        torch.testing.assert_close(t.f[i], at.f)
        assert (at.error < 1.01e-4) == (used < 50)
        if 1 < used < 50:
            assert dk.sinkhorn(cost[i], eps=0.1, n_iters=used - 1, tau_a=tau_a, backend=backend).error >= 0.99e-4


@each_backend
def test_error_is_that_of_the_plan(backend):
    cost, a, b = random_problem(3, 14, 9, dtype=torch.float32)
    for n_iters in (1, 4, 50):
        t = dk.sinkhorn(cost, a, b, n_iters=n_iters, eps=0.02, backend=backend)
        truth = (t.plan.sum(-1) - a).abs().sum(-1) + (t.plan.sum(-2) - b).abs().sum(-1)
        torch.testing.assert_close(t.error, truth, rtol=1e-4, atol=5e-7)


@each_backend
def test_marginals_to_1e_6_with_tol(backend):
    for eps in (0.05, 5e-3):
        cost, a, b = random_problem(2, 60, 50, dtype=torch.float32)
        t = dk.sinkhorn(cost, a, b, eps=eps, tol=1e-6, n_iters=20_000, backend=backend)
        assert (t.n_iters < 20_000).all() and (t.error < 1.2e-6).all()
