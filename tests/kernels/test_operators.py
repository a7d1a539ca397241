"""Operators called directly, and through torch.library where something has to see them."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpdiff_kernels.operators import observed, register


def cube(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return factor * x**3, x.detach().clone()


torch.library.custom_op("dpdiff_test::cube", cube, mutates_args=())


def setup(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.factor = inputs[1]


def backward(ctx, grad, _):
    return 3 * ctx.factor * ctx.saved_tensors[0] ** 2 * grad, None


def fake(x, factor):
    return torch.empty_like(x), torch.empty_like(x)


CUBE = register("dpdiff_test::cube", fake, backward, setup, SimpleNamespace(cube=cube))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Marked(Tensor):
    pass


def test_torch_func_is_refused_in_one_line():
    with pytest.raises(NotImplementedError, match=r"torch\.func doesn't differentiate dpdiff_test\.cube\."):
        torch.func.grad(lambda x: CUBE(x, 2.0)[0].sum())(torch.ones(3))


@pytest.fixture
def calls(monkeypatch):
    """How often the function was called without torch.library."""
    counted = []

    def counting(*arguments):
        counted.append(arguments)
        return cube(*arguments)

    monkeypatch.setattr(CUBE, "function", counting)
    return counted


def test_a_plain_call_goes_to_the_function(calls):
    x = torch.randn(4)
    assert torch.equal(CUBE(x, 2.0)[0], 2 * x**3) and len(calls) == 1


def test_the_gradient_is_the_same_either_way():
    x = torch.randn(4, requires_grad=True)
    for call in (CUBE, torch.ops.dpdiff_test.cube):
        out, kept = call(x, 2.0)
        assert not kept.requires_grad
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 6 * x**2)
    assert not CUBE(x.detach(), 2.0)[0].requires_grad
    with torch.no_grad():
        assert not CUBE(x, 2.0)[0].requires_grad


def test_whatever_has_to_see_the_operator_does(calls):
    x = torch.randn(4)
    with Seen() as seen:
        CUBE(x, 2.0)
    assert "dpdiff_test::cube" in seen.names
    CUBE(x.as_subclass(Marked), 2.0)
    assert torch.vmap(lambda x: torch.tensor(observed((x,))))(x).all()
    compiled = torch.compile(lambda x: CUBE(x, 2.0)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * x**3)
    assert not calls
