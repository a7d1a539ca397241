"""Problems of Sinkhorn, and what their results have to be, for the GPU's tests."""

import torch
from torch.testing import assert_close

TAUS = [(None, None), (0.5, None), (None, 0.8), (0.5, 0.8)]


def problem(*shape, device, seed=0):
    """A cost in [0, 1] and weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(shape, generator=generator)
    a = torch.rand(shape[:-1], generator=generator) + 0.1
    b = torch.rand((*shape[:-2], shape[-1]), generator=generator) + 0.1
    return [x.to(device) for x in (cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))]


def clouds(n, m, d, batch, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(batch, n, d, generator=generator), torch.randn(batch, m, d, generator=generator) + 0.5
    return [x.to(device), y.to(device)]


def assert_as_all(t, exact, eps):
    assert torch.equal(t.n_iters, exact.n_iters)
    for name in ("f", "g"):
        assert_close(getattr(t, name).double(), getattr(exact, name).double(), rtol=1e-5, atol=1e-5 * eps, msg=name)
    assert_close(t.value.double(), exact.value.double(), rtol=1e-5, atol=1e-5 * eps)
