"""sinkhorn on the GPU's backends against its definition in float64."""

import math

import pytest
import torch
from gpu_problems import TAUS, assert_as_all, clouds, problem
from torch.testing import assert_close

import dpdiff_kernels as dk
from dpdiff_kernels.replay import forget

pytest.importorskip("triton")
if not dk.backends()["triton"]:
    pytest.skip(dk.backends()["triton"].reason, allow_module_level=True)

BACKENDS = ["triton", "triton streaming", pytest.param("cuda", marks=pytest.mark.cuda_only)]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Of `sinkhorn`; what runs without a GPU of CUDA C++ is in tests/kernels/test_cuda_sources.py. Streaming: as for
    problems that are too large for one program each."""
    name, *streaming = request.param.split()
    if not dk.backends()[name]:
        pytest.skip(dk.backends()[name].reason)
    if streaming:
        monkeypatch.setattr("dpdiff_kernels.triton.sinkhorn_whole.fits", lambda *_, **__: False)
    forget()
    yield name
    forget()


def in_float64(*inputs, **options):
    return dk.sinkhorn(*(None if x is None else x.double() for x in inputs), **options, backend="reference")


def assert_agrees(t, exact, potential=1e-6, plan=2e-5):
    assert_close(t.plan, exact.plan.float(), rtol=0, atol=plan * exact.plan.max().item())
    for name in ("f", "g", "cost", "value"):
        assert_close(getattr(t, name), getattr(exact, name).float(), rtol=1e-5, atol=potential, msg=name)
    assert_close(t.error, exact.error, rtol=1e-3, atol=3e-6)
    assert torch.equal(t.n_iters, exact.n_iters)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("eps", [10.0, 0.05, 1e-3, 1e-4])
def test_costs_at_any_eps(device, backend, eps, tau):
    inputs = problem(2, 37, 29, device=device)
    options = {"eps": eps, "n_iters": 4, "tau_a": tau[0], "tau_b": tau[1]}
    t = dk.sinkhorn(*inputs, **options, backend=backend)
    assert_agrees(t, in_float64(*inputs, **options), potential=max(1e-6, 1e-6 * eps))
    bare = dk.sinkhorn(*inputs, **options, return_plan=False, backend=backend)
    assert bare.plan is None and all(torch.equal(x, y) for x, y in zip(t[1:], bare[1:]))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 70), (70, 1), (3, 17, 300), (2, 2, 65, 16), (0, 3, 4), (2, 0, 3), (2, 3, 0)]
)
def test_costs_of_any_shape(device, backend, shape):
    cost = problem(*shape, device=device)[0]
    options = {"eps": 0.1, "n_iters": 3}
    t, exact = dk.sinkhorn(cost, **options, backend=backend), in_float64(cost, **options)
    assert [x.shape for x in t] == [x.shape for x in exact]
    if cost.numel():
        assert_agrees(t, exact)
    else:
        assert_close(t.value, exact.value.float())
        assert_close(t.error, exact.error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(device, backend, dtype):
    cost = problem(2, 20, 2 * 17, device=device)[0].to(dtype)[..., ::2].mT
    t = dk.sinkhorn(cost, n_iters=3, backend=backend)
    assert t.plan.dtype == torch.float32
    assert_agrees(t, in_float64(cost, n_iters=3))


@pytest.mark.parametrize("tau_a", [None, 0.5])
def test_each_problem_stops_by_itself(device, backend, tau_a):
    cost = problem(4, 20, 10, device=device)[0] * torch.tensor([0.05, 0.5, 1.0, 20.0], device=device)[:, None, None]
    options = {"eps": 0.1, "n_iters": 12, "tol": 1e-3 if tau_a is None else 4e-2, "tau_a": tau_a}
    t = dk.sinkhorn(cost, **options, backend=backend)
    assert len(t.n_iters.unique()) >= 2 and t.n_iters[3] == 12
    assert_agrees(t, in_float64(cost, **options), potential=2e-5)


@pytest.mark.parametrize("tau", TAUS)
def test_iterations_that_change_nothing_are_spared(device, backend, tau):
    """At another iteration each, or not at all: results are those of all."""
    eps = 0.02
    cost, a, b = problem(6, 40, 20, device=device)
    cost *= eps * 2 * torch.logspace(-1, 2, 6, device=device)[:, None, None]
    cost[0, :, 3] = math.inf  # infeasible where balanced: f and g go on moving, though the plan doesn't
    options = {"eps": eps, "n_iters": 16, "tau_a": tau[0], "tau_b": tau[1]}
    t, exact = dk.sinkhorn(cost, a, b, **options, backend=backend), in_float64(cost, a, b, **options)
    assert_as_all(t, exact, eps)
    # CUDA C++ has no kernel below 2^-126, and no two scalings beyond 2^60 (csrc/cuda/sinkhorn_side.cuh).
    lost = 2.0**-66 * a[:, :, None] * b[:, None]
    assert ((t.plan - exact.plan).abs() <= 3e-5 * exact.plan + (lost if backend == "cuda" else 1e-30)).all()


def test_zero_weights_forbidden_and_infeasible_pairs(device, backend):
    cost, a, b = problem(3, 8, 6, device=device)
    a[:, 1] = b[:, 2] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost[0, 2, 3:] = math.inf
    cost[1, 4] = math.inf  # a row that can't be carried
    cost[2, :, 0] = math.inf  # a column that nothing reaches
    for eps, tol in ((0.1, None), (1e-3, None), (0.1, 1e-3)):
        options = {"eps": eps, "n_iters": 6, "tol": tol}
        t = dk.sinkhorn(cost, a, b, **options, backend=backend)
        assert_agrees(t, in_float64(cost, a, b, **options))
        assert t.f[1, 4] == math.inf and t.g[2, 0] == math.inf and (t.value[1:] == math.inf).all()
        assert not t.plan[cost == math.inf].any() and t.error[1] >= 0.99 * a[1, 4]
    relaxed = {"eps": 0.1, "n_iters": 30, "tau_a": 0.2, "tau_b": 0.2, "tol": 1e-2}
    assert_agrees(dk.sinkhorn(cost, a, b, **relaxed, backend=backend), in_float64(cost, a, b, **relaxed))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["cost", "a", "b"])
def test_meaningless_input_makes_its_problem_nan_and_no_other(device, backend, bad, where):
    inputs = dict(zip(("cost", "a", "b"), problem(3, 5, 4, device=device)))
    expected = dk.sinkhorn(**inputs, n_iters=4, tol=1e-3, backend=backend)
    inputs[where] = inputs[where].clone()
    inputs[where][1].view(-1)[2] = bad if where == "cost" else abs(bad)
    t = dk.sinkhorn(**inputs, n_iters=4, tol=1e-3, backend=backend)
    for name, x, y in zip(t._fields, t, expected):
        assert_close(x[[0, 2]], y[[0, 2]])
        if name != "n_iters":
            assert x[1].isnan().all(), name


def test_nothing_is_read_beyond_the_edges(device, backend):
    """Views into larger arrays of NaN."""
    cost, a, b = problem(1, 21, 19, device=device)
    surrounded = []
    for x in (cost, a, b):
        room = torch.full((x.numel() + 2 * 512,), math.nan, device=device)
        room[512:-512] = x.flatten()
        surrounded.append(room[512:-512].view(x.shape))
    t = dk.sinkhorn(*surrounded, n_iters=2, tol=1e-9, backend=backend)
    assert_agrees(t, in_float64(cost, a, b, n_iters=2, tol=1e-9))


def gradients(inputs, backend, outputs, dtype, **options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    t = dk.sinkhorn(*leaves, **options, backend=backend)
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for name in outputs:
        result = getattr(t, name)
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
        total = total + (result.masked_fill(result == math.inf, 0) * weight).sum()
    return torch.autograd.grad(total, leaves)


def assert_gradients_agree(inputs, outputs=("plan", "f", "g", "cost", "value"), rtol=2e-4, backend="triton", **options):
    results = gradients(inputs, backend, outputs, torch.float32, **options)
    for x, y in zip(results, gradients(inputs, "reference", outputs, torch.float64, **options)):
        assert_close(x.double(), y, rtol=rtol, atol=rtol * y.abs().max().item() if y.numel() else 0.0)


@pytest.mark.parametrize("outputs", [("plan",), ("f",), ("g", "cost"), ("value",), ("plan", "f", "g", "cost", "value")])
def test_gradients(device, backend, outputs):
    assert_gradients_agree(problem(2, 21, 18, device=device), outputs, backend=backend, eps=0.1, n_iters=3)


@pytest.mark.parametrize("tau", TAUS[1:])
def test_gradients_where_relaxed_and_at_small_eps(device, backend, tau):
    options = {"backend": backend, "n_iters": 3, "tau_a": tau[0], "tau_b": tau[1]}
    inputs = problem(2, 12, 10, device=device)
    assert_gradients_agree(inputs, eps=0.1, **options)
    assert_gradients_agree(inputs, eps=2e-3, rtol=1e-3, **options)


def test_gradients_of_problems_that_stop_early_with_zeros_and_forbidden_pairs(device, backend):
    cost, a, b = problem(3, 12, 10, device=device)
    cost = cost * torch.tensor([0.1, 1.0, 3.0], device=device)[:, None, None]
    cost[0, 1, 2:5] = cost[1, 3] = math.inf
    a[:, 5] = b[:, 7] = 0
    inputs = cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    assert_gradients_agree(inputs, ("plan", "f", "g", "cost"), backend=backend, eps=0.1, n_iters=5, tol=1e-2)


def test_opcheck(device):
    cost, a, b = (z.requires_grad_() for z in problem(2, 6, 5, device=device))
    ops = torch.ops.dpdiff_triton
    torch.library.opcheck(ops.sinkhorn.default, (cost, a, b, 0.1, 2, 1e-2, 0.5, None, True))
    used = torch.full((2,), 2, device=device)
    given = torch.rand_like(cost), torch.rand_like(a), None, torch.rand(2, device=device)
    arguments = (*(z.detach() for z in (cost, a, b)), used, *(None if z is None else z.detach() for z in given))
    torch.library.opcheck(ops.sinkhorn_backward.default, (*arguments, 0.1, 2, None, 0.5))


def test_same_bits_every_time(device, backend):
    inputs = problem(2, 40, 33, device=device)
    first, second = (dk.sinkhorn(*inputs, n_iters=3, tol=1e-6, backend=backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_compiles_whole(device):
    def run(cost, x, y):
        t = dk.sinkhorn(cost, n_iters=2, eps=0.3, backend="triton")
        u = dk.sinkhorn_points(x, y, n_iters=2, eps=0.5, backend="triton")
        return t.plan, t.value, u.value

    inputs = *problem(2, 9, 7, device=device)[:1], *clouds(9, 7, 3, 2, device)
    engine = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=engine)
    for result, expected in zip(compiled(*inputs), run(*inputs)):
        assert_close(result, expected)


@pytest.mark.cuda_only
def test_cuda_graph(device, backend):
    cost, a, b = problem(4, 200, 128, device=device)
    cost.requires_grad_()

    def run():
        t = dk.sinkhorn(cost, a, b, n_iters=5, tol=1e-4, return_plan=False, backend=backend)
        return t.f, t.value, *torch.autograd.grad(t.f.square().sum() + t.value.sum(), cost)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    for x, y in zip(results, expected):
        assert_close(x, y)


def test_steps_and_weights_of_any_stride(device):
    used = torch.tensor([3, 0, 1, 0], device=device)[::2]
    cost, a, b = problem(2, 8, 6, device=device)
    a, b, grad = a.T.contiguous().T, b.T.contiguous().T, torch.rand(2, 8, device=device)
    backward = torch.ops.dpdiff_triton.sinkhorn_backward
    strided, expected = (
        backward(cost, a, b, steps, None, grad, None, None, 0.5, 3, None, None) for steps in (used, used.contiguous())
    )
    assert all(torch.equal(z, w) for z, w in zip(strided, expected))


@pytest.mark.cuda_only
@pytest.mark.parametrize(
    "shape",
    # in one block, in clusters of 2 to 8, and beyond shared memory
    [(256, 784, 128), (3, 784, 128), (512, 32, 32), (8, 900, 200), (2, 400, 500), (2, 5000, 300), (1, 4096, 4096)],
)
def test_large_problems(device, backend, shape):
    inputs = problem(*shape, device=device)
    for eps in (0.05, 1e-3):
        t = dk.sinkhorn(*inputs, eps=eps, n_iters=20, backend=backend)
        assert_agrees(t, in_float64(*inputs, eps=eps, n_iters=20))
    assert_gradients_agree([x[:2] for x in inputs], eps=0.05, n_iters=5, rtol=1e-3, backend=backend)


@pytest.mark.cuda_only
def test_too_many_columns_for_cuda(device):
    if dk.backends()["cuda"]:
        cost = torch.rand(1, 3, 4097, device=device)
        with pytest.raises(ValueError, match=r"backend is 'cuda', which can't run this call .* expected one of triton"):
            dk.sinkhorn(cost, n_iters=2, backend="cuda")
        assert_agrees(dk.sinkhorn(cost, n_iters=2), in_float64(cost, n_iters=2))


@pytest.mark.cuda_only
def test_cuda_runs_on_the_current_stream_and_the_device_of_its_inputs(device, backend):
    inputs = problem(2, 40, 33, device=device)
    expected = dk.sinkhorn(*inputs, n_iters=3, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        results = dk.sinkhorn(*(x + 0 for x in inputs), n_iters=3, backend=backend)
    assert not stream.query()  # else it ran elsewhere, or waited for the device
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(results, expected))
