"""nearest_prototype and aggregate_nearest against float64 brute force, faiss and each other."""

import subprocess
import sys
from functools import partial

import faiss
import numpy as np
import pytest
import torch
from cpu_backends import each_backend, needs_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest_problems import METRICS, brute_force, metrics, random

import dpdiff_kernels as dk


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


@each_backend
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


@each_backend
@metrics
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(backend, metric, dtype):
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("float64 runs on the reference")
    tokens, prototypes = random(40, 70, dtype=dtype), random(90, 70, seed=1, dtype=dtype)
    result = dk.nearest_prototype(tokens, prototypes, k=3, metric=metric, backend=backend)
    assert result.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_nearest(result, tokens, prototypes, metric, 3)


@each_backend
@pytest.mark.parametrize("k", [1, 4])
def test_agrees_with_faiss(backend, k):
    tokens, prototypes = random(500, 64), random(200, 64, seed=1)
    for metric, index in (("l2", faiss.IndexFlatL2(64)), ("dot", faiss.IndexFlatIP(64))):
        index.add(prototypes.numpy())
        scores, indices = index.search(tokens.numpy(), k)
        result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
        np.testing.assert_array_equal(result.indices.numpy(), indices)  # random: no two are as near as rounding
        np.testing.assert_allclose(result.scores.numpy(), scores, rtol=1e-4, atol=1e-4)


@each_backend
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


@each_backend
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


@each_backend
def test_routes_of_any_stride(backend):
    tokens, prototypes = random(3, 8, 5), random(24, 5, seed=1)
    groups = torch.randint(4, (24,), generator=torch.Generator().manual_seed(2))
    active = torch.tensor([[0, 3], [1, -1], [2, 2]])
    one_group, everywhere = torch.zeros(1, dtype=torch.int64).expand(24), torch.tensor([0, 3]).expand(3, 2)
    for strided_groups, strided_active in (
        (groups.repeat_interleave(2)[::2], active),
        (groups, active.T.contiguous().T),
        (groups, everywhere),
        (one_group, torch.zeros(1, 1, dtype=torch.int64).expand(3, 2)),
    ):
        for operator in (dk.nearest_prototype, dk.aggregate_nearest):
            call = partial(operator, tokens, prototypes, 2, backend=backend)
            expected = call(groups=strided_groups.contiguous(), active_groups=strided_active.contiguous())
            found = call(groups=strided_groups, active_groups=strided_active)
            assert all(torch.equal(x, y) for x, y in zip(found, expected))
    free = dk.nearest_prototype(tokens, prototypes, 2, backend=backend)
    assert torch.equal(found.indices, free.indices)  # one group of all: as without groups


@each_backend
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


@each_backend
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


@each_backend
@metrics
def test_values_at_the_smallest_temperature(backend, metric):
    """The nearest prototype, or the mean of those equally near: no score over temperature overflows."""
    tokens, prototypes = 1e19 * torch.ones(1, 2), torch.tensor([[0.0, 1.0], [0.0, 1.0], [-1e19, 0.0]])
    for k in (2, 3):
        found = dk.aggregate_nearest(tokens, prototypes, k, metric, temperature=1e-300, backend=backend)
        assert torch.equal(found.values, prototypes[:1])


@each_backend
def test_nothing_to_search(backend):
    for shape in [(0, 5), (3, 0, 5), (0, 7, 5)]:
        result = dk.aggregate_nearest(torch.empty(shape), random(4, 5), k=2, backend=backend)
        assert result.values.shape == shape and result.scores.shape == result.indices.shape == (*shape[:-1], 2)
    statistics = dk.prototype_statistics(torch.empty(0, 5), random(4, 5), backend=backend)
    assert (statistics.counts == 0).all() and (statistics.sums == 0).all() and statistics.inertia == 0
    assert statistics.sums.shape == (4, 5) and statistics.inertia.shape == ()


@needs_cpp
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


# ---------------------------------------------------------------------------------- adversarial values


@each_backend
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


@each_backend
@metrics
@pytest.mark.parametrize("scale", [1e-7, 3e-6, 1e-4])
def test_near_ties_below_bfloat16_resolution(backend, metric, scale):
    tokens = random(64, 256, offset=1.0)
    prototypes = random(1, 256, seed=1, offset=1.0) * (1 + scale * random(500, 256, seed=2))
    for k in (1, 5):
        result = dk.nearest_prototype(tokens, prototypes, k=k, metric=metric, backend=backend)
        assert_nearest(result, tokens, prototypes, metric, k)


@each_backend
@metrics
@pytest.mark.parametrize("d", [64, 4096])
def test_long_sums_of_one_sign(backend, metric, d):
    """Where a plain float32 sum would drift: all terms positive, and a constant far larger than the differences."""
    tokens, prototypes = random(16, d, offset=30.0).abs(), random(80, d, seed=1, offset=30.0).abs()
    result = dk.nearest_prototype(tokens, prototypes, k=3, metric=metric, backend=backend)
    assert_nearest(result, tokens, prototypes, metric, 3)


@each_backend
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


@each_backend
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


@each_backend
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


@each_backend
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


@each_backend
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


@each_backend
def test_one_long_prototype_among_short_ones(backend):
    """Every prototype's error is bounded by itself: here the largest one's bound would let all through."""
    tokens, prototypes = random(300, 40), 1e-2 * random(200, 40, seed=1)
    prototypes[7] = 1e3
    scores, indices = dk.nearest_prototype(tokens, prototypes, k=3, metric="l2", backend=backend)
    expected, found = brute_force(tokens, prototypes, "l2")[0], indices.numpy()
    np.testing.assert_allclose(np.take_along_axis(expected, found, 1), np.sort(expected, 1)[:, :3], rtol=1e-6)
    np.testing.assert_allclose(scores.numpy(), np.sort(expected, 1)[:, :3], rtol=1e-6)
