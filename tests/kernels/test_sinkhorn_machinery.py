"""sinkhorn and sinkhorn_points in torch's machinery, on every instruction set and on any number of threads."""

import os
import subprocess
import sys

import pytest
import torch
from cpu_backends import each_backend, needs_cpp
from sinkhorn_problems import points, random_problem
from torch._subclasses.fake_tensor import FakeTensorMode

import dpdiff_kernels as dk

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


@needs_cpp
@pytest.mark.parametrize("shape", [(13, 7), (8, 16), (33, 20), (32, 32), (30, 41), (9, 120), (130, 5), (64, 64)])
def test_small_problems_are_solved_together_as_they_are_alone(shape):
    """To the bit, whatever their neighbours are: such too that need stabilising, weigh nothing or have no solution."""
    cost, a, b = random_problem(21, *shape, dtype=torch.float32)
    cost[3] *= 100  # exponents up to 2,000
    cost[4] -= 1000
    cost[5, 2] = torch.nan
    cost[6, :, 1] = torch.inf
    a[7, 0], a[7, 1] = 0, a[7, :2].sum()
    a[8] = b[8] = 0
    cost[9], a[9] = 0, torch.full(shape[:1], 1 / shape[0])
    cost[10] -= 0.5
    a[11], b[11] = a[11] * 1e-7, b[11] * 1e-7
    together = dk.sinkhorn(cost, a, b, eps=0.05, n_iters=60, backend="cpp")
    for i in range(len(cost)):
        alone = dk.sinkhorn(cost[i], a[i], b[i], eps=0.05, n_iters=60, backend="cpp")
        for name, result in alone._asdict().items():
            assert torch.equal(result.nan_to_num(nan=-1), getattr(together, name)[i].nan_to_num(nan=-1)), (i, name)
    exact = dk.sinkhorn(cost.double(), a.double(), b.double(), eps=0.05, n_iters=60, backend="reference")
    for name in ("plan", "f", "g", "value", "cost"):
        ours, wanted = getattr(together, name).double(), getattr(exact, name)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-5, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("eps", [0.05, 2e-3, 1e-5])
def test_the_kernel_of_a_large_problem_is_in_the_memory_of_its_plan(eps):
    cost, a, b = random_problem(1, 1040, 1024, dtype=torch.float32)
    inside = dk.sinkhorn(cost, a, b, eps=eps, n_iters=12, backend="cpp")
    elsewhere = dk.sinkhorn(cost, a, b, eps=eps, n_iters=12, return_plan=False, backend="cpp")
    for name, result in elsewhere._asdict().items():
        assert result is None or torch.equal(result, getattr(inside, name)), name
    exact = dk.sinkhorn(cost.double(), a.double(), b.double(), eps=eps, n_iters=12, backend="reference")
    largest = exact.plan.max().item()
    torch.testing.assert_close(inside.plan.double(), exact.plan, rtol=1e-3, atol=1e-4 * largest)


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


@each_backend
def test_exports_for_any_numbers_of_rows_and_columns(backend):
    class Model(torch.nn.Module):
        def forward(self, cost):
            return dk.sinkhorn(cost, n_iters=3, backend=backend).value

    every = dict(enumerate(map(torch.export.Dim, ("batch", "n", "m"))))
    program = torch.export.export(Model(), (torch.rand(2, 6, 5),), dynamic_shapes=(every,))
    cost = torch.rand(3, 4, 600)  # more columns than CUDA C++ would be chosen for
    torch.testing.assert_close(program.module()(cost), Model()(cost))


@each_backend
def test_fake_tensors_and_vmap_see_no_numbers(backend):
    cost, a, b = torch.rand(2, 6, 5), torch.full((6,), 1 / 6), torch.full((5,), 1 / 5)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (cost, a, b)]
        assert dk.sinkhorn(*fakes, tol=1e-3, backend=backend).plan.shape == cost.shape
    if backend == "cpp":  # vmap takes no autograd.Function of the reference's
        values = torch.vmap(lambda one: dk.sinkhorn(one, a, b, backend=backend).value)(cost)
        assert torch.equal(values, dk.sinkhorn(cost, a, b, backend=backend).value)


def test_meta_tensors():
    cost, x = torch.rand(2, 6, 5, device="meta"), torch.rand(6, 3, device="meta")
    assert dk.sinkhorn(cost).plan.shape == cost.shape
    assert dk.sinkhorn_points(x, x).f.shape == (6,)


@needs_cpp
def test_opcheck_of_transposed_inputs():
    ops = torch.ops.dpdiff
    cost, a, b = random_problem(2, 6, 5, dtype=torch.float32)
    turned = [x.mT.contiguous().mT for x in (cost, a, b)]
    torch.library.opcheck(ops.sinkhorn.default, (*turned, 0.1, 4, None, None, None, True), test_utils="test_faketensor")
    x, y = (z.mT.contiguous().mT for z in points(6, 5, 3, 2, dtype=torch.float32))
    options = 0.1, 4, None, None, None, "l2"
    torch.library.opcheck(ops.sinkhorn_points.default, (x, y, *turned[1:], *options), test_utils="test_faketensor")


@needs_cpp
@pytest.mark.parametrize("shape", [(2, 6, 5), (0, 3, 4), (1, 0, 2)])
def test_opcheck(shape):
    cost, a, b = (x.requires_grad_() for x in random_problem(*shape, dtype=torch.float32))
    for tol, tau, plan in ((None, None, True), (1e-2, 0.5, False)):
        torch.library.opcheck(torch.ops.dpdiff.sinkhorn.default, (cost, a, b, 0.1, 4, tol, tau, tau, plan))
    used = torch.full(shape[:1], 4)
    cost, a, b = (x.detach() for x in (cost, a, b))
    args = cost, a, b, used, torch.rand(shape), torch.rand(a.shape), None, torch.rand(shape[:1]), 0.1, 4, None, 0.5
    torch.library.opcheck(torch.ops.dpdiff.sinkhorn_backward.default, args)
    args = torch.rand(shape[:1], requires_grad=True), torch.rand(shape, requires_grad=True), cost, a, b, a, b, 0.1
    torch.library.opcheck(torch.ops.dpdiff.sinkhorn_value_backward.default, args)


def value_gradient(cost, a, b, eps, **options):
    """The gradient of value, random gradient of value, and plan, by one call of the operator."""
    t = dk.sinkhorn(cost, a, b, eps=eps, backend="cpp", **options)
    of_value = torch.randn(len(cost))
    return torch.ops.dpdiff.sinkhorn_value_backward(of_value, t.plan, cost, a, b, t.f, t.g, eps), of_value, t.plan


@needs_cpp
@pytest.mark.parametrize("shape", [(5, 37, 29), (3, 1024, 700), (33, 250, 257)])  # the larger two pass by the caches
def test_gradient_of_value_is_the_plan_times_its_gradient(shape):
    found, of_value, plan = value_gradient(*random_problem(*shape, dtype=torch.float32), 0.05)
    torch.testing.assert_close(found, of_value[:, None, None] * plan, rtol=0, atol=0)


@needs_cpp
@pytest.mark.parametrize("eps", [0.3, 0.05, 0.001])  # the last one's exponents are too large to make a plan again
@pytest.mark.parametrize("tau", [None, 0.5])
def test_gradient_of_value_from_plans_made_again(eps, tau):
    cost, a, b = random_problem(9, 1000, 240, dtype=torch.float32)
    cost[0, :7, :9] = torch.inf
    a[1, :3] = b[1, -5:] = 0
    cost[1, :3, -5:] = -1e4  # pairs of none, whose weights are zero
    a[1], b[1] = a[1] / a[1].sum(), b[1] / b[1].sum()
    cost[2, 1, 1] = torch.nan
    cost[3, 5] = torch.inf  # can't be reached
    found, of_value, plan = value_gradient(cost, a, b, eps, tau_a=tau, tau_b=tau)
    expected = of_value[:, None, None] * plan
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=1e-30, equal_nan=True)
    assert plan[2].isnan().all() and not found[[0, 1, 3]].isnan().any()


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


@needs_cpp
@pytest.mark.parametrize("shape", [(40, 30, 20), (1, 700, 600)])
def test_other_tiny_numbers_stay(shape):
    """This thread flushes its own to zero only while it iterates."""
    cost, *_ = random_problem(*shape, dtype=torch.float32)
    torch.set_flush_denormal(False)  # which some library may have asked for as it was loaded
    dk.sinkhorn(cost, eps=1e-4, n_iters=5, backend="cpp")
    assert torch.full((), 1e-38) * 0.1 > 0
