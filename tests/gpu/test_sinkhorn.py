"""sinkhorn and sinkhorn_points on the GPU's backends against their definition in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

import dpdiff_kernels as dk
from dpdiff_kernels.replay import forget

pytest.importorskip("triton")
if not dk.backends()["triton"]:
    pytest.skip(dk.backends()["triton"].reason, allow_module_level=True)

BACKENDS = ["triton", "triton streaming", pytest.param("cuda", marks=pytest.mark.cuda_only)]
TAUS = [(None, None), (0.5, None), (None, 0.8), (0.5, 0.8)]


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


def problem(*shape, device, seed=0):
    """A cost in [0, 1] and weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(shape, generator=generator)
    a = torch.rand(shape[:-1], generator=generator) + 0.1
    b = torch.rand((*shape[:-2], shape[-1]), generator=generator) + 0.1
    return [x.to(device) for x in (cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))]


def clouds(n, m, d, batch, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(batch, n, d, generator=generator), torch.randn(batch, m, d, generator=generator) + 0.5
    return [x.to(device), y.to(device)]


def in_float64(*inputs, **options):
    return dk.sinkhorn(*(None if x is None else x.double() for x in inputs), **options, backend="reference")


def assert_agrees(t, exact, potential=1e-6, plan=2e-5):
    assert_close(t.plan, exact.plan.float(), rtol=0, atol=plan * exact.plan.max().item())
    for name in ("f", "g", "cost", "value"):
        assert_close(getattr(t, name), getattr(exact, name).float(), rtol=1e-5, atol=potential, msg=name)
    assert_close(t.error, exact.error, rtol=1e-3, atol=3e-6)
    assert torch.equal(t.n_iters, exact.n_iters)


# ------------------------------------------------------------------------------------------- from costs


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


def assert_as_all(t, exact, eps):
    assert torch.equal(t.n_iters, exact.n_iters)
    for name in ("f", "g"):
        assert_close(getattr(t, name).double(), getattr(exact, name).double(), rtol=1e-5, atol=1e-5 * eps, msg=name)
    assert_close(t.value.double(), exact.value.double(), rtol=1e-5, atol=1e-5 * eps)


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


@pytest.mark.parametrize("tau", TAUS)
def test_iterations_between_points_that_change_nothing_are_spared(device, tau):
    x, y = clouds(40, 20, 3, 5, device)
    x, y = (p * torch.logspace(-2, 0, 5, device=device)[:, None, None] for p in (x, y))
    options = {"eps": 0.5, "n_iters": 16, "tau_a": tau[0], "tau_b": tau[1]}
    exact = dk.sinkhorn_points(x.double(), y.double(), **options, backend="reference")
    assert_as_all(dk.sinkhorn_points(x, y, **options, backend="triton"), exact, 2.0)


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


# ------------------------------------------------------------------------------------------- from points


def of_points(inputs, backend, dtype, outputs, **options):
    x, y, a, b, v = leaves = [z.detach().to(dtype).requires_grad_() for z in inputs]
    u = dk.sinkhorn_points(x, y, a, b, **options, backend=backend)
    results = {"value": u.value, "f": u.f, "g": u.g, "applied": u.apply(v), "error": u.error, "n_iters": u.n_iters}
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for name in outputs:
        total = total + (results[name] * torch.randn(results[name].shape, generator=generator).to(results[name])).sum()
    return results, torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("shape", "tau", "outputs"),
    [
        ((2, 21, 18, 5), (None, None), ("value", "f", "g", "applied")),
        ((1, 70, 66, 3), (0.9, 2.0), ("value",)),
        ((2, 9, 4, 70), (0.9, None), ("f", "applied")),  # more dimensions than a tile holds
        ((1, 1, 3, 1), (None, 2.0), ("g",)),
    ],
)
def test_points_and_their_gradients(device, metric, shape, tau, outputs):
    batch, n, m, d = shape
    _, a, b = problem(batch, n, m, device=device)
    inputs = *clouds(n, m, d, batch, device), a, b, torch.randn(batch, m, 20, device=device)
    options = {"eps": 0.3 * d if metric == "l2" else 0.3, "n_iters": 3, "metric": metric}
    options |= {"tau_a": tau[0], "tau_b": tau[1]}
    results, grads = of_points(inputs, "triton", torch.float32, outputs, **options)
    expected, expected_grads = of_points(inputs, "reference", torch.float64, outputs, **options)
    for name, x in results.items():
        y = expected[name].to(x.dtype)
        assert_close(x, y, rtol=1e-5, atol=3e-6 * max(1.0, y.abs().max().item()), msg=name)
    for x, y in zip(grads, expected_grads):
        if y is None:
            assert x is None or not x.any()
        else:
            assert_close(x.double(), y, rtol=2e-4, atol=2e-4 * y.abs().max().item() + 1e-9)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_points_and_weights_of_any_stride(device, metric):
    x, y = (z.transpose(0, 1).contiguous().transpose(0, 1) for z in clouds(8, 6, 3, 2, device))
    a, b = (w.T.contiguous().T for w in problem(2, 8, 6, device=device)[1:])
    v = torch.randn(2, 6, 4).to(device)
    u = dk.sinkhorn_points(x, y, a, b, 0.5, 3, metric=metric, backend="triton")
    dense = dk.sinkhorn_points(*(z.contiguous() for z in (x, y, a, b)), 0.5, 3, metric=metric, backend="triton")
    assert all(torch.equal(z, w) for z, w in zip((*u[:5], u.apply(v)), (*dense[:5], dense.apply(v))))
    used = torch.tensor([3, 0, 1, 0], device=device)[::2]
    cost, grad = torch.rand(2, 8, 6, device=device), torch.rand(2, 8, device=device)
    backward = torch.ops.dpdiff_triton.sinkhorn_backward
    strided, expected = (
        backward(cost, a, b, steps, None, grad, None, None, 0.5, 3, None, None) for steps in (used, used.contiguous())
    )
    assert all(torch.equal(z, w) for z, w in zip(strided, expected))


def test_points_far_from_the_origin_and_at_small_eps(device):
    x, y = clouds(40, 33, 4, 2, device)
    near = dk.sinkhorn_points(x.double(), y.double(), eps=0.05, n_iters=3)
    far = dk.sinkhorn_points(x + 64, y + 64, eps=0.05, n_iters=3, backend="triton")
    assert_close(far.value.double(), near.value, rtol=1e-5, atol=0)  # + 64 rounds the points, by 4e-6
    assert_close(far.f.double(), near.f, rtol=0, atol=5e-4)
    cost = (x[:, :, None] - y[:, None]).square().sum(-1)
    eps = 1e-4 * cost.max().item()
    u = dk.sinkhorn_points(x, y, eps=eps, n_iters=3, backend="triton")
    exact = dk.sinkhorn_points(x.double(), y.double(), eps=eps, n_iters=3)
    assert_close(u.f.double(), exact.f, rtol=0, atol=3e-6 * cost.max().item())
    assert_close(u.value.double(), exact.value, rtol=1e-5, atol=0)


def test_points_stop_by_themselves_and_bad_ones_are_nan(device):
    x, y = clouds(30, 20, 4, 4, device)
    x = x * torch.tensor([0.1, 1.0, 2.0, 1.0], device=device)[:, None, None]
    options = {"eps": 2.0, "n_iters": 10, "tol": 1e-3}
    expected = dk.sinkhorn_points(x.double(), y.double(), **options)
    assert len(expected.n_iters.unique()) > 1
    x[3, 2, 1] = math.nan
    u = dk.sinkhorn_points(x, y, **options, backend="triton")
    assert torch.equal(u.n_iters[:3], expected.n_iters[:3])
    assert_close(u.error[:3], expected.error[:3], rtol=1e-2, atol=1e-6)
    for z in (u.f, u.g, u.value, u.error):
        assert z[3].isnan().all() and z[:3].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 4, 0)])
def test_points_degenerate_shapes(device, shape):
    batch, n, m, d = shape
    x, y = torch.rand(batch, n, d, device=device), torch.rand(batch, m, d, device=device)
    u = dk.sinkhorn_points(x, y, n_iters=2, backend="triton")
    assert [z.shape for z in u[:5]] == [torch.Size(s) for s in ((batch,), (batch, n), (batch, m), (batch,), (batch,))]
    assert u.apply(torch.rand(batch, m, 2, device=device)).shape == (batch, n, 2)


# ------------------------------------------------------------------------------------------- torch's machinery


def test_opcheck(device):
    cost, a, b = (z.requires_grad_() for z in problem(2, 6, 5, device=device))
    ops = torch.ops.dpdiff_triton
    torch.library.opcheck(ops.sinkhorn.default, (cost, a, b, 0.1, 2, 1e-2, 0.5, None, True))
    used = torch.full((2,), 2, device=device)
    given = torch.rand_like(cost), torch.rand_like(a), None, torch.rand(2, device=device)
    arguments = (*(z.detach() for z in (cost, a, b)), used, *(None if z is None else z.detach() for z in given))
    torch.library.opcheck(ops.sinkhorn_backward.default, (*arguments, 0.1, 2, None, 0.5))


def test_opcheck_of_points(device):
    _, a, b = problem(2, 6, 5, device=device)
    x, y = (z.requires_grad_() for z in clouds(6, 5, 3, 2, device))
    ops = torch.ops.dpdiff_triton
    torch.library.opcheck(ops.sinkhorn_points.default, (x, y, a, b, 0.5, 2, 1e-3, None, 0.7, "l2"))
    h_x, h_y = torch.randn_like(a).double(), torch.randn_like(b).double()
    v = torch.randn(2, 5, 2, device=device)
    torch.library.opcheck(ops.sinkhorn_apply.default, (x, y, h_x, h_y, v.requires_grad_(), 0.5, "cosine"))
    x, y, v, used = x.detach(), y.detach(), v.detach(), torch.full((2,), 2, device=device)
    arguments = x, y, a, b, used, torch.randn_like(a), None, 0.5, 2, None, 0.7, "l2"
    torch.library.opcheck(ops.sinkhorn_points_backward.default, arguments)
    grad = torch.randn(2, 6, 2, device=device)
    torch.library.opcheck(ops.sinkhorn_apply_backward.default, (grad, x, y, h_x, h_y, v, 0.5, "cosine"))


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


@pytest.mark.cuda_only
def test_points_hold_no_cost(device):
    x, y = (torch.rand(1, 20_000, 64, device=device, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dk.sinkhorn_points(x, y, n_iters=5).value.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # the cost would be 1.6 GB
