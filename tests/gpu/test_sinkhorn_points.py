"""sinkhorn_points on the GPU against its definition in float64."""

import math

import pytest
import torch
from gpu_problems import TAUS, assert_as_all, clouds, problem
from torch.testing import assert_close

import dpdiff_kernels as dk

pytest.importorskip("triton")
if not dk.backends()["triton"]:
    pytest.skip(dk.backends()["triton"].reason, allow_module_level=True)


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


@pytest.mark.parametrize("tau", TAUS)
def test_iterations_between_points_that_change_nothing_are_spared(device, tau):
    x, y = clouds(40, 20, 3, 5, device)
    x, y = (p * torch.logspace(-2, 0, 5, device=device)[:, None, None] for p in (x, y))
    options = {"eps": 0.5, "n_iters": 16, "tau_a": tau[0], "tau_b": tau[1]}
    exact = dk.sinkhorn_points(x.double(), y.double(), **options, backend="reference")
    assert_as_all(dk.sinkhorn_points(x, y, **options, backend="triton"), exact, 2.0)


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


@pytest.mark.cuda_only
def test_points_hold_no_cost(device):
    x, y = (torch.rand(1, 20_000, 64, device=device, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dk.sinkhorn_points(x, y, n_iters=5).value.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # the cost would be 1.6 GB
