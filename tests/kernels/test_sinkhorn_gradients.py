"""Gradients of sinkhorn: the reference's by finite differences, the native ones against the reference's."""

import math

import pytest
import torch
from cpu_backends import each_backend, needs_cpp
from sinkhorn_problems import normalised, random_problem

import dpdiff_kernels as dk


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
@pytest.mark.parametrize("tau", [(None, None), (0.5, 0.8)])
def test_native_gradients_of_pairs_far_nearer_than_those_with_weight(tau):
    """Neither end of which has weight: their plan is 0, though nothing bounds exp((f + g - cost) / eps)."""
    cost, a, b = random_problem(2, 12, 10, dtype=torch.float32)
    cost[:, 5, 7] = -20
    a[:, 5] = b[:, 7] = 0
    inputs = 3 * cost, normalised(a), normalised(b)
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
