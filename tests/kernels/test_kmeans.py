"""kmeans against scikit-learn, and what it promises about seeds, empty clusters and bad input."""

import importlib

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import dpdiff_kernels as dk

module = importlib.import_module("dpdiff_kernels.kmeans")


def blobs(n=600, n_blobs=8, d=10, spread=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_blobs, d, generator=generator)
    labels = torch.arange(n) % n_blobs
    return centres[labels] + spread * torch.randn(n, d, generator=generator), labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_follows_scikit_learn_step_by_step():
    tokens, _ = blobs(spread=1.0)
    for n_iters in (1, 3, 10):
        init = tokens[:12]
        expected = KMeans(12, init=init.numpy(), n_init=1, max_iter=n_iters, tol=0, algorithm="lloyd").fit(
            tokens.numpy()
        )
        found = dk.kmeans(tokens, 12, n_iters=n_iters, init=init)
        np.testing.assert_allclose(found.numpy(), expected.cluster_centers_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_finds_the_blobs(metric):
    tokens, labels = blobs()
    if metric == "cosine":
        tokens = tokens * (0.1 + torch.rand(len(tokens), 1, generator=seeded()))  # the direction alone tells
    prototypes = dk.kmeans(tokens, 8, metric=metric, generator=seeded())
    found = dk.nearest_prototype(tokens, prototypes, metric=metric).indices.flatten()
    assert adjusted_rand_score(labels, found) == 1
    if metric == "cosine":
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(8))


def test_seeding_is_as_good_as_scikit_learns():
    """k-means++ finds a centre in most blobs; a uniform draw misses about a third of them."""
    tokens, _ = blobs(n=3000, n_blobs=40)
    seeds = [dk.kmeans(tokens, 40, n_iters=0, generator=seeded(i)) for i in range(5)]
    found = np.mean([dk.prototype_statistics(tokens, s).inertia.item() for s in seeds])
    plain = [dk.kmeans(tokens, 40, n_iters=0, init="random", generator=seeded(i)) for i in range(5)]
    assert found < 0.5 * np.mean([dk.prototype_statistics(tokens, s).inertia.item() for s in plain])
    converged = dk.prototype_statistics(tokens, dk.kmeans(tokens, 40, generator=seeded())).inertia.item()
    assert converged <= 1.5 * KMeans(40, n_init=1, random_state=0).fit(tokens.numpy()).inertia_


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_generator_decides(init):
    tokens, _ = blobs(spread=1.0)
    runs = [dk.kmeans(tokens, 5, generator=seeded(s), init=init, n_iters=2) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_chunks_change_nothing(metric, monkeypatch):
    tokens, _ = blobs(spread=1.0)
    whole = dk.kmeans(tokens, 7, metric=metric, generator=seeded())
    monkeypatch.setattr(module, "_CHUNK", 37 * tokens.shape[1])
    torch.testing.assert_close(dk.kmeans(tokens, 7, metric=metric, generator=seeded()), whole)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_empty_clusters_move_to_the_farthest_tokens(metric):
    tokens, _ = blobs(n_blobs=4)
    init = torch.cat([tokens[:1], -100 * tokens[:3].sum(0, keepdim=True) - 300 * torch.eye(10)[:3]])
    prototypes = dk.kmeans(tokens, 4, metric=metric, init=init)
    counts = dk.prototype_statistics(tokens, prototypes, metric=metric).counts
    assert (counts > 0).all()
    far = torch.full((1, 10), 1e6)
    moved = dk.kmeans(tokens, 2, init=torch.cat([tokens[:1], far]), n_iters=1)
    farthest = (tokens - tokens[0]).square().sum(1).argmax()
    torch.testing.assert_close(moved[1], tokens[farthest])


def test_the_given_centres_stay_the_callers():
    tokens = torch.randn(30, 3)
    fixed = dk.kmeans(tokens, 4, n_iters=200)
    found = dk.kmeans(tokens, 4, init=fixed)
    assert torch.equal(found, fixed) and found.data_ptr() != fixed.data_ptr()


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_zero_vectors_have_no_direction(init):
    tokens = torch.cat([torch.zeros(50, 8), torch.randn(12, 8)])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres = dk.kmeans(tokens, 6, "cosine", init=init, generator=generator)
        torch.testing.assert_close(centres.norm(dim=-1), torch.ones(6))
    assert dk.kmeans(tokens[:52], 3, "cosine", init=init).isfinite().all()  # only two have one


def test_shapes_and_dtypes():
    tokens, _ = blobs()
    prototypes = dk.kmeans(tokens.reshape(2, 30, 10, 10), 5, generator=seeded())
    assert prototypes.shape == (5, 10) and not prototypes.requires_grad
    torch.testing.assert_close(prototypes, dk.kmeans(tokens, 5, generator=seeded()))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert dk.kmeans(tokens.to(dtype), 5, generator=seeded()).dtype == dtype
    half = dk.kmeans(tokens.bfloat16(), 5, generator=seeded(), init=tokens[:5].bfloat16())
    torch.testing.assert_close(half.float(), dk.kmeans(tokens, 5, init=tokens[:5]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_autocast_changes_nothing(metric):
    tokens, _ = blobs(spread=1.0)
    tokens = tokens + 30  # bfloat16 doesn't tell their distances
    expected = dk.kmeans(tokens, 5, metric=metric, n_iters=2, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dk.kmeans(tokens, 5, metric=metric, n_iters=2, generator=seeded()), expected)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_tokens_without_channels(metric, init):
    assert dk.kmeans(torch.zeros(5, 0), 2, metric=metric, init=init, generator=seeded()).shape == (2, 0)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_fewer_different_tokens_than_prototypes(metric):
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(10, 1)
    prototypes = dk.kmeans(tokens, 5, metric=metric, generator=seeded())
    assert prototypes.isfinite().all() and prototypes.shape == (5, 2)
    torch.testing.assert_close(
        dk.prototype_statistics(tokens, prototypes, metric=metric).inertia, torch.tensor(0.0), rtol=0, atol=1e-5
    )
    zeros = dk.kmeans(torch.zeros(6, 3), 2, metric=metric, generator=seeded())
    assert torch.equal(zeros, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "n_prototypes is 7: expected at most the number of tokens, 6", dict(n_prototypes=7)),
        (ValueError, "n_prototypes is 0: expected at least 1", dict(n_prototypes=0)),
        (ValueError, "metric is 'dot': expected 'l2', 'cosine'", dict(metric="dot")),
        (ValueError, "init is 'first'", dict(init="first")),
        (TypeError, "init is a list: expected a torch.Tensor, 'k-means", dict(init=[[1.0]])),
        (ValueError, r"init has shape \(3, 3\): expected \(2, 3\)", dict(init=torch.ones(3, 3))),
        (ValueError, "tokens holds NaN or Inf", dict(tokens=torch.full((6, 3), torch.nan))),
        (ValueError, "init holds NaN or Inf: expected finite values", dict(init=torch.full((2, 3), torch.nan))),
        (ValueError, "init holds NaN or Inf", dict(init=torch.eye(3)[:2] / 0)),
        (ValueError, r"tokens has shape \(6,\)", dict(tokens=torch.ones(6))),
        (TypeError, "tokens is a NoneType: expected a torch.Tensor", dict(tokens=None)),
        (ValueError, "backend is 'fast'", dict(backend="fast", n_iters=0)),
        (TypeError, "generator is 5: expected a torch.Generator", dict(generator=5)),
        (TypeError, "init has dtype torch.float64", dict(init=torch.ones(2, 3).double())),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        dk.kmeans(**(dict(tokens=torch.ones(6, 3), n_prototypes=2) | arguments))
