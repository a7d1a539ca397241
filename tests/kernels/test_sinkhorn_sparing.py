"""Iterations that can't change a plan any more are spared: results are those of all of them, whether a problem
converges fast, slowly, only in its plan, or not at all."""

import pytest
import torch
from cpu_backends import needs_cpp
from sinkhorn_problems import normalised, random_problem
from torch.testing import assert_close

import dpdiff_kernels as dk

pytestmark = needs_cpp
# many to a vector, a few at a time, alone, and alone with a width of its own
SHAPES = [(12, 10), (32, 32), (130, 40), (70, 300)]
SCALES = torch.logspace(-1, 1.5, 24)


def assert_as_all(cost, a, b, eps, n_iters, relative=2e-5, shift=2**-20, **options):
    """relative: of each entry of the plan; shift: of all of f against all of g, in units of eps, for each iteration."""
    options |= {"eps": eps, "n_iters": n_iters}
    found = dk.sinkhorn(cost, a, b, **options, backend="cpp")
    wanted = dk.sinkhorn(cost.double(), a.double(), b.double(), **options, backend="reference")
    assert torch.equal(found.n_iters, wanted.n_iters)
    seen = wanted.plan > 1e-30
    assert_close(found.plan.double()[seen], wanted.plan[seen], rtol=relative, atol=0)
    off = [(getattr(found, name) - getattr(wanted, name)).nan_to_num() for name in ("f", "g")]  # infinite alike
    for x, sign in zip(off, (1, -1)):
        between = sign * off[0].median(-1, keepdim=True).values
        assert between.abs().max() <= 2e-6 + shift * eps * n_iters
        assert_close(
            x, between.expand_as(x), rtol=0, atol=eps * relative + 2e-7 * cost[cost < torch.inf].abs().max().item()
        )
    for name in ("value", "cost"):
        assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    assert_close(found.error, wanted.error.float(), rtol=1e-2, atol=2e-6)


def in_float32(w):
    """Weights in float32 whose sums agree as those in float64 do."""
    return normalised(w.double()).float()


@pytest.mark.parametrize("tau", [(None, None), (0.3, None), (None, 0.3), (2.0, 0.3)])
@pytest.mark.parametrize("n_iters", [1, 2, 9, 20, 50, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_problems_that_end_each_at_another_iteration(shape, n_iters, tau):
    cost, a, b = random_problem(len(SCALES), *shape, dtype=torch.float32)
    cost *= SCALES[:, None, None]
    assert_as_all(cost, a, b, 0.5, n_iters, tau_a=tau[0], tau_b=tau[1])


@pytest.mark.parametrize("n_iters", [20, 100, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_slow_convergence(shape, n_iters):
    """Long waves on a line, where every iteration changes little and all together much; and parts that are almost
    apart, between which a step of an iteration is as small as that of float32."""
    n, m = shape
    line = (torch.linspace(0, 1, n)[:, None] - torch.linspace(0, 1, m)).square()
    apart, a, b = random_problem(n, m, dtype=torch.float32)
    far = torch.arange(n)[:, None].ge(n // 2) != torch.arange(m).ge(m // 2)
    cost = torch.stack([line, 3 * line, apart + 5 * far, apart + 8 * far])
    a, b = a.expand(len(cost), n).clone(), b.expand(len(cost), m).clone()
    a[3, : n // 2] *= b[3, : m // 2].sum() / a[3, : n // 2].sum()  # nearly nothing has to go from part to part
    a[3, n // 2 :] *= b[3, m // 2 :].sum() / a[3, n // 2 :].sum()
    for eps in (0.5, 0.05):
        assert_as_all(cost * eps * 10, in_float32(a), in_float32(b), eps, n_iters, relative=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_potentials_that_move_though_the_plan_does_not(shape):
    """What is infeasible, or of masses that differ a little, shifts f and g against each other in every iteration."""
    cost, a, b = random_problem(2, *shape, dtype=torch.float32)
    b[0] *= 1 + 8e-6
    cost[1, :, 0] = torch.inf
    assert_as_all(cost, a, b, 0.5, 200, shift=1e-7)


def test_a_tolerance_is_reached_where_it_can_be():
    cost, a, b = random_problem(64, 130, 40, dtype=torch.float32)
    cost *= torch.logspace(0.5, 1.2, 64)[:, None, None]
    options = {"eps": 0.5, "n_iters": 50, "tol": 1e-6}
    found = dk.sinkhorn(cost, a, b, **options, backend="cpp")
    wanted = dk.sinkhorn(cost.double(), in_float32(a).double(), in_float32(b).double(), **options, backend="reference")
    assert (found.n_iters - wanted.n_iters).abs().max() <= 1


@pytest.mark.parametrize("tau", [(None, None), (0.3, None), (2.0, 0.3)])
@pytest.mark.parametrize("outputs", [("plan",), ("f",), ("g", "cost")])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_problems_that_end_each_at_another_iteration(shape, outputs, tau):
    grads = []
    for backend, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        cost, a, b = random_problem(6, *shape, dtype=torch.float64)
        cost *= torch.logspace(-1, 1.5, 6)[:, None, None]
        inputs = [x.to(dtype).requires_grad_() for x in (cost, a, b)]
        t = dk.sinkhorn(*inputs, eps=0.5, n_iters=100, tau_a=tau[0], tau_b=tau[1], backend=backend)
        generator = torch.Generator().manual_seed(0)
        results = [getattr(t, name) for name in outputs]
        loss = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in results)
        grads.append(torch.autograd.grad(loss, inputs))
    for found, wanted in zip(*grads):
        largest = wanted.abs().amax(tuple(range(1, wanted.dim())), keepdim=True)
        assert_close(found.double() / largest, wanted / largest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["plan", "f", "cost"])
def test_the_backward_pass_is_of_all_iterations(name):
    """At their fixed point from the start, iterations move nothing, while the derivative converges in its own time."""
    grads = []
    for backend, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        alike = (torch.arange(30)[:, None] - torch.arange(40)).remainder(10).to(dtype) / 10  # all rows, and all columns
        cost = alike.requires_grad_()
        assert dk.sinkhorn(cost.detach(), eps=0.02, n_iters=1).error < 1e-6
        result = getattr(dk.sinkhorn(cost, eps=0.02, n_iters=60, backend=backend), name)
        direction = torch.rand(result.shape, generator=torch.Generator().manual_seed(0))
        grads += torch.autograd.grad((result * direction).sum(), cost)
    assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-6 * grads[1].abs().max().item())
