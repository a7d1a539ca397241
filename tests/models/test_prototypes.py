"""Both banks against scikit-learn, brute force and POT."""

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

import dpdiff_kernels as dk
from dpdiff.prototypes import GlobalPrototypes, LocalPrototypes


def blobs(n_blobs=6, per_blob=50, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(n_blobs, dim, generator=generator)
    points = centres.repeat_interleave(per_blob, 0) + torch.randn(n_blobs * per_blob, dim, generator=generator)
    return points[torch.randperm(len(points), generator=generator)]


def test_local_bank_starts_at_the_cluster_centres():
    points = blobs()
    prototypes = LocalPrototypes(6, 8)
    prototypes.initialise(points, n_iters=20, generator=torch.Generator().manual_seed(0))
    expected = KMeans(6, n_init=10, random_state=0).fit(points.numpy()).cluster_centers_
    got = prototypes.bank.detach().numpy()
    distances = np.linalg.norm(got[:, None] - expected, axis=-1)
    assert sorted(distances.argmin(1)) == list(range(6))
    np.testing.assert_allclose(distances.min(1), 0, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_condition_is_the_softmax_of_the_nearest_prototypes(k):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 7, 5, generator=generator)
    prototypes = LocalPrototypes(9, 5, k=k, temperature=0.2)
    condition, distances = prototypes(tokens)
    bank = prototypes.bank.detach().double().numpy()
    for i, j in np.ndindex(2, 7):
        token = tokens[i, j].double().numpy()
        squared = ((token - bank) ** 2).mean(-1)  # per channel
        nearest = np.argsort(squared)[:k]
        weights = np.exp(-squared[nearest] / 0.2)
        expected = weights @ bank[nearest] / weights.sum()
        np.testing.assert_allclose(condition[i, j].detach().numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(distances[i, j].detach().numpy(), squared.min(), atol=1e-5)


def test_the_loss_pulls_the_nearest_prototypes_to_the_tokens():
    points = blobs()
    prototypes = LocalPrototypes(6, 8)
    with torch.no_grad():
        prototypes.bank.copy_(points[:6])
    optimizer = torch.optim.Adam(prototypes.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        loss = prototypes(points[None])[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] == pytest.approx(min(losses), rel=0.05)


def test_uses_are_counted_in_training_only():
    prototypes = LocalPrototypes(3, 2)
    with torch.no_grad():
        prototypes.bank.copy_(torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]))
    tokens = torch.tensor([[[0.1, 0.0], [5.1, 0.0], [4.0, 0.0]]])
    prototypes(tokens)
    prototypes(tokens)
    assert prototypes.counts.tolist() == [2, 4, 0]
    prototypes.eval()(tokens)
    assert prototypes.counts.tolist() == [2, 4, 0]


def test_revive_moves_unused_prototypes_onto_the_farthest_tokens():
    prototypes = LocalPrototypes(4, 2)
    with torch.no_grad():
        prototypes.bank.copy_(torch.tensor([[0.0, 0.0], [90.0, 90.0], [5.0, 0.0], [-90.0, 90.0]]))
    tokens = torch.tensor([[[0.0, 0.1], [5.0, 0.5]], [[0.0, 3.0], [5.0, 2.0]]])
    _, distances = prototypes(tokens)
    assert prototypes.revive(tokens, distances.detach()) == 2
    moved = prototypes.bank.detach()
    assert moved[[0, 2]].tolist() == [[0.0, 0.0], [5.0, 0.0]]
    assert sorted(moved[[1, 3]].tolist()) == [[0.0, 3.0], [5.0, 2.0]]
    _, distances = prototypes(tokens)  # now each is the nearest of one token
    assert prototypes.revive(tokens, distances.detach()) == 0
    torch.testing.assert_close(prototypes.bank.detach(), moved)


def test_revive_with_fewer_tokens_than_unused_prototypes():
    prototypes = LocalPrototypes(8, 2)
    tokens = torch.randn(1, 3, 2)
    assert prototypes.revive(tokens, torch.tensor([[1.0, 2.0, 3.0]])) == 3  # none was used yet


def views(n=48, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    view = torch.randn(n, dim, generator=generator)
    return view, view + 0.3 * torch.randn(n, dim, generator=generator)


def test_transport_uses_every_prototype_alike(monkeypatch):
    plans = []

    def recorded(*args, **kwargs):
        plans.append(sinkhorn(*args, **kwargs))
        return plans[-1]

    sinkhorn = dk.sinkhorn
    monkeypatch.setattr(dk, "sinkhorn", recorded)
    bank = GlobalPrototypes(6, 12)
    with torch.no_grad():
        bank.bank[1:] = bank.bank[1:] - 2 * bank.bank[:1]  # every point's nearest prototypes are few
    bank(*views())
    (transport,) = plans
    assert transport.plan.shape == (2, 48, 6)
    torch.testing.assert_close(transport.plan.sum(-2), torch.full((2, 6), 1 / 6), rtol=0.01, atol=0)
    torch.testing.assert_close(transport.plan.sum(-1), torch.full((2, 48), 1 / 48), rtol=0.15, atol=0)


def test_losses_are_those_of_pot():
    bank = GlobalPrototypes(6, 12, eps=0.2, n_iters=200, temperature=0.3)
    pair = views()
    transport, swapped = bank(*pair)
    prototypes = F.normalize(bank.bank.detach().double(), dim=-1).numpy()
    similarities = [F.normalize(v.double(), dim=-1).numpy() @ prototypes.T for v in pair]
    plans = [ot.sinkhorn([], [], 1 - s, reg=0.2, stopThr=1e-12) for s in similarities]
    # The regularised objective is the plan's cost less eps times its entropy, up to a constant of the marginals.
    costs = [(p * (1 - s)).sum() + 0.2 * (p * np.log(p * 48 * 6)).sum() for p, s in zip(plans, similarities)]
    assert transport.item() == pytest.approx(np.mean(costs), abs=1e-4)
    expected = []
    for plan, other in [(plans[0], similarities[1]), (plans[1], similarities[0])]:
        logits = other / 0.3
        log_prediction = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        expected.append(-(plan / plan.sum(1, keepdims=True) * log_prediction).sum(1).mean())
    assert swapped.item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_both_losses_fall_and_reach_bank_and_embedding():
    torch.manual_seed(0)
    bank, embed = GlobalPrototypes(6, 12), torch.nn.Linear(12, 12)
    x, y = views()
    optimizer = torch.optim.Adam([*bank.parameters(), *embed.parameters()], lr=0.02)
    history = []
    for _ in range(40):
        transport, swapped = bank(embed(x), embed(y))
        optimizer.zero_grad()
        (transport + swapped).backward()
        assert bank.bank.grad.abs().sum(-1).min() > 0  # every prototype
        assert embed.weight.grad.abs().sum() > 0
        optimizer.step()
        history.append((transport.item(), swapped.item()))
    assert history[-1][0] < 0.7 * history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]
    assert len(bank.similarity(embed(x)).argmax(-1).unique()) == 6
