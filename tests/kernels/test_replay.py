"""Calls that are recorded and replayed: the same results as without, on other tensors, and who isn't replayed."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpdiff_kernels import replay
from dpdiff_kernels.replay import ReplayedOperator, forgo, replayed


class Counted:
    """A function, and how often it ran itself."""

    def __init__(self, function):
        self.function, self.runs, self.__name__ = function, 0, function.__name__

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.function(*args, **kwargs)


def mixture(x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Allocations, views, changes in place, operations of several results, and some of them in vain."""
    out = x.new_empty(x.shape)
    torch.empty_like(y)
    out.copy_(x).mul_(factor)
    values, order = (out + y.T).sort(-1)
    total = torch.zeros(x.shape[0])
    for i in range(3):
        total += values[:, i % 2]
    return values, order, total


def operands(seed: int, n: int = 5, m: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator), torch.randn(m, n, generator=generator)


def test_operations_are_replayed_on_other_tensors():
    function = Counted(mixture)
    operator = ReplayedOperator(function)
    for seed in range(3):
        x, y = operands(seed)
        for found, wanted in zip(operator(x, y, 0.5), mixture(x, y, 0.5)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert function.runs == 1


def test_results_of_calls_are_tensors_of_their_own():
    operator = ReplayedOperator(mixture)
    first = operator(*operands(0), 0.5)
    kept = [t.clone() for t in first]
    second = operator(*operands(1), 0.5)
    for before, after, other in zip(kept, first, second):
        assert torch.equal(before, after) and after.data_ptr() != other.data_ptr()


def test_sizes_strides_types_alignment_and_options_have_recordings_of_their_own():
    function = Counted(lambda x, y, factor: x * factor + y.T)
    operator = ReplayedOperator(function)
    x, y = operands(0)
    unaligned = torch.randn(21)[1:].view(5, 4)
    calls = [
        (x, y, 0.5), (*operands(0, 6, 4), 0.5), (y.T.contiguous().T.T, y.clone(), 0.5), (x, y, 2.0), (x, y, 2),
        (y.clone().T, y, 0.5), (x.double(), y.double(), 0.5), (unaligned, y, 0.5),
    ]  # fmt: skip
    for _ in range(2):
        for x_, y_, factor in calls:
            torch.testing.assert_close(operator(x_, y_, factor), x_ * factor + y_.T, rtol=0, atol=0)
    assert function.runs == 7  # the third is as the first


def test_autocast_has_recordings_of_its_own():
    function = Counted(lambda x, y: x @ y)
    operator = ReplayedOperator(function)
    for dtype in (None, torch.bfloat16, None, torch.float16, torch.bfloat16):
        x, y = operands(1)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            assert operator(x, y).dtype == (dtype or torch.float32)
    assert function.runs == 3


def test_operands_at_one_address_are_not_replayed():
    function = Counted(lambda x, y: x - y)
    operator = ReplayedOperator(function)
    x, y = torch.randn(4), torch.randn(4)
    assert torch.equal(operator(x, x), torch.zeros(4))
    assert torch.equal(operator(x, y), x - y)
    assert torch.equal(operator(y, y), torch.zeros(4))
    assert function.runs == 3


def test_views_of_one_tensor_are_operands():
    operator = ReplayedOperator(lambda x, y: x - y)
    for _ in range(2):
        x, y = torch.randn(2, 4).unbind()
        assert torch.equal(operator(x, y), x - y)


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: len(x.nonzero())])
def test_what_looks_into_a_tensor_is_not_kept(look):
    function = Counted(lambda x: x + look(x))
    operator = ReplayedOperator(function)
    for x in (torch.ones(3), torch.arange(3.0)):
        assert torch.equal(operator(x), x + look(x))
    assert function.runs == 2


def test_what_knows_another_tensor_is_not_kept():
    other = torch.ones(3)
    function = Counted(lambda x: x + other)
    operator = ReplayedOperator(function)
    operator(torch.ones(3))
    other += 1
    assert torch.equal(operator(torch.ones(3)), torch.full((3,), 3.0))
    assert function.runs == 2


@pytest.mark.parametrize("function", [lambda x: x, lambda x: x[:1], lambda x: x.add_(1)])
def test_operands_as_results(function):
    operator = ReplayedOperator(function)
    for x in (torch.ones(3), torch.zeros(3)):
        wanted = function(x.clone())
        assert torch.equal(operator(x), wanted)


def test_too_long_calls_are_not_kept(monkeypatch):
    monkeypatch.setattr(replay, "_MOST_STEPS", 3)
    function = Counted(lambda x, n: sum(x * i for i in range(n)))
    operator = ReplayedOperator(function)
    for n in (2, 8):
        for _ in range(2):
            assert torch.equal(operator(torch.ones(3), n), torch.full((3,), n * (n - 1) / 2))
    assert function.runs == 4  # of a product and a sum each, 2 take four steps


def test_calls_are_forgotten(monkeypatch):
    monkeypatch.setattr(replay, "_MOST_CALLS", 2)
    function = Counted(lambda x: x + 1)
    operator = ReplayedOperator(function)
    for size in (1, 2, 3, 3, 1):
        operator(torch.ones(size))
    assert function.runs == 4


def test_all_calls_are_forgotten():
    function = Counted(lambda x: x + 1)
    operator = ReplayedOperator(function)
    for _ in range(2):
        for _ in range(2):
            operator(torch.ones(3))
        replay.forget()
    assert function.runs == 2


def test_an_error_ends_a_recording():
    def function(x):
        if len(x) == 3:
            raise ValueError("three")
        return x + 1

    operator = ReplayedOperator(function)
    for _ in range(2):
        with pytest.raises(ValueError, match="three"):
            operator(torch.ones(3))
        assert replay.recorder() is None and torch.equal(operator(torch.ones(2)), torch.full((2,), 2.0))


def test_results_without_elements_may_be_shared():
    operator = ReplayedOperator(lambda x: (x + 1, x.new_empty(0)))
    operator(torch.ones(3))
    first, second = operator(torch.ones(3)), operator(torch.zeros(3))
    assert first[1] is second[1] and first[0] is not second[0]


# --------------------------------------------------------------------------------------------- functions of users


class Pair(NamedTuple):
    sum: Tensor
    nothing: None
    empty: Tensor


@pytest.fixture
def function(monkeypatch):
    """What would be replayed on a GPU is, here."""
    monkeypatch.setattr(replay, "is_on_gpu", lambda tensor: True)
    counted = Counted(lambda x, y=None, factor=2.0: Pair(factor * x + (0 if y is None else y), None, x.new_empty(0)))
    counted.replayed = replayed(lambda: counted.choice)(counted)
    counted.choice = "auto"
    return counted


def test_functions_are_replayed_with_named_arguments(function):
    for _ in range(3):
        x, y = torch.randn(3), torch.randn(3)
        found = function.replayed(x, factor=3.0, y=y)
        assert isinstance(found, Pair) and torch.equal(found.sum, 3 * x + y) and found.nothing is None
        assert torch.equal(function.replayed(x, y).sum, 2 * x + y)
    assert function.runs == 2


def test_the_choice_of_a_backend_has_recordings_of_its_own(function):
    for choice in ("auto", "triton", "auto"):
        function.choice = choice
        function.replayed(torch.ones(3))
    assert function.runs == 2


def test_gradients_are_not_replayed(function):
    function.replayed(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    function.replayed(x).sum.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    function.replayed(torch.ones(3), y=torch.ones(3, requires_grad=True)).sum.sum().backward()
    with torch.no_grad():
        assert not function.replayed(x).sum.requires_grad
    assert function.runs == 3


def test_transforms_modes_and_subclasses_are_not_replayed(function):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append(operation)
            return operation(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    x, seen = torch.randn(3, 4), []
    function.replayed(x[0])
    assert torch.equal(torch.vmap(lambda row: function.replayed(row).sum)(x), 2 * x)
    with Seen():
        function.replayed(x[0])
    assert seen and isinstance(function.replayed(x[0].as_subclass(Subclass)).sum, Subclass)
    _, tangent = torch.func.jvp(lambda row: function.replayed(row).sum, (x,), (x,))
    assert torch.equal(tangent, 2 * x)
    compiled = torch.compile(lambda row: function.replayed(row).sum, backend="eager")
    assert torch.equal(compiled(x), 2 * x)


def test_functions_complain_themselves(function):
    function.replayed(torch.ones(3))
    with pytest.raises(RuntimeError, match="sparse"):
        function.replayed(torch.ones(3).to_sparse())
    with pytest.raises(TypeError):
        function.replayed(torch.ones(3), factor=[1])
    with pytest.raises(TypeError):
        function.replayed(torch.ones(3), other=1)


def test_forgone_calls_are_not_kept(monkeypatch):
    monkeypatch.setattr(replay, "is_on_gpu", lambda tensor: True)

    @replayed(lambda: "auto")
    def function(x):
        forgo()
        runs.append(x)
        return x + 1

    runs = []
    for _ in range(2):
        assert torch.equal(function(torch.ones(3)), torch.full((3,), 2.0))
    assert len(runs) == 2


# ------------------------------------------------------------------------------------------------------ gradients


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, factor):
        ctx.factor = factor
        return x + y, factor * x

    @staticmethod
    def backward(ctx, _, grad):
        return None if grad is None else ctx.factor * grad, None, None


def scaled(x: Tensor, y: Tensor, factor: float = 2.0, offset: bool = False) -> Tensor:
    outputs = Doubled.apply(x, y + 1 if offset else y, factor)
    replay.saw(Doubled.apply, (x, y + 1 if offset else y, factor), outputs)
    return outputs[1]


@pytest.mark.parametrize("offset", [False, True])
def test_an_operator_is_called_at_once_where_it_is_given_the_operands(monkeypatch, offset):
    monkeypatch.setattr(replay, "is_on_gpu", lambda tensor: True)
    counted = Counted(scaled)
    function = replayed(lambda: "auto")(counted)
    for factor in (2.0, 3.0, 2.0, 3.0):
        x, y = torch.randn(3, requires_grad=True), torch.randn(3)
        out = function(x, y=y, factor=factor, offset=offset)
        assert torch.equal(out, factor * x)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), factor))
        with torch.no_grad():
            assert not function(x, y).requires_grad
    assert counted.runs == (5 if offset else 3)  # of them one without a gradient


def test_two_operators_are_not_called_at_once(monkeypatch):
    monkeypatch.setattr(replay, "is_on_gpu", lambda tensor: True)
    counted = Counted(lambda x, y: scaled(x, y) + scaled(x, y, 3.0))
    function = replayed(lambda: "auto")(counted)
    for _ in range(2):
        x = torch.randn(3, requires_grad=True)
        torch.testing.assert_close(function(x, torch.ones(3)), 5 * x)
    assert counted.runs == 2
