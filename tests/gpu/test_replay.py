"""The operators, replayed on other tensors: what they answer when they are run, to the bit."""

import pytest
import torch

import dpdiff_kernels as dk
from dpdiff_kernels import replay

pytestmark = pytest.mark.skipif(not dk.backends()["triton"], reason="triton is not available")


def attention(draw, options=None):
    tensors = [draw(2, 2, 9, 16), *(draw(2, m, 16) for m in (12, 12, 5, 5))]
    tensors.append(draw(2, 2, 9).detach().sigmoid().requires_grad_(tensors[0].requires_grad))
    return dk.prototype_attention(*tensors, **(options or {}), backend="triton"), tensors


def routed_attention(draw):
    routes = torch.arange(12) // 4, torch.tensor([[0, 2], [1, -1]])
    return attention(draw, dict(zip(("groups", "active_groups"), (t.to(draw(1).device) for t in routes))))


def aggregation(draw):
    tensors = draw(2, 9, 20), draw(7, 20)
    return dk.aggregate_nearest(*tensors, k=2, metric="l2", backend="triton").values, tensors


def assignment(draw):
    found = dk.nearest_prototype(draw(9, 32), draw(7, 32), k=3, backend="triton")
    return torch.cat([found.scores, found.indices.float()]), ()


def statistics(draw):
    found = dk.prototype_statistics(draw(9, 20), draw(7, 20), metric="cosine", backend="triton")
    return torch.cat([found.counts, found.sums.flatten(), found.inertia[None]]), ()


def transport(draw):
    tensors = (draw(2, 6, 7),)
    return dk.sinkhorn(*tensors, n_iters=3, tol=1e-3, backend="triton").plan, tensors


def transport_of_points(draw):
    tensors = draw(2, 6, 8), draw(2, 7, 8)
    found = dk.sinkhorn_points(*tensors, n_iters=3, eps=1.0, backend="triton")
    return found.apply(draw(2, 7, 3)).sum() + found.value, tensors


CALLS = [attention, routed_attention, aggregation, assignment, statistics, transport, transport_of_points]


def answers(call, device, with_gradients):
    """Of three calls, on tensors of one size; the gradients too."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator).to(device).requires_grad_(with_gradients)

        out, tensors = call(draw)
        yield out.detach()
        if with_gradients and tensors:
            yield from torch.autograd.grad(out.square().sum(), tensors)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_replayed_and_run(device, call, with_gradients, monkeypatch):
    monkeypatch.setattr(replay, "is_on_gpu", lambda tensor: True)
    replayed = list(answers(call, device, with_gradients))
    monkeypatch.setattr(replay._Kept, "run", lambda self, key, given, args, kwargs: self.function(*args, **kwargs))
    for found, wanted in zip(replayed, answers(call, device, with_gradients), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_every_operator_can_be_replayed(device, call, monkeypatch):
    monkeypatch.setattr(replay, "is_on_gpu", lambda tensor: True)
    faults, call_of = [], replay.Recorder.call

    def noted(self, *args):
        kept = call_of(self, *args)
        faults.append(self.fault if kept is None else "")
        return kept

    monkeypatch.setattr(replay.Recorder, "call", noted)
    monkeypatch.setattr(replay._Kept, "run", fresh(replay._Kept.run))
    list(answers(call, device, False))
    assert faults and not any(faults)


def fresh(run):
    """As if nothing were kept yet."""

    def run_anew(self, *args):
        self.kept = {}
        return run(self, *args)

    return run_anew
