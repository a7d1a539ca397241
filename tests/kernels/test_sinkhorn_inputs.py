"""sinkhorn of what isn't a dense float32 problem of normalised weights: zeros, infinities, any shape, any dtype."""

import math

import pytest
import torch
from cpu_backends import each_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkhorn_problems import clouds_apart, objective, random_problem

import dpdiff_kernels as dk

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
@pytest.mark.parametrize("tau", [(None, None), (0.5, None), (0.5, 0.8)])
@pytest.mark.parametrize(("n", "m"), [(6, 5), (50, 40)])
def test_near_columns_without_weight_change_nothing(backend, tau, n, m):
    eps = 2e-3
    x, y, a, b = clouds_apart(n, m, eps)
    cost = torch.cdist(x.double(), y.double()).square().float()
    for n_iters in (1, 2, 5):
        options = {"eps": eps, "n_iters": n_iters, "tau_a": tau[0], "tau_b": tau[1]}
        inputs = [z.clone().requires_grad_() for z in (cost, a, b)]
        wide = [z.double().requires_grad_() for z in (cost, a, b)]
        t = dk.sinkhorn(*inputs, **options, backend=backend)
        exact = dk.sinkhorn(*wide, **options)
        for name in ("f", "g", "value", "cost", "error"):
            torch.testing.assert_close(getattr(t, name), getattr(exact, name).float(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(t.plan, exact.plan.float(), rtol=0, atol=1e-4 * exact.plan.max().item())
        for names in (("value",), ("f", "g"), ("plan", "cost")):
            grads, expected = (
                torch.autograd.grad(sum(getattr(r, name).sin().sum() for name in names), z, retain_graph=True)
                for r, z in ((t, inputs), (exact, wide))
            )
            for z, w in zip(grads, expected):
                torch.testing.assert_close(z.double(), w.double(), rtol=1e-3, atol=1e-3 * w.abs().max().item())


@each_backend
@pytest.mark.parametrize(
    "seed", [14, 53, 686, 968, 1489]
)  # sums of zero weights beyond float32, and lost in capped ones
def test_relaxed_zero_weights(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(1, 20, (), generator=generator)) for _ in "nm")
    cost, *weights = (torch.rand(*shape, generator=generator) for shape in ((n, m), (n,), (m,)))
    a, b = (w * (torch.rand(len(w), generator=generator) > 0.3) for w in weights)
    a, b = a / a.sum(), b / b.sum()
    options = {"eps": 1e-4, "tau_a": 1e-2} if seed % 2 else {"eps": 1e-3, "tau_a": 1e-3, "tau_b": 1e-2}
    t = dk.sinkhorn(cost, a, b, n_iters=30, **options, backend=backend)
    exact = dk.sinkhorn(cost.double(), a.double(), b.double(), n_iters=30, **options)
    for name in ("f", "g", "value", "error"):
        torch.testing.assert_close(getattr(t, name), getattr(exact, name).float(), rtol=1e-5, atol=1e-5)


@each_backend
def test_a_padded_row_takes_no_part_in_the_gradient(backend):
    cost, weights = torch.rand(2, 3, 4), torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    cost[:, 2] = math.inf
    a = (weights / weights.sum()).expand(2, 3)
    (grad,) = torch.autograd.grad(dk.sinkhorn(cost, a, backend=backend).value.sum(), weights)
    kept = weights[:2].detach().requires_grad_()
    a = (kept / kept.sum()).expand(2, 2)
    (expected,) = torch.autograd.grad(dk.sinkhorn(cost[:, :2], a, backend=backend).value.sum(), kept)
    torch.testing.assert_close(grad[:2], expected, rtol=1e-5, atol=1e-6)


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
