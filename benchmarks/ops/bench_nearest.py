"""Nearest prototype beside faiss, scikit-learn and PyTorch, eager and compiled:

    pytest benchmarks/ops/bench_nearest.py [--device cuda]

Tokens are (12,544, 768), as of 16 images of 28 x 28. Every contender's answer is compared with float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dpdiff_kernels as dk
from benchmarks.contenders import contenders

N, D = 12_544, 768
COMPARED = 256  # tokens whose answer is checked


@pytest.fixture
def random(device) -> Callable[..., Tensor]:
    def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)

    return draw


def work(n_prototypes: int, width: int = 4, k: int = 1) -> dict:
    """Of the scores and what they are computed from; an answer is a score and an int64 index.

    The rate that bounds float32 is bfloat16's, since scores may be screened in it and settled in float32.
    """
    n_bytes = width * (N * D + n_prototypes * D) + (4 + 8) * k * N
    return {"flops": 2 * N * n_prototypes * D, "bytes": n_bytes, "dtype": "bfloat16"}


def by_faiss(tokens: Tensor, prototypes: Tensor, k: int) -> Callable:
    faiss = pytest.importorskip("faiss")
    if tokens.device.type != "cpu":
        pytest.skip("faiss is its CPU build here")
    index = faiss.IndexFlatL2(prototypes.shape[1])
    index.add(prototypes.numpy())
    array = tokens.numpy()
    return lambda: torch.from_numpy(index.search(array, k)[1])


def by_flash_kmeans(tokens: Tensor, prototypes: Tensor, k: int) -> Callable:
    """Its assignment step alone, with the tokens' norms, which stay from one iteration to the next, computed before."""
    if tokens.device.type != "cuda" or k > 1:
        pytest.skip("flash-kmeans finds the nearest one on GPUs only")
    assign = pytest.importorskip("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    norms = tokens.square().sum(-1)
    return lambda: assign(tokens[None], prototypes[None], norms[None]).long()


def searches(tokens: Tensor, prototypes: Tensor, k: int, contender: str) -> Callable[[], Tensor]:
    """What finds the indices (N, k) of the nearest."""
    if contender == "faiss":
        return by_faiss(tokens, prototypes, k)
    if contender.startswith("flash-kmeans"):
        return by_flash_kmeans(tokens, prototypes, k)
    by_cdist = lambda: torch.cdist(tokens, prototypes).topk(k, largest=False)[1]
    by_mm = lambda: torch.addmm(prototypes.square().sum(-1), tokens, prototypes.T, alpha=-2).topk(k, largest=False)[1]
    return {
        "dpdiff": lambda: dk.nearest_prototype(tokens, prototypes, k=k, metric="l2").indices,
        "cdist": by_cdist if k > 1 else lambda: torch.cdist(tokens, prototypes).argmin(1),
        "mm": by_mm,
        "compiled mm": torch.compile(by_mm, dynamic=False),
    }[contender]


def check_nearest(
    indices: Tensor,
    tokens: Tensor,
    prototypes: Tensor,
    k: int,
    rtol: float = 1e-5,
    searched: Tensor | slice = slice(None),
) -> None:
    """The distances of those found are the smallest there are, by default to float32 rounding.

    searched: the prototypes among which the first tokens have to find them.
    """
    indices, prototypes = indices.view(N, k)[:COMPARED].to(tokens.device), prototypes.double()
    tokens = tokens[:COMPARED].double()
    found = (tokens[:, None] - prototypes[indices]).norm(dim=-1)
    distances = torch.cdist(tokens, prototypes[searched], compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, distances.topk(k, largest=False)[0], rtol=rtol, atol=0)


@contenders("faiss", "cdist", "mm", "compiled mm", "flash-kmeans (TF32)")
@pytest.mark.parametrize(("n_prototypes", "k"), [(64, 1), (256, 1), (1024, 1), (4096, 1), (1024, 4)])
def test_nearest_l2(measure, random, n_prototypes, k, contender):
    tokens, prototypes = random(N, D), random(n_prototypes, D, seed=1)
    run = searches(tokens, prototypes, k, contender)
    check_nearest(run(), tokens, prototypes, k, rtol=1e-3 if "TF32" in contender else 1e-5)
    measure(f"float32, l2, K = {n_prototypes}, k = {k}", run, **work(n_prototypes, k=k))


@contenders(yardsticks=["mm alone"])
def test_nearest_bfloat16(measure, random, contender):
    tokens, prototypes = random(N, D, dtype=torch.bfloat16), random(1024, D, seed=1, dtype=torch.bfloat16)
    run = {
        "dpdiff": lambda: dk.nearest_prototype(tokens, prototypes, metric="l2"),
        "mm alone": lambda: torch.mm(tokens, prototypes.T),  # no search at all: less than any rival has to do
    }[contender]
    if contender == "dpdiff":
        check_nearest(run().indices, tokens, prototypes, 1)
    measure("bfloat16, l2, K = 1024", run, **work(1024, width=2))


def aggregate_by_cdist(tokens, prototypes, k):
    scores, indices = torch.cdist(tokens, prototypes).square().topk(k, largest=False)
    return blend(prototypes, scores, indices), scores


def aggregate_by_mm(tokens, prototypes, k):
    with torch.no_grad():
        indices = torch.addmm(prototypes.square().sum(-1), tokens, prototypes.T, alpha=-2).topk(k, largest=False)[1]
    scores = (tokens[:, None] - prototypes[indices]).square().sum(-1)
    return blend(prototypes, scores, indices), scores


def blend(prototypes, scores, indices):
    if scores.shape[1] == 1:
        return prototypes[indices[:, 0]]
    return torch.einsum("nk,nkd->nd", torch.softmax(-scores, -1), prototypes[indices])


def aggregate_by_dpdiff(tokens, prototypes, k, backend=None):
    return dk.aggregate_nearest(tokens, prototypes, k=k, metric="l2", temperature=1.0, backend=backend)[:2]


AGGREGATES = {"cdist": aggregate_by_cdist, "mm": aggregate_by_mm}
AGGREGATES |= {f"compiled {name}": torch.compile(run, dynamic=False) for name, run in AGGREGATES.items()}


@contenders(*AGGREGATES)
@pytest.mark.parametrize("k", [1, 4])
def test_aggregate_forward_and_backward(measure, random, k, contender):
    tokens, prototypes = random(N, D).requires_grad_(), random(1024, D, seed=1).requires_grad_()
    grads = random(N, D, seed=2), random(N, k, seed=3)
    aggregate = AGGREGATES.get(contender, aggregate_by_dpdiff)
    values, scores = aggregate(tokens, prototypes, k)
    few = [t.detach()[:COMPARED].double() for t in (tokens, values, scores)]
    wanted = aggregate_by_dpdiff(few[0], prototypes.detach().double(), k, backend="reference")
    torch.testing.assert_close(few[1], wanted[0], rtol=1e-2, atol=1e-2)  # near ties weigh in
    torch.testing.assert_close(few[2], wanted[1], rtol=1e-4, atol=1e-4)
    run = lambda: torch.autograd.grad(aggregate(tokens, prototypes, k), (tokens, prototypes), grads)
    # Read tokens and two gradients, write values and one gradient of that size.
    n_bytes = 4 * (5 * N * D + 2 * 1024 * D)
    measure(f"aggregate_nearest, forward + backward, k = {k}, K = 1024", run, **work(1024) | {"bytes": n_bytes})


@contenders(yardsticks=["nearest_prototype alone"])
@pytest.mark.parametrize("n_prototypes", [256, 1024])
def test_statistics(measure, random, n_prototypes, contender):
    tokens, prototypes = random(N, D), random(n_prototypes, D, seed=1)
    run = {
        "dpdiff": lambda: dk.prototype_statistics(tokens, prototypes),
        "nearest_prototype alone": lambda: dk.nearest_prototype(tokens, prototypes, metric="l2"),
    }[contender]
    if contender == "dpdiff":
        found = run()
        torch.testing.assert_close(found.counts.sum().item(), float(N))
        torch.testing.assert_close(found.sums.double().sum(0), tokens.double().sum(0), rtol=1e-4, atol=1e-2)
        wanted = dk.prototype_statistics(tokens.double(), prototypes.double(), backend="reference")
        same = found.counts == wanted.counts
        assert same.double().mean() > 0.99  # rounding decides between near ties
        torch.testing.assert_close(found.sums[same].double(), wanted.sums[same], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.inertia.double(), wanted.inertia, rtol=1e-5, atol=0)
    measure(f"prototype_statistics, K = {n_prototypes}", run, **work(n_prototypes))


def lloyd_by_faiss(tokens: Tensor, init: Tensor, n_iters: int) -> Callable:
    faiss = pytest.importorskip("faiss")
    array, centroids = tokens.cpu().numpy(), init.cpu().numpy()

    def run():
        clustering = faiss.Clustering(array.shape[1], len(centroids))
        clustering.niter, clustering.max_points_per_centroid = n_iters, len(array)
        clustering.min_points_per_centroid = 1
        faiss.copy_array_to_vector(centroids.ravel(), clustering.centroids)
        clustering.train(array, faiss.IndexFlatL2(array.shape[1]))
        return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(centroids.shape))

    return run


def lloyd_by_sklearn(tokens: Tensor, init: Tensor, n_iters: int) -> Callable:
    cluster = pytest.importorskip("sklearn.cluster")
    array, centroids = tokens.cpu().numpy(), init.cpu().numpy()
    model = cluster.KMeans(len(centroids), init=centroids, n_init=1, max_iter=n_iters, tol=0, algorithm="lloyd")
    return lambda: torch.from_numpy(model.fit(array).cluster_centers_)


def lloyd_by_flash_kmeans(tokens: Tensor, init: Tensor, n_iters: int) -> Callable:
    if tokens.device.type != "cuda":
        pytest.skip("flash-kmeans runs on GPUs only")
    kmeans = pytest.importorskip("flash_kmeans").batch_kmeans_Euclid
    return lambda: kmeans(tokens[None], len(init), max_iters=n_iters, tol=-1.0, init_centroids=init[None])[1][0]


LLOYDS = {"scikit-learn": lloyd_by_sklearn, "faiss": lloyd_by_faiss, "flash-kmeans (TF32)": lloyd_by_flash_kmeans}


@contenders(*LLOYDS)
def test_ten_lloyd_iterations(measure, random, contender):
    tokens = random(N, D)
    init = tokens[:256].clone()
    if contender == "dpdiff":
        run = lambda: dk.kmeans(tokens, 256, n_iters=10, init=init)
    else:
        run = LLOYDS[contender](tokens, init, 10)
    inertia, wanted = (
        torch.cdist(tokens.cpu(), centroids.cpu()).amin(1).square().sum()
        for centroids in (run(), dk.kmeans(tokens, 256, n_iters=10, init=init, backend="reference"))
    )
    torch.testing.assert_close(inertia, wanted, rtol=1e-3, atol=0)
    measure("10 Lloyd iterations, K = 256", run, **{**work(256), "flops": 10 * work(256)["flops"]})


@contenders(yardsticks=["80 prototypes"])
def test_routing(measure, random, contender):
    """Ten active groups of 8 of 1,600 for each of 16 images, beside as many when there are no others."""
    n_groups = 1600 if contender == "dpdiff" else 10
    tokens, prototypes = random(16, N // 16, D), random(8 * n_groups, D, seed=1)
    groups = torch.arange(8 * n_groups, device=tokens.device) // 8
    draw = torch.Generator().manual_seed(2)
    active = torch.stack([torch.randperm(n_groups, generator=draw)[:10] for _ in range(16)]).to(tokens.device)
    run = lambda: dk.nearest_prototype(tokens, prototypes, metric="l2", groups=groups, active_groups=active)
    searched = torch.isin(groups, active[0])
    check_nearest(run().indices, tokens.flatten(0, 1), prototypes, 1, searched=searched)
    measure("10 active groups of 8, of 1,600 groups", run, **work(80))


@contenders(yardsticks=["l2"])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_metrics(measure, random, metric, contender):
    tokens, prototypes = F.normalize(random(N, D), dim=-1), F.normalize(random(1024, D, seed=1), dim=-1)
    metric_of_contender = metric if contender == "dpdiff" else "l2"
    run = lambda: dk.nearest_prototype(tokens, prototypes, metric=metric_of_contender)
    if contender == "dpdiff":
        scores = run().scores.view(-1)[:COMPARED].double()
        wanted = (tokens[:COMPARED].double() @ prototypes.double().T).amax(1)
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-6)
    measure(f"{metric}, K = 1024", run, **work(1024))
