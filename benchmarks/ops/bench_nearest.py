"""Nearest prototype beside its rivals, in one run, on CPU:

    pytest benchmarks/ops/bench_nearest.py --benchmark-group-by=group --benchmark-columns=median,min,rounds

Tokens are (12,544, 768), as of 16 images of 28 x 28; every group is one case, and its table gives each rival's ratio.
"""

import faiss
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn import functional as F

import dpdiff_kernels as dk

THREADS = 2
N, D = 12_544, 768


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat_index(prototypes):
    index = faiss.IndexFlatL2(prototypes.shape[1])
    index.add(prototypes.numpy())
    return index


def measure(benchmark, group, function):
    benchmark.group = group
    benchmark.pedantic(function, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("rival", ["dpdiff", "faiss", "cdist"])
@pytest.mark.parametrize("n_prototypes", [64, 256, 1024, 4096])
def test_nearest_l2(benchmark, n_prototypes, rival):
    tokens, prototypes = random(N, D), random(n_prototypes, D, seed=1)
    index, array = flat_index(prototypes), tokens.numpy()
    run = {
        "dpdiff": lambda: dk.nearest_prototype(tokens, prototypes, metric="l2"),
        "faiss": lambda: index.search(array, 1),
        "cdist": lambda: torch.cdist(tokens, prototypes).argmin(1),
    }[rival]
    measure(benchmark, f"nearest, float32, l2, K = {n_prototypes}", run)


@pytest.mark.parametrize("rival", ["dpdiff", "mm"])
def test_nearest_bfloat16(benchmark, rival):
    tokens, prototypes = random(N, D).bfloat16(), random(1024, D, seed=1).bfloat16()
    run = {
        "dpdiff": lambda: dk.nearest_prototype(tokens, prototypes, metric="l2"),
        "mm": lambda: torch.mm(tokens, prototypes.T),
    }[rival]
    measure(benchmark, "nearest, bfloat16, K = 1024", run)


@pytest.mark.parametrize("rival", ["dpdiff", "faiss"])
def test_four_nearest(benchmark, rival):
    tokens, prototypes = random(N, D), random(1024, D, seed=1)
    index, array = flat_index(prototypes), tokens.numpy()
    run = {
        "dpdiff": lambda: dk.nearest_prototype(tokens, prototypes, k=4, metric="l2"),
        "faiss": lambda: index.search(array, 4),
    }[rival]
    measure(benchmark, "nearest, float32, l2, k = 4, K = 1024", run)


def aggregate_by_cdist(tokens, prototypes, k):
    scores, indices = torch.cdist(tokens, prototypes).square().topk(k, largest=False)
    if k == 1:
        return prototypes[indices[:, 0]], scores
    return torch.einsum("nk,nkd->nd", torch.softmax(-scores, -1), prototypes[indices]), scores


def aggregate_by_mm(tokens, prototypes, k):
    with torch.no_grad():
        indices = torch.addmm(prototypes.square().sum(-1), tokens, prototypes.T, alpha=-2).topk(k, largest=False)[1]
    scores = (tokens[:, None] - prototypes[indices]).square().sum(-1)
    if k == 1:
        return prototypes[indices[:, 0]], scores
    return torch.einsum("nk,nkd->nd", torch.softmax(-scores, -1), prototypes[indices]), scores


@pytest.mark.parametrize("rival", ["dpdiff", "cdist", "mm", "compiled cdist", "compiled mm"])
@pytest.mark.parametrize("k", [1, 4])
def test_aggregate_forward_and_backward(benchmark, k, rival):
    tokens, prototypes = random(N, D).requires_grad_(), random(1024, D, seed=1).requires_grad_()
    grad_values, grad_scores = random(N, D, seed=2), random(N, k, seed=3)
    aggregate = {
        "dpdiff": lambda *operands: dk.aggregate_nearest(*operands, k=k, metric="l2", temperature=1.0)[:2],
        "cdist": lambda *operands: aggregate_by_cdist(*operands, k),
        "mm": lambda *operands: aggregate_by_mm(*operands, k),
    }[rival.removeprefix("compiled ")]
    if rival.startswith("compiled"):
        aggregate = torch.compile(aggregate)

    def run():
        return torch.autograd.grad(aggregate(tokens, prototypes), (tokens, prototypes), (grad_values, grad_scores))

    measure(benchmark, f"aggregate_nearest, forward and backward, l2, k = {k}, K = 1024", run)


@pytest.mark.parametrize("rival", ["prototype_statistics", "nearest_prototype"])
@pytest.mark.parametrize("n_prototypes", [256, 1024])
def test_statistics(benchmark, n_prototypes, rival):
    tokens, prototypes = random(N, D), random(n_prototypes, D, seed=1)
    run = {
        "prototype_statistics": lambda: dk.prototype_statistics(tokens, prototypes),
        "nearest_prototype": lambda: dk.nearest_prototype(tokens, prototypes, metric="l2"),
    }[rival]
    measure(benchmark, f"statistics beside nearest alone, K = {n_prototypes}", run)


def lloyd_by_faiss(array, init, n_iters):
    clustering = faiss.Clustering(array.shape[1], len(init))
    clustering.niter, clustering.max_points_per_centroid = n_iters, len(array)
    clustering.min_points_per_centroid = 1
    faiss.copy_array_to_vector(init.ravel(), clustering.centroids)
    clustering.train(array, faiss.IndexFlatL2(array.shape[1]))


@pytest.mark.parametrize("rival", ["dpdiff", "scikit-learn", "faiss"])
def test_ten_lloyd_iterations(benchmark, rival):
    tokens = random(N, D)
    init = tokens[:256].clone()
    array, init_array = tokens.numpy(), init.numpy()
    run = {
        "dpdiff": lambda: dk.kmeans(tokens, 256, n_iters=10, init=init),
        "scikit-learn": lambda: KMeans(256, init=init_array, n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(
            array
        ),
        "faiss": lambda: lloyd_by_faiss(array, init_array, 10),
    }[rival]
    benchmark.group = "10 Lloyd iterations, K = 256"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("n_groups", [10, 1600])
def test_routing(benchmark, n_groups):
    """Ten active groups of 8 of 1,600 for each of 16 images, beside as many when there are no others."""
    tokens, prototypes = random(16, N // 16, D), random(8 * n_groups, D, seed=1)
    groups = torch.arange(8 * n_groups) // 8
    generator = torch.Generator().manual_seed(2)
    active = torch.stack([torch.randperm(n_groups, generator=generator)[:10] for _ in range(16)])
    run = lambda: dk.nearest_prototype(tokens, prototypes, metric="l2", groups=groups, active_groups=active)
    measure(benchmark, "10 active groups of 8, of 10 and of 1600", run)


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_metrics(benchmark, metric):
    tokens, prototypes = F.normalize(random(N, D), dim=-1), F.normalize(random(1024, D, seed=1), dim=-1)
    measure(benchmark, "metrics, K = 1024", lambda: dk.nearest_prototype(tokens, prototypes, metric=metric))
