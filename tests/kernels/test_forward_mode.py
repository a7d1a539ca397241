"""Forward-mode derivatives: the reference's, and from operators that have none an error, never silent zeros."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cpu_backends import needs_cpp

import dpdiff_kernels as dk


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, BANK, GATE = random(7, 4), random(5, 4, seed=1), random(2, 6, 4, seed=2), torch.full((2, 3), 0.3).double()


def attention(backend, **given):
    inputs = {"query": random(1, 2, 3, 4, seed=3), "local_key": BANK, "local_value": BANK + 1, "global_key": BANK - 1}
    inputs |= {"global_value": 2 * BANK, "gate": GATE}
    dtype = next(iter(given.values())).dtype
    return dk.prototype_attention(**{name: x.to(dtype) for name, x in inputs.items()} | given, backend=backend)


HAVE = {
    "query": (lambda q, backend: attention(backend, query=q), random(1, 2, 3, 4, seed=3)),
    "local_value": (lambda v, backend: attention(backend, local_value=v), BANK),
    "global_key": (lambda k, backend: attention(backend, global_key=k), BANK),
    "gate": (lambda gate, backend: attention(backend, gate=gate), GATE),
    "scores, tokens": (lambda x, backend: dk.nearest_prototype(x, Y.to(x), 2, backend=backend).scores, X),
    "scores, prototypes": (lambda y, backend: dk.nearest_prototype(X.to(y), y, 2, backend=backend).scores, Y),
    "values, tokens": (lambda x, backend: dk.aggregate_nearest(x, Y.to(x), 2, backend=backend).values, X),
    "values, prototypes": (lambda y, backend: dk.aggregate_nearest(X.to(y), y, 2, backend=backend).values, Y),
}
HAVE_NOT = {
    "cost": (lambda c, backend: dk.sinkhorn(c, n_iters=3, backend=backend).plan, random(5, 4)),
    "weights": (
        lambda a, backend: dk.sinkhorn(X.to(a), a, n_iters=3, tau_a=1.0, backend=backend).value,
        torch.full((7,), 0.2),
    ),
    "x": (lambda x, backend: dk.sinkhorn_points(x, Y.to(x), eps=1.0, n_iters=3, backend=backend).value, X),
    "y": (lambda y, backend: dk.sinkhorn_points(X.to(y), y, eps=1.0, n_iters=3, backend=backend).f, Y),
    "v": (lambda v, backend: dk.sinkhorn_points(X.to(v), Y.to(v), n_iters=3, backend=backend).apply(v), random(5, 2)),
}


@pytest.mark.parametrize("case", HAVE)
def test_the_reference_has_them(case):
    function, primal = HAVE[case]
    run, tangent, step = partial(function, backend="reference"), random(*primal.shape, seed=9), 1e-6
    slope = torch.func.jvp(run, (primal,), (tangent,))[1]
    expected = (run(primal + step * tangent) - run(primal - step * tangent)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


@needs_cpp
@pytest.mark.parametrize("case", HAVE | HAVE_NOT)
@pytest.mark.parametrize("backend", ["cpp", None])
def test_native_operators_refuse(case, backend):
    function, primal = (HAVE | HAVE_NOT)[case]
    run, primal = partial(function, backend=backend), primal.float()
    message = "forward-mode derivatives are not on backend 'cpp': expected backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(run, (primal,), (torch.ones_like(primal),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=message):
            run(forward_ad.make_dual(primal, torch.ones_like(primal)))
        assert torch.equal(run(primal), run(primal.clone()))  # what has no tangent runs


@needs_cpp
def test_what_is_not_differentiable_has_no_tangent():
    x = X.float()
    for function in (
        lambda x: dk.prototype_statistics(x, Y.float(), backend="cpp").sums,
        lambda x: dk.kmeans(x, 2, init=x[:2], backend="cpp"),
    ):
        result, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        assert torch.equal(result, function(x)) and not tangent.any()
