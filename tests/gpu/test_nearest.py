"""The Triton kernels of nearest prototype against the reference in float64, forward and backward."""

import pytest
import torch

import dpdiff_kernels as dk

pytest.importorskip("triton")
METRICS = ("cosine", "dot", "l2")
TOLERANCE = 6e-7  # of |x|^2 + |p|^2, or of 1 for cosine

metrics = pytest.mark.parametrize("metric", METRICS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def random(*shape, seed=0, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def assert_nearest(result, tokens, prototypes, metric, k):
    """Scores true and, one by one, as good as the best there are."""
    expected = dk.nearest_prototype(tokens.double(), prototypes.double(), k, metric, backend="reference")
    p = prototypes.double()[result.indices] if prototypes.dim() == 2 else None
    x = tokens.double().unsqueeze(-2)
    if metric == "l2":
        true = (x - p).square().sum(-1)
    elif metric == "dot":
        true = (x * p).sum(-1)
    else:
        true = torch.cosine_similarity(x, p, dim=-1, eps=0)
    slack = TOLERANCE * (1 if metric == "cosine" else x.square().sum(-1) + p.square().sum(-1))
    assert ((result.scores - true).abs() <= slack).all()
    assert ((true - expected.scores).abs() <= 2 * slack).all()
    assert all(len(set(row)) == k for row in result.indices.flatten(0, -2).tolist())


@dtypes
@metrics
@pytest.mark.parametrize(("n", "n_prototypes", "d", "k"), [(20, 150, 35, 1), (5, 40, 64, 6), (130, 20, 16, 2)])
def test_nearest_is_exact(device, dtype, metric, n, n_prototypes, d, k):
    tokens, prototypes = random(n, d, dtype=dtype).to(device), random(n_prototypes, d, seed=1, dtype=dtype).to(device)
    result = dk.nearest_prototype(tokens, prototypes, k, metric, backend="triton")
    assert result.scores.dtype == torch.float32 and result.indices.dtype == torch.int64
    assert_nearest(result, tokens, prototypes, metric, k)


@metrics
def test_the_most_neighbours(device, metric):
    tokens, prototypes = random(3, 20).to(device), random(70, 20, seed=1).to(device)
    result = dk.nearest_prototype(tokens, prototypes, 32, metric, backend="triton")
    assert_nearest(result, tokens, prototypes, metric, 32)


@metrics
@pytest.mark.parametrize("shared", [True, False])
def test_routes_and_banks(device, metric, shared):
    tokens = random(2, 10, 24).to(device)
    prototypes = random(*([] if shared else [2]), 60, 24, seed=1).to(device)
    groups = torch.randperm(60, generator=torch.Generator().manual_seed(3)) // 4
    active = torch.tensor([[0, 5, 5], [14, -1, 2]])
    for routes in (dict(), dict(groups=groups.to(device), active_groups=active.to(device))):
        expected = dk.nearest_prototype(tokens, prototypes, 3, metric, backend="reference", **routes)
        result = dk.nearest_prototype(tokens, prototypes, 3, metric, backend="triton", **routes)
        assert torch.equal(result.indices, expected.indices)
        torch.testing.assert_close(result.scores, expected.scores, rtol=1e-6, atol=1e-6)


@metrics
@pytest.mark.parametrize("k", [1, 7])
def test_equal_prototypes_go_to_the_lowest_index(device, metric, k):
    one = random(1, 40)
    tokens = (one * torch.linspace(2.9, 3.1, 6)[:, None]).to(device)
    result = dk.nearest_prototype(tokens, one.expand(90, 40).to(device), k, metric, backend="triton")
    assert torch.equal(result.indices.cpu(), torch.arange(k).expand(6, k))


@metrics
@pytest.mark.parametrize("scale", [1e-7, 1e-4])
def test_near_ties_below_the_screenings_resolution(device, metric, scale):
    tokens = random(8, 64, offset=1.0).to(device)
    prototypes = (random(1, 64, seed=1, offset=1.0) * (1 + scale * random(100, 64, seed=2))).to(device)
    for k in (1, 3):
        result = dk.nearest_prototype(tokens, prototypes, k, metric, backend="triton")
        assert_nearest(result, tokens, prototypes, metric, k)


@metrics
@pytest.mark.parametrize("scale", [1e18, 1e-18, 1e-30])
def test_huge_and_tiny_vectors(device, metric, scale):
    tokens, prototypes = random(12, 20) * scale, random(40, 20, seed=1) * scale
    tokens[::2], prototypes[::3] = random(6, 20, seed=3), random(14, 20, seed=2)
    tokens, prototypes = tokens.to(device), prototypes.to(device)
    result = dk.nearest_prototype(tokens, prototypes, 2, metric, backend="triton")
    expected = dk.nearest_prototype(tokens, prototypes, 2, metric, backend="reference")
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-6, atol=1e-6 if metric == "cosine" else 1e-45)


@metrics
def test_nan_infinity_and_zero_stay_visible(device, metric):
    tokens, prototypes = random(9, 33), random(70, 33, seed=1)
    tokens[3, 5], tokens[7], tokens[8] = torch.nan, torch.inf, 0
    tokens, prototypes = tokens.to(device), prototypes.to(device)
    result = dk.aggregate_nearest(tokens, prototypes, 2, metric, backend="triton")
    assert result.scores[3].isnan().all() and not result.scores[7].isfinite().any()
    assert not result.values[[3, 7]].isfinite().any() and result.scores[8].isfinite().all()
    assert ((0 <= result.indices) & (result.indices < 70)).all()
    if metric != "l2":
        assert (result.scores[8] == 0).all() and result.indices[8].tolist() == [0, 1]
    prototypes[[40, 12], 4] = torch.nan
    result = dk.nearest_prototype(tokens[:3], prototypes, 2, metric, backend="triton")
    assert result.scores.isnan().all() and result.indices.tolist() == 3 * [[12, 40]]


def test_too_few_active_prototypes_score_nan(device):
    groups, active = torch.tensor([0, 0, 1]).to(device), torch.tensor([[1, -1]]).to(device)
    tokens, prototypes = random(1, 4, 5).to(device), random(3, 5, seed=1).to(device)
    options = dict(groups=groups, active_groups=active, backend="triton")
    result = dk.nearest_prototype(tokens, prototypes, 2, **options)
    assert (result.indices[..., 0] == 2).all() and result.scores[..., 1].isnan().all()


@dtypes
@metrics
@pytest.mark.parametrize(("shared", "k"), [(True, 1), (False, 3)])
def test_values_and_gradients_agree_with_float64(device, dtype, metric, shared, k):
    inputs = random(2, 10, 35, dtype=dtype), random(*([] if shared else [2]), 20, 35, seed=1, dtype=dtype)
    grad_values, grad_scores = random(2, 10, 35, seed=2, dtype=dtype).to(device), random(2, 10, k, seed=3).to(device)
    found = []
    for kind, backend in ((torch.float64, "reference"), (dtype, "triton")):
        tokens, prototypes = (t.to(device, kind).requires_grad_() for t in inputs)
        result = dk.aggregate_nearest(tokens, prototypes, k, metric, temperature=0.5, backend=backend)
        nearest = dk.nearest_prototype(tokens, prototypes, k, metric, backend=backend)
        loss = (result.values * grad_values).sum() + (result.scores * grad_scores).sum() + nearest.scores.sum()
        found.append((result.values.detach(), *torch.autograd.grad(loss, (tokens, prototypes))))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for expected, got in zip(*found):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@metrics
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics(device, metric, weighted):
    tokens, prototypes = random(3, 20, 20).to(device), random(30, 20, seed=1).to(device)
    weights = random(3, 20, seed=2).abs().to(device) if weighted else None
    expected = dk.prototype_statistics(tokens, prototypes, metric, weights, backend="reference")
    result = dk.prototype_statistics(tokens, prototypes, metric, weights, backend="triton")
    for got, wanted in zip(result, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_same_bits_every_time(device):
    tokens, prototypes = random(30, 24).to(device), random(10, 24, seed=1).to(device)
    runs = []
    for _ in range(2):
        x, p = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
        values, scores, indices = dk.aggregate_nearest(x, p, 4, backend="triton")
        (values.sin().sum() + scores.cos().sum()).backward()
        runs.append((values, scores, indices, x.grad, p.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@metrics
def test_statistics_without_channels(device, metric):
    tokens, prototypes = torch.zeros(5, 0, device=device), torch.zeros(3, 0, device=device)
    result = dk.prototype_statistics(tokens, prototypes, metric, backend="triton")
    assert result.counts.tolist() == [5, 0, 0] and result.sums.shape == (3, 0)
    assert result.inertia == (5 if metric == "cosine" else 0)


def test_nothing_to_search(device):
    for shape in [(0, 5), (3, 0, 5)]:
        result = dk.aggregate_nearest(torch.empty(shape, device=device), random(4, 5).to(device), 2, backend="triton")
        assert result.values.shape == shape and result.scores.shape == (*shape[:-1], 2)
    statistics = dk.prototype_statistics(torch.empty(0, 5, device=device), random(4, 5).to(device), backend="triton")
    assert (statistics.counts == 0).all() and (statistics.sums == 0).all() and statistics.inertia == 0


@pytest.mark.cuda_only
def test_at_full_size_under_compile_and_in_a_graph(device):
    tokens, prototypes = (random(n, 768, seed=n, dtype=torch.bfloat16).to(device) for n in (16_384, 1_024))
    run = lambda x, p: dk.nearest_prototype(x, p, metric="l2", backend="triton")
    expected = run(tokens, prototypes)
    assert_nearest(expected, tokens, prototypes, "l2", 1)
    compiled = torch.compile(run, fullgraph=True)(tokens, prototypes)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tokens, prototypes)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


def test_scores_of_one_prototype(device):
    tokens = random(4, 7).to(device)
    result = dk.nearest_prototype(tokens, random(1, 7, seed=1).to(device), metric="l2", backend="triton")
    assert (result.indices == 0).all() and result.scores.isfinite().all()
