"""sinkhorn and sinkhorn_points against POT, against formulas written out, and against their own definition."""

import math
import os
import subprocess
import sys

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpdiff_kernels as dk
from dpdiff_kernels import reference

BACKENDS = [name for name in ("reference", "cpp") if dk.backends()[name]]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


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


# ------------------------------------------------------------------------------------------- special inputs


@each_backend
def test_zero_weights(backend):
    cost, a, b = random_problem(8, 6, dtype=torch.float32)
    keep_a, keep_b = torch.tensor([0, 2, 3, 5, 7]), torch.tensor([0, 1, 4])
    a, b = (torch.zeros_like(w).index_copy(0, k, w[k] / w[k].sum()) for w, k in ((a, keep_a), (b, keep_b)))
    for eps in (0.3, 0.05, 1e-3):
        t = dk.sinkhorn(cost, a, b, eps=eps, n_iters=7, backend=backend)
        small = dk.sinkhorn(cost[keep_a][:, keep_b], a[keep_a], b[keep_b], eps=eps, n_iters=7, backend=backend)
        before = dk.sinkhorn(cost[keep_a][:, keep_b], a[keep_a], b[keep_b], eps=eps, n_iters=6, backend=backend)
        torch.testing.assert_close(t.plan[keep_a][:, keep_b], small.plan)
        assert t.plan.sum().item() == pytest.approx(small.plan.sum().item())
        for x, y in ((t.f[keep_a], small.f), (t.g[keep_b], small.g), (t.value, small.value), (t.error, small.error)):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        # where a weight is zero, the potential is what the formula gives
        f = -eps * (((before.g.double() - cost[:, keep_b].double()) / eps) + b[keep_b].double().log()).logsumexp(1)
        g = -eps * (((small.f.double() - cost[keep_a].double().T) / eps) + a[keep_a].double().log()).logsumexp(1)
        torch.testing.assert_close(t.f, f.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(t.g, g.float(), rtol=1e-5, atol=1e-6)


@each_backend
def test_no_mass_at_all(backend):
    t = dk.sinkhorn(torch.rand(4, 3), torch.zeros(4), torch.zeros(3), backend=backend)
    assert not t.plan.any() and t.value == t.cost == t.error == 0


@each_backend
@pytest.mark.parametrize("total", [1e-6, 3.0, 1e5])
def test_unnormalised_weights(backend, total):
    cost, a, b = random_problem(9, 7, dtype=torch.float32)
    t = dk.sinkhorn(cost, total * a, total * b, n_iters=300, backend=backend)
    unit = dk.sinkhorn(cost, a, b, n_iters=300, backend=backend)
    torch.testing.assert_close(t.plan / total, unit.plan, rtol=1e-4, atol=1e-8)
    expected = objective(t.plan.double(), cost.double(), total * a.double(), total * b.double(), 0.05)
    assert t.value.item() == pytest.approx(expected.item(), rel=1e-4)


@each_backend
@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_infinite_costs_forbid_pairs(backend, eps):
    cost, a, b = random_problem(2, 10, 8, dtype=torch.float32)
    forbidden = torch.rand(2, 10, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    cost = cost.masked_fill(forbidden, math.inf)
    t = dk.sinkhorn(cost, a, b, eps=eps, n_iters=40, backend=backend)
    exact = dk.sinkhorn(cost.double(), a.double(), b.double(), eps=eps, n_iters=40, backend="reference")
    assert not t.plan[forbidden].any()
    torch.testing.assert_close(t.plan, exact.plan.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(t.cost, exact.cost.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(t.value, exact.value.float(), rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("eps", [0.05, 1e-3])
def test_infeasible_problems_say_so(backend, eps):
    cost, a, b = random_problem(3, 6, 5, dtype=torch.float32)
    cost[1, 2] = math.inf  # a row that can't be carried
    cost[2, :, 1] = math.inf  # a column that nothing reaches
    t = dk.sinkhorn(cost, a, b, eps=eps, n_iters=200, tol=1e-3, backend=backend)
    assert t.error[1] >= a[1, 2] * 0.99 and t.error[2] >= b[2, 1] * 0.99
    assert (t.value[1:] == math.inf).all() and (t.n_iters[1:] == 200).all()
    assert not t.plan[1, 2].any() and not t.plan[2, :, 1].any() and t.plan.isfinite().all()
    assert t.f[1, 2] == math.inf and t.g[2, 1] == math.inf and t.value[0].isfinite()
    # a relaxed marginal leaves that mass behind, and the problem has a solution
    t = dk.sinkhorn(cost, a, b, eps=eps, n_iters=20_000, tol=1e-4, tau_a=0.2, tau_b=0.2, backend=backend)
    assert (t.error < 1.1e-4).all() and t.value.isfinite().all()


@each_backend
def test_all_costs_infinite(backend):
    t = dk.sinkhorn(torch.full((3, 4), math.inf), backend=backend)
    assert not t.plan.any() and t.error == pytest.approx(2.0) and t.value == math.inf and t.cost == 0
    assert (t.f == math.inf).all() and (t.g == math.inf).all()


@each_backend
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["cost", "a", "b"])
def test_meaningless_input_makes_its_problem_nan_and_no_other(backend, bad, where):
    inputs = dict(zip(("cost", "a", "b"), random_problem(3, 5, 4, dtype=torch.float32)))
    expected = dk.sinkhorn(**inputs, tol=1e-3, backend=backend)
    inputs[where] = inputs[where].clone()
    inputs[where][1].view(-1)[2] = bad if where == "cost" else abs(bad)
    t = dk.sinkhorn(**inputs, tol=1e-3, backend=backend)
    for name, x, y in zip(t._fields, t, expected):
        torch.testing.assert_close(x[[0, 2]], y[[0, 2]])
        if name != "n_iters":
            assert x[1].isnan().all(), name


@each_backend
@pytest.mark.parametrize("constant", [0.0, -3.0, 1e6])
def test_constant_cost(backend, constant):
    _, a, b = random_problem(5, 4, dtype=torch.float32)
    t = dk.sinkhorn(torch.full((5, 4), constant), a, b, tol=1e-5, backend=backend)
    torch.testing.assert_close(t.plan, a[:, None] * b, rtol=1e-5, atol=0)
    assert t.n_iters == 1
    assert t.value.item() == pytest.approx(constant, rel=1e-5, abs=1e-6)


@each_backend
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (1, 3), (3, 1), (1, 1), (2, 0, 1, 1)])
def test_degenerate_shapes(backend, shape):
    cost = torch.rand(shape)
    t = dk.sinkhorn(cost, backend=backend)
    *batch, n, m = shape
    assert [x.shape for x in t] == [torch.Size(s) for s in (shape, (*batch, n), (*batch, m), *4 * (batch,))]
    if n and m:
        torch.testing.assert_close(t.plan.sum(-2), torch.full((*batch, m), 1 / m))
        torch.testing.assert_close(t.plan.sum(-1), torch.full((*batch, n), 1 / n), atol=1e-6, rtol=1e-5)
    elif n or m:  # the other side's mass can't be carried
        assert (t.error == 1).all() and (t.value == math.inf).all() and (t.cost == 0).all()
    else:
        assert (t.error == 0).all() and (t.value == 0).all()


@each_backend
@settings(deadline=None, max_examples=25)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 70),
    m=st.integers(1, 70),
    eps=st.sampled_from([1.0, 0.05, 1e-3]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_any_shape_and_stride(backend, batch, n, m, eps, layout):
    generator = torch.Generator().manual_seed(n * 71 + m)
    if layout == "transposed":
        cost = torch.rand(*batch, m, n, generator=generator).mT
    elif layout == "strided":
        cost = torch.rand(*batch, n, 2 * m, generator=generator)[..., ::2]
    elif layout == "expanded":
        cost = torch.rand(n, m, generator=generator).expand(*batch, n, m)
    else:
        cost = torch.rand(*batch, n, m, generator=generator)
    t = dk.sinkhorn(cost, eps=eps, n_iters=5, backend=backend)
    exact = dk.sinkhorn(cost.double(), eps=eps, n_iters=5, backend="reference")
    assert t.plan.shape == cost.shape and t.f.shape == cost.shape[:-1] and t.value.shape == cost.shape[:-2]
    torch.testing.assert_close(t.plan, exact.plan.float(), rtol=1e-4, atol=1e-6 / max(n, m))
    torch.testing.assert_close(t.f, exact.f.float(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- dtypes


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    cost, a, b = (x.to(dtype) for x in random_problem(2, 20, 16))
    t = dk.sinkhorn(cost, a, b, backend=backend)
    assert {x.dtype for x in (t.plan, t.f, t.g, t.cost, t.value, t.error)} == {torch.float32}
    exact = dk.sinkhorn(cost.double(), a.double(), (b.double() / b.double().sum(-1, True) * a.double().sum(-1, True)))
    torch.testing.assert_close(t.plan, exact.plan.float(), rtol=5e-2, atol=1e-5)
    uniform = torch.full((20,), 1 / 20, dtype=dtype)  # its sum is off by the rounding of 1 / 20
    dk.sinkhorn(cost, uniform, b.float().to(dtype), backend=backend)


def test_float64_runs_on_the_reference():
    t = dk.sinkhorn(torch.rand(3, 4, dtype=torch.float64))
    assert {x.dtype for x in (t.plan, t.f, t.g, t.cost, t.value)} == {torch.float64} and t.error.dtype == torch.float32


def test_autocast_promotes_to_the_widest():
    cost, a, _ = random_problem(5, 4, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"a has dtype .*bfloat16: expected .*float32, as cost has"):
        dk.sinkhorn(cost, a.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        t = dk.sinkhorn(cost, a.bfloat16(), tau_a=1.0)
        u = dk.sinkhorn_points(torch.rand(5, 3), torch.rand(4, 3).bfloat16())
        assert u.apply(torch.rand(4, 2).bfloat16()).shape == (5, 2)
    torch.testing.assert_close(t.plan, dk.sinkhorn(cost, a.bfloat16().float(), tau_a=1.0).plan)
    assert t.plan.dtype == u.value.dtype == torch.float32


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cost": torch.rand(3)}, ValueError, r"cost has shape \(3,\): expected \(..., N, M\)"),
        ({"cost": [[1.0]]}, TypeError, "cost is a list"),
        ({"cost": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "cost has dtype torch.int64"),
        ({"a": torch.rand(4)}, ValueError, r"a has shape \(4,\): expected \(5,\)"),
        ({"b": torch.rand(5)}, ValueError, r"b has shape \(5,\): expected \(4,\)"),
        ({"b": torch.full((4,), 0.5)}, ValueError, "a sums to 1 and b to 2 .problem 0 of 1.: expected equal masses"),
        ({"a": torch.tensor([-0.2, 0.3, 0.3, 0.3, 0.3])}, ValueError, "a has a weight of -0.2: expected none below 0"),
        ({"eps": 0}, ValueError, "eps is 0: expected a positive finite number"),
        ({"eps": math.nan}, ValueError, "eps is nan"),
        ({"eps": "1"}, TypeError, "eps is '1'"),
        ({"n_iters": 0}, ValueError, "n_iters is 0: expected at least 1"),
        ({"n_iters": 2.5}, TypeError, "n_iters is 2.5: expected an int"),
        ({"tol": -1e-3}, ValueError, "tol is -0.001"),
        ({"tau_a": 0.0}, ValueError, "tau_a is 0.0"),
        ({"tau_b": -1.0}, ValueError, "tau_b is -1.0"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.sinkhorn(**({"cost": torch.rand(5, 4)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.rand(3)}, ValueError, r"x has shape \(3,\)"),
        ({"y": torch.rand(4, 2)}, ValueError, r"y has shape \(4, 2\): expected \('M', 3\)"),
        ({"y": torch.rand(2, 4, 3)}, ValueError, "y has shape"),
        ({"y": torch.rand(4, 3).half()}, TypeError, "y has dtype torch.float16"),
        ({"metric": "dot"}, ValueError, "metric is 'dot': expected 'l2', 'cosine'"),
        ({"a": torch.ones(5)}, ValueError, "a sums to 5 and b to 1"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ],
)
def test_wrong_arguments_of_points(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.sinkhorn_points(**({"x": torch.rand(5, 3), "y": torch.rand(4, 3)} | arguments))
    u = dk.sinkhorn_points(torch.rand(2, 5, 3), torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match=r"v has shape \(4, 1\): expected \(2, 4, 'C'\)"):
        u.apply(torch.rand(4, 1))


# ------------------------------------------------------------------------------------------- gradients


def normalised(w):
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("tau", [(None, None), (0.8, None), (0.8, 1.5)])
@pytest.mark.parametrize("options", [{"n_iters": 3}, {"n_iters": 25, "tol": 1e-2}])
def test_gradcheck_of_the_iterations(tau, options):
    """plan, f, g and cost: exact, converged or not."""
    inputs = [x.requires_grad_() for x in random_problem(2, 4, 3)]

    def run(cost, a, b):
        return dk.sinkhorn(cost, normalised(a), normalised(b), eps=0.3, tau_a=tau[0], tau_b=tau[1], **options)[:4]

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("tau", [(None, None), (0.8, None), (None, 0.8), (0.8, 1.5)])
def test_gradcheck_of_the_value(tau):
    inputs = [x.requires_grad_() for x in random_problem(4, 3)]

    def run(cost, a, b):
        # sums other than 1, so that the masses' own terms are checked too
        return dk.sinkhorn(cost, 1.7 * normalised(a), 1.7 * normalised(b), 1.0, 30, tau_a=tau[0], tau_b=tau[1]).value

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@each_backend
def test_gradient_of_the_value_is_the_plan_and_the_potentials(backend):
    cost, a, b = (x.requires_grad_() for x in random_problem(2, 6, 5, dtype=torch.float32))
    t = dk.sinkhorn(cost, a, b, n_iters=400, backend=backend)
    t.value.backward(torch.tensor([1.0, -2.0]))
    sign = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(cost.grad, sign[:, None, None] * t.plan)
    torch.testing.assert_close(a.grad, sign[:, None] * t.f, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.grad, sign[:, None] * t.g, rtol=1e-4, atol=1e-6)


@each_backend
def test_gradients_with_zero_weights_and_forbidden_pairs_are_finite(backend):
    cost, a, b = random_problem(2, 6, 5, dtype=torch.float32)
    cost[0, 1, 2] = cost[1, 0, :4] = math.inf
    a[:, 3] = 0
    b[:, 4] = 0
    cost[1, 0] = math.inf  # a whole row
    inputs = [x.requires_grad_() for x in (cost, normalised(a), normalised(b))]
    t = dk.sinkhorn(*inputs, n_iters=5, backend=backend)
    outputs = [t.plan, t.cost, t.f.masked_fill(t.f == math.inf, 0), t.g.masked_fill(t.g == math.inf, 0)]
    grads = torch.autograd.grad([x.sin().sum() for x in outputs], inputs)
    assert all(x.isfinite().all() for x in grads)
    assert grads[0][0, 1, 2] == 0 and (grads[1][:, 3] == 0).all() and (grads[2][:, 4] == 0).all()


def gradients(inputs, backend, outputs=("plan", "f", "g", "cost", "value"), **options):
    """Gradients of a random functional of the outputs with respect to cost, a and b."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    t = dk.sinkhorn(*inputs, **options, backend=backend)
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for name in outputs:
        result = getattr(t, name)
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        total = total + (result.masked_fill(result == math.inf, 0) * weight).sum()
    return torch.autograd.grad(total, inputs)


def assert_gradients_agree(inputs, rtol=1e-4, **options):
    results = gradients(inputs, "cpp", **options)
    expected = gradients([x.double() for x in inputs], "reference", **options)
    for x, y in zip(results, expected):
        atol = rtol * y.abs().max().item() if y.numel() else 0.0
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=atol)


needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library is not there")


@needs_cpp
@pytest.mark.parametrize(
    "outputs", [("plan",), ("f",), ("g",), ("cost",), ("value",), ("plan", "f", "g", "cost", "value")]
)
@pytest.mark.parametrize("tau", [(None, None), (0.5, None), (None, 0.8), (0.5, 0.8)])
def test_native_gradients_agree_with_the_reference(outputs, tau):
    inputs = random_problem(2, 21, 18, dtype=torch.float32)
    for eps in (0.2, 0.01):
        assert_gradients_agree(inputs, outputs=outputs, eps=eps, n_iters=6, tau_a=tau[0], tau_b=tau[1])


@needs_cpp
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 40, 33), (0, 3, 4), (2, 0, 4), (3, 4, 0)])
def test_native_gradients_of_any_shape(shape):
    assert_gradients_agree(
        random_problem(*shape, dtype=torch.float32), outputs=("plan", "f", "g", "cost"), eps=0.1, n_iters=4
    )


@needs_cpp
def test_native_gradients_at_small_eps():
    assert_gradients_agree(random_problem(2, 30, 25, dtype=torch.float32), eps=1e-3, n_iters=12, rtol=1e-3)


@needs_cpp
def test_native_gradients_of_problems_that_stop_early():
    cost, a, b = random_problem(3, 12, 10, dtype=torch.float32)
    cost = cost * torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    assert_gradients_agree((cost, a, b), eps=0.1, n_iters=30, tol=1e-2)


@needs_cpp
@pytest.mark.parametrize("tau", [(None, None), (0.5, 0.8)])
def test_native_gradients_with_zero_weights_and_forbidden_pairs(tau):
    cost, a, b = random_problem(2, 12, 10, dtype=torch.float32)
    cost[0, 1, 2:5] = cost[1, 3] = cost[1, :, 4] = math.inf
    a[:, 5] = b[:, 7] = 0
    inputs = cost, normalised(a), normalised(b)
    assert_gradients_agree(inputs, outputs=("plan", "f", "g", "cost"), eps=0.1, n_iters=5, tau_a=tau[0], tau_b=tau[1])


@needs_cpp
def test_native_gradients_of_large_problems_run_in_chunks():
    assert_gradients_agree(random_problem(300, 500, dtype=torch.float32), eps=0.1, n_iters=3, rtol=1e-3)


@needs_cpp
def test_second_derivatives():
    """Of value they are there; of the rest an error says where."""
    inputs = [x.requires_grad_() for x in random_problem(5, 4, dtype=torch.float32)]

    def hessian_product(backend, inputs):
        value = dk.sinkhorn(*inputs, eps=0.3, n_iters=60, backend=backend).value
        first = torch.autograd.grad(value, inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    for x, y in zip(hessian_product("cpp", inputs), hessian_product("reference", doubles)):
        torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-5)
    plan = dk.sinkhorn(*inputs, n_iters=3).plan
    (grad,) = torch.autograd.grad(plan.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


def test_backward_stores_no_plan_per_iteration():
    cost = torch.rand(50, 40, dtype=torch.float64, requires_grad=True)
    counts = []
    for n_iters in (3, 30):
        stored = set()

        def note(t, stored=stored):
            if t.numel() == cost.numel():
                stored.add(t.untyped_storage().data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            t = dk.sinkhorn(cost, n_iters=n_iters)
        counts.append(len(stored))
        t.plan.sum().backward()
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------- points


def points(n, m, d, *batch, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=generator, dtype=dtype)
    return x, torch.randn(*batch, m, d, generator=generator, dtype=dtype) + 0.5


def cost_of(x, y, metric):
    if metric == "l2":
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return 1 - torch.nn.functional.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1)


@each_backend
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("tau", [(None, None), (0.9, None), (0.9, 2.0)])
def test_points_agree_with_their_cost(backend, metric, tau, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", 100)
    x, y = points(21, 17, 6, 2, dtype=torch.float32)
    _, a, b = random_problem(2, 21, 17, dtype=torch.float32)
    v = torch.randn(2, 17, 3)
    cost = cost_of(x, y, metric)
    for eps in (1.0, 0.05, 1e-4 * cost.max().item()):
        args = {"eps": eps, "n_iters": 15, "tau_a": tau[0], "tau_b": tau[1]}
        u = dk.sinkhorn_points(x, y, a, b, metric=metric, **args, backend=backend)
        t = dk.sinkhorn(cost_of(x.double(), y.double(), metric), a.double(), b.double(), **args)
        scale = cost.max().item()
        for name in ("f", "g", "value"):
            torch.testing.assert_close(getattr(u, name), getattr(t, name).float(), rtol=1e-5, atol=3e-6 * scale)
        # a float32 cost is off by 1e-7 of its largest entry, and so is what a plan makes of it
        noise = max(1e-5, 3e-6 * scale / eps)
        torch.testing.assert_close(u.error, t.error, rtol=noise, atol=noise)
        applied = t.plan @ v.double()
        torch.testing.assert_close(u.apply(v).double(), applied, rtol=noise, atol=noise * applied.abs().max().item())


@each_backend
def test_points_stop_early_and_report(backend):
    x, y = points(30, 20, 4, 3, dtype=torch.float32)
    x = x * torch.tensor([0.1, 1.0, 4.0])[:, None, None]
    u = dk.sinkhorn_points(x, y, eps=1.0, n_iters=40, tol=1e-4, backend=backend)
    t = dk.sinkhorn(cost_of(x.double(), y.double(), "l2"), eps=1.0, n_iters=40, tol=1e-4)
    assert u.n_iters.tolist() == t.n_iters.tolist() and len(u.n_iters.unique()) > 1
    torch.testing.assert_close(u.error, t.error, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_gradcheck_of_points(metric, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", 4)
    inputs = [z.requires_grad_() for z in (*points(4, 3, 2), *random_problem(4, 3)[1:], torch.rand(3, 2).double())]

    def run(x, y, a, b, v):
        u = dk.sinkhorn_points(x, y, normalised(a), normalised(b), 0.8, 2, metric=metric)
        return u.f, u.g, u.apply(v)

    def value(x, y, a, b, v):
        return dk.sinkhorn_points(x, y, normalised(a), normalised(b), 5.0, 20, metric=metric).value

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(value, [*inputs[:4], inputs[4].detach()])


def points_gradients(inputs, backend, outputs, **options):
    x, y, a, b, v = inputs = [z.detach().clone().requires_grad_() for z in inputs]
    u = dk.sinkhorn_points(x, y, a, b, **options, backend=backend)
    results = {"value": u.value, "f": u.f, "g": u.g, "applied": u.apply(v)}
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for name in outputs:
        weight = torch.randn(results[name].shape, generator=generator, dtype=torch.float64)
        total = total + (results[name] * weight).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True)


@needs_cpp
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("outputs", [("value",), ("f",), ("g",), ("applied",), ("value", "f", "g", "applied")])
@pytest.mark.parametrize("tau", [(None, None), (0.9, 2.0)])
def test_native_gradients_of_points_agree_with_the_reference(metric, outputs, tau):
    for batch, n, m, d in ((2, 21, 18, 5), (1, 300, 270, 3), (2, 1, 3, 2)):
        _, a, b = random_problem(batch, n, m, dtype=torch.float32)
        inputs = *points(n, m, d, batch, dtype=torch.float32), a, b, torch.randn(batch, m, 4)
        options = {"eps": 0.3, "n_iters": 4, "metric": metric, "tau_a": tau[0], "tau_b": tau[1]}
        results = points_gradients(inputs, "cpp", outputs, **options)
        expected = points_gradients([z.double() for z in inputs], "reference", outputs, **options)
        for z, w in zip(results, expected):
            if w is None:
                assert z is None or not z.any()
            else:
                torch.testing.assert_close(z.double(), w, rtol=2e-4, atol=2e-4 * w.abs().max().item() + 1e-5)


@needs_cpp
def test_points_never_hold_the_cost():
    """Peak memory of a process that solves 4,000 x 4,000 (64 MB of cost) and differentiates its value."""
    code = """
import resource, torch, dpdiff_kernels as dk
torch.set_num_threads(1)
x, y = torch.rand(4000, 3, requires_grad=True), torch.rand(4000, 3)
dk.sinkhorn_points(x[:64], y[:64], n_iters=2).value.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
u = dk.sinkhorn_points(x, y, n_iters=2)
(u.value + u.apply(y).sum()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16 * 1024  # kB


@each_backend
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_points_bad_input(backend, metric):
    x, y = points(5, 4, 3, 3, dtype=torch.float32)
    expected = dk.sinkhorn_points(x, y, metric=metric, backend=backend)
    x = x.clone()
    x[1, 2, 0] = math.nan
    u = dk.sinkhorn_points(x, y, metric=metric, backend=backend)
    for name in ("f", "g", "value", "error"):
        assert getattr(u, name)[1].isnan().all()
        torch.testing.assert_close(getattr(u, name)[[0, 2]], getattr(expected, name)[[0, 2]])
    x[1, 2] = 0  # cosine of a zero vector: similar to nothing
    assert dk.sinkhorn_points(x, y, metric=metric, backend=backend).value.isfinite().all()


@each_backend
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 4, 0), (1, 1, 1, 1)])
def test_points_degenerate_shapes(backend, shape):
    b, n, m, d = shape
    u = dk.sinkhorn_points(torch.rand(b, n, d), torch.rand(b, m, d), backend=backend)
    assert [z.shape for z in u[:5]] == [torch.Size(s) for s in ((b,), (b, n), (b, m), (b,), (b,))]
    assert u.apply(torch.rand(b, m, 2)).shape == (b, n, 2)


# ------------------------------------------------------------------------------------------- torch's machinery

# the reference is a long graph of torch's own operators: tracing it is what there is to test
COMPILER = {"reference": "aot_eager", "cpp": "inductor"}


@each_backend
@pytest.mark.parametrize("tol", [None, 1e-2])
def test_compiles_whole_with_dynamic_shapes(backend, tol):
    def run(cost, a):
        t = dk.sinkhorn(cost, a, n_iters=2, eps=0.3, tol=tol, backend=backend)
        return t.plan, t.f, t.value, t.n_iters

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=COMPILER[backend])
    for shape in ((2, 9, 7), (3, 12, 5)):
        cost, a, _ = random_problem(*shape, dtype=torch.float32)
        cost.requires_grad_()
        expected = run(cost, a)
        result = compiled(cost, a)
        for x, y in zip(result, expected):
            torch.testing.assert_close(x, y)
        grads = [torch.autograd.grad((r[0].sin().sum(), r[2].sum()), cost)[0] for r in (result, expected)]
        torch.testing.assert_close(*grads)


@each_backend
def test_points_compile(backend):
    def run(x, y, v):
        u = dk.sinkhorn_points(x, y, n_iters=2, eps=0.5, backend=backend)
        return u.value, u.apply(v)

    x, y = points(9, 7, 3, 2, dtype=torch.float32)
    v = torch.rand(2, 7, 2)
    compiled = torch.compile(run, fullgraph=True, backend=COMPILER[backend])
    for result, expected in zip(compiled(x, y, v), run(x, y, v)):
        torch.testing.assert_close(result, expected)


@each_backend
def test_exports(backend):
    class Model(torch.nn.Module):
        def forward(self, cost, x, y):
            t = dk.sinkhorn(cost, n_iters=3, backend=backend)
            u = dk.sinkhorn_points(x, y, n_iters=3, backend=backend)
            return t.plan, t.value, u.value

    cost = torch.rand(2, 6, 5)
    inputs = (cost, *points(6, 5, 3, 2, dtype=torch.float32))
    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    inputs = tuple(torch.cat([z, z, z]) for z in inputs)
    for result, expected in zip(program.module()(*inputs), Model()(*inputs)):
        torch.testing.assert_close(result, expected)


@needs_cpp
@pytest.mark.parametrize("shape", [(2, 6, 5), (0, 3, 4), (1, 0, 2)])
def test_opcheck(shape):
    cost, a, b = (x.requires_grad_() for x in random_problem(*shape, dtype=torch.float32))
    for tol, tau, plan in ((None, None, True), (1e-2, 0.5, False)):
        if not plan:
            cost = cost.detach()
            a, b = a.detach(), b.detach()
        torch.library.opcheck(torch.ops.dpdiff.sinkhorn.default, (cost, a, b, 0.1, 4, tol, tau, tau, plan))
    used = torch.full(shape[:1], 4)
    args = cost, a, b, used, torch.rand(shape), torch.rand(a.shape), None, torch.rand(shape[:1]), 0.1, 4, None, 0.5
    torch.library.opcheck(torch.ops.dpdiff.sinkhorn_backward.default, args)


@needs_cpp
@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (0, 3, 4, 2), (1, 0, 2, 1), (1, 2, 3, 0)])
def test_opcheck_of_points(shape):
    batch, n, m, d = shape
    _, a, b = random_problem(batch, n, m, dtype=torch.float32)
    x, y = (z.requires_grad_() for z in points(n, m, d, batch, dtype=torch.float32))
    ops = torch.ops.dpdiff
    torch.library.opcheck(ops.sinkhorn_points.default, (x, y, a, b, 0.5, 3, 1e-3, None, 0.7, "l2"))
    h_x, h_y = torch.randn(batch, n).double(), torch.randn(batch, m).double().requires_grad_()
    v = torch.randn(batch, m, 2, requires_grad=True)
    torch.library.opcheck(ops.sinkhorn_apply.default, (x, y, h_x, h_y, v, 0.5, "cosine"))
    x, y, h_y, v = (z.detach() for z in (x, y, h_y, v))
    used = torch.full((batch,), 3)
    args = x, y, a, b, used, torch.randn(batch, n), None, 0.5, 3, None, 0.7, "l2"
    torch.library.opcheck(ops.sinkhorn_points_backward.default, args)
    torch.library.opcheck(
        ops.sinkhorn_apply_backward.default, (torch.randn(batch, n, 2), x, y, h_x, h_y, v, 0.5, "cosine")
    )


ON_ONE_INSTRUCTION_SET = """
import sys, torch, dpdiff_kernels as dk
assert torch.ops.dpdiff.cpu_capability() == sys.argv[1], torch.ops.dpdiff.cpu_capability()
inputs = torch.load(sys.argv[2], weights_only=True)
results = []
for options in ({"eps": 0.1}, {"eps": 1e-3, "n_iters": 20}, {"eps": 1e-4, "tau_a": 0.5, "n_iters": 10}):
    leaves = [x.clone().requires_grad_() for x in inputs]
    t = dk.sinkhorn(*leaves, **options, backend="cpp")
    grads = torch.autograd.grad(t.plan.square().sum() + t.value.sum(), leaves)
    results.append([x.detach() for x in (*t, *grads)])
torch.save(results, sys.argv[3])
"""


@needs_cpp
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    inputs = random_problem(2, 37, 29, dtype=torch.float32)
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [
        sys.executable,
        "-c",
        ON_ONE_INSTRUCTION_SET,
        capability,
        tmp_path / "inputs.pt",
        tmp_path / "results.pt",
    ]
    run = subprocess.run(
        command, env={**os.environ, "DPDIFF_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False
    )
    if "AssertionError" in run.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert run.returncode == 0, run.stderr
    all_results = torch.load(tmp_path / "results.pt", weights_only=True)
    all_options = ({"eps": 0.1}, {"eps": 1e-3, "n_iters": 20}, {"eps": 1e-4, "tau_a": 0.5, "n_iters": 10})
    for results, options in zip(all_results, all_options):
        leaves = [x.double().requires_grad_() for x in inputs]
        t = dk.sinkhorn(*leaves, **options)
        grads = torch.autograd.grad(t.plan.square().sum() + t.value.sum(), leaves)
        for name, x, y in zip((*t._fields, "grad_cost", "grad_a", "grad_b"), results, (*t, *grads)):
            rtol = 2e-3 if name.startswith("grad") and options["eps"] < 0.01 else 1e-4
            atol = rtol * y.abs().max().item() if name.startswith("grad") else 2e-6
            torch.testing.assert_close(
                x.double(), y.detach().double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@needs_cpp
@pytest.mark.parametrize("shape", [(5, 40, 30), (1, 700, 600)])
def test_same_bits_on_any_number_of_threads(shape):
    inputs = random_problem(*shape, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            leaves = [x.clone().requires_grad_() for x in inputs]
            t = dk.sinkhorn(*leaves, eps=5e-3, n_iters=10, backend="cpp")
            results.append([*t, *torch.autograd.grad(t.plan.square().sum() + t.value.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@each_backend
def test_same_bits_every_time(backend):
    cost, a, b = random_problem(3, 100, 37, dtype=torch.float32)
    first = dk.sinkhorn(cost, a, b, eps=1e-3, tol=1e-5, backend=backend)
    second = dk.sinkhorn(cost.clone(), a.clone(), b.clone(), eps=1e-3, tol=1e-5, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(first, second))
