"""Both banks against scikit-learn, brute force and POT."""

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from dpdiff.prototypes import GlobalPrototypes, LocalPrototypes


def blobs(n_blobs=6, per_blob=50, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(n_blobs, dim, generator=generator)
    points = centres.repeat_interleave(per_blob, 0) + torch.randn(n_blobs * per_blob, dim, generator=generator)
    return points[torch.randperm(len(points), generator=generator)]


def test_a_group_is_the_cluster_centres_of_its_tokens():
    points = blobs()
    prototypes = LocalPrototypes(3, 6, 8, 2, k=1, temperature=0.1)
    others = prototypes.bank.clone()
    places = points[:, :2].sign()
    prototypes.initialise(1, points, places, torch.Generator().manual_seed(0))
    expected = KMeans(6, n_init=10, random_state=0).fit(points.numpy()).cluster_centers_
    distances = np.linalg.norm(prototypes.bank[6:12].numpy()[:, None] - expected, axis=-1)
    assert sorted(distances.argmin(1)) == list(range(6))
    np.testing.assert_allclose(distances.min(1), 0, atol=1e-3)
    assert torch.equal(prototypes.bank[:6], others[:6]) and torch.equal(prototypes.bank[12:], others[12:])
    nearest = np.linalg.norm(points.numpy()[:, None] - prototypes.bank[6:12].numpy(), axis=-1).argmin(1)
    for i in range(6):
        torch.testing.assert_close(prototypes.places[6 + i], places[nearest == i].mean(0))
    assert not prototypes.places[:6].any() and not prototypes.places[12:].any()


def test_fewer_tokens_than_prototypes():
    prototypes = LocalPrototypes(1, 8, 2, 1, k=1, temperature=0.1)
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    prototypes.initialise(0, points, torch.arange(1.0, 4.0)[:, None], torch.Generator().manual_seed(0))
    assert {tuple(p) for p in prototypes.bank.tolist()} <= {tuple(p) for p in points.tolist()}
    assert {1.0, 2.0, 3.0} <= set(prototypes.places.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("k", [1, 3])
def test_condition_is_the_softmax_of_the_nearest_prototypes(k):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 7, 5, generator=generator)
    prototypes = LocalPrototypes(3, 4, 5, 16, k=k, temperature=0.2)
    prototypes.bank.normal_(generator=generator)
    active = torch.tensor([[0, 2], [1, 2]])
    condition, distances, indices = prototypes(tokens, active)
    whole, all_distances, _ = prototypes(tokens, None)
    assert (all_distances <= distances).all() and not torch.equal(whole, condition)
    for i, j in np.ndindex(2, 7):
        token = tokens[i, j].double().numpy()
        bank = prototypes.active(active)[0][i].double().numpy()
        squared = ((token - bank) ** 2).mean(-1)  # per channel
        nearest = np.argsort(squared)[:k]
        weights = np.exp(-squared[nearest] / 0.2)
        expected = weights @ bank[nearest] / weights.sum()
        np.testing.assert_allclose(condition[i, j].numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(distances[i, j].numpy(), squared.min(), atol=1e-5)
        assert torch.equal(prototypes.bank[indices[i, j]], prototypes.active(active)[0][i, nearest[0]])


def descriptors(counts=(60, 6, 6), dim=12, seed=0):
    """Images of kinds that differ, some kinds much more frequent than others, and their kinds."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centres = torch.randn(len(counts), dim, generator=generator)
    return centres[kinds] + 0.1 * torch.randn(len(kinds), dim, generator=generator), kinds


def test_every_kind_of_image_has_a_global_prototype_and_images_go_to_their_own():
    images, kinds = descriptors()
    prototypes = GlobalPrototypes(6, 12)
    nearest = prototypes.initialise(images, balanced=False, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prototypes.bank.norm(dim=1), torch.ones(6))
    assert torch.equal(nearest, prototypes.route(images, 1)[:, 0])
    kinds_of = [set(kinds[nearest == g].tolist()) for g in range(6)]
    assert all(len(kind) <= 1 for kind in kinds_of) and set.union(*kinds_of) == {0, 1, 2}
    similarity = F.normalize(images, dim=1) @ prototypes.bank.T
    assert torch.equal(prototypes.route(images, 3), similarity.topk(3).indices)


def test_transport_evens_the_clusters_shares_of_the_images():
    """Of kinds equally frequent, each gets a cluster; where one kind is most images, most clusters are for it."""
    images, kinds = descriptors((20,) * 6)
    for seed in range(5):
        prototypes = GlobalPrototypes(6, 12)
        cluster = prototypes.initialise(images, generator=torch.Generator().manual_seed(seed))
        assert all(len(set(kinds[cluster == g].tolist())) == 1 for g in range(6))
        assert torch.equal(prototypes.route(images, 1)[:, 0], cluster)
    images, _ = descriptors((60, 6, 6))
    cluster = prototypes.initialise(images, generator=torch.Generator().manual_seed(0))
    assert cluster.bincount(minlength=6).max() <= 18  # 12 each in the mean; most images are of one kind


def test_images_of_rare_kinds_find_their_own_beside_others():
    """A kind of fewer images than a cluster's share has to live with others, within reach of the routing."""
    images, kinds = descriptors((40, 40, 40, 3, 3, 3, 3, 3))
    prototypes = GlobalPrototypes(10, 12)
    cluster = prototypes.initialise(images, generator=torch.Generator().manual_seed(0))
    for kind, groups in zip(kinds, prototypes.route(images, 4)):
        assert (kinds[torch.isin(cluster, groups)] == kind).any()


@pytest.mark.parametrize("balanced", [False, True])
def test_fewer_images_than_global_prototypes(balanced):
    images, _ = descriptors((2, 1))
    prototypes = GlobalPrototypes(8, 12)
    prototypes.initialise(images, balanced, torch.Generator().manual_seed(0))
    assert prototypes.bank.isfinite().all()


def test_swapped_assignment_is_that_of_pots_plan():
    """Marginals of images hold; those of prototypes are free at a price."""
    images, _ = descriptors()
    bank = GlobalPrototypes(5, 12, eps=0.2, n_iters=500, temperature=0.3)
    clean, reconstructed = images, images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    _, swapped = bank(clean, reconstructed)
    pair = F.normalize(torch.stack([clean, reconstructed]).double(), dim=-1)
    similarities = (pair @ bank.bank.double().T).numpy()
    a, b = np.full(len(images), 1 / len(images)), np.full(5, 1 / 5)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a, b, 1 - similarities[0], reg=0.2, reg_m=(np.inf, 0.2), numItermax=10_000, stopThr=1e-12
    )
    np.testing.assert_allclose(plan.sum(1), a, rtol=1e-3)
    logits = similarities[1] / 0.3
    log_prediction = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(plan / plan.sum(1, keepdims=True) * log_prediction).sum(1).mean()
    assert swapped.item() == pytest.approx(expected, abs=1e-3)


def test_losses_pull_reconstructions_back():
    """To the prototypes of their own kind."""
    images, kinds = descriptors()
    bank = GlobalPrototypes(6, 12)
    bank.initialise(images, balanced=False, generator=torch.Generator().manual_seed(0))
    reconstructed = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.Adam([reconstructed], lr=0.05)
    for _ in range(60):
        loss = sum(bank(images, reconstructed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kind_of_prototype = kinds[(F.normalize(images, dim=1) @ bank.bank.T).argmax(0)]
    assert torch.equal(kind_of_prototype[bank.route(reconstructed, 1)[:, 0]], kinds)
