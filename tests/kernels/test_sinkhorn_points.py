"""sinkhorn_points against sinkhorn on the cost of the points, with its gradients and its memory."""

import math
import subprocess
import sys

import pytest
import torch
from cpu_backends import each_backend, needs_cpp
from sinkhorn_problems import clouds_apart, normalised, points, random_problem

import dpdiff_kernels as dk
from dpdiff_kernels import reference


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
def test_cosine_of_zero_and_of_tiny_vectors(backend):
    """A zero vector has similarity 0 to all and gradient 0; a tiny one has a direction."""
    x, y = points(4, 5, 3, dtype=torch.float32)
    x[0], x[1] = 0, x[1] * 1e-15
    x.requires_grad_()
    u = dk.sinkhorn_points(x, y, metric="cosine", backend=backend)
    directions = torch.nn.functional.normalize(x.detach().double(), dim=-1, eps=1e-40)
    cost = 1 - directions @ torch.nn.functional.normalize(y.double(), dim=-1).mT
    torch.testing.assert_close(u.value, dk.sinkhorn(cost).value.float(), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(u.value, x)
    assert (grad[0] == 0).all() and grad[2:].isfinite().all() and (grad[2:] != 0).any()


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


TAUS = [(None, None), (0.5, None), (0.5, 0.8)]


@each_backend
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("n", "m"), [(6, 5), (50, 40)])
def test_near_points_without_weight_change_nothing(backend, tau, n, m):
    eps = 2e-3
    x, y, a, b = clouds_apart(n, m, eps)
    v = torch.randn(m, 3)
    for n_iters in (1, 2, 5):
        options = {"eps": eps, "n_iters": n_iters, "tau_a": tau[0], "tau_b": tau[1]}
        u = dk.sinkhorn_points(x, y, a, b, **options, backend=backend)
        exact = dk.sinkhorn_points(*(z.double() for z in (x, y, a, b)), **options)
        for name in ("f", "g", "value"):
            torch.testing.assert_close(getattr(u, name), getattr(exact, name).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(u.error, exact.error, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(u.apply(v), exact.apply(v).float(), rtol=2e-3, atol=2e-3)


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


def assert_gradients(results, expected, rtol, atol):
    """rtol: also of the largest entry. Where the reference has none, there is none, or zeros."""
    for z, w in zip(results, expected):
        if w is None:
            assert z is None or not z.any()
        else:
            torch.testing.assert_close(z.double(), w, rtol=rtol, atol=rtol * w.abs().max().item() + atol)


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
        assert_gradients(results, expected, rtol=2e-4, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("tau", TAUS)
def test_native_gradients_with_near_points_without_weight(tau):
    x, y, a, b = clouds_apart(20, 18, eps=2e-3)
    inputs = x, y, a, b, torch.randn(18, 3)
    options = {"eps": 2e-3, "n_iters": 3, "tau_a": tau[0], "tau_b": tau[1]}
    for outputs in (("value",), ("f", "g"), ("applied",)):
        results = points_gradients(inputs, "cpp", outputs, **options)
        expected = points_gradients([z.double() for z in inputs], "reference", outputs, **options)
        assert_gradients(results, expected, rtol=5e-3, atol=0.0)


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
