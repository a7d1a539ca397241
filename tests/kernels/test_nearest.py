"""nearest_prototype, aggregate_nearest and prototype_statistics against float64 brute force, faiss and each other."""

import os
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpdiff_kernels as dk

METRICS = ("cosine", "dot", "l2")
BACKENDS = tuple(name for name in ("reference", "cpp") if dk.backends()[name])
TOLERANCE = 6e-7  # of |x|^2 + |p|^2, or of 1 for cosine

backends = pytest.mark.parametrize("backend", BACKENDS)
metrics = pytest.mark.parametrize("metric", METRICS)
native = pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library is not there")


def random(*shape, seed=0, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def brute_force(tokens, prototypes, metric):
    """Scores (N, K) in float64, each pair on its own, and what float32 rounding means for each."""
    x, p = tokens.double().numpy()[:, None, :], prototypes.double().numpy()[None, :, :]
    square_x, square_p = (x * x).sum(-1), (p * p).sum(-1)
    if metric == "l2":
        return ((x - p) ** 2).sum(-1), TOLERANCE * (square_x + square_p)
    dot = (x * p).sum(-1)
    if metric == "dot":
        return dot, TOLERANCE * (square_x + square_p)
    norms = np.sqrt(square_x * square_p)
    cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)
    return cosine, np.full_like(dot, TOLERANCE)


def assert_nearest(result, tokens, prototypes, metric, k, allowed=None):
    """For one batch element: scores true, indices truly the best, in order, different, ties to the lowest."""
    scores, tolerance = brute_force(tokens, prototypes, metric)
    if allowed is not None:
        scores = np.where(allowed[None, :], scores, np.inf if metric == "l2" else -np.inf)
    assert result.scores.shape == result.indices.shape == (tokens.shape[0], k)
    assert result.indices.dtype == torch.int64
    indices, found = result.indices.numpy(), result.scores.double().numpy()
    rows = np.arange(len(indices))[:, None]
    slack = tolerance[rows, indices]
    assert (np.abs(found - scores[rows, indices]) <= slack).all()
    sign = 1 if metric == "l2" else -1
    order = np.argsort(sign * scores, axis=1, kind="stable")[:, :k]
    assert (sign * (scores[rows, indices] - scores[rows, order]) <= slack + tolerance[rows, order]).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (sign * np.diff(found, axis=1) >= 0).all()


@backends
@metrics
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    ("n", "n_prototypes", "d"), [(1, 5, 1), (7, 33, 3), (100, 65, 17), (67, 130, 96), (50, 48, 768)]
)
def test_nearest_is_exact(backend, metric, k, n, n_prototypes, d):
    tokens, prototypes = random(n, d), random(n_prototypes, d, seed=1, offset=0.1)
    result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
    assert result.scores.dtype == torch.float32
    assert_nearest(result, tokens, prototypes, metric, k)


@backends
@metrics
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(backend, metric, dtype):
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("float64 runs on the reference")
    tokens, prototypes = random(40, 70, dtype=dtype), random(90, 70, seed=1, dtype=dtype)
    result = dk.nearest_prototype(tokens, prototypes, k=3, metric=metric, backend=backend)
    assert result.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_nearest(result, tokens, prototypes, metric, 3)


@backends
@pytest.mark.parametrize("k", [1, 4])
def test_agrees_with_faiss(backend, k):
    tokens, prototypes = random(500, 64), random(200, 64, seed=1)
    for metric, index in (("l2", faiss.IndexFlatL2(64)), ("dot", faiss.IndexFlatIP(64))):
        index.add(prototypes.numpy())
        scores, indices = index.search(tokens.numpy(), k)
        result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
        np.testing.assert_array_equal(result.indices.numpy(), indices)  # random: no two are as near as rounding
        np.testing.assert_allclose(result.scores.numpy(), scores, rtol=1e-4, atol=1e-4)


@backends
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(backend, data):
    n, n_prototypes, d = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 150)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, min(n_prototypes, 32)))
    batch = data.draw(st.lists(st.integers(0, 3), max_size=2))
    metric, shared = data.draw(st.sampled_from(METRICS)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens = random(*batch, d, 2 * n, dtype=dtype, seed=n).mT[..., ::2, :]
    prototypes = random(*([] if shared else batch), d, n_prototypes, seed=d + 100, dtype=dtype).mT
    result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
    assert result.scores.shape == (*batch, n, k)
    for b in np.ndindex(*batch):
        one = type(result)(result.scores[b], result.indices[b])
        assert_nearest(one, tokens[b], prototypes if shared else prototypes[b], metric, k)


@backends
@metrics
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_active_groups(backend, metric, shared, k):
    tokens = random(2, 2, 30, 24)
    prototypes = random(60, 24, seed=1) if shared else random(2, 2, 60, 24, seed=1)
    groups = torch.arange(60)[torch.randperm(60, generator=torch.Generator().manual_seed(3))] // 4  # 15 groups of 4
    groups[groups == 14] = 1_000_000_007
    groups[:2] = -5  # belongs to no group that can be named
    active = torch.tensor([[[0, 5, 5], [1_000_000_007, -1, -5]], [[3, -1, 2], [14, 9, 10]]])
    result = dk.nearest_prototype(tokens, prototypes, k, metric, groups=groups, active_groups=active, backend=backend)
    for b in np.ndindex(2, 2):
        allowed = np.isin(groups.numpy(), [g for g in active[b].tolist() if g >= 0])
        one = type(result)(result.scores[b], result.indices[b])
        assert_nearest(one, tokens[b], prototypes if shared else prototypes[b], metric, k, allowed)
    aggregated = dk.aggregate_nearest(
        tokens, prototypes, k, metric, groups=groups, active_groups=active, backend=backend
    )
    assert torch.equal(aggregated.indices, result.indices) and torch.equal(aggregated.scores, result.scores)


@backends
def test_too_few_active_prototypes(backend):
    groups, active = torch.tensor([0, 0, 1]), torch.tensor([[0, 1], [1, -1]])
    with pytest.raises(
        ValueError, match=r"active_groups leaves batch element 1 with 1 prototypes: expected at least k=2"
    ):
        dk.nearest_prototype(random(2, 4, 5), random(3, 5), 2, groups=groups, active_groups=active, backend=backend)
    with pytest.raises(ValueError, match="batch element 0 with 0 prototypes"):
        dk.nearest_prototype(
            random(2, 4, 5),
            random(3, 5),
            groups=groups,
            active_groups=torch.empty(2, 0, dtype=torch.int64),
            backend=backend,
        )


# ---------------------------------------------------------------------------------- adversarial values


@backends
@metrics
@pytest.mark.parametrize("k", [1, 7, 32])
def test_equal_prototypes_go_to_the_lowest_index(backend, metric, k):
    """Also where the copies lie in different tiles, and the other prototypes are farther."""
    one, others = random(1, 100), random(300, 100, seed=1)
    prototypes = torch.where((torch.arange(300) % 3 == 1)[:, None], one * 3, -others.abs() * one.sign())
    tokens = (one * torch.linspace(2.9, 3.1, 50)[:, None]).contiguous()
    result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
    assert torch.equal(result.indices, (torch.arange(k) * 3 + 1).expand(50, k))
    same = dk.nearest_prototype(tokens, one.expand(200, 100), k=k, metric=metric, backend=backend)
    assert torch.equal(same.indices, torch.arange(k).expand(50, k))


@backends
@metrics
@pytest.mark.parametrize("scale", [1e-7, 3e-6, 1e-4])
def test_near_ties_below_bfloat16_resolution(backend, metric, scale):
    tokens = random(64, 256, offset=1.0)
    prototypes = random(1, 256, seed=1, offset=1.0) * (1 + scale * random(500, 256, seed=2))
    for k in (1, 5):
        result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
        assert_nearest(result, tokens, prototypes, metric, k)


@backends
@metrics
@pytest.mark.parametrize("d", [64, 4096])
def test_long_sums_of_one_sign(backend, metric, d):
    """Where a plain float32 sum would drift: all terms positive, and a constant far larger than the differences."""
    tokens, prototypes = random(16, d, offset=30.0).abs(), random(80, d, seed=1, offset=30.0).abs()
    result = dk.nearest_prototype(tokens, prototypes, k=3, metric=metric, backend=backend)
    assert_nearest(result, tokens, prototypes, metric, 3)


@backends
def test_cosine_of_zero_vectors_is_zero(backend):
    tokens, prototypes = random(4, 20), random(6, 20, seed=1)
    tokens[1] = 0
    prototypes[3] = 0
    tokens.requires_grad_()
    prototypes.requires_grad_()
    result = dk.nearest_prototype(tokens, prototypes, k=6, backend=backend)
    assert (result.scores[1] == 0).all() and torch.equal(result.indices[1], torch.arange(6))
    assert (result.scores[result.indices == 3] == 0).all()
    result.scores.sum().backward()
    assert (tokens.grad[1] == 0).all() and (prototypes.grad[3] == 0).all()
    assert (tokens.grad[[0, 2, 3]] != 0).any(-1).all() and prototypes.grad.isfinite().all()


@backends
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-41])
@pytest.mark.parametrize("mixed", [False, True])
def test_cosine_of_huge_and_tiny_vectors(backend, scale, mixed):
    """Also next to vectors of ordinary length."""
    tokens, prototypes = random(30, 50) * scale, random(40, 50, seed=1) * scale
    if mixed:
        tokens[::2] /= scale
        prototypes[::3] = random(14, 50, seed=2)
    tokens.requires_grad_(scale > 1e-40)
    result = dk.nearest_prototype(tokens, prototypes, k=3, backend=backend)
    assert_nearest(type(result)(result.scores.detach(), result.indices), tokens.detach(), prototypes, "cosine", 3)
    if scale > 1e-40:
        result.scores.sum().backward()
        assert tokens.grad.isfinite().all()


@backends
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("scale", [1e18, 1e-18, 1e-30])
def test_huge_and_tiny_vectors(backend, metric, scale):
    """The choice is right, and the scores are, even where products underflow in float32."""
    tokens, prototypes = random(30, 50) * scale, random(40, 50, seed=1) * scale
    tokens[::2], prototypes[::3] = random(15, 50, seed=3), random(14, 50, seed=2)
    result = dk.nearest_prototype(tokens, prototypes, k=2, metric=metric, backend=backend)
    scores, tolerance = brute_force(tokens, prototypes, metric)
    sign = 1 if metric == "l2" else -1
    rows, first = np.arange(30), np.argmin(sign * scores, axis=1)
    chosen = result.indices[:, 0].numpy()
    assert (
        sign * (scores[rows, chosen] - scores[rows, first]) <= tolerance[rows, chosen] + tolerance[rows, first]
    ).all()
    with np.errstate(over="ignore", under="ignore"):
        expected = scores[rows, chosen].astype(np.float32)
    np.testing.assert_allclose(result.scores[:, 0].numpy(), expected, rtol=1e-6, atol=1e-45)


@backends
@metrics
def test_nan_and_infinity_stay_visible(backend, metric):
    tokens, prototypes = random(20, 33), random(70, 33, seed=1)
    clean = dk.aggregate_nearest(tokens, prototypes, k=2, metric=metric, backend=backend)
    tokens[3, 5], tokens[7] = torch.nan, torch.inf
    tokens[8, 32] = -torch.inf
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 7, 8]] = True
    result = dk.aggregate_nearest(tokens, prototypes, k=2, metric=metric, backend=backend)
    assert torch.equal(result.indices[~bad], clean.indices[~bad]) and torch.equal(
        result.scores[~bad], clean.scores[~bad]
    )
    assert not result.scores[bad].isfinite().any() and not result.values[bad].isfinite().any()
    assert result.scores[3].isnan().all() and torch.equal(result.indices[3], torch.arange(2))
    assert (0 <= result.indices).all() and (result.indices < 70).all()
    one = dk.aggregate_nearest(tokens, prototypes, k=1, metric=metric, backend=backend)
    assert not one.values[bad].isfinite().any()

    prototypes[[40, 12], 4] = torch.nan
    result = dk.nearest_prototype(tokens, prototypes, k=2, metric=metric, backend=backend)
    assert torch.equal(result.indices[~bad], torch.tensor([12, 40]).expand(17, 2))
    assert result.scores[~bad].isnan().all()


@backends
@metrics
def test_infinite_prototypes(backend, metric):
    tokens, prototypes = random(20, 33), random(70, 33, seed=1)
    prototypes[9, 3] = torch.inf
    result = dk.nearest_prototype(tokens, prototypes, k=1, metric=metric, backend=backend)
    if metric == "l2":  # infinitely far
        rest = dk.nearest_prototype(tokens, prototypes[torch.arange(70) != 9], metric=metric, backend=backend)
        assert torch.equal(result.scores, rest.scores) and (result.indices != 9).all()
    elif metric == "dot":
        assert torch.equal(result.indices.squeeze() == 9, tokens[:, 3] > 0)
    else:
        assert result.scores.isnan().all() and (result.indices == 9).all()


# --------------------------------------------------------------------------- aggregation and gradients


@backends
@metrics
@pytest.mark.parametrize("k", [1, 3])
def test_values(backend, metric, k):
    tokens, prototypes = random(2, 25, 40), random(30, 40, seed=1)
    temperature = 10.0 if metric != "cosine" else 0.1
    result = dk.aggregate_nearest(tokens, prototypes, k=k, metric=metric, temperature=temperature, backend=backend)
    nearest = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
    assert torch.equal(result.indices, nearest.indices) and torch.equal(result.scores, nearest.scores)
    logits = (-nearest.scores if metric == "l2" else nearest.scores).double().numpy() / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnk,bnkd->bnd", weights, prototypes.double().numpy()[nearest.indices.numpy()])
    np.testing.assert_allclose(result.values.numpy(), expected, rtol=1e-5, atol=1e-6)
    if k == 1:
        assert torch.equal(result.values, prototypes[nearest.indices.squeeze(-1)])


@backends
@metrics
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_agree_with_float64(backend, metric, shared, k, dtype):
    inputs = random(2, 40, 35, dtype=dtype), random(*([] if shared else [2]), 20, 35, seed=1, dtype=dtype)
    grad_values, grad_scores = random(2, 40, 35, seed=2, dtype=dtype), random(2, 40, k, seed=3)
    found = []
    for cast, name in ((torch.Tensor.double, "reference"), (torch.clone, backend)):
        tokens, prototypes = (cast(t).requires_grad_() for t in inputs)
        result = dk.aggregate_nearest(tokens, prototypes, k=k, metric=metric, temperature=0.5, backend=name)
        nearest = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=name)
        loss = (result.values * grad_values).sum() + (result.scores * grad_scores).sum() + nearest.scores.sum()
        found.append(torch.autograd.grad(loss, (tokens, prototypes)))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for expected, grad in zip(*found):
        assert grad.dtype == dtype
        torch.testing.assert_close(
            grad.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


@backends
def test_gradients_of_one_input_or_output(backend):
    tokens, prototypes = random(30, 8), random(10, 8, seed=1)
    both = [t.clone().requires_grad_() for t in (tokens, prototypes)]
    dk.aggregate_nearest(*both, k=2, backend=backend).values.sum().backward()
    for i in range(2):
        inputs = [tokens.clone(), prototypes.clone()]
        inputs[i].requires_grad_()
        dk.aggregate_nearest(*inputs, k=2, backend=backend).values.sum().backward()
        assert torch.equal(inputs[i].grad, both[i].grad) and inputs[1 - i].grad is None
    inputs = [t.clone().requires_grad_() for t in (tokens, prototypes)]
    result = dk.aggregate_nearest(*inputs, k=2, backend=backend)
    assert not result.indices.requires_grad
    statistics = dk.prototype_statistics(*inputs, backend=backend)
    assert not any(t.requires_grad for t in statistics)
    with torch.no_grad():
        assert not dk.nearest_prototype(*inputs, backend=backend).scores.requires_grad


@metrics
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(metric, shared, k):
    tokens = random(2, 2, 3, dtype=torch.float64).requires_grad_()
    prototypes = random(*([] if shared else [2]), 4, 3, seed=1, dtype=torch.float64).requires_grad_()

    def function(tokens, prototypes):
        values, scores, _ = dk.aggregate_nearest(tokens, prototypes, k=k, metric=metric, temperature=0.7)
        return values, scores, dk.nearest_prototype(tokens, prototypes, k=k, metric=metric).scores

    assert torch.autograd.gradcheck(function, (tokens, prototypes))
    assert torch.autograd.gradgradcheck(function, (tokens, prototypes))


# ------------------------------------------------------------------------------------------ statistics


@backends
@metrics
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(backend, metric, weighted, dtype):
    tokens, prototypes = random(3, 50, 20, dtype=dtype), random(30, 20, seed=1, dtype=dtype)
    weights = random(3, 50, seed=2).abs() if weighted else None
    result = dk.prototype_statistics(tokens, prototypes, metric=metric, weights=weights, backend=backend)
    scores, _ = brute_force(tokens.flatten(0, 1), prototypes, metric)
    distances = {"l2": scores, "cosine": 1 - scores, "dot": -scores}[metric]
    nearest, w = distances.argmin(1), np.ones(150) if weights is None else weights.double().flatten().numpy()
    assigned = (nearest[:, None] == np.arange(30)) * w[:, None]
    assert all(t.dtype == torch.float32 for t in result)
    np.testing.assert_allclose(result.counts.numpy(), assigned.sum(0), rtol=1e-6)
    sums = assigned.T @ tokens.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(result.sums.numpy(), sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.inertia.item(), (distances.min(1) * w).sum(), rtol=1e-5)
    options = {"metric": metric, "weights": weights, "backend": backend}
    without = dk.prototype_statistics(tokens, prototypes, with_inertia=False, **options)
    assert torch.equal(without.counts, result.counts) and torch.equal(without.sums, result.sums)
    assert without.inertia is None


@backends
def test_one_long_prototype_among_short_ones(backend):
    """Every prototype's error is bounded by itself: here the largest one's bound would let all through."""
    tokens, prototypes = random(300, 40), 1e-2 * random(200, 40, seed=1)
    prototypes[7] = 1e3
    scores, indices = dk.nearest_prototype(tokens, prototypes, k=3, metric="l2", backend=backend)
    expected, found = brute_force(tokens, prototypes, "l2")[0], indices.numpy()
    np.testing.assert_allclose(np.take_along_axis(expected, found, 1), np.sort(expected, 1)[:, :3], rtol=1e-6)
    np.testing.assert_allclose(scores.numpy(), np.sort(expected, 1)[:, :3], rtol=1e-6)


@backends
def test_statistics_of_many_tokens_keep_their_precision(backend):
    """Float32 running sums of 200,000 equal terms would be off in the fourth digit."""
    tokens = torch.full((200_000, 3), 0.1)
    result = dk.prototype_statistics(tokens, torch.zeros(1, 3), backend=backend)
    assert result.counts.item() == 200_000
    np.testing.assert_allclose(result.sums.numpy(), np.full((1, 3), 200_000 * np.float64(np.float32(0.1))), rtol=2e-7)
    np.testing.assert_allclose(result.inertia.item(), 200_000 * 3 * np.float64(np.float32(0.1)) ** 2, rtol=2e-7)


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_beyond_inputs_and_outputs():
    """12,544 x 4,096 scores alone would be 196 MiB."""
    code = """
import torch, dpdiff_kernels as dk
torch.set_num_threads(2)
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
tokens, prototypes = torch.randn(12544, 768), torch.randn(4096, 768)
dk.nearest_prototype(tokens[:10], prototypes[:10], metric="l2", backend="cpp")
before = peak()
dk.nearest_prototype(tokens, prototypes, metric="l2", backend="cpp")
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) <= 32


@backends
def test_nothing_to_search(backend):
    for shape in [(0, 5), (3, 0, 5), (0, 7, 5)]:
        result = dk.aggregate_nearest(torch.empty(shape), random(4, 5), k=2, backend=backend)
        assert result.values.shape == shape and result.scores.shape == result.indices.shape == (*shape[:-1], 2)
    statistics = dk.prototype_statistics(torch.empty(0, 5), random(4, 5), backend=backend)
    assert (statistics.counts == 0).all() and (statistics.sums == 0).all() and statistics.inertia == 0
    assert statistics.sums.shape == (4, 5) and statistics.inertia.shape == ()


# --------------------------------------------------------------------------------- PyTorch's machinery


@native
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_opcheck(shared, metric):
    ops = torch.ops.dpdiff
    tokens, prototypes = random(2, 9, 12), random(*([] if shared else [2]), 7, 12, seed=1)
    routes = (torch.arange(7) // 2, torch.tensor([[0, 1], [3, 2]]))
    for t in (tokens, prototypes):
        t.requires_grad_()
    for groups in ((None, None), routes):
        torch.library.opcheck(ops.nearest_prototype.default, (tokens, prototypes, 2, metric, *groups))
        torch.library.opcheck(ops.aggregate_nearest.default, (tokens, prototypes, 2, metric, 0.1, *groups))
    tokens, prototypes = tokens.detach(), prototypes.detach()
    indices = torch.randint(7, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    scores, weights = random(2, 9, 3, seed=2), random(2, 9, 3, seed=3)
    arguments = (tokens, prototypes, indices, scores, weights, tokens, random(2, 9, 3), metric, 0.1)
    torch.library.opcheck(ops.nearest_backward.default, (*arguments, True, True))
    torch.library.opcheck(ops.nearest_backward.default, (*arguments, False, True))
    if shared:
        torch.library.opcheck(ops.prototype_statistics.default, (tokens[0], prototypes, metric, None, True))


@native
def test_no_second_derivative_is_an_error_rather_than_zero():
    tokens = random(5, 4).requires_grad_()
    scores = dk.nearest_prototype(tokens, random(3, 4, seed=1), backend="cpp").scores
    (grad,) = torch.autograd.grad(scores.sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: pass backend='reference'"):
        grad.sum().backward()


@native
@pytest.mark.skipif("DPDIFF_CPU_CAPABILITY" in os.environ, reason="runs itself")
@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_other_instruction_sets(capability):
    """All of this file once more: a process chooses its instruction set when it starts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "cpp and not compile and not export and not opcheck"]
    result = subprocess.run(
        command, env=os.environ | {"DPDIFF_CPU_CAPABILITY": capability}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout[-3000:]


class Module(torch.nn.Module):
    def __init__(self, k=2, metric="cosine", backend=None):
        super().__init__()
        self.k, self.metric, self.backend = k, metric, backend

    def forward(self, tokens, prototypes, groups=None, active_groups=None):
        options = dict(groups=groups, active_groups=active_groups, backend=self.backend)
        values, scores, _ = dk.aggregate_nearest(tokens, prototypes, self.k, self.metric, **options)
        nearest = dk.nearest_prototype(tokens, prototypes, self.k, self.metric, **options)
        statistics = dk.prototype_statistics(tokens, prototypes, self.metric, backend=self.backend)
        return values, scores, nearest.scores, nearest.indices, statistics.sums


@pytest.mark.parametrize(
    ("backend", "metric", "compiler"),
    [
        ("reference", "cosine", "aot_eager"),
        pytest.param("cpp", "l2", "aot_eager", marks=native),
        pytest.param("cpp", "cosine", "inductor", marks=native),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_compile_with_dynamic_shapes(backend, metric, compiler):
    module = Module(metric=metric, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
    for n, n_prototypes in ((20, 30), (33, 21)):
        tokens, prototypes = random(2, n, 12), random(n_prototypes, 12, seed=1)
        eager_inputs = [t.clone().requires_grad_() for t in (tokens, prototypes)]
        compiled_inputs = [t.clone().requires_grad_() for t in (tokens, prototypes)]
        routed = (torch.arange(n_prototypes) // 3, torch.tensor([[0, 1, 4], [2, 6, -1]]))
        for extra in ((), routed):
            expected, found = module(*eager_inputs, *extra), compiled(*compiled_inputs, *extra)
            torch.testing.assert_close(found, expected)
            for outputs in (expected, found):
                (outputs[0].square().sum() + outputs[1].sin().sum() + outputs[2].sum()).backward()
        for a, b in zip(eager_inputs, compiled_inputs):
            torch.testing.assert_close(b.grad, a.grad)


@backends
@pytest.mark.filterwarnings("ignore")
def test_export(backend):
    module, tokens, prototypes = Module(backend=backend), random(2, 20, 12), random(30, 12, seed=1)
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("n")}, {0: torch.export.Dim("k", min=3)})
    program = torch.export.export(module, (tokens, prototypes), dynamic_shapes=dynamic)
    tokens, prototypes = random(3, 31, 12), random(17, 12, seed=1)
    torch.testing.assert_close(program.module()(tokens, prototypes), module(tokens, prototypes))


@backends
def test_autocast_promotes_to_the_widest(backend):
    tokens, prototypes = random(20, 12, dtype=torch.bfloat16), random(30, 12, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = dk.aggregate_nearest(tokens, prototypes, backend=backend)
        same = dk.nearest_prototype(prototypes, prototypes, backend=backend)
        statistics = dk.prototype_statistics(tokens, prototypes, backend=backend)
    expected = dk.aggregate_nearest(tokens.float(), prototypes, backend=backend)
    assert result.values.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(result, expected))
    assert torch.equal(same.indices.flatten(), torch.arange(30))
    assert statistics.sums.dtype == torch.float32


@backends
def test_same_bits_every_time(backend):
    tokens, prototypes = random(300, 64), random(100, 64, seed=1)
    runs = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x, p = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
            values, scores, indices = dk.aggregate_nearest(x, p, k=4, backend=backend)
            (values.sin().sum() + scores.cos().sum()).backward()
            statistics = dk.prototype_statistics(tokens, prototypes, backend=backend)
        finally:
            torch.set_num_threads(before)
        runs.append((values, scores, indices, *statistics, x.grad, p.grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


# ---------------------------------------------------------------------------- what the user gets wrong


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "tokens is a list", dict(tokens=[[1.0]])),
        (
            TypeError,
            "prototypes has dtype torch.float16: expected torch.float32",
            dict(prototypes=torch.ones(3, 4).half()),
        ),
        (TypeError, "tokens has dtype torch.int64", dict(tokens=torch.ones(2, 4, dtype=torch.int64))),
        (TypeError, "k is 1.5", dict(k=1.5)),
        (ValueError, r"tokens has shape \(4,\): expected \(..., N, D\)", dict(tokens=torch.ones(4))),
        (ValueError, r"prototypes has shape \(3, 5\): expected \(3, 4\)", dict(prototypes=torch.ones(3, 5))),
        (ValueError, r"prototypes has shape \(4,\)", dict(prototypes=torch.ones(4))),
        (
            ValueError,
            r"prototypes has shape \(5, 3, 4\): expected \(3, 4\) or \(2, 3, 4\)",
            dict(tokens=torch.ones(2, 6, 4), prototypes=torch.ones(5, 3, 4)),
        ),
        (ValueError, "k is 4: expected at most the number of prototypes, 3", dict(k=4)),
        (ValueError, "k is 0: expected at least 1", dict(k=0)),
        (ValueError, "metric is 'euclidean': expected 'cosine', 'dot', 'l2'", dict(metric="euclidean")),
        (ValueError, "groups is given without active_groups", dict(groups=torch.zeros(3, dtype=torch.int64))),
        (ValueError, "k is 1: expected at most the number of prototypes, 0", dict(prototypes=torch.ones(0, 4))),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    arguments = dict(tokens=torch.ones(2, 4), prototypes=torch.ones(3, 4)) | arguments
    for function in (dk.nearest_prototype, dk.aggregate_nearest):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_other_errors():
    with pytest.raises(ValueError, match="temperature is 0: expected a positive finite number"):
        dk.aggregate_nearest(torch.ones(2, 4), torch.ones(3, 4), temperature=0)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\): expected \(2,\)"):
        dk.prototype_statistics(torch.ones(2, 4), torch.ones(3, 4), weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"prototypes has shape \(2, 3, 4\): expected \(2, 4\)"):
        dk.prototype_statistics(torch.ones(2, 2, 4), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="prototypes is empty"):
        dk.prototype_statistics(torch.ones(2, 4), torch.ones(0, 4))
